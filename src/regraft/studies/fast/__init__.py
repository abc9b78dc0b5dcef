"""Study 3: FAST, "Learn Faster and Forget Slower via Fast and Stable Task Adaptation" (Varno et al.)."""

from regraft.studies.fast.pages import FIGURES, SUMMARY, TABLES
from regraft.studies.fast.scenarios import QUICK, SCENARIOS
from regraft.studies.fast.setting import FastSetting
from regraft.studies.study import Study

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
