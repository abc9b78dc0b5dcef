"""Learning transfer beside plain training."""

from regraft.studies.study import Study
from regraft.studies.transfer.pages import TABLES
from regraft.studies.transfer.plots import FIGURES
from regraft.studies.transfer.scenarios import SCENARIOS
from regraft.studies.transfer.setting import TransferSetting

STUDY = Study(
    name="transfer",
    title="Learning transfer",
    setting=TransferSetting,
    scenarios=SCENARIOS,
    quick=("digits-mlp",),
    tables=TABLES,
    figures=FIGURES,
)
