"""Microbenches: kernels, assignment, matching, grids, the recorder, compiled code, GPUs, proofs of symmetry.

What is timed is a contest, whose contenders take turns (contests.py, timing.py); each contender is a method.
"""

from regraft_bench.contests import MicroSetting
from regraft_bench.micro.pages import SUMMARY, TABLES
from regraft_bench.micro.scenarios import QUICK, SCENARIOS
from regraft_bench.study import Study

STUDY = Study("micro", "Kernels and parts", MicroSetting, SCENARIOS, QUICK, TABLES, summary=SUMMARY)
