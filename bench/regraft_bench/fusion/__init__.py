"""Gradient assignment and fusion: "Rethinking the Dependence Between Gradients and the Initial Point" and controls."""

from __future__ import annotations

from regraft_bench.fusion.pages import FUSION_FIGURES, FUSION_TABLES
from regraft_bench.fusion.scenarios import DIGITS, FUSION_SCENARIOS
from regraft_bench.fusion.setting import FusionSetting
from regraft_bench.study import Study

STUDY = Study(
    name="fusion",
    title="Gradient assignment and fusion",
    setting=FusionSetting,
    scenarios=FUSION_SCENARIOS,
    quick=(DIGITS.name,),
    tables=FUSION_TABLES,
    figures=FUSION_FIGURES,
)
