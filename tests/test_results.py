"""Rows: what they hold, that none is lost, and what is computed from them."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest

from regraft import results
from regraft.results import Cost, Environment, Point, Row

HERE = Environment("cpu", "a processor", 2, {"torch": "2.15.0"}, "c0de", "abc123", False, "pytest bench")


def make_row(method="fgmt", seed=0, accuracy=0.9, *, scenario="s", cpu=2.0, curve=(), **others) -> Row:
    defaults = dict(
        phases={
            "gradients": Cost(1.0, cpu - 0.5),
            "assignment": Cost(0.5, 0.5),
            "evaluation": Cost(10.0, 20.0),
        },
        environment=HERE,
        config={"epochs": 3},
        plain=Cost(5.0, 10.0),
        plain_accuracy=0.96,
        curve=curve,
    )
    return Row(method=method, scenario=scenario, seed=seed, accuracy=accuracy, **{**defaults, **others})


def points(*accuracies, cpu=1.0):
    return tuple(Point(i, Cost(i / 2, i * cpu), a) for i, a in enumerate(accuracies))


def test_evaluation_is_not_charged():
    assert make_row().cost == Cost(1.5, 2.0)


def test_the_two_sides_of_a_clock_are_joined_by_phase():
    assert Cost.by_phase({"a": 1.0, "b": 2.0}, {"b": 4.0, "a": 3.0}) == {
        "a": Cost(1.0, 3.0),
        "b": Cost(2.0, 4.0),
    }


def test_a_row_survives_the_file(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    results.append(path, make_row(accuracy=0.75, curve=points(0.8, 0.9)))
    results.append(path, make_row("gmt", seed=3))
    rows = results.read(path)
    assert list(rows["method"]) == ["fgmt", "gmt"]
    assert list(rows["error"]) == pytest.approx([0.25, 0.1])
    assert rows["cost.cpu"][0] == 2.0 and rows["cost.wall"][0] == 1.5
    assert rows["config.epochs"][0] == 3 and rows["phases.assignment.wall"][0] == 0.5
    assert rows["environment.commit"][0] == "abc123" and not rows["environment.dirty"][0]
    assert rows["curve"][0][1]["accuracy"] == 0.9
    assert pd.Timestamp(rows["time"][0]).tzinfo is not None
    assert sorted(p.name for p in path.parent.iterdir()) == ["rows.jsonl"]


def test_what_json_cannot_say_is_refused_and_the_file_is_left_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    results.append(path, make_row())
    before = path.read_bytes()
    with pytest.raises(ValueError):
        results.append(path, make_row(accuracy=math.nan))
    with pytest.raises(TypeError, match="object"):
        results.append(path, make_row(config={"what": object()}))
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{", "3", '{"method": "fgmt"}'])
def test_a_damaged_file_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    results.append(path, make_row())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        results.read(path)


def test_a_cut_off_line_is_not_written_behind(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"method"')
    with pytest.raises(ValueError, match="cut off"):
        results.append(path, make_row())


def test_no_file(tmp_path):
    assert results.records(tmp_path / "none.jsonl") == []
    with pytest.raises(FileNotFoundError, match="none"):
        results.read(tmp_path / "none.jsonl")


def test_a_killed_writer_leaves_whole_rows(tmp_path):
    """A process that appends without end is killed in the middle; every line that is there is a row."""
    path = tmp_path / "rows.jsonl"
    script = (
        "import itertools, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_results import make_row; from regraft import results\n"
        "for i in itertools.count():\n"
        "    results.append(sys.argv[2], make_row(seed=i)); print(i, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        finished = -1
        while finished < 20:
            finished = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        finished = max([finished, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    seeds = [record["seed"] for record in results.records(path)]
    assert seeds in (list(range(finished + 1)), list(range(finished + 2)))


@dataclass(frozen=True)
class Settings:
    factory: object
    sizes: tuple[int, ...]


def test_configurations_become_plain_data():
    data = results.plain_data({"settings": Settings(Path.cwd, (1, 2)), "root": Path("a") / "b"})
    assert data["settings"]["sizes"] == [1, 2] and data["root"] == os.path.join("a", "b")
    assert data["settings"]["factory"].endswith("Path.cwd")
    json.dumps(data)


def test_the_same_run_has_the_same_identity_and_another_has_not():
    row = make_row()
    one = row.record()["identity"]
    assert make_row(accuracy=0.1, time="later").record()["identity"] == one
    others = [
        replace(row, method="gmt"),
        replace(row, seed=1),
        replace(row, scenario="t"),
        replace(row, config={"epochs": 4}),
        replace(row, environment=replace(HERE, commit="def")),
        replace(row, environment=replace(HERE, code="other")),
        replace(row, environment=replace(HERE, device="cuda:0")),
    ]
    assert len({one, *(other.record()["identity"] for other in others)}) == len(others) + 1


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert results.digest({"a": 1, "b": 2}) == results.digest({"b": 2, "a": 1})
    assert results.digest([1, 2]) != results.digest([2, 1])


def git(folder, *arguments):
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments],
        check=True,
        capture_output=True,
    )


def test_commit_and_dirty_of_the_current_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    outside = results.environment()
    assert outside.commit is None and outside.dirty is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    clean = results.environment()
    assert len(clean.commit) == 40 and clean.dirty is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rows.jsonl").write_text("{}")
    assert results.environment().dirty is False, "results being written are no change of the code"
    (tmp_path / "a").write_text("2")
    assert results.environment().dirty is True
    assert clean.device == "cpu" and clean.threads >= 1 and "torch" in clean.versions


def test_peak_memory_is_in_bytes():
    assert 1 << 20 < results.peak_memory() < 1 << 42


def records(*rows):
    return results.frame(row.record() for row in rows)


def test_derived_shares_and_speed_up():
    # plain reaches 0.95 * 0.96 = 0.912 at epoch 3 for 3 CPU seconds; fgmt at epoch 1 for 1.5
    plain = make_row("plain", accuracy=0.96, curve=points(0.1, 0.5, 0.9, 0.92, 0.96))
    fgmt = make_row("fgmt", cpu=2.5, curve=(Point(0, Cost(0, 0.5), 0.9), Point(1, Cost(0, 1.5), 0.93)))
    never = make_row("naive", curve=points(0.1, 0.2))
    rows = results.derived(records(plain, fgmt, never)).set_index("method")
    assert rows["share"]["fgmt"] == pytest.approx(0.25)
    assert rows["final"]["fgmt"] == 0.93
    assert rows["epochs_to_reach"]["plain"] == 3 and rows["epochs_to_reach"]["fgmt"] == 1
    assert rows["speed_up"]["fgmt"] == pytest.approx(2.0) and rows["speed_up"]["plain"] == 1.0
    assert math.isnan(rows["speed_up"]["naive"]) and math.isnan(rows["epochs_to_reach"]["naive"])


def test_on_a_gpu_the_wall_clock_counts():
    gpu = replace(HERE, device="cuda")
    rows = results.derived(records(make_row(environment=gpu, scenario="gpu"), make_row()))
    assert list(rows["share"]) == pytest.approx([1.5 / 5.0, 2.0 / 10.0])


def test_the_newest_row_counts():
    rows = results.newest(records(make_row(accuracy=0.1), make_row("gmt"), make_row(accuracy=0.2)))
    assert sorted(rows["accuracy"]) == [0.2, 0.9]


def test_rows_of_other_settings_or_code_are_not_mixed_in():
    old = replace(HERE, code="old")
    rows = [
        make_row(seed=1, environment=old),
        make_row(seed=2, config={"epochs": 1}),
        make_row(seed=0, environment=old, scenario="only old"),
        make_row(seed=0),
    ]
    kept = results.newest(records(*rows))
    assert list(zip(kept["scenario"], kept["seed"], strict=True)) == [("only old", 0), ("s", 0)]


def test_compare_pairs_by_seed():
    fgmt, naive = [0.9, 0.8, 0.95], [0.5, 0.45, 0.5]
    rows = [make_row("fgmt", seed, a) for seed, a in enumerate(fgmt)]
    rows += [make_row("naive", seed, a) for seed, a in reversed(list(enumerate(naive)))]
    rows += [make_row("fgmt", 9, 0.0)]  # has no partner
    line = results.compare(records(*rows), "fgmt", "naive").iloc[0]
    differences = pd.Series(fgmt) - pd.Series(naive)
    t = differences.mean() / (differences.std() / math.sqrt(3))
    assert line["n"] == 3 and line["difference"] == pytest.approx(differences.mean())
    # Student's t with two degrees of freedom has this closed form
    assert line["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert results.compare(records(*rows), "naive", "fgmt").iloc[0]["difference"] < 0


def test_compare_says_nothing_that_it_cannot():
    assert results.compare(records(make_row("fgmt")), "fgmt", "naive").empty
    one = results.compare(records(make_row("fgmt"), make_row("naive")), "fgmt", "naive").iloc[0]
    assert one["n"] == 1 and math.isnan(one["p"])
    same = records(*(make_row(m, s, 0.5 + 0.1 * (m == "fgmt")) for m in ("fgmt", "naive") for s in range(3)))
    assert math.isnan(results.compare(same, "fgmt", "naive").iloc[0]["p"])
