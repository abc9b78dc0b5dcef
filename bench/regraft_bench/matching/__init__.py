"""Study 4: matching the units of networks that were trained apart, by ours and by published algorithms."""

from regraft_bench.matching.methods import MATCHING_SCENARIOS, QUICK_PAIRS
from regraft_bench.matching.pages import MATCHING_TABLES
from regraft_bench.matching.setting import MatchingSetting
from regraft_bench.study import Study

STUDY = Study(
    name="matching",
    title="Matching of trained networks",
    setting=MatchingSetting,
    scenarios=MATCHING_SCENARIOS,
    quick=(QUICK_PAIRS.name,),
    tables=MATCHING_TABLES,
)
