"""permute, graft and combine as operators of PyTorch: traced, compiled, differentiated, and refused by name."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from regraft_kernels import Packing, Term, assign, combine, graft, permute, similarity_many, similarity_update_

PACKING = Packing.build({"w": (4, 3, 2), "v": (4,), "n": ()}, {"w": ("a", "b", None), "v": ("a",)})


def draw(generator, *lead, dtype=torch.float64):
    shapes = {name: shape for name, shape in PACKING.shapes.items() if name != "n"}
    return {name: torch.randn(*lead, *s, generator=generator, dtype=dtype) for name, s in shapes.items()}


def vectors(generator, *lead):
    def one(n):
        found = [torch.randperm(n, generator=generator) for _ in range(lead[0] if lead else 1)]
        return torch.stack(found) if lead else found[0]

    return {slot: one(n) for slot, n in PACKING.slots.items()}


def everything(base, start, end, indices):
    """A function that permutes, grafts and sums."""
    moved = permute(base, indices, PACKING)
    grafted = graft(moved, start, end, [0.5, 2.0], indices, PACKING)
    return combine([{n: t[0] for n, t in grafted.items()}, {n: t[1] for n, t in grafted.items()}], [[1.0, -3.0]])


@pytest.fixture
def inputs(generator):
    return *(draw(generator) for _ in range(3)), vectors(generator)


def test_compiles_whole_and_matches(inputs):
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for name, tensor in everything(*inputs).items():
        torch.testing.assert_close(compiled(*inputs)[name], tensor)
    wanted = [{n: t.requires_grad_() for n, t in inputs[0].items()}, *inputs[1:]]
    assert compiled(*wanted)["w"].requires_grad


def test_exports_and_runs_without_values(inputs):
    class Model(torch.nn.Module):
        def forward(self, base, start, end, indices):
            return everything(base, start, end, indices)

    expected = everything(*inputs)
    program = torch.export.export(Model(), inputs)
    for name, tensor in program.module()(*inputs).items():
        torch.testing.assert_close(tensor, expected[name])
    meta = [{n: t.to("meta") for n, t in tensors.items()} for tensors in inputs]
    assert {n: t.shape for n, t in everything(*meta).items()} == {n: t.shape for n, t in expected.items()}
    with FakeTensorMode() as mode:
        fake = [{n: mode.from_tensor(t) for n, t in tensors.items()} for tensors in inputs]
        assert everything(*fake)["w"].shape == expected["w"].shape


def test_pytorch_counts_their_operations(generator, inputs):
    base, start, end, indices = inputs
    elements = sum(tensor.numel() for tensor in base.values())
    a, b = (torch.randn(5, 6, 2, 7, generator=generator) for _ in range(2))
    place = torch.arange(6).view(3, 2)
    batch, many = draw(generator, 2), vectors(generator, 2)
    terms, S = [Term(a, b, 0), Term(a.transpose(1, 3), b.transpose(1, 3), 2)], torch.zeros(6, 6)
    for expected, call in (
        (0, lambda: permute(base, indices, PACKING)),
        (2 * (1 + 2 * 3) * elements, lambda: graft(batch, start, end, [0.5, 1.0, 2.0], many, PACKING)),
        (2 * 2 * 3 * elements, lambda: combine([base, start], [[0.5, 1.0]] * 3)),
        (2 * 2 * 6 * a.numel(), lambda: similarity_many([terms])),
        (2 * 3 * a.numel(), lambda: similarity_many([[Term(a, b, 0, place)]])),
    ):
        without = call()
        with FlopCounterMode(display=False) as counter:
            counted = call()
        assert counter.get_total_flops() == expected
        torch.testing.assert_close(counted, without)
        with counter:  # what writes to given memory launches as ever
            permute(base, indices, PACKING, out={name: torch.empty_like(tensor) for name, tensor in base.items()})
            similarity_update_(S, terms[0], 1, torch.tensor([0, 1]), torch.tensor([1, 0]))


@pytest.mark.parametrize("targets", [(), (2,)])
def test_gradients_are_those_of_the_formulas(generator, targets):
    base, start, end = draw(generator, *targets), draw(generator), draw(generator)
    scales = torch.tensor([0.5, -1.5], dtype=torch.float64)
    indices = vectors(generator, *targets)

    def run(scales, *flat):
        groups = [dict(zip(base, flat[k : k + 2], strict=True)) for k in (0, 2, 4)]
        grafted = graft(*groups, scales, indices, PACKING)
        if targets:
            return tuple(grafted.values())
        moved = permute(groups[0], indices, PACKING, inverse=True)
        table = torch.stack([scales, scales**2])
        summed = combine([moved, groups[1]], table)
        return *grafted.values(), *summed.values()

    flat = [t.requires_grad_() for group in (base, start, end) for t in group.values()]
    assert torch.autograd.gradcheck(run, (scales.requires_grad_(), *flat), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (scales, *flat), fast_mode=True)


def test_gradients_run_where_the_operation_ran(generator, backend):
    base, start, end = ({n: t.requires_grad_() for n, t in draw(generator).items()} for _ in range(3))
    indices = vectors(generator)
    grafted = graft(
        permute(base, indices, PACKING, backend=backend), start, end, [2.0], indices, PACKING, backend=backend
    )
    combine([grafted, grafted], [[1.0, 0.5]], backend=backend)["w"].square().sum().backward()
    found = [t.grad for group in (base, start, end) for t in group.values()]
    for tensor in (t for group in (base, start, end) for t in group.values()):
        tensor.grad = None
    moved = {n: t[indices["a"]] for n, t in base.items()}
    moved["w"] = moved["w"][:, indices["b"]]
    change = (end["w"] - start["w"])[indices["a"]][:, indices["b"]]
    (1.5 * (moved["w"] + 2 * change)).square().sum().backward()
    torch.testing.assert_close(found[0], base["w"].grad)
    torch.testing.assert_close(found[2], start["w"].grad)
    torch.testing.assert_close(found[4], end["w"].grad)


@pytest.mark.parametrize("gradients", [False, True])
def test_operators_keep_their_contracts(generator, gradients):
    tensors = [t.requires_grad_(gradients) for t in draw(generator, dtype=torch.float32).values()]
    indices, axes = list(vectors(generator).values()), [0, 1, -1, 0]
    scales = torch.tensor([0.5, 2.0])
    for operator, arguments in (
        (torch.ops.regraft.permute, (tensors, indices, axes, False, False, "auto")),
        (torch.ops.regraft.graft, (tensors, tensors, tensors, scales, indices, axes, False, "auto")),
        (torch.ops.regraft.combine, ([*tensors, *tensors], torch.eye(2), "auto")),
    ):
        torch.library.opcheck(operator.default, arguments)


def operations(generator):
    """Name -> a function of tensors that gives a tuple of tensors, and its arguments."""
    many = draw(generator, 2)
    flat = [t for group in (draw(generator), draw(generator)) for t in group.values()]
    scales = torch.tensor([0.5, -1.5], dtype=torch.float64)
    one, each = vectors(generator), vectors(generator, 2)

    def grafted(indices):
        def run(scales, *tensors):
            groups = (dict(zip(PACKING.axes, tensors[k : k + 2], strict=False)) for k in (0, 2, 4))
            return tuple(graft(*groups, scales, indices, PACKING).values())

        return run

    def permuted(w, v):
        return tuple(permute({"w": w, "v": v}, one, PACKING, inverse=True).values())

    def summed(scales, *tensors):
        sources = [{"w": tensors[0]}, {"w": tensors[2]}]
        return (combine(sources, torch.stack([scales, scales**2]))["w"],)

    def compared(w, v, other, last):
        groups = [[Term(w, other, 0, None, (one["b"], None))], [Term(w, other, 1), Term(w, w, 1)]]
        return tuple(similarity_many(groups))

    return {
        "permute": (permuted, flat[:2]),
        "graft": (grafted(one), (scales, *flat[:2], *flat)),
        "graft for two targets": (grafted(each), (scales, *many.values(), *flat)),
        "combine": (summed, (scales, *flat)),
        "similarity": (compared, flat),
    }


@pytest.mark.parametrize("name", operations(torch.Generator()))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_all_transformations_of_torch_func(name, generator):
    """Forward and reverse mode agree with what the operator's own gradients say, alone, composed and compiled."""
    torch.compiler.reset()
    run, arguments = operations(generator)[name]
    arguments, places = tuple(arguments), tuple(range(len(arguments)))
    expected = torch.autograd.functional.jacobian(run, arguments)
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(transform(run, places)(*arguments), expected)
    tangents = tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in arguments)
    along = tuple(
        sum((part * t).flatten(result.ndim).sum(-1) for part, t in zip(row, tangents, strict=True))
        for row, result in zip(expected, run(*arguments), strict=True)
    )
    torch.testing.assert_close(torch.func.jvp(run, arguments, tangents)[1], along)
    torch.testing.assert_close(torch.func.linearize(run, *arguments)[1](*tangents), along)
    with forward_ad.dual_level():
        duals = run(*map(forward_ad.make_dual, arguments, tangents))
        torch.testing.assert_close(tuple(forward_ad.unpack_dual(dual).tangent for dual in duals), along)
    compiled = torch.compile(lambda *args: torch.func.jvp(run, args, tangents)[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), along)
    mapped = torch.compile(torch.func.vmap(run), fullgraph=True, backend="aot_eager")
    for size in (0, 3):
        stacks = [torch.randn(size, *t.shape, generator=generator, dtype=t.dtype) for t in arguments]
        for found in (torch.func.vmap(run)(*stacks), mapped(*stacks)):
            for number in range(size):
                each = run(*(stack[number] for stack in stacks))
                torch.testing.assert_close(tuple(part[number] for part in found), each)
            assert [len(part) for part in found] == [size] * len(found)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("permute", lambda t: torch.ops.regraft.permute([t], [torch.arange(4)], [0, -1], False, False, "auto")),
        ("graft", lambda t: torch.ops.regraft.graft([t], [t], [t], torch.ones(1), [], [-1, -1], False, "auto")),
        ("combine", lambda t: torch.ops.regraft.combine([t], torch.ones(1, 1), "auto")),
        ("similarity", lambda t: torch.ops.regraft.similarity([t], [t], [0], [None], [None], [1], "ieee", "auto")),
    ],
)
def test_operators_called_directly_refuse_forward_mode(name, call, generator):
    """They would drop the tangent in silence."""
    value, tangent = torch.randn(2, 4, 3, generator=generator)
    for run in (torch.func.jvp, lambda f, x, t: torch.func.jacfwd(f)(*x)):
        with pytest.raises(NotImplementedError, match=f"call regraft_kernels.{name}, which has one"):
            run(lambda t: call(t)[0], (value,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"torch.ops.regraft.{name}"):
        call(forward_ad.make_dual(value, tangent))


def test_transformations_check_their_indices(inputs):
    base, bad = inputs[0], {**inputs[3], "a": torch.tensor([0, 0, 1, 2])}
    with pytest.raises(ValueError, match="slot 'a' is not a permutation"):
        torch.func.vmap(lambda t: permute({"v": t}, bad, PACKING))(base["v"][None])
    with pytest.raises(ValueError, match="slot 'b' is missing"):
        torch.func.grad(lambda t: permute({"w": t}, {"a": bad["a"]}, PACKING)["w"].sum())(base["w"])
    out = {"v": torch.empty(4, dtype=torch.float64)}
    with pytest.raises(ValueError, match="out cannot be given"), forward_ad.dual_level():
        permute({"v": base["v"]}, inputs[3], PACKING, out=out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformations_map_over_indices_and_copy_integers(dtype, generator):
    base = {"w": torch.randn(4, 3, 2, generator=generator).to(dtype), "n": torch.tensor(5)}
    indices = vectors(generator, 3)
    found = torch.func.vmap(lambda v: graft(base, base, {"w": 2 * base["w"], "n": base["n"]}, [0.5, 1.0], v, PACKING))(
        indices
    )
    for number in range(3):
        one = {slot: vector[number] for slot, vector in indices.items()}
        expected = graft(base, base, {"w": 2 * base["w"], "n": base["n"]}, [0.5, 1.0], one, PACKING)
        for name, tensor in expected.items():
            assert torch.equal(found[name][number], tensor)


def test_a_named_batch_dimension_is_exported(generator):
    base, indices = draw(generator, 5), vectors(generator)

    class Model(torch.nn.Module):
        def forward(self, base):
            return permute(base, indices, PACKING)

    dims = {"base": {name: {0: torch.export.Dim("batch")} for name in base}}
    program = torch.export.export(Model(), (base,), dynamic_shapes=dims)
    more = draw(generator, 4)
    for name, tensor in permute(more, indices, PACKING).items():
        assert torch.equal(program.module()(more)[name], tensor)


@pytest.mark.parametrize("gradients", [False, True])
def test_scales_are_one_number_or_a_vector(gradients, inputs):
    base, start, end, indices = inputs
    base = {name: tensor.requires_grad_(gradients) for name, tensor in base.items()}
    expected = graft(base, start, end, [0.5], indices, PACKING)["w"]
    for scales in (0.5, torch.tensor(0.5)):
        assert torch.equal(graft(base, start, end, scales, indices, PACKING)["w"], expected)
    with pytest.raises(ValueError, match=r"scales have shape \(1, 2\), expected \(K,\)"):
        graft(base, start, end, torch.ones(1, 2), indices, PACKING)


def test_what_traces_sees_the_operators(inputs):
    base, start, end, indices = inputs
    graph = make_fx(lambda w: everything({**base, "w": w}, start, end, indices))(base["w"]).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    for name in ("permute", "graft", "combine"):
        assert getattr(torch.ops.regraft, name).default in called


def test_prepared_indices_serve_traced_calls_too(inputs):
    prepared = PACKING.prepare(inputs[3])
    compiled = torch.compile(lambda w: permute(w, prepared, PACKING), fullgraph=True, backend="aot_eager")
    expected = permute(inputs[0], inputs[3], PACKING)
    for name, tensor in compiled(inputs[0]).items():
        assert torch.equal(tensor, expected[name])


def test_negative_and_conjugate_views_keep_their_values(backend, generator):
    z = torch.randn(4, 3, 2, generator=generator, dtype=torch.complex64)
    negative = z.conj().imag
    assert negative.is_neg()
    indices = vectors(generator)
    for tensor in (negative, z.conj()):
        moved = permute({"w": tensor}, indices, PACKING, backend=backend)["w"]
        assert torch.equal(moved, tensor.resolve_conj().resolve_neg()[indices["a"]][:, indices["b"]])
    w = {"w": negative}
    grafted = graft(w, w, {"w": torch.zeros(4, 3, 2)}, [1.0], indices, PACKING, backend=backend)["w"]
    torch.testing.assert_close(grafted[0], negative - negative[indices["a"]][:, indices["b"]])
    torch.testing.assert_close(combine([w, w], [[1.0, 2.0]], backend=backend)["w"][0], 3 * negative)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    def __tensor_flatten__(self):
        raise AssertionError("it was taken apart")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("it was computed with")


def test_what_has_no_memory_is_refused_by_name(backend, generator):
    strange, indices = {"w": Wrapper((4, 3, 2))}, vectors(generator)
    for call in (
        lambda: permute(strange, indices, PACKING, backend=backend),
        lambda: graft(strange, strange, strange, [1.0], indices, PACKING, backend=backend),
        lambda: combine([strange], [[1.0]], backend=backend),
    ):
        with pytest.raises(ValueError, match="'w' is a Wrapper, which has no memory of its own"):
            call()


def strange_layouts(tensor):
    yield "torch.sparse_coo", tensor.to_sparse()
    yield "torch.sparse_csr", tensor.to_sparse_csr()
    yield "nested", torch.nested.nested_tensor([tensor, tensor])
    yield "nested", torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_dense_is_refused_by_name(backend, generator):
    packing, index = Packing.build({"w": (4, 3)}, {"w": ("a", None)}), {"a": torch.arange(4)}
    dense = {"w": torch.randn(4, 3, generator=generator)}
    for kind, tensor in strange_layouts(dense["w"]):
        strange = {"w": tensor}
        for call in (
            lambda w: permute(w, index, packing, backend=backend),
            lambda w: graft(w, dense, dense, [1.0], index, packing, backend=backend),
            lambda w: graft(dense, dense, w, [1.0], index, packing, backend=backend),
            lambda w: combine([w, w], [[1.0, 2.0]], backend=backend),
        ):
            with pytest.raises(ValueError, match=f"'w' is {kind}; give dense tensors"):
                call(strange)
        with pytest.raises(ValueError, match=f"'target of term 0' is {kind}; give dense tensors"):
            similarity_many([[Term(tensor, tensor, 0)]], backend=backend)
        with pytest.raises(ValueError, match="similarity must be a dense tensor"):
            assign(tensor)
    with pytest.raises(ValueError, match=r"int64 tensor, not .*sparse_coo"):
        permute(dense, {"a": index["a"].to_sparse()}, packing, backend=backend)


def test_float8_moves_and_is_not_added(backend, generator):
    small = {"w": torch.randn(4, 3, 2, generator=generator).to(torch.float8_e4m3fn)}
    indices = vectors(generator)
    moved = permute(small, indices, PACKING, backend=backend)["w"]
    assert torch.equal(moved.float(), small["w"].float()[indices["a"]][:, indices["b"]])
    with pytest.raises(ValueError, match=r"'w' is torch\.float8_e4m3fn; only"):
        graft(small, small, small, [1.0], indices, PACKING, backend=backend)
    with pytest.raises(ValueError, match=r"'w' is torch\.float8_e4m3fn; only"):
        combine([small], [[1.0]], backend=backend)


def test_out_is_refused_where_it_would_lose_gradients(generator):
    base = {n: t.requires_grad_() for n, t in draw(generator).items()}
    out = {n: torch.empty_like(t).detach() for n, t in base.items()}
    with pytest.raises(ValueError, match="out cannot be given"):
        permute(base, vectors(generator), PACKING, out=out)
    with torch.no_grad():
        assert permute(base, vectors(generator), PACKING, out=out)["w"] is out["w"]
