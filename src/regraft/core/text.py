"""Text from outside (names of tensors, files, methods, failures) as plain text of the medium where it is shown."""

from __future__ import annotations

import html
import re


def clean_text(text: str) -> str:
    """In one line, for a terminal: whatever does more than stand there (control codes, line breaks, changes of
    direction, halves of a character) as Python escapes it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def describe_error(problem: Exception) -> str:
    """Its message in one line for a terminal: of an error of the system the path and the reason, without its number."""
    said = re.sub(r"^\[Errno \d+\] ", "", str(problem))
    if isinstance(problem, OSError) and problem.filename is not None and problem.strerror:
        said = f"{problem.filename}: {problem.strerror}"
    return clean_text(said)


def clean_markdown(text: str) -> str:
    """The same for a cell, an item or a heading: no cell, link or HTML of its own."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", clean_text(text))
    return re.sub(r"\||\](?=\()", r"\\\g<0>", text)


def clean_html(text: str) -> str:
    """The same for an HTML page."""
    return html.escape(clean_text(text))
