"""Study 3: FAST, "Learn Faster and Forget Slower via Fast and Stable Task Adaptation" (Varno et al.)."""

from regraft_bench.fast.pages import FIGURES, SUMMARY, TABLES
from regraft_bench.fast.scenarios import QUICK, SCENARIOS
from regraft_bench.fast.setting import FastSetting
from regraft_bench.study import Study

STUDY = Study(
    name="fast",
    title="FAST: fine-tuning with a zero classifier and two learning rates",
    setting=FastSetting,
    scenarios=SCENARIOS,
    quick=(QUICK.name,),
    tables=TABLES,
    figures=FIGURES,
    summary=SUMMARY,
)
