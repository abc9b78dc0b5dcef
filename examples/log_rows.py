"""Send what is measured to a logger, too (here: print); trackio, wandb or MLflow take the same two dictionaries.

wandb.log({f"{row.scenario}/{row.method}/{name}": value for name, value in row.values.items()})
"""

import tempfile
from pathlib import Path

from regraft_bench.run import run
from regraft_bench.studies import study
from regraft_bench.study import RunPaths

transfer = study("transfer")
with tempfile.TemporaryDirectory() as folder:
    rows = run(
        transfer,
        transfer.select(["digits-mlp"]),
        place=RunPaths(cache=Path(folder)),
        rows=Path(folder) / "rows.jsonl",
        seeds=[0],
    )
    for row in rows:
        values = {"accuracy": row.values["accuracy"], "seconds": round(row.seconds, 3)}
        print(f"{row.scenario}/{row.method}", values)
