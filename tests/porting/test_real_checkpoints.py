"""Values that training loops leave on disk: moved and written right, or refused by name."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from checkpoints import FOUR, drawn, names_of, near, one_line, save, three_verbs, written
from torch import nn
from torch.nn.utils import parametrizations

# ---------------------------------------------------------------------------------------------------
# Tables that grew or shrank

TABLES = """
import torch
from torch import nn

class Reader(nn.Module):
    def __init__(self, words=11, places=6, kinds=2, tied=False):
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(words, 8), nn.Embedding(places, 8), nn.Embedding(kinds, 8)
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, words if tied else 5, bias=False)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]] + self.kinds.weight[0]
        return self.out(self.outer(torch.relu(self.inner(x))).mean(1))
"""
Reader = names_of(TABLES)["Reader"]
SIZES = {
    "two more words": ({"words": 11}, {"words": 13}, "words.weight"),
    "two more words, tied": ({"words": 11, "tied": True}, {"words": 13, "tied": True}, "words.weight"),
    "padded base": ({"words": 16}, {"words": 11}, "words.weight"),
    "longer": ({"places": 6}, {"places": 9}, "places.weight"),
    "shorter": ({"places": 9}, {"places": 6}, "places.weight"),
    "one kind": ({"kinds": 2}, {"kinds": 1}, "kinds.weight"),
    "more kinds": ({"kinds": 1}, {"kinds": 3}, "kinds.weight"),
}


@pytest.mark.parametrize("method", ["naive", "weights"])
@pytest.mark.parametrize("kind", SIZES)
def test_a_table_of_another_length_keeps_the_new_base(kind, method, tmp_path, run, module):
    """Rows that both have follow the new base, added ones are the fine-tune's, and it is said; or it is refused."""
    of_base, of_tuned, name = SIZES[kind]
    torch.manual_seed(0)
    own = "out.weight" if of_base.get("tied") else None
    base, new = ({k: v for k, v in Reader(**of_base).state_dict().items() if k != own} for _ in range(2))
    tuned = {k: v for k, v in Reader(**of_tuned).state_dict().items() if k != own}
    for key, value in tuned.items():
        shared = min(len(value), len(base[key]))
        value[:shared] = base[key][:shared] + 0.01 * torch.randn_like(base[key][:shared])
    paths = [save(tmp_path / f"{n}.safetensors", t) for n, t in {"base": base, "tuned": tuned, "new": new}.items()]
    factory = f"{TABLES}\ndef made():\n    return Reader(**{of_tuned!r})\n"
    model = ["--model", f"{module(factory + IDS)}:made_with_ids", "--shape", 1, 4]
    done = run("port", *paths, "--method", method, *model, "--out", tmp_path / "out")
    if done.status:
        one_line(done, name)
        return
    result = written(tmp_path / "out")
    shared = min(len(tuned[name]), len(base[name]))
    if method == "naive":
        expected = new[name][:shared] + tuned[name][:shared] - base[name][:shared]
        torch.testing.assert_close(result[name][:shared], expected)
        torch.testing.assert_close(result[name][shared:], tuned[name][shared:])
    else:
        assert (result[name][:shared] - new[name][:shared]).norm() < 0.1 * new[name].norm(), "the new base was dropped"
    assert name in done.text and "head of other classes" not in done.text


IDS = """
class WithIds(nn.Module):
    '''Takes the pixels that the command makes as the numbers of words.'''

    def __init__(self, inner):
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.forward = lambda x: type(inner).forward(self, (x * 0).long())

def made_with_ids():
    model = made()
    class Taking(type(model)):
        def forward(self, x):
            return super().forward((x * 8).long())
    model.__class__ = Taking
    return model
"""
IDS = IDS[IDS.index("def made_with_ids") :]


def test_a_head_of_other_classes_is_still_carried_over(tmp_path, run, module):
    """Only a module that makes the output is a head; that one is carried over, as before."""
    base, new = drawn(0), drawn(1)
    tuned = near(base) | {"2.weight": torch.randn(7, 8), "2.bias": torch.randn(7)}
    paths = [save(tmp_path / f"{n}.safetensors", t) for n, t in {"base": base, "tuned": tuned, "new": new}.items()]
    done = run(
        "port",
        *paths,
        "--method",
        "weights",
        "--model",
        f"{module()}:mlp",
        "--shape",
        1,
        6,
        "--out",
        tmp_path / "o",
    )
    assert done.status == 0, done.text
    assert written(tmp_path / "o")["2.weight"].shape == (7, 8)


# ---------------------------------------------------------------------------------------------------
# Integers that are weights

PACKED = {
    "int8 with scales": lambda g: {
        "w": torch.randint(-127, 127, (8, 8), dtype=torch.int8, generator=g), "w_scale": torch.rand(8, generator=g)
    },
    "GPTQ": lambda g: {
        "qweight": torch.randint(2**30, (4, 8), dtype=torch.int32, generator=g),
        "qzeros": torch.randint(2**30, (1, 4), dtype=torch.int32, generator=g),
        "scales": torch.rand(1, 8, generator=g).half(),
        "g_idx": torch.arange(8, dtype=torch.int32),
    },
    "four bits in bytes": lambda g: {
        "w": torch.randint(255, (32, 1), dtype=torch.uint8, generator=g), "w.absmax": torch.rand(1, generator=g)
    },
    "codes of eight bytes": lambda g: {
        "codes": torch.randint(9, (8, 8), generator=g), "book": torch.rand(9, 2, generator=g)
    },
    "masks": lambda g: {"mask": torch.rand(8, 8, generator=g) > 0.5, "w": torch.rand(8, 8, generator=g)},
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_not_summed(kind, tmp_path, run):
    """Codes of quantised weights that differ have no sum: refused, naming one of them."""
    networks = [PACKED[kind](torch.Generator().manual_seed(seed)) for seed in range(2)]
    a, b = (save(tmp_path / f"{n}.safetensors", t) for n, t in zip("ab", networks, strict=True))
    said = one_line(run("fuse", a, b, "--weights", ".5", ".5", "--out", tmp_path / "out"), status=[1])
    assert any(repr(name) in said for name, value in networks[0].items() if not value.is_floating_point())


@pytest.mark.parametrize("kind", ["counter", "equal ids", "equal codes"])
def test_counters_and_equal_integers_pass(kind, tmp_path, run):
    """Counters are the first's; integers that are equal on all sides pass."""
    extra = {
        "counter": [{"norm.num_batches_tracked": torch.tensor(n)} for n in (3, 9)],
        "equal ids": [{"position_ids": torch.arange(512)[None]}] * 2,
        "equal codes": [{"codes": torch.arange(64).view(8, 8)}] * 2,
    }[kind]
    a, b = (save(tmp_path / f"{n}.safetensors", drawn(s) | extra[s]) for s, n in enumerate("ab"))
    assert run("fuse", a, b, "--weights", ".5", ".5", "--out", tmp_path / "out").status == 0
    for name, value in extra[0].items():
        assert torch.equal(written(tmp_path / "out")[name], value)


# ---------------------------------------------------------------------------------------------------
# Buffers that are rightly infinite

MASKED = """
import torch
from torch import nn

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def forward(self, x):
        x = torch.softmax(self.mask, -1) @ torch.relu(self.first(x))
        return self.last(x.mean(1))
"""
Masked = names_of(MASKED)["Masked"]


def masked(seed: int, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    values = drawn(seed, Masked())
    return values | {"mask": torch.full((3, 3), float("-inf")).triu(1)} | changed


@pytest.mark.parametrize("verb", FOUR)
def test_a_saved_mask_of_minus_infinity_passes(verb, tmp_path, run, module):
    """Infinities that are equal on all sides come out as they were."""
    base, new = masked(0), masked(1)
    model = ["--model", f"{module(MASKED)}:Masked", "--shape", 1, 3, 6]
    done = run(*three_verbs(tmp_path, base, near(base) | {"mask": base["mask"]}, new, model)[verb])
    assert done.status == 0, done.text
    assert torch.equal(written(tmp_path / "out")["mask"], base["mask"])


ODD = {
    "a mask with NaN": {"mask": torch.full((3, 3), float("nan"))},
    "an infinite parameter": {"first.weight": torch.full((8, 6), float("inf"))},
    "a NaN in a parameter": {"last.bias": torch.tensor([0.0, float("nan"), 0.0, 0.0, 0.0])},
}


# Without a model nothing says which tensor is a parameter: fuse takes its infinities for a mask.
ODD_VERBS = [(kind, verb) for kind in ODD for verb in FOUR if verb != "fuse" or "infinite" not in kind]


@pytest.mark.parametrize(("kind", "verb"), ODD_VERBS)
def test_what_is_wrongly_not_finite_is_refused(kind, verb, tmp_path, run, module):
    """NaN anywhere, and parameters that are infinite, on one side or on all."""
    base, new = masked(0, **ODD[kind]), masked(1, **ODD[kind])
    model = ["--model", f"{module(MASKED)}:Masked", "--shape", 1, 3, 6]
    one_line(run(*three_verbs(tmp_path, base, near(base), new, model)[verb]), next(iter(ODD[kind])), status=[1])


@pytest.mark.parametrize("verb", FOUR)
def test_infinities_that_differ_are_refused(verb, tmp_path, run, module):
    """A causal mask and another one have no sum."""
    base, new = masked(0), masked(1, mask=torch.full((3, 3), float("-inf")).tril(-1))
    model = ["--model", f"{module(MASKED)}:Masked", "--shape", 1, 3, 6]
    done = run(*three_verbs(tmp_path, base, near(base) | {"mask": base["mask"]}, new, model)[verb])
    if verb == "match" and done.status == 0:
        assert torch.equal(written(tmp_path / "out")["mask"], new["mask"])
    else:
        one_line(done, "mask", status=[1])


# ---------------------------------------------------------------------------------------------------
# Buffers that are not linear in weights

SPECTRAL = {
    "old": "from torch import nn\nfrom torch.nn.utils import spectral_norm\n",
    "new": "from torch import nn\nfrom torch.nn.utils.parametrizations import spectral_norm\n",
}
for text in SPECTRAL:
    SPECTRAL[text] += (
        "def made():\n    return nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 5))\n"
    )


def spectral(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = names_of(SPECTRAL[kind])["made"]()
    model.train()
    for _ in range(30):
        model(torch.randn(2, 6))
    return model.eval()


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("kind", ["old", "new"])
@pytest.mark.parametrize("weights", [(".5", ".5"), ("1", "-1"), ("2", "-1"), (".7", ".9")])
def test_a_sum_of_spectral_norms_is_normalised_or_refused(weights, kind, with_model, tmp_path, run, module):
    """Vectors of the power iteration have no sum: made anew for the summed weight, or refused by name."""
    one, two = spectral(kind, 0), spectral(kind, 1)
    a, b = (save(tmp_path / f"{n}.safetensors", m.state_dict()) for n, m in zip("ab", (one, two), strict=True))
    model = ["--model", f"{module(SPECTRAL[kind])}:made", "--shape", 1, 6] if with_model else []
    done = run("fuse", a, b, "--weights", *weights, *model, "--out", tmp_path / "out")
    if done.status:
        assert "_u" in one_line(done) or "_v" in done.err
        return
    fused = spectral(kind, 5)
    fused.load_state_dict(written(tmp_path / "out"))
    fused(torch.ones(1, 6))
    weight = fused[0].weight
    assert bool(weight.isfinite().all())
    assert abs(float(torch.linalg.matrix_norm(weight.detach(), 2)) - 1) < 0.05


# ---------------------------------------------------------------------------------------------------
# float64


@pytest.mark.parametrize("verb", FOUR)
def test_double_stays_double(verb, tmp_path, run, module):
    """Values of 53 bits are computed with 53 bits."""
    base, new = ({n: v.double() / 3 for n, v in drawn(seed).items()} for seed in range(2))
    tuned = {n: v + torch.randn(v.shape, dtype=v.dtype) / 30 for n, v in base.items()}
    model = ["--model", f"{module()}:mlp", "--shape", 1, 6]
    verbs = three_verbs(tmp_path, base, tuned, new, model)
    if verb == "port":
        verbs["port"][verbs["port"].index("weights")] = "naive"
    done = run(*verbs[verb])
    assert done.status == 0, done.text
    result = written(tmp_path / "out")
    assert {value.dtype for value in result.values()} == {torch.float64}
    if verb == "match":  # b's own values, to the bit
        assert torch.equal(result["0.weight"].sort(0)[0], new["0.weight"].sort(0)[0])
        return
    for name, value in result.items():
        if verb == "port":
            torch.testing.assert_close(value, new[name] + (tuned[name] - base[name]), rtol=1e-14, atol=1e-15)
        elif verb == "fuse":
            torch.testing.assert_close(value, base[name] / 2 + new[name] / 2, rtol=1e-14, atol=1e-15)
        else:
            assert not torch.equal(value, value.float().double()), "rounded to float32"


def test_a_large_double_is_finite(tmp_path, run):
    """1e60 is a number."""
    path = save(tmp_path / "a.safetensors", {"w": torch.tensor([1e60, 2.0], dtype=torch.float64)})
    assert run("fuse", path, "--weights", ".5", "--out", tmp_path / "out").status == 0
    assert written(tmp_path / "out")["w"].tolist() == [5e59, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_match_gives_bs_own_values(dtype, tmp_path, run, module):
    """Aligning only exchanges: every dtype's bits stay."""
    a, b = ({n: v.to(dtype) for n, v in drawn(seed).items()} for seed in range(2))
    model = ["--model", f"{module()}:mlp", "--shape", 1, 6]
    assert run(*three_verbs(tmp_path, a, a, b, model)["match"]).status == 0
    result = written(tmp_path / "out")
    for name, value in b.items():
        assert torch.equal(result[name].flatten().sort()[0], value.flatten().sort()[0])


# ---------------------------------------------------------------------------------------------------
# Optional counters, other names for the same


NORMED = """
from torch import nn
def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
"""
normed = names_of(NORMED)["normed"]


def normed_values(seed: int) -> dict[str, torch.Tensor]:
    values = drawn(seed, normed())
    return values | {"1.running_var": values["1.running_var"].abs() + 0.5}


@pytest.mark.parametrize("lacking", [("new",), ("base",), ("base", "tuned", "new"), ("tuned",)])
@pytest.mark.parametrize("verb", FOUR)
def test_batchnorm_without_its_counter(verb, lacking, tmp_path, run, module):
    """Old files and some exporters leave num_batches_tracked out: read as torch reads them, and said."""
    base, new = normed_values(0), normed_values(1)
    networks = {"base": base, "tuned": near(base), "new": new}
    networks["tuned"]["1.running_var"] = networks["tuned"]["1.running_var"].abs()
    for name in lacking:
        networks[name].pop("1.num_batches_tracked")
    model = ["--model", f"{module(NORMED)}:normed", "--shape", 2, 6]
    done = run(*three_verbs(tmp_path, *networks.values(), model)[verb])
    assert done.status == 0, done.text
    normed().load_state_dict(written(tmp_path / "out"), strict="1.num_batches_tracked" in written(tmp_path / "out"))


WEIGHT_NORM = {
    "old": "from torch import nn\nfrom torch.nn.utils import weight_norm\n",
    "new": "from torch import nn\nfrom torch.nn.utils.parametrizations import weight_norm\n",
}
for text in WEIGHT_NORM:
    WEIGHT_NORM[text] += (
        "def made():\n    return nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 5))\n"
    )


@pytest.mark.parametrize("kind", ["old", "new"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_names_of_weight_norm_are_read(kind, tmp_path, run, module):
    """weight_g and weight_v beside parametrizations.weight.original0 and 1: the same tensors, and said."""
    torch.manual_seed(0)
    old = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 5))
    new = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 5))
    a, b = (save(tmp_path / f"{n}.safetensors", m.state_dict()) for n, m in zip("ab", (old, new), strict=True))
    model = ["--model", f"{module(WEIGHT_NORM['new'])}:made", "--shape", 1, 6, "--out", tmp_path / "out"]
    files = (a, b) if kind == "old" else (b, a)
    done = run("match", *files, *model)
    assert done.status == 0, done.text


# ---------------------------------------------------------------------------------------------------
# Statistics

DATA = (
    NORMED
    + """
import torch
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(64, 6, generator=generator) + 2, torch.arange(64) % 5)]
"""
)


@pytest.mark.parametrize("align", [[], ["--align"]])
def test_a_sum_with_data_has_statistics_of_the_data(align, tmp_path, run, module):
    """`fuse --data` with BatchNorm: running statistics are estimated anew, as `match` does and the docs promise."""
    name = module(DATA)
    model = ["--model", f"{name}:normed", "--shape", 2, 6, "--data", f"{name}:batches"]
    base, new = normed_values(0), normed_values(1)
    a, b = (save(tmp_path / f"{n}.safetensors", t) for n, t in zip("ab", (base, new), strict=True))
    done = run("fuse", a, b, "--weights", ".5", ".5", *align, *model, "--out", tmp_path / "out")
    assert done.status == 0, done.text
    result = written(tmp_path / "out")
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) + 2
    features = inputs @ result["0.weight"].T + result["0.bias"]
    torch.testing.assert_close(result["1.running_mean"], features.mean(0), rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------
# The verdict


@pytest.mark.parametrize("good", [True, False])
def test_a_port_says_whether_it_was_worth_it(good, tmp_path, run, module):
    """The last lines and the card say "better" with a number and its uncertainty, or "no better: train instead"."""
    text = DATA.replace("torch.arange(64) % 5", "torch.full((64,), 3)")
    name = module(text)
    base = normed_values(0)
    tuned = OrderedDict((n, v.clone()) for n, v in base.items())
    tuned["3.bias"][3 if good else 0] += 100
    verbs = three_verbs(tmp_path, base, tuned, normed_values(1), ["--model", f"{name}:normed", "--shape", 2, 6])
    done = run(*verbs["port"], "--data", f"{name}:batches")
    assert done.status == 0, done.text
    card = (tmp_path / "out" / "README.md").read_text()
    for told in (done.out, card):
        assert ("better than the new base" in told) if good else ("no better" in told and "train" in told)


def test_a_port_without_data_confirms_nothing(tmp_path, run, module):
    """Without data the result is not called better."""
    base = drawn(0)
    verbs = three_verbs(tmp_path, base, near(base), drawn(1), ["--model", f"{module()}:mlp", "--shape", 1, 6])
    done = run(*verbs["port"])
    assert done.status == 0 and "better than" not in done.out
