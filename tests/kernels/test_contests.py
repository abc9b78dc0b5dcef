"""What is timed compares like with like: the operation, and what a user writes by hand, give the same."""

from types import SimpleNamespace

import pytest
import torch

from regraft_bench.kernels.networks import NETWORKS
from regraft_bench.kernels.variants import operators
from regraft_bench.timing import BY_HAND, OURS


@pytest.mark.parametrize("kernel", operators())
def test_by_hand_computes_the_same(kernel):
    contest = operators()[kernel].contests[0]
    contenders = contest.make(SimpleNamespace(device="cpu"))
    assert tuple(contenders) == contest.contenders
    ours, by_hand = contenders[OURS].run(), contenders[BY_HAND].run()
    if kernel == "similarity":
        ours, by_hand = {"S": ours}, {"S": by_hand}
    assert ours.keys() == by_hand.keys()
    for name, tensor in ours.items():
        other = by_hand[name] if isinstance(by_hand[name], torch.Tensor) else torch.stack(by_hand[name])
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-3 if kernel == "similarity" else 1e-5)


def test_names_of_contests_differ():
    names = [contest.name for operator in operators().values() for contest in operator.contests]
    assert len(set(names)) == len(names)


def test_the_networks_have_their_published_sizes():
    """Parameters and running statistics; ViT-B/16's twelve blocks alone."""
    counts = {name: sum(s.size for s in make().segments.values()) for name, make in NETWORKS.items()}
    assert counts["ResNet-50"] == 25_557_032 + 53_120 - 1000  # without the head's bias
    assert counts["ResNet-18"] == 11_689_512 + 9_600 - 1000
    assert counts["ViT-B/16"] == 12 * 7_087_872
