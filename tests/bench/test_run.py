from dataclasses import replace

import pytest

from regraft.data import MissingData
from regraft_bench import rows as rows_module
from regraft_bench import run as run_module
from regraft_bench import session
from regraft_bench.rows import read_rows
from regraft_bench.run import is_crash, run
from regraft_bench.studies import STUDIES, study
from regraft_bench.study import TUNING_SEED, Measured, Method, Scenario, Setting, Task

from .conftest import Toy, broken, diverging, ran


def measured(study, place, path, **how):
    return list(run(study, study.scenarios, place=place, rows=path, **how))


def test_every_method_and_seed_is_one_row(toy, place, tmp_path):
    found = measured(toy, place, tmp_path / "rows.jsonl")
    assert [(row.seed, row.method) for row in found] == [(s, m) for s in range(3) for m in ("plain", "cheap")]
    assert read_rows(tmp_path / "rows.jsonl") == found
    assert found[0].config == {"settings": {"difficulty": 0.1}, "method": {}}


def test_the_same_seed_gives_the_same_values(toy, place, tmp_path):
    first, second = (measured(toy, place, tmp_path / name) for name in ("a", "b"))
    assert [row.values for row in first] == [row.values for row in second]
    assert len({row.values["accuracy"] for row in first}) == len(first)


def test_seeds_can_be_chosen(toy, place, tmp_path):
    found = measured(toy, place, tmp_path / "rows.jsonl", seeds=[5])
    assert [(row.seed, row.method) for row in found] == [(5, "plain"), (5, "cheap")]


def test_methods_can_be_chosen_across_scenarios():
    chosen = session.choose(["transfer", "fusion"], methods=["fgmt", "EWC"])
    assert [(s.name, m.name) for _, s in chosen for m in s.methods] == [
        ("digits-mlp", "fgmt"),
        ("digits-batchnorm", "fgmt"),
        ("digits-two-tasks", "EWC"),
    ]
    with pytest.raises(ValueError, match="there is no method 'fgtm' here; did you mean fgmt"):
        session.choose(["transfer"], methods=["fgtm"])


def test_a_scenario_is_chosen_by_its_name_whatever_others_are_called():
    for one in map(study, STUDIES):
        for scenario in one.scenarios:
            assert (one.name, scenario.name) in [(s.name, c.name) for s, c in session.choose(scenarios=[scenario.name])]


def counted(toy, method):
    calls = []

    def work(setting):
        calls.append(setting.seed)
        return ran(setting, 0.5)

    return replace(toy, scenarios=(replace(toy.scenarios[0], methods=(replace(method, run=work),)),)), calls


def test_resume_takes_rows_of_the_same_code_only(toy, place, tmp_path, monkeypatch):
    study, calls = counted(toy, Method("counted", ran))
    path = tmp_path / "rows.jsonl"
    first = measured(study, place, path, seeds=[0, 1])
    assert measured(study, place, path, seeds=[0, 1, 2], resume=True)[:2] == first
    assert calls == [0, 1, 2]
    assert len(read_rows(path)) == 3
    other = replace(rows_module.code(), regraft="other tree")
    monkeypatch.setattr(run_module, "code", lambda: other)
    measured(study, place, path, seeds=[0], keep_older=True)
    assert calls == [0, 1, 2]
    measured(study, place, path, seeds=[0], resume=True)
    assert calls == [0, 1, 2, 0]


def test_without_resume_everything_is_measured_again(toy, place, tmp_path):
    study, calls = counted(toy, Method("counted", ran))
    for _ in range(2):
        measured(study, place, tmp_path / "rows.jsonl", seeds=[0])
    assert calls == [0, 0]


def test_other_settings_are_another_run(toy, place, tmp_path):
    study, calls = counted(toy, Method("counted", ran))
    measured(study, place, tmp_path / "rows.jsonl", seeds=[0], resume=True)
    harder = replace(study, scenarios=(replace(study.scenarios[0], settings=Toy(0.2)),))
    measured(harder, place, tmp_path / "rows.jsonl", seeds=[0], resume=True)
    assert calls == [0, 0]


def test_a_run_that_fails_is_a_row_that_says_how(toy, place, tmp_path):
    methods = (Method("diverging", diverging), Method("broken", broken), toy.scenarios[0].methods[0])
    study = replace(toy, scenarios=(replace(toy.scenarios[0], methods=methods, seeds=1),))
    found = measured(study, place, tmp_path / "rows.jsonl")
    assert [row.failure for row in found] == [
        "diverged: the loss of step 3 is not finite",
        "KeyError: 'no such tensor'",
        None,
    ]
    assert [is_crash(row) for row in found] == [False, True, False]
    again = measured(study, place, tmp_path / "rows.jsonl", resume=True)
    assert again[0] == found[0]
    assert len(read_rows(tmp_path / "rows.jsonl")) == 4, "what crashed is tried again, what diverged is not"


def test_missing_data_stop_a_scenario_before_any_row(place, tmp_path, toy):
    def asks(setting):
        setting.dataset(Task("cars"))
        return Measured({})

    study = replace(toy, scenarios=(Scenario("cars", (Method("asks", asks),), Toy(0.0)),))
    with pytest.raises(MissingData, match="cars is missing"):
        measured(study, replace(place, data=tmp_path), tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def leveled(level):
    return lambda setting: ran(setting, level)


def test_candidates_are_tried_on_a_seed_of_their_own_and_the_best_is_reported(toy, place, tmp_path):
    levels = (0.3, 0.8, 0.5)
    candidates = tuple(Method("", leveled(level), {"level": level}) for level in levels)
    scenario = Scenario("tuned", (Method("tuned", broken, candidates=candidates),), Toy(0.0), seeds=2)
    study = replace(toy, scenarios=(scenario,))
    found = measured(study, place, tmp_path / "rows.jsonl")
    assert [row.seed for row in found] == [TUNING_SEED] * 3 + [0, 1]
    assert [row.config["method"]["level"] for row in found] == [0.3, 0.8, 0.5, 0.8, 0.8]
    again = measured(study, place, tmp_path / "rows.jsonl", resume=True)
    assert again == found


def test_methods_of_one_seed_share_a_setting_and_it_goes_with_the_seed(toy, place, tmp_path):
    seen = []

    def look(setting):
        seen.append(setting)
        return ran(setting, 0.5)

    methods = (Method("one", look), Method("two", look))
    study = replace(toy, scenarios=(Scenario("shared", methods, Toy(0.0), seeds=2),))
    measured(study, place, tmp_path / "rows.jsonl")
    assert seen[0] is seen[1]
    assert seen[0] is not seen[2]


def test_a_setting_draws_per_class_and_smaller_numbers_are_among_larger_ones(place):
    setting = Setting(Scenario("digits", (), None), 0, place)
    few, more = (setting.dataset(Task("digits", per_class=n)).train for n in (4, 10))
    assert len(few) == 40
    assert len(more) == 100
    rows = {tuple(image.flatten().tolist()) for image in more.images}
    assert all(tuple(image.flatten().tolist()) in rows for image in few.images)


@pytest.mark.parametrize("taken", [False, True])
def test_a_workers_row_is_added_once(toy, place, tmp_path, monkeypatch, taken):
    """Whether the runner before was killed after it added the row, or another runner takes the file away."""
    path = tmp_path / "rows.jsonl"
    first = measured(toy, place, path, seeds=[0])
    text, left = path.read_bytes(), tmp_path / "parts" / "toy" / "0.json"
    left.parent.mkdir(parents=True)
    left.write_bytes(text)
    if taken:
        append = run_module.read_rows
        monkeypatch.setattr(run_module, "read_rows", lambda file: (left.unlink(missing_ok=True), append(file))[1])
    assert measured(toy, place, path, seeds=[0], keep_older=True) == first
    assert path.read_bytes() == text and not left.exists()
