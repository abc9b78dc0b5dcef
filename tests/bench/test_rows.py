import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from regraft.core.clock import Cost
from regraft.core.registry import register
from regraft.networks import papers as networks
from regraft_bench import rows
from regraft_bench.rows import (
    Row,
    Series,
    append,
    code,
    digest,
    encode,
    environment,
    plain_data,
    read_rows,
    row_identity,
    tree_hash,
)


def made(seed: int = 0, **changes) -> Row:
    row = Row(
        study="toys",
        scenario="toy",
        method="plain",
        seed=seed,
        config={"settings": {"width": 1.0}, "method": {}},
        values={"accuracy": 0.5, "lost": None},
        series={"grid": Series(("beta", "alpha"), ((0.1, 1.0), (1.0,)), ([0.5], [None]))},
        cost={"training": Cost(1.0, 2.0), "evaluation": Cost(5.0, 5.0)},
        notes={"of": "a test"},
        failure=None,
        environment=environment(),
        code=code(),
    )
    return replace(row, **changes)


def test_a_row_comes_back_as_it_went(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    append(path, made())
    append(path, made(1))
    assert read_rows(path) == [made(0, time=read_rows(path)[0].time), made(1, time=read_rows(path)[1].time)]


def test_evaluation_is_not_charged():
    assert made().total == Cost(1.0, 2.0)
    assert made().seconds == 2.0
    gpu = replace(environment(), device="cuda:1")
    assert made(environment=gpu).seconds == 1.0


def test_values_that_json_cannot_say_become_none(tmp_path):
    append(tmp_path / "rows.jsonl", made(values={"accuracy": float("nan")}))
    assert read_rows(tmp_path / "rows.jsonl")[0].values == {"accuracy": None}


def test_identity_is_of_what_is_asked_not_of_what_answers():
    row = made()
    assert row.identity == made(values={}, time="later", failure="diverged").identity
    assert row.identity == made(code=replace(code(), commit="another")).identity
    assert row.identity == made(environment=replace(environment(), machine="another", threads=7)).identity
    others = [
        made(1),
        made(method="other"),
        made(scenario="other"),
        made(study="other"),
        made(config={"settings": {"width": 2.0}, "method": {}}),
        made(environment=replace(environment(), device="cuda:0")),
    ]
    assert len({row.identity, *(other.identity for other in others)}) == 1 + len(others)


def test_cards_of_one_kind_are_one_identity():
    first, second = (made(environment=replace(environment(), device=f"cuda:{n}")) for n in (0, 1))
    assert first.identity == second.identity


def test_digest_does_not_see_the_order_of_keys():
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1}) != digest({"a": 1})


def test_plain_data_names_registered_functions_and_refuses_what_has_no_form():
    assert plain_data({"f": networks.mlp, "c": Cost(1, 2)}) == {"f": "mlp", "c": {"wall": 1, "cpu": 2}}
    with pytest.raises(TypeError, match="not registered"):
        plain_data(json.dumps)
    with pytest.raises(TypeError, match="a row cannot hold"):
        plain_data(object())


def test_a_module_that_moves_changes_no_identity(tmp_path, monkeypatch):
    """The same function, imported from two places, has the same name in a row; two of one name are refused."""
    monkeypatch.setattr("regraft.core.registry._REGISTERED", {})
    identities, modules = [], []
    for place in ("here", "there"):
        text = "from regraft.core.registry import register\n@register\ndef network(width): ...\n"
        (tmp_path / f"{place}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(place, tmp_path / f"{place}.py")
        modules.append(importlib.util.module_from_spec(spec))
        monkeypatch.setattr("regraft.core.registry._REGISTERED", {})
        spec.loader.exec_module(modules[-1])
        config = plain_data({"settings": {"model": modules[-1].network}})
        identities.append(row_identity("transfer", "toy", "plain", 0, config, "cpu"))
    assert identities[0] == identities[1]
    with pytest.raises(ValueError, match="two functions are registered as 'network'"):
        register(modules[0].network)


def test_a_series_has_as_many_values_as_positions():
    with pytest.raises(ValueError, match="2 values at 3 positions of 'step'"):
        Series.over("step", (0, 1, 2), (0.1, 0.2))


def add(path: Path, count: int) -> None:
    for seed in range(count):
        append(path, made(seed))


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add, args=(path, 500)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = read_rows(path)
    assert len(found) == 1000
    assert sorted(row.seed for row in found) == sorted([*range(500), *range(500)])


def test_an_unfinished_line_is_named_and_skipped_and_what_follows_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    append(path, made(0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    append(path, made(2))
    with pytest.warns(UserWarning, match=r"rows.jsonl, line 2: an unfinished row"):
        assert [row.seed for row in read_rows(path)] == [0, 2]


@pytest.mark.parametrize("cut", [1, 5, 12, 20, 40, 200])
def test_a_torn_row_that_another_program_added_to_costs_these_two_alone(cut, tmp_path):
    """`cat` ends no line first, as `append` does."""
    first, torn, joined, last = (encode(made(seed)) for seed in range(4))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(first + b"\n" + torn[:cut] + joined + b"\n" + last + b"\n")
    with pytest.warns(UserWarning, match="line 2: a damaged row is skipped"):
        assert [row.seed for row in read_rows(path)] == [0, 3]


def test_equal_rows_are_one(tmp_path):
    """A runner that was killed between two steps, or a second runner, may add a row again; another run differs."""
    path = tmp_path / "rows.jsonl"
    rows = [made(0), made(0), made(1)]
    for row in [*rows, *rows[:2], rows[0]]:
        append(path, row)
    assert read_rows(path) == rows


WHOLE = encode(made(0))
DAMAGED = {
    "torn after one byte": WHOLE[:1],
    "torn within 20 bytes": WHOLE[:17],
    "torn after 20 bytes": WHOLE[:300],
    "torn in a letter": WHOLE[:100] + b"\xc3",
    "zeros": b"\0" * 4096,
    "a row and zeros": WHOLE[:200] + b"\0" * 300,
    "complete, a wrong byte": WHOLE.replace(b'"seed":0', b'"seed":?'),
    "complete, no UTF-8": WHOLE.replace(b"plain", b"pl\xffin"),
}


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_named_and_skipped_wherever_it_is(tmp_path, kind, at):
    path = tmp_path / "rows.jsonl"
    lines = [encode(made(1)), encode(made(2))]
    lines.insert(at, DAMAGED[kind])
    path.write_bytes(b"\n".join(lines) + b"\n" * (at < 2))
    word = "damaged" if "complete" in kind else "unfinished"
    with pytest.warns(UserWarning, match=rf"rows.jsonl, line {at + 1}: an? {word} row"):
        assert [row.seed for row in read_rows(path)] == [1, 2]
    append(path, made(3))
    with pytest.warns(UserWarning, match=f"line {at + 1}"):
        assert [row.seed for row in read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("<html>", "not a row"),
        ("[1, 2]", "of schema 1 but of None"),
        ('{"schema": 2, "study": "x"}', "of schema 1 but of 2; a newer regraft"),
        ('{"schema": 1, "study": "x"}', "missing required field"),
        ('{"schema": 1, "study": 3}', "Expected `str`"),
    ],
)
def test_a_foreign_or_newer_line_is_refused_with_its_number(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    append(path, made())
    with path.open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        read_rows(path)
    assert said in str(caught.value)


def test_no_file_is_said_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append(path, made())
    before, write = path.read_bytes(), os.write

    calls = iter((True, False))

    def once(handle, data):
        if next(calls):
            return write(handle, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "write", once)
    with pytest.raises(OSError, match=r"rows\.jsonl: a row of \d+ bytes could not be added"):
        append(path, made(1))
    assert path.read_bytes() == before


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_tree_hash_is_gits(tmp_path):
    package = tmp_path / "package"
    (package / "part").mkdir(parents=True)
    (package / "part.py").write_text("x = 1\n")
    (package / "part" / "a.py").write_text("")
    (package / "run.sh").write_text("#!/bin/sh\n")
    (package / "run.sh").chmod(0o755)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_text("compiled")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package/part.py", "package/part", "package/run.sh")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert tree_hash(package) == git(tmp_path, "rev-parse", "HEAD:package")
    (package / "part.py").write_text("x = 2\n")
    assert tree_hash(package) != git(tmp_path, "rev-parse", "HEAD:package")


def test_the_code_is_that_of_the_package_not_of_the_working_directory(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "x").write_text("x")
    git(tmp_path, "add", "x")
    git(tmp_path, "commit", "-q", "-m", "elsewhere")
    words = "from regraft_bench.rows import code; print(code().commit)"
    done = subprocess.run([sys.executable, "-c", words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(code().commit) != git(tmp_path, "rev-parse", "HEAD")


def test_a_commit_that_only_adds_results_is_the_same_code():
    here = code()
    assert here.same(replace(here, commit="another", changed=None))
    assert not here.same(replace(here, regraft="another tree"))
    assert not here.same(replace(here, kernels="another tree"))
