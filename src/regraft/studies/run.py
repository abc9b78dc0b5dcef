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
    earlier = Earlier.of(rows, resume=resume, keep_older=keep_older)
    for scenario in scenarios:
        chosen: dict[str, Method] = {}
        for method in scenario.methods:
            if method.candidates:
                tried = list(_tune(study, scenario, method, place, rows, earlier))
                yield from (row for _, row in tried)
                chosen[method.name] = best(tried, method.tuned_by)
            else:
                chosen[method.name] = method
        for seed in range(scenario.seeds) if seeds is None else seeds:
            yield from _run_all(study, scenario, seed, list(chosen.values()), place, rows, earlier)


def _tune(
    study: Study, scenario: Scenario, method: Method, place: Place, rows: Path, earlier: Earlier
) -> Iterator[tuple[Method, Row]]:
    """Every candidate on the tuning seed, each under the method's own name."""
    variants = [Method(method.name, variant.run, variant.config) for variant in method.candidates]
    measured = _run_all(study, scenario, TUNING_SEED, variants, place, rows, earlier)
    yield from zip(variants, measured, strict=True)


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


def _run_all(
    study: Study,
    scenario: Scenario,
    seed: int,
    methods: Sequence[Method],
    place: Place,
    path: Path,
    earlier: Earlier,
) -> Iterator[Row]:
    setting = study.setting(scenario, seed, place)
    kind = place.device.partition(":")[0]
    for number, method in enumerate(methods):
        key = identity(study.name, scenario.name, method.name, seed, scenario.config(method), kind)
        row = earlier.rows.get(key)
        if row is None:
            place.tell(f"{scenario.name}, seed {seed}: {method.name}", number, len(methods))
            setting.method = method
            row = execute(study, setting, method)
            append(path, row)
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
