"""Campaigns in a fresh process: names and settings as JSON in, counts as JSON out."""

import json
import sys

from regraft_bench.micro.reliability import Campaign, campaigns, subjects
from regraft_bench.micro.reliability.attempt import tally

names, settings = json.loads(sys.argv[1])
campaign = Campaign(**settings | {"disks": tuple(settings["disks"])})
subjects.spec()  # takes seconds, and serves every process that is forked from this one
known = campaigns(campaign.assignments)
found = {name: tally(known[name](campaign)) for name in names}
sys.stdout.write("\n" + json.dumps({name: (m.values, m.notes) for name, m in found.items()}))
