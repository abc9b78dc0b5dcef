"""similarity and its update against float64, for every layout and both implementations."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from regraft_kernels import Term, launch, similarity, similarity_many, similarity_update_
from regraft_kernels.copies import Copies
from regraft_kernels.similarity import similarity_reference
from regraft_kernels.terms import Runs, flatten_terms, operands_of

module = sys.modules["regraft_kernels.similarity"]
terms_module = sys.modules["regraft_kernels.terms"]


@pytest.fixture(autouse=True)
def _in_parts(monkeypatch):
    """These small terms are multiplied as large ones are."""
    monkeypatch.setattr(module, "SMALL_TERM", 0)


def widen(term):
    return replace(term, target=term.target.double(), source=term.source.double())


def check(found, terms, dtype):
    """At most twice the error of torch at the same dtype, measured against float64 (plus one rounding)."""
    exact = similarity_reference([widen(term) for term in terms])
    torchs = similarity_reference(terms)
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    rounding = torch.finfo(torchs.dtype).eps * max(scale, 1.0)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == exact.shape
    error = (found.double() - exact).abs()
    allowed = 2 * (torchs.double() - exact).abs().max() + 8 * rounding if exact.numel() else 0.0
    assert bool((error <= allowed).all()), float(error.max())


def layout(tensor, order):
    """The same values with the dimensions in another order in memory."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


@st.composite
def groups(draw, dtype):
    """One to three terms of one group: any axis, layout, positions and gathers; 0 to 2 steps."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    n = draw(st.sampled_from([0, 1, 2, 5, 16, 19]))
    terms = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["none", "flatten", "concatenated", "scattered"]))
        repeats = 1 if kind == "none" else draw(st.sampled_from([1, 2, 3]))
        spare = 0 if kind == "none" else draw(st.sampled_from([0, 2]))
        length = n * repeats + spare
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 7]), max_size=3))
        axis = draw(st.integers(0, len(shape)))
        shape.insert(axis, length)
        positions = {
            "none": None,
            "flatten": spare + torch.arange(n * repeats).view(n, repeats),
            "concatenated": spare + torch.arange(n * repeats).view(repeats, n).T,
            "scattered": torch.randperm(length, generator=generator)[: n * repeats].view(n, repeats),
        }[kind]
        gathers = tuple(torch.randperm(size, generator=generator) if draw(st.booleans()) else None for size in shape)
        stacks = []
        for _ in range(2):
            order = draw(st.permutations(range(len(shape) + 1))) if draw(st.booleans()) else range(len(shape) + 1)
            stack = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
            stacks.append(layout(stack, list(order)).to(dtype))
        steps = draw(st.sampled_from([0, 1, 2, 2]))
        target, source = (stack[:steps] for stack in stacks)
        terms.append(Term(target, source, axis, positions, draw(st.sampled_from([gathers, ()]))))
    return terms


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(data=st.data(), block=st.sampled_from([1, 300, 1 << 20]))
def test_torch_is_as_exact_as_the_formula(dtype, data, block):
    terms = data.draw(groups(dtype))
    before, terms_module.PART_BYTES = terms_module.PART_BYTES, block
    try:
        check(similarity(terms, backend="torch"), terms, dtype)
    finally:
        terms_module.PART_BYTES = before


@pytest.mark.parametrize("dtype", DTYPES[:3])
@settings(max_examples=12)
@given(data=st.data(), split=st.sampled_from([4, 512]))
def test_triton_is_as_exact_as_torch(dtype, data, split):
    pytest.importorskip("triton")
    terms = data.draw(groups(dtype))
    before, module.SPLIT = module.SPLIT, split
    try:
        check(similarity(terms, precision="ieee", backend="triton"), terms, dtype)
    finally:
        module.SPLIT = before


@settings(max_examples=30)
@given(data=st.data())
def test_update_equals_a_new_similarity(backend, data):
    dtype = torch.float32
    terms = data.draw(groups(dtype).filter(lambda terms: terms[0].target.ndim > 2))
    term = terms[0]
    axis = data.draw(st.sampled_from([a for a in range(term.target.ndim - 1) if a != term.axis]))
    length = term.source.shape[axis + 1]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    gathers = term.gathers or (None,) * (term.target.ndim - 1)
    old = torch.arange(length) if gathers[axis] is None else gathers[axis]
    new = old.clone()
    few = torch.randperm(length, generator=generator)[: data.draw(st.integers(0, length))]
    new[few] = old[few.roll(1)]
    after = replace(term, gathers=(*gathers[:axis], new, *gathers[axis + 1 :]))
    total = similarity(terms, backend="torch")
    kept = total.clone()
    found = similarity_update_(total, term, axis, old, new, precision="ieee", backend=backend)
    assert found is total
    expected = similarity_reference([widen(t) for t in [after, *terms[1:]]])
    size = 1 + max(float(expected.abs().max()), float(kept.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-5 * size)


def test_small_terms_are_unfolded_and_the_sum_is_the_same(monkeypatch, generator):
    positions = torch.randperm(6, generator=generator).view(3, 2)
    gathers = (torch.randperm(4, generator=generator), None)
    target, source = (torch.randn(2, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    terms = [Term(target, source, 1, positions, gathers), Term(target[:, :3], source[:, :3], 0)]
    in_parts = similarity(terms)
    monkeypatch.setattr(module, "SMALL_TERM", 1 << 16)
    torch.testing.assert_close(similarity(terms), in_parts, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precisions_and_many_groups_at_once(backend, precision, generator):
    groups = [
        [
            Term(*torch.randn(2, 3, n, k, generator=generator), 0),
            Term(*torch.randn(2, 3, n, generator=generator), 0),
        ]
        for n, k in ((33, 20), (7, 70))
    ]
    found = similarity_many(groups, precision=precision, backend=backend)
    again = similarity_many(groups, precision=precision, backend=backend)
    for terms, one, two in zip(groups, found, again, strict=True):
        assert torch.equal(one, two)
        exact = similarity_reference([widen(term) for term in terms])
        error = float((one.double() - exact).abs().max() / exact.abs().max())
        assert error < (2e-3 if precision == "tf32" else 2e-6), error
    assert similarity_many([], backend=backend) == []


@pytest.mark.parametrize("n", [16, 18])
def test_no_two_results_share_memory(backend, n, generator):
    """PyTorch refuses an operator whose results do: one that is differentiated, here."""
    pairs = torch.randn(2, 2, 1, n, n, generator=generator).requires_grad_()
    found = similarity_many([[Term(*pair, 0)] for pair in pairs], backend=backend)
    assert len({S.untyped_storage().data_ptr() for S in found}) == 2
    for S, (target, source) in zip(found, pairs.detach(), strict=True):
        assert S.is_contiguous()
        torch.testing.assert_close(S.detach(), target[0] @ source[0].T)


def test_terms_are_compared_by_identity(generator):
    term = Term(*torch.randn(2, 1, 3, 3, generator=generator), 0)
    assert term == term and term != replace(term) and len({term, replace(term)}) == 2


@pytest.mark.parametrize(("tiles", "count"), [(16, 16), (36, 7), (64, 4), (256, 1), (300, 1), (1, 264), (0, 1)])
def test_the_splits_of_a_sum_fill_their_rounds(tiles, count):
    """n = 512, 768 and 1024 with tiles of 128: one more split would begin a second round for all."""
    assert module._count_splits(tiles) == count


def test_gpus_without_matrix_units_multiply_by_torch(monkeypatch, generator):
    terms = [Term(*torch.randn(2, 1, 3, 3, generator=generator), 0)]
    monkeypatch.setattr(launch, "has_matrix_units", lambda device: False)
    monkeypatch.setattr(launch, "resolve", lambda backend, device: "triton")
    monkeypatch.setattr(module, "_similarity_triton", None)
    torch.testing.assert_close(similarity(terms), similarity_reference(terms))
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        similarity(terms, backend="triton")


def test_families_follow_the_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for number, (major, family) in enumerate(
        ((7, "sm_80"), (8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (12, "sm_120"))
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        device = torch.device("cuda", 90 + number)
        assert launch.device_family(device).name == family
        assert launch.has_matrix_units(device) == (major >= 8)


def test_nan_spoils_only_its_unit(backend, generator):
    target, source = torch.randn(2, 3, 20, 5, generator=generator)
    target[1, 4, 2] = torch.nan
    found = similarity([Term(target, source, 0)], backend=backend)
    assert found[4].isnan().all()
    assert not found[[i for i in range(20) if i != 4]].isnan().any()


def test_stacks_are_left_alone_and_need_not_be_contiguous(backend, generator):
    big = torch.randn(5, 9, 8, 6, generator=generator)
    target, source = big[::2, 1:8, :, ::2], big[:3, 2:, :, 3:]
    before = big.clone()
    gathers = (torch.randperm(7, generator=generator), None, torch.randperm(3, generator=generator))
    terms = [Term(target, source, 1, None, gathers)]
    check(similarity(terms, precision="ieee", backend=backend), terms, torch.float32)
    assert torch.equal(big, before)


def test_nothing_large_is_copied_where_the_layout_allows_it(monkeypatch, generator):
    """Axis first or last in memory, no gather: the operands of the products are views of the stacks."""
    seen = []
    plain = module._multiply_add_
    monkeypatch.setattr(module, "_multiply_add_", lambda s, a, b, p: (seen.append((a, b)), plain(s, a, b, p)))
    stack = torch.randn(3, 6, 2, 2, 5, generator=generator).permute(0, 1, 4, 2, 3)  # T, r, c, kh, kw
    for axis in (0, 1):
        similarity([Term(stack, stack, axis)], backend="torch")
    storage = stack.untyped_storage().data_ptr()
    assert len(seen) == 2
    assert all(x.untyped_storage().data_ptr() == storage for pair in seen for x in pair)


def test_refuses_what_does_not_fit():
    t = torch.zeros(2, 4, 3)
    index = torch.arange(4)
    for terms, text in (
        ([], "at least one term"),
        ([Term(t, torch.zeros(2, 3, 4), 0)], "shape is"),
        ([Term(t, t.double(), 0)], "dtype is"),
        ([Term(t, t.to("meta"), 0)], "device is"),
        ([Term(t.long(), t.long(), 0)], "real and floating"),
        ([Term(t, t, 2)], "axis 2 of tensors with 2 axes"),
        ([Term(t, t, -1)], "axis -1"),
        ([Term(t, t, 0), Term(t, t, 1)], "term 1 has 3 units, but term 0 4"),
        ([Term(t, t, 0), Term(t.double(), t.double(), 0)], "term 1 is torch.float64"),
        ([Term(t, t, 0, index)], "positions must be"),
        ([Term(t, t, 0, index[:, None] + 1)], "positions has entries outside 0..3"),
        ([Term(t, t, 0, index[:, None].int())], "positions must be an int64"),
        ([Term(t, t, 0, None, (index,))], "1 gathers for 2 axes"),
        ([Term(t, t, 0, None, (None, index))], r"gather of axis 1 has shape \(4,\), expected \(3,\)"),
        ([Term(t, t, 0, None, (index - 1, None))], "gather of axis 0 has entries outside 0..3"),
        ([Term(t, t, 0, None, (index.float(), None))], "gather of axis 0 must be an int64"),
        ([Term(t, t, 0, None, (index.to("meta"), None))], "gather of axis 0 is on meta"),
    ):
        with pytest.raises(ValueError, match=text):
            similarity(terms)
    fine = Term(t, t, 0)
    with pytest.raises(ValueError, match="precision must be one of"):
        similarity([fine], precision="fp8")
    three = torch.arange(3)
    for S, axis, old, new, text in (
        (torch.zeros(3, 3), 1, three, three, "does not fit"),
        (torch.zeros(4, 4).double(), 1, three, three, "does not fit"),
        (torch.zeros(4, 4), 0, three, three, "axis_changed"),
        (torch.zeros(4, 4), 2, three, three, "axis_changed"),
        (torch.zeros(4, 4), 1, index, three, r"old has shape \(4,\), expected \(3,\)"),
        (torch.zeros(4, 4), 1, three, three + 1, "new has entries outside"),
    ):
        with pytest.raises(ValueError, match=text):
            similarity_update_(S, fine, axis, old, new)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="not float64"):
        similarity([Term(t.double(), t.double(), 0)], backend="triton")


# ---------------------------------------------------------------- as an operator of PyTorch


def two_groups(g, dtype=torch.float64):
    """Two terms and one: a block of positions, gathers on the other axis and on the units' own."""
    first = torch.randn(2, 2, 6, 4, generator=g, dtype=dtype)
    second = torch.randn(2, 2, 3, generator=g, dtype=dtype)
    third = torch.randn(2, 1, 2, 5, generator=g, dtype=dtype)
    positions = torch.randperm(6, generator=g).view(3, 2)
    gathers = (torch.randperm(6, generator=g), torch.randperm(4, generator=g))
    return [[Term(*first, 0, positions, gathers), Term(*second, 0)], [Term(*third, 1, None, (None, None))]]


def with_tensors(groups, tensors):
    left = iter(tensors)
    return [[replace(term, target=next(left), source=next(left)) for term in terms] for terms in groups]


def tensors_of(groups):
    return [tensor for terms in groups for term in terms for tensor in (term.target, term.source)]


def test_gradients_are_two_products(generator):
    groups = two_groups(generator)
    tensors = [tensor.clone().requires_grad_() for tensor in tensors_of(groups)]

    def run(*tensors):
        return tuple(similarity_many(with_tensors(groups, tensors)))

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)
    few = [tensors[0], *(tensor.detach() for tensor in tensors[1:])]
    run(*few)[0].sum().backward()
    assert tensors[0].grad is not None


def test_is_an_operator_by_all_of_pytorchs_checks(generator):
    groups = two_groups(generator, torch.float32)
    tensors = [tensor.clone().requires_grad_() for tensor in tensors_of(groups)]
    arguments = (*flatten_terms(with_tensors(groups, tensors)), "tf32x3", "auto")
    torch.library.opcheck(torch.ops.regraft.similarity.default, arguments)


def test_compiles_exports_and_runs_without_data(generator):
    groups = two_groups(generator, torch.float32)
    tensors = tensors_of(groups)

    def run(*tensors):
        return [2 * S for S in similarity_many(with_tensors(groups, tensors))]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return run(*tensors)

    expected = run(*tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Module(), tuple(tensors)).module()
    for found in (compiled(*tensors), exported(*tensors)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with FakeTensorMode() as mode:
        fake = similarity([Term(*(mode.from_tensor(t) for t in tensors[-2:]), 1)])
    meta = similarity([Term(*(t.to("meta") for t in tensors[-2:]), 1)])
    assert fake.shape == meta.shape == expected[-1].shape
    assert fake.dtype == meta.dtype == torch.float32


def test_the_update_is_refused_where_it_would_be_wrong(generator):
    """It changes S in place: a derivative would be lost in silence. A compiler leaves it alone."""
    term, S = Term(*torch.randn(2, 2, 4, 3, generator=generator), 0), torch.zeros(4, 4)
    old, new = torch.arange(3), torch.tensor([1, 0, 2])

    def update(S):
        return similarity_update_(S, term, 1, old, new)

    with pytest.raises(ValueError, match="no derivative"):
        torch.func.jvp(lambda w: similarity_update_(S, replace(term, target=w), 1, old, new), *[(term.target,)] * 2)
    with pytest.raises(ValueError, match="no derivative"):
        torch.func.vmap(update)(S[None])
    expected = update(S.clone())
    assert torch.equal(torch.compile(update, backend="aot_eager")(S.clone()), expected)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="similarity_update_ works in place"):
        torch.compile(update, fullgraph=True, backend="aot_eager")(S.clone())


def test_negated_views_count_as_what_they_show(backend, generator):
    target, source = torch.randn(2, 3, 5, 4, generator=generator)
    negated = torch._neg_view(target)
    assert negated.is_neg()
    found = similarity([Term(negated, source, 0)], precision="ieee", backend=backend)
    torch.testing.assert_close(found, -similarity([Term(target, source, 0)], precision="ieee", backend=backend))


def test_refuses_wrapper_subclasses_by_name():
    wrapped = TwoTensor(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'source of term 0' is a TwoTensor"):
        similarity([Term(torch.zeros(2, 3), wrapped, 0)])


# ---------------------------------------------------------------- what the kernel reads in place


@pytest.mark.parametrize(
    ("shape", "axis", "gathers", "order", "copied"),
    [
        ((2, 6, 8), 0, (None, None), (0, 1, 2), "neither"),
        ((2, 6, 8), 0, (torch.arange(6), None), (0, 1, 2), "neither"),
        ((2, 6, 8), 0, (None, torch.arange(8).flip(0)), (0, 1, 2), "source"),
        ((2, 6, 7), 0, (None, None), (0, 1, 2), "both"),
        ((2, 6, 8), 1, (None, None), (0, 1, 2), "both"),
        ((2, 6, 4, 3), 0, (None, None, None), (0, 1, 3, 2), "neither"),
    ],
)
def test_only_what_is_not_in_aligned_runs_is_copied_first(shape, axis, gathers, order, copied, generator):
    target, source = (layout(torch.randn(shape, generator=generator), list(order)) for _ in range(2))
    term = Term(target, source, axis, None, gathers)
    runs = Runs.of(*operands_of(term), axis + 1, Copies())
    given = [runs.stack is stack for runs, stack in zip(runs, (target, source), strict=True)]
    assert given == {"neither": [True, True], "source": [True, False], "both": [False, False]}[copied]
    assert runs[0].count * runs[0].length == runs[1].count * runs[1].length
    check(similarity([term], precision="ieee", backend="triton"), [term], torch.float32)
