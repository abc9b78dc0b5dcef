"""What a call asks of the device: counted with the launches replaced by notes of them."""

import sys
from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import regraft_kernels as rk
from regraft_bench.kernels.networks import Network, resnet50
from regraft_kernels import backend, memory
from regraft_kernels.launch import FAMILIES, INTERPRETER

NO_WORK = {
    "empty",
    "empty_like",
    "new_empty",
    "view",
    "slice",
    "select",
    "lift_fresh",
    "detach",
    "alias",
    "split_with_sizes",
}
"""Operators that ask nothing of a device: memory from the allocator's pool, and views."""


class Note:
    """In a kernel's place: notes each launch."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def __getitem__(self, grid):
        assert grid[0] > 0
        return lambda *args, **kwargs: self.notes.append(self.name)


class Operators(TorchDispatchMode):
    """Notes every operator that would work on a device."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_WORK:
            self.notes.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def notes(monkeypatch):
    found = []
    monkeypatch.setattr(backend, "INTERPRETING", True)
    for module, kernel in (
        ("permute", "_permute_kernel"),
        ("graft", "_graft_kernel"),
        ("combine", "_combine_kernel"),
        ("similarity", "_similarity_kernel"),
        ("copies", "_collect_kernel"),
        ("indices", "_check_kernel"),
        ("indices", "_compose_kernel"),
    ):
        monkeypatch.setattr(sys.modules[f"regraft_kernels.{module}"], kernel, Note(kernel, found))
    return found


def test_fewer_than_ten_device_operations_for_a_whole_network(notes):
    net = Network.of(resnet50(), torch.device("cpu"))
    a = {name: torch.empty(shape) for name, shape in net.packing.shapes.items()}
    prepared = net.packing.prepare(net.indices)
    calls = {
        "permute": lambda indices: rk.permute(a, indices, net.packing, backend="triton"),
        "graft": lambda indices: rk.graft(a, a, a, [0.5, 1.0], indices, net.packing, backend="triton"),
        "combine": lambda indices: rk.combine([a, a], [[0.5, 0.5]], backend="triton"),
    }
    for name, call in calls.items():
        for indices in (net.indices, prepared):
            call(indices)  # makes the tables that later calls find
            notes.clear()
            with Operators(notes):
                call(indices)
            # The copies of addresses and of numbers are not seen on a CPU.
            assert 1 <= len(notes) + 2 < 10, (name, notes)
            assert f"_{name}_kernel" in notes


def test_fewer_than_ten_device_operations_for_the_largest_group(notes, monkeypatch):
    """All terms of ResNet-50's group with the most tensors, the other axes gathered; nothing waits for the device."""
    monkeypatch.setattr(sys.modules["regraft_kernels.indices"], "reports_assertions", lambda device: True)
    net = Network.of(resnet50(), torch.device("cpu"))
    terms = {}
    for name, axes in net.packing.axes.items():
        stack = torch.empty(1, *net.packing.shapes[name])
        for axis, slot in enumerate(axes):
            gathers = tuple(None if n == axis or s is None else net.indices[s] for n, s in enumerate(axes))
            if slot is not None:
                terms.setdefault(slot, []).append(rk.Term(stack, stack, axis, None, gathers))
    largest = max(terms.values(), key=len)
    assert len(largest) > 30
    rk.similarity(largest, backend="triton")
    notes.clear()
    with Operators(notes):
        rk.similarity(largest, backend="triton")
    assert len(notes) + 1 < 10, notes  # the copy of the tables is not seen on a CPU
    assert notes.count("_similarity_kernel") == notes.count("_collect_kernel") == 1
    assert not {"item", "_local_scalar_dense", "nonzero"} & set(notes)


def test_caches_stay_within_their_bounds(notes):
    packing = rk.Packing.build({"w": (4, 4)}, {"w": ("a", "a")})
    numbers, index = torch.zeros(400), {"a": torch.arange(4)}
    for start in range(100):
        rk.permute({"w": numbers[start : start + 16].view(4, 4)}, index, packing, backend="triton")
        rk.permute({"w": torch.zeros(start % 50, 4, 4)}, index, packing, backend="triton")
    assert len(packing.layouts) <= packing.layouts.limit
    assert memory._UPLOADS.limit == 64


@pytest.mark.parametrize("family", [*FAMILIES.values(), INTERPRETER], ids=lambda family: family.name)
def test_the_sides_of_every_tile_are_powers_of_two(family):
    """Triton's ranges have no other lengths; on a GPU a kernel would not compile."""
    tiles = [
        family.move,
        *family.gather,
        family.flat,
        *(tile for kind in family.dot.values() for tile in kind),
    ]
    numbers = [(tile, name, n) for tile in tiles for name, n in asdict(tile).items() if name != "stages"]
    assert numbers and all(n > 0 and n & (n - 1) == 0 for _, _, n in numbers), numbers
