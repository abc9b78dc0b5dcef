"""The only runner: pytest, the command and an engine call it.

    for row in run(study, scenarios, place=place, rows=path, resume=True):
        ...

Rows are independent of one another and the same whoever runs them. Methods of one scenario and seed share a setting, so
that what they all need (data, a trained source, a traced specification) is made once; it goes when they are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.data import MissingData
from regraft.studies.rows import Row, append, code, identity, latest, read
from regraft.studies.study import TUNING_SEED, Measured, Method, Place, Scenario, Setting, Study


@dataclass(frozen=True)
class Earlier:
    """Rows that need not be measured again, by identity."""

    rows: dict[str, Row]

    @classmethod
    def of(cls, path: Path, *, resume: bool, keep_older: bool) -> Earlier:
        """From a file: rows of this code (``resume``), of any code (``keep_older``), or none.

        A run that crashed is not kept; one that diverged is, as it would diverge again.
        """
        if not (resume or keep_older) or not path.is_file():
            return cls({})
        kept = [row for row in read(path) if keep_older or row.code.same(code())]
        return cls({row.identity: row for row in latest(kept) if not crashed(row)})


def run(
    study: Study,
    scenarios: Sequence[Scenario],
    *,
    place: Place,
    rows: Path,
    seeds: Sequence[int] | None = None,
    resume: bool = False,
    keep_older: bool = False,
) -> Iterator[Row]:
    """Measure what is asked for, append each row to the file, and yield it; rows that are kept are yielded, too.

    Args:
        seeds: instead of each scenario's own.
        resume: rows of the same identity and the same code are taken as they are; keep_older: of any code.

    Raises MissingData before any work of a scenario whose data are not there. A run that fails or diverges is a
    row that says how.
    """
    code()  # read before anything that runs could change the files
    how = _How(study, place, rows, Earlier.of(rows, resume=resume, keep_older=keep_older))
    for scenario in scenarios:
        chosen: dict[str, Method] = {}
        for method in scenario.methods:
            if method.candidates:
                tried = list(_tune(how, scenario, method))
                yield from (row for _, row in tried)
                chosen[method.name] = best(tried, method.tuned_by)
            else:
                chosen[method.name] = method
        for seed in range(scenario.seeds) if seeds is None else seeds:
            yield from _run_all(how, scenario, seed, list(chosen.values()))


@dataclass(frozen=True)
class _How:
    """What all runs of one call share."""

    study: Study
    place: Place
    path: Path
    earlier: Earlier


def _tune(how: _How, scenario: Scenario, method: Method) -> Iterator[tuple[Method, Row]]:
    """Every candidate on the tuning seed, each under the method's own name."""
    variants = [Method(method.name, variant.run, variant.config) for variant in method.candidates]
    yield from zip(variants, _run_all(how, scenario, TUNING_SEED, variants), strict=True)


def best(tried: Sequence[tuple[Method, Row]], value: str) -> Method:
    """The candidate whose tuning row has the largest value; the first of several.

    Raises ValueError where no candidate has one.
    """
    scored = [(row.values.get(value), method) for method, row in tried]
    known = [(score, method) for score, method in scored if score is not None]
    if not known:
        raise ValueError(
            f"no candidate of {tried[0][0].name!r} came to a value of {value!r}: {tried[0][1].failure}"
        )
    return max(known, key=lambda pair: pair[0])[1]


def _run_all(how: _How, scenario: Scenario, seed: int, methods: Sequence[Method]) -> Iterator[Row]:
    setting = how.study.setting(scenario, seed, how.place)
    kind = how.place.device.partition(":")[0]
    for number, method in enumerate(methods):
        key = identity(how.study.name, scenario.name, method.name, seed, scenario.config(method), kind)
        row = how.earlier.rows.get(key)
        if row is None:
            how.place.tell(f"{scenario.name}, seed {seed}: {method.name}", number, len(methods))
            setting.method = method
            row = execute(how.study, setting, method)
            append(how.path, row)
        yield row


def execute(study: Study, setting: Setting, method: Method) -> Row:
    """Run one method and make its row. MissingData and interruptions are raised; other failures are in the row."""
    failure = None
    try:
        measured = method.run(setting)
    except MissingData:
        raise
    except FloatingPointError as problem:
        measured, failure = Measured({}), f"diverged: {problem}"
    except Exception as problem:  # whatever it is, it is what the run came to, and is told with its row
        measured, failure = Measured({}), f"{type(problem).__name__}: {problem}"
    scenario = setting.scenario
    return Row(
        study=study.name,
        scenario=scenario.name,
        method=method.name,
        seed=setting.seed,
        config=scenario.config(method),
        values=dict(measured.values),
        series=dict(measured.series),
        cost=dict(measured.cost),
        notes=dict(measured.notes),
        failure=failure,
        environment=setting.environment(),
        code=code(),
    )


def crashed(row: Row) -> bool:
    """Whether the run ended by an error of code or input, not by diverging."""
    return row.failure is not None and not row.failure.startswith("diverged")
