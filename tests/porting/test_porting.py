"""A fine-tune follows a new base: exactly where the new base is the old one in another order; else checked and said."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import regraft
import regraft.matching.descent
from regraft import porting
from regraft.cli import main
from regraft.core.files import BadFile
from regraft.core.tensors import Tensors
from regraft.matching.descent import match, match_streamed
from regraft.porting import result as results
from regraft.porting.checkpoint_files import CheckpointFile, Entry
from regraft.symmetry import PermutationSpec

CLASSES = 5


def mlp(classes: int = CLASSES) -> nn.Module:
    hidden = [layer for a, b in ((6, 12), (12, 9), (9, 8)) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(8, classes))


class Residual(nn.Module):
    """Convolutions with BatchNorm around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.one, self.two = nn.Conv2d(6, 7, 3, padding=1), nn.Conv2d(7, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.two(torch.relu(self.one(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Heads that may be exchanged whole, and an embedding that the output shares."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks(self.embed(tokens)).mean(1))


INPUTS = {
    mlp: torch.linspace(-1, 1, 12).view(2, 6),
    Residual: torch.linspace(-1, 1, 384).sin().view(2, 3, 8, 8),
    Attention: torch.arange(10).view(2, 5),
}


def state(model: nn.Module, seed: int) -> Tensors:
    """Random values of all that is floating; shared tensors once."""
    generator = torch.Generator().manual_seed(seed)
    held = {id(t): n for n, t in reversed(model.state_dict(keep_vars=True).items())}
    kept = {n: t.detach() for n, t in model.state_dict().items() if n in held.values()}
    drawn = {n: torch.randn(t.shape, generator=generator) for n, t in kept.items()}
    return {
        n: kept[n].clone() if not kept[n].is_floating_point() else t if t.ndim > 1 else t.abs() + 0.5
        for n, t in drawn.items()
    }


def near(tensors: Tensors, seed: int = 9) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.1 * t.norm() / t.numel() ** 0.5 * torch.randn(t.shape, generator=generator)
        if t.is_floating_point()
        else t
        for n, t in tensors.items()
    }


def saved(folder: Path, **networks: Tensors) -> list[Path]:
    paths = []
    for name, tensors in networks.items():
        paths.append(folder / f"{name}.safetensors")
        save_file({n: t.contiguous() for n, t in tensors.items()}, paths[-1])
    return paths


def result(out: Path) -> Tensors:
    return {n: t for path in sorted(out.glob("*.safetensors")) for n, t in load_file(path).items()}


def close(a: Tensors, b: Tensors, **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Of an MLP: a base, its fine-tune, another base."""
    model = mlp()
    base = state(model, 0)
    return saved(tmp_path, base=base, tuned=near(base), new=state(model, 1))


def command(verb: str, paths: list[Path], *argv: object) -> int:
    return main([verb, *map(str, paths), *map(str, argv)])


KNOWN = {"model": mlp(), "inputs": INPUTS[mlp]}
OF_MLP = ["--model", f"{__name__}:mlp", "--shape", "2", "6"]
WEIGHTS = [*OF_MLP, "--method", "weights"]

# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("make", INPUTS)
def test_onto_a_permuted_base_the_fine_tune_arrives_permuted(make, tmp_path):
    model = make()
    base = state(model, 0)
    tuned = near(base)
    spec = regraft.trace(model, INPUTS[make])
    perm = spec.random(torch.Generator().manual_seed(2))
    paths = saved(tmp_path, base=base, tuned=tuned, new=regraft.apply(spec, perm, base))
    done = regraft.port(*paths, tmp_path / "out", model=model, inputs=INPUTS[make], method="weights")
    close(result(done.out), regraft.apply(spec, perm, tuned), rtol=1e-5, atol=1e-5)
    assert done.measured["function_error"] < 1e-5


def test_naive_is_the_plain_sum_and_the_result_has_the_new_bases_dtype(three, tmp_path):
    base, tuned, new = (load_file(path) for path in three)
    save_file({n: t.bfloat16() for n, t in new.items()}, three[2])
    save_file({n: t.half() for n, t in tuned.items()}, three[1])
    out = regraft.port(*three, tmp_path / "out", method="naive", **KNOWN).out
    expected = {n: (new[n].bfloat16().float() + tuned[n].half().float() - base[n]).bfloat16() for n in new}
    close(result(out), expected, rtol=0, atol=0)


def test_a_head_of_other_classes_is_carried_over_permuted_on_its_input(tmp_path):
    model = mlp()
    base = state(model, 0)
    tuned = near(base) | {"6.weight": torch.randn(3, 8), "6.bias": torch.randn(3)}
    spec = regraft.trace(model, INPUTS[mlp])
    perm = spec.random(torch.Generator().manual_seed(2))
    paths = saved(tmp_path, base=base, tuned=tuned, new=regraft.apply(spec, perm, base))
    out = regraft.port(*paths, tmp_path / "out", method="weights", **KNOWN).out
    head = {name: tensor for name, tensor in result(out).items() if name.startswith("6.")}
    close(head, {"6.weight": tuned["6.weight"][:, perm["4"]], "6.bias": tuned["6.bias"]})
    assert "its head is carried over" in (out / "README.md").read_text()


class Pooled(nn.Module):
    """A body, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.pre, self.out = nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.pre(self.body(x))))


def test_parts_that_no_base_has_are_carried_over(tmp_path):
    model = Pooled()
    tuned = near(state(model, 0))
    base = {n: t for n, t in near(tuned).items() if n.startswith("body")}
    spec = regraft.trace(model, torch.randn(1, 6))
    perm = spec.random(torch.Generator().manual_seed(2))
    new = {n: t for n, t in regraft.apply(spec, perm, tuned | base).items() if n in base}
    paths = saved(tmp_path, base=base, tuned=tuned, new=new | {"other.weight": torch.ones(2)})
    done = regraft.port(*paths, tmp_path / "out", model=model, inputs=torch.randn(1, 6), method="weights")
    x = torch.randn(4, 6)
    after, before = (torch.func.functional_call(model, theta, x) for theta in (result(done.out), tuned))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert any("other.weight" in note for note in done.plan.notes)


def test_of_a_body_a_named_part_may_be_new_and_a_layer_not(tmp_path):
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
            self.pooler = nn.Sequential(nn.Linear(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pooler(self.layers(x))

    model = nn.Sequential()
    model.add_module("body", Body())
    model.add_module("out", nn.Linear(8, 3))
    base = state(model, 0)
    known = {"model": model, "inputs": torch.randn(1, 6), "method": "naive"}
    for lacking, fits in (("body.pooler", True), ("body.layers.1", False)):
        whole = (base, state(model, 1))
        bases = [{n: t for n, t in x.items() if not n.startswith((lacking, "out"))} for x in whole]
        paths = saved(tmp_path, base=bases[0], tuned=near(base), new=bases[1])
        if fits:
            assert result(regraft.port(*paths, tmp_path / "out", **known).out).keys() == base.keys()
            continue
        with pytest.raises(BadFile, match=r"no tensor 'body\.layers\.1"):
            regraft.port(*paths, tmp_path / "other", **known)


def test_a_proven_specification_stands_for_the_model(three, tmp_path):
    spec = regraft.trace(mlp(), INPUTS[mlp], verify=True)
    spec.save(tmp_path / "spec.json")
    regraft.port(*three, tmp_path / "a", spec=tmp_path / "spec.json", method="weights")
    regraft.port(*three, tmp_path / "b", method="weights", **KNOWN)
    close(result(tmp_path / "a"), result(tmp_path / "b"), rtol=0, atol=0)
    spec.mark(proven=False)
    with pytest.raises(ValueError, match="not proven"):
        regraft.port(*three, tmp_path / "c", spec=spec, method="weights")


def test_a_wrong_specification_is_proven_wrong_before_it_is_used(three, tmp_path):
    wrong = PermutationSpec.build(
        {"0": 12}, {n: ["0", 6] if n == "0.weight" else list(t.shape) for n, t in load_file(three[0]).items()}
    )
    with pytest.raises(ValueError, match=r"0\.weight"):
        regraft.port(*three, tmp_path / "out", spec=wrong, method="weights", **KNOWN)
    wrong.mark(proven=True)
    with pytest.raises(BadFile, match="does not compute what the network computes"):
        regraft.port(*three, tmp_path / "out", spec=wrong, method="weights", **KNOWN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", INPUTS)
def test_matching_from_files_is_matching(make):
    model = make()
    spec = regraft.trace(model, INPUTS[make])
    pair = [{n: t.detach() for n, t in make().named_parameters()} for _ in range(2)]
    whole, streamed = match(spec, *pair), match_streamed(spec, *pair)
    assert streamed.objective == pytest.approx(whole.objective, rel=0.02)
    assert streamed.objective == pytest.approx(
        match(spec, *pair, start=streamed.perm, max_sweeps=1).objective, rel=1e-5
    )


def test_fgmt_is_the_transfer_along_the_straight_line(three, tmp_path):
    data = [(torch.randn(16, 6), torch.randint(CLASSES, (16,))) for _ in range(3)]
    done = regraft.port(*three, tmp_path / "out", method="fgmt", data={"train": data, "test": data}, steps=3, **KNOWN)
    base, tuned, new = (load_file(path) for path in three)
    path = regraft.Trajectory.linear(base, tuned, steps=3)
    close(result(done.out), regraft.transfer(mlp(), path, new, data, "fgmt").params, rtol=1e-5, atol=1e-5)
    assert done.measured["measured_on"] == "test"
    assert done.measured["accuracy"].keys() == {
        "fine-tune on its own base",
        "new base",
        "naive sum",
        "result",
    }


@pytest.mark.parametrize("method", ["naive", "weights"])
def test_gradfix_keeps_of_what_is_moved_what_the_new_base_agrees_with(method, three, tmp_path):
    data = [(torch.randn(8, 6), torch.randint(CLASSES, (8,))) for _ in range(2)]
    known = {**KNOWN, "data": data}
    new = load_file(three[2])
    moved = result(regraft.port(*three, tmp_path / "all", method=method, **known).out)
    change = {n: moved[n] - new[n] for n in new}
    name = "gradfix" if method == "naive" else f"{method}+gradfix"
    masked = result(regraft.port(*three, tmp_path / "out", method=name, **known).out)
    close(masked, regraft.porting.gradfix.transport(mlp(), new, change, data), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(masked[n], moved[n]) for n in new)


def test_gradfix_lets_images_vote_before_a_head_that_is_carried_over(three, tmp_path):
    tuned = load_file(three[1]) | {"6.weight": torch.randn(3, 8), "6.bias": torch.randn(3)}
    save_file(tuned, three[1])
    data = [(torch.randn(8, 6), torch.randint(3, (8,)))]
    found = result(regraft.port(*three, tmp_path / "out", method="gradfix", data=data, **KNOWN).out)
    new = load_file(three[2])
    assert torch.equal(found["6.weight"], tuned["6.weight"])
    assert not torch.equal(found["0.weight"], new["0.weight"])


def test_batchnorm_statistics_are_those_of_the_data(tmp_path):
    base = state(Residual(), 0)
    paths = saved(tmp_path, base=base, tuned=near(base), new=state(Residual(), 1))
    images = torch.randn(8, 3, 8, 8)
    known = {"model": Residual(), "inputs": images[:2], "method": "naive"}
    data = [(images, torch.randint(CLASSES, (8,)))]
    found = result(regraft.port(*paths, tmp_path / "out", data=data, **known).out)
    stem = torch.nn.functional.conv2d(images, found["stem.weight"], found["stem.bias"])
    close({"m": found["norm.running_mean"]}, {"m": stem.mean((0, 2, 3))}, rtol=1e-4, atol=1e-4)
    without = result(regraft.port(*paths, tmp_path / "plain", **known).out)
    assert (without["norm.running_var"] >= 0).all()


def test_a_shared_tensor_is_written_once_and_ties_that_are_none_are_refused(tmp_path):
    base = state(Attention(), 0)
    paths = saved(tmp_path, base=base, tuned=near(base), new=state(Attention(), 1))
    both = {**base, "out.weight": base["embed.weight"].clone()}
    save_file(both, paths[0])
    known = {"model": Attention(), "inputs": INPUTS[Attention], "method": "naive"}
    assert "out.weight" not in result(regraft.port(*paths, tmp_path / "out", **known).out)
    save_file({**both, "out.weight": both["out.weight"] + 1}, paths[0])
    with pytest.raises(BadFile, match=r"'out\.weight' and 'embed\.weight' differ"):
        regraft.port(*paths, tmp_path / "other", **known)


# ---------------------------------------------------------------- memory, kills


def test_tensors_are_read_one_pair_at_a_time(tmp_path, monkeypatch):
    layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    base = state(model, 0)
    paths = saved(tmp_path, base=base, tuned=near(base), new=state(model, 1))
    regraft.trace(model, torch.randn(1, 16), verify=True).save(tmp_path / "spec.json")
    alive, peak, read = [0], [0], Entry.read

    def counted(entry: Entry) -> torch.Tensor:
        tensor = read(entry)
        alive[0] += tensor.nbytes
        peak[0] = max(peak[0], alive[0])
        weakref.finalize(tensor, lambda size=tensor.nbytes: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(Entry, "read", counted)
    for method in ("weights", "naive"):
        regraft.port(*paths, tmp_path / method, spec=tmp_path / "spec.json", method=method)
    assert 0 < peak[0] <= 5 * 16 * 16 * 4  # a tensor of each network, the next one's, and biases; of 36


def test_no_similarity_is_kept_but_the_last(monkeypatch):
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(70, 70), nn.ReLU())])
    pair = [{n: torch.randn(t.shape) for n, t in model.named_parameters()} for _ in range(2)]
    made, alive, solve = [], [], regraft.matching.descent.assign_many

    def counted(*args, **kwargs):
        alive.append(sum(one() is not None for one in made))
        found = solve(*args, **kwargs)
        made.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr("regraft.matching.descent.assign_many", counted)
    match_streamed(regraft.trace(model, torch.randn(1, 70)), *pair)
    assert max(alive) <= 2 < len(made)


def test_an_interrupted_port_goes_on_where_it_was(three, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    asked = {**KNOWN, "method": "weights", "max_memory": None}
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            regraft.port(*three, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(porting.methods, "match_streamed", interrupted)
        patch.setattr("regraft.porting.output_folder.write_tensors", interrupted)
        regraft.port(*three, tmp_path / "out", resume=True, **asked)
    regraft.port(*three, tmp_path / "whole", **asked)
    close(result(tmp_path / "out"), result(tmp_path / "whole"), rtol=0, atol=0)
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- bad input, as the command says it


def broken(name: str, change) -> object:
    def make(paths: list[Path]) -> list[Path]:
        path = paths[["base", "tuned", "new"].index(name)]
        save_file(change(load_file(path)), path)
        return paths

    return make


def without(name: str):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors | {name: tensor}


def shallower(tensors: Tensors) -> Tensors:
    kept = {n: t for n, t in tensors.items() if n[0] in "02"}
    return kept | {"4.weight": torch.ones(CLASSES, 9), "4.bias": torch.ones(CLASSES)}


def images(paths: list[Path], count: int) -> Path:
    from PIL import Image

    for part in ("train", "test"):
        for label in range(count):
            folder = paths[0].parent / "images" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (8, 8), (20 * number, 40 * label, 0)).save(folder / f"{number}.png")
    return paths[0].parent / "images"


BAD = {
    "architecture": (broken("base", without("2.weight")), [], "has no tensor '2.weight'.*another architecture"),
    "shape": (broken("new", put("2.weight", torch.ones(3, 3))), [], r"new.*'2\.weight' has shape \(3, 3\)"),
    "shallower": (broken("new", shallower), [], r"new.*'4\.weight' has shape \(5, 9\).*no classifier's"),
    "extra": (broken("tuned", put("0.scale", torch.ones(3))), [], "tuned.*has tensor '0.scale'"),
    "nan": (broken("tuned", put("0.bias", torch.full((12,), torch.nan))), [], "'0.bias' of .*tuned.*not finite"),
    "other base": (
        broken("base", lambda tensors: {n: torch.randn(t.shape) for n, t in tensors.items()}), [], "does not come from"
    ),
    "exchanged": (lambda p: [p[2], p[1], p[0]], [], r"does not come from .*new.*nearer to .*base"),
    "equal": (lambda p: [p[1], p[1], p[2]], [], "there is nothing to port"),
    "absent": (lambda p: [p[0].with_name("none.pt"), *p[1:]], [], "none.pt"),
    "memory": (lambda p: p, ["--max-memory", "10MB"], "takes about .* of memory, and there are 10 MB"),
    "there": (lambda p: p, ["--out", "."], "there is something already"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_and_status_1(case, three, tmp_path, monkeypatch, capsys):
    change, more, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    paths = change(three)
    before = sorted(tmp_path.iterdir())
    assert command("port", paths, *WEIGHTS, "--out", "out", *more) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(said, captured.err), captured.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "resnet81"], "do you mean resnet"),
        (["--model", "nowhere:net"], "cannot find 'nowhere:net'"),
        (["--model", f"{__name__}:mlp", "--method", "fgtm"], "unknown method 'fgtm'"),
        (["--model", f"{__name__}:mlp", "--method", "fgmt"], "needs data"),
        (["--model", f"{__name__}:mlp", "--max-memory", "much"], "no size: 'much'"),
        ([], "a model is needed"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_status_2(more, said, three, tmp_path, capsys):
    settings = ("--shape", 2, 6, "--out", tmp_path / "out", "--method", "weights")
    assert command("port", three, *settings, *more) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("classes", "status"), [(CLASSES, 0), (CLASSES - 1, 1)])
def test_a_folder_of_images_has_the_classes_of_the_head(classes, status, tmp_path, capsys):
    base = state(Residual(), 0)
    paths = saved(tmp_path, base=base, tuned=near(base), new=state(Residual(), 1))
    model = ("--model", f"{__name__}:Residual", "--shape", 1, 3, 8, 8)
    data = ("--data", images(paths, classes), "--steps", 2, "--out", tmp_path / "out", "--json")
    assert command("port", paths, *model, *data) == status
    captured = capsys.readouterr()
    if status:
        assert f"has images of {CLASSES - 1} classes, and the head {CLASSES} outputs" in captured.err
    else:
        assert set(json.loads(captured.out)["accuracy"]) >= {"naive sum", "result"}


def test_too_little_disk_is_said_before_any_work(three, tmp_path, monkeypatch):
    full = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(OSError, match="has 100 B"):
        regraft.port(*three, tmp_path / "out", method="weights", **KNOWN)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(three, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert command("port", three, *WEIGHTS, "--out", tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "relative distance of the fine-tune" in printed
    assert "needs about" in printed
    assert "2.weight (0)" in printed
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------- match and fuse


def test_an_aligned_checkpoint_is_the_same_function_nearer(three, tmp_path, capsys):
    spec = regraft.trace(mlp(), INPUTS[mlp])
    base = load_file(three[0])
    moved = regraft.apply(spec, spec.random(torch.Generator().manual_seed(1)), base)
    save_file(near(moved), three[2])
    x = torch.randn(32, 6)
    data = [(x, torch.func.functional_call(mlp(), base, x).argmax(1))]  # which both know
    done = regraft.match_checkpoints(three[0], three[2], tmp_path / "out", data=data, **KNOWN)
    assert done.measured["distance"]["after"] < done.measured["distance"]["before"]
    assert done.measured["barrier"]["after"] < done.measured["barrier"]["before"]
    close(result(done.out), regraft.apply(spec, done.perms[0], near(moved)), rtol=0, atol=0)
    assert command("match", [three[0], three[2]], *OF_MLP, "--out", tmp_path / "again") == 0
    assert "distance, after" in capsys.readouterr().out
    by_data = regraft.match_checkpoints(three[0], three[2], tmp_path / "d", data=data, activations=True, **KNOWN)
    assert by_data.measured["distance"]["after"] < by_data.measured["distance"]["before"]
    assert command("match", [three[0], three[2]], *OF_MLP, "--out", tmp_path / "no", "--activations") == 2
    assert "matching by activations needs data" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_sum_of_checkpoints(three, tmp_path):
    a, b, c = (load_file(path) for path in three)
    assert command("fuse", three, "--weights", 0.5, 0.25, -1, "--out", tmp_path / "out") == 0
    close(result(tmp_path / "out"), {n: 0.5 * a[n] + 0.25 * b[n] - c[n] for n in a})


def test_aligned_copies_sum_to_the_original(three, tmp_path):
    spec = regraft.trace(mlp(), INPUTS[mlp])
    base = load_file(three[0])
    save_file(regraft.apply(spec, spec.random(torch.Generator().manual_seed(1)), base), three[1])
    out = regraft.fuse_checkpoints(three[:2], [0.5, 0.5], tmp_path / "out", align=True, **KNOWN).out
    close(result(out), base)


def test_sums_of_unlike_checkpoints_are_refused(three, tmp_path, capsys):
    broken("tuned", without("0.bias"))(three)
    for weights, status, said in (
        ((1, 1), 1, "has no tensor '0.bias'"),
        ((1,), 2, "2 networks need as many weights"),
    ):
        assert command("fuse", three[:2], "--out", tmp_path / "out", "--weights", *weights) == status
        assert said in capsys.readouterr().err


# ---------------------------------------------------------------- the models that people have, small


def resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1])


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


@pytest.mark.parametrize("make", [resnet, vit])
def test_models_of_torchvision_and_timm(make, tmp_path):
    torch.manual_seed(0)
    base, new = make().state_dict(), make().state_dict()
    head = "fc" if make is resnet else "head"
    width = base[f"{head}.weight"].shape[1]
    tuned = near(base) | {f"{head}.weight": torch.randn(4, width), f"{head}.bias": torch.randn(4)}
    paths = saved(tmp_path, base=base, new=new)
    torch.save({"state_dict": {f"model.{n}": t for n, t in tuned.items()}}, tmp_path / "tuned.ckpt")
    files = [paths[0], tmp_path / "tuned.ckpt", paths[1]]
    named = ("--model", f"{__name__}:{make.__name__}", "--shape", 1, 3, 32, 32, "--out", tmp_path / "out")
    assert command("port", files, "--method", "weights", *named) == 0
    model = make()
    regraft.fast.adopt(model, 4, head=head)
    model.load_state_dict(result(tmp_path / "out"))


def test_a_classifier_of_transformers_in_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.BertConfig(**sizes, intermediate_size=32, num_labels=3)
    torch.manual_seed(0)
    base, new = transformers.BertModel(config), transformers.BertForPreTraining(config)
    tuned = transformers.BertForSequenceClassification(config)
    tuned.bert.load_state_dict(near(base.state_dict()))
    for name, model in {"base": base, "tuned": tuned, "new": new}.items():
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    tokens = torch.randint(50, (8, 6))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.randint(3, (8,))}
    paths = [tmp_path / name for name in ("base", "tuned", "new", "out")]
    done = regraft.port(*paths, model=f"hf/{tmp_path / 'tuned'}", data=[batch], steps=2)
    kind = transformers.BertForSequenceClassification
    loaded, problems = kind.from_pretrained(done.out, output_loading_info=True)
    assert not any(problems.values())
    assert any("cls.predictions" in note for note in done.plan.notes)
    assert set(CheckpointFile.open(done.out)) == set(loaded.state_dict())
