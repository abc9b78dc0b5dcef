"""Text from outside (names of tensors, files, methods, failures) as plain text of the medium where it is shown."""

from __future__ import annotations

import html
import re


def clean_text(text: str) -> str:
    """In one line, for a terminal: whatever does more than stand there (control codes, line breaks, changes of
    direction, halves of a character) as Python escapes it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def clean_markdown(text: str) -> str:
    """The same for a cell, an item or a heading: no cell, link or HTML of its own."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", clean_text(text))
    return re.sub(r"\||\](?=\()", r"\\\g<0>", text)


def clean_html(text: str) -> str:
    """The same for an HTML page."""
    return html.escape(clean_text(text))
