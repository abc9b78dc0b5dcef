"""Study 1: learning transfer against plain training (Chijiwa, Transferring Learning Trajectories of Neural Networks).

Read it in this order: `setting` (what methods are given), `methods` (each returns what it measured), `bases` (data,
networks and recipes by name), `scenarios` (what is asked of them), `pages`, `plots` and `related_pages` (tables and
figures of rows).
"""

from regraft_bench.study import Study
from regraft_bench.transfer.pages import TRANSFER_TABLES
from regraft_bench.transfer.plots import TRANSFER_FIGURES
from regraft_bench.transfer.related_pages import RELATED_FIGURES, RELATED_TABLES
from regraft_bench.transfer.scenarios import DIGITS_BATCHNORM, TRANSFER_SCENARIOS
from regraft_bench.transfer.setting import TransferSetting

STUDY = Study(
    name="transfer",
    title="Learning transfer",
    setting=TransferSetting,
    scenarios=TRANSFER_SCENARIOS,
    quick=("digits-mlp", DIGITS_BATCHNORM.name),
    tables=(*TRANSFER_TABLES, *RELATED_TABLES),
    figures=(*TRANSFER_FIGURES, *RELATED_FIGURES),
    headlines=("related", "leaderboard"),
)
