"""Random models for the tests of permute, graft and combine: shapes, slots, tensors, permutations."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from regraft_kernels import Packing

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Model:
    """Slots and their lengths; name -> shape, slots of the axes, dtype, memory order."""

    slots: dict
    shapes: dict
    axes: dict
    dtypes: dict
    reversed_memory: dict

    @property
    def packing(self):
        return Packing.build(self.shapes, self.axes)

    def tensors(self, generator, lead=()):
        return {name: self._tensor(name, generator, lead) for name in self.shapes}

    def _tensor(self, name, generator, lead):
        shape, dtype = (*lead, *self.shapes[name]), self.dtypes[name]
        if dtype.is_floating_point:
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        else:
            tensor = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
        if self.reversed_memory[name]:  # the same values, the last axis first in memory
            tensor = tensor.permute(tuple(reversed(range(tensor.ndim)))).contiguous()
            tensor = tensor.permute(tuple(reversed(range(tensor.ndim))))
        return tensor

    def indices(self, generator, targets=None):
        def draw(n):
            return torch.randperm(n, generator=generator)

        if targets is None:
            return {slot: draw(n) for slot, n in self.slots.items()}
        return {
            slot: torch.stack([draw(n) for _ in range(targets)]) if targets else torch.zeros(0, n).long()
            for slot, n in self.slots.items()
        }


@st.composite
def models(draw, dtypes=(*FLOATING, torch.int64, torch.bool, torch.uint8)):
    """Zero to four tensors of zero to four axes, any of them permuted, sizes 0 and 1 and odd ones among them."""
    slots = {name: draw(st.sampled_from([1, 2, 3, 5, 7, 17, 33])) for name in "ab"}
    shapes, axes, kinds, memory = {}, {}, {}, {}
    for number in range(draw(st.integers(0, 4))):
        name = f"layer{number}"
        pattern = draw(st.lists(st.sampled_from(["a", "b", None, None]), max_size=4))
        sizes = [slots[slot] if slot else draw(st.sampled_from([0, 1, 2, 3, 5])) for slot in pattern]
        if draw(st.integers(0, 7)) == 0 and len(pattern) == 1 and pattern[0]:
            sizes, pattern = [*sizes, 515], [*pattern, None]  # a long contiguous tail
        shapes[name], axes[name] = tuple(sizes), tuple(pattern)
        kinds[name], memory[name] = draw(st.sampled_from(dtypes)), draw(st.booleans())
    return Model(slots, shapes, axes, kinds, memory)


def same_bits(a, b):
    """Equal shapes, dtypes and bits (so that NaN equals NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not a.numel() or torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
