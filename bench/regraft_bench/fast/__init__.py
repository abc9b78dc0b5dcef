"""Study 3: FAST, "Learn Faster and Forget Slower via Fast and Stable Task Adaptation" (Varno et al.)."""

from regraft_bench.fast.pages import FAST_FIGURES, FAST_SUMMARY, FAST_TABLES
from regraft_bench.fast.scenarios import FAST_SCENARIOS, QUICK_BATCHNORM, QUICK_DIGITS
from regraft_bench.fast.setting import FastSetting
from regraft_bench.study import Study

STUDY = Study(
    name="fast",
    title="FAST: fine-tuning with a zero classifier and two learning rates",
    setting=FastSetting,
    scenarios=FAST_SCENARIOS,
    quick=(QUICK_DIGITS.name, QUICK_BATCHNORM.name),
    tables=FAST_TABLES,
    figures=FAST_FIGURES,
    headlines=("figure_10",),
    summary=FAST_SUMMARY,
)
