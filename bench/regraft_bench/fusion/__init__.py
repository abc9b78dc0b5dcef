"""Gradient assignment and fusion: "Rethinking the Dependence Between Gradients and the Initial Point" and controls."""

from __future__ import annotations

from regraft_bench.fusion.pages import FUSION_FIGURES, FUSION_TABLES
from regraft_bench.fusion.scenarios import FUSION_SCENARIOS, QUICK_DROPOUT, TWO_DIGIT_TASKS
from regraft_bench.fusion.setting import FusionSetting
from regraft_bench.study import Study

STUDY = Study(
    name="fusion",
    title="Gradient assignment and fusion",
    setting=FusionSetting,
    scenarios=FUSION_SCENARIOS,
    quick=(TWO_DIGIT_TASKS.name, QUICK_DROPOUT.name),
    tables=FUSION_TABLES,
    figures=FUSION_FIGURES,
    headlines=("recipes",),
)
