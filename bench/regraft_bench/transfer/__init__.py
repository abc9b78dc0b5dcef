"""Learning transfer beside plain training."""

from regraft_bench.study import Study
from regraft_bench.transfer.pages import TABLES
from regraft_bench.transfer.plots import FIGURES
from regraft_bench.transfer.scenarios import SCENARIOS
from regraft_bench.transfer.setting import TransferSetting

STUDY = Study(
    name="transfer",
    title="Learning transfer",
    setting=TransferSetting,
    scenarios=SCENARIOS,
    quick=("digits-mlp",),
    tables=TABLES,
    figures=FIGURES,
)
