"""Ports that need inputs of the task, but no labels: what each must give exactly, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import regraft
from regraft import networks
from regraft.core.files import BadFile
from regraft.core.forward import inputs_of
from regraft.core.tensors import Tensors
from regraft.porting import data_by_name, data_of
from regraft.porting.label_free import distil, fit_head, predict
from regraft.porting.label_free.head import Sums
from regraft.porting.models import NamedModel
from regraft.training.evaluation import NotFinite


def draw(model: nn.Module, seed: int) -> Tensors:
    return networks.initialise(model, torch.Generator().manual_seed(seed))


def inputs(*shape: int, batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(batches)]


MLP = networks.mlp([16, 24, 5])
BATCHES = inputs(32, 16)


def agreement(model: nn.Module, a: Tensors, b: Tensors, batches: list[Tensor]) -> float:
    answers = (torch.cat(predict(model, tensors, batches)).argmax(-1) for tensors in (a, b))
    return float(torch.eq(*answers).float().mean())


# ---------------------------------------------------------------- head


def test_head_is_the_fine_tunes_where_that_is_linear_in_the_features() -> None:
    base, other = draw(MLP, 0), draw(MLP, 1)
    tuned = base | {name: other[name] for name in ("layers.1.weight", "layers.1.bias")}
    fitted = fit_head(MLP, tuned, base, BATCHES)
    for name, tensor in tuned.items():
        torch.testing.assert_close(fitted[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [12, 60])  # fewer than features, and more
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_is_that_of_the_normal_equations(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, width, generator=generator, dtype=torch.float64) + 1 for width in (20, 3))
    sums = Sums(20, bias=bias)
    for part in (slice(0, 5), slice(5, None)):
        sums.add(x[part], y[part])
    weight, free = sums.solve(0.1)
    if bias:
        x, y = x - x.mean(0), y - y.mean(0)
    penalty = 0.1 * x.square().sum() / 20 * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(weight.T, torch.linalg.solve(x.T @ x + penalty, x.T @ y))
    assert bias or not free.any()


def test_chosen_ridge_has_the_least_score_of_generalised_cross_validation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 20, generator=generator, dtype=torch.float64)
    y = x[:, :3] + 2 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    sums = Sums(20, bias=False)
    sums.add(x, y)
    weight, _ = sums.solve()

    def score(ridge: float) -> float:
        penalty = ridge * x.square().sum() / 20 * torch.eye(20, dtype=torch.float64)
        hat = x @ torch.linalg.solve(x.T @ x + penalty, x.T)
        return float((y - hat @ y).square().sum() / (40 - hat.trace()) ** 2)

    ridges = torch.logspace(-9, 2, 45, dtype=torch.float64).tolist()
    best = min(ridges, key=score)
    torch.testing.assert_close(weight, sums.solve(best)[0])
    assert ridges[0] < best < ridges[-1]


def test_too_few_inputs_other_classes_and_bad_values_are_refused() -> None:
    base, tuned = draw(MLP, 0), draw(MLP, 1)
    with pytest.raises(ValueError, match="2 inputs are too few to fit a head of 5 classes: give at least 3"):
        fit_head(MLP, tuned, base, [BATCHES[0][:2]])
    wider = networks.mlp([16, 24, 7])
    with pytest.raises(ValueError, match=r"'layers.1' has 7 outputs, the fine-tune has 5 classes"):
        fit_head(MLP, tuned, draw(wider, 0), BATCHES, new_model=wider)
    with pytest.raises(ValueError, match="batch 1 holds a value that is not finite"):
        fit_head(MLP, tuned, base, [BATCHES[0], BATCHES[1] / 0])
    huge = base | {"layers.0.weight": base["layers.0.weight"] * 1e38}
    with pytest.raises(NotFinite, match=r"input of layer 'layers.1', are not finite"):
        fit_head(MLP, tuned, huge, [batch * 1e3 for batch in BATCHES])
    with pytest.raises(NotFinite, match="logits of batch 0 are not finite"):
        fit_head(MLP, huge, base, [batch * 1e3 for batch in BATCHES])


def test_head_of_a_network_of_another_width() -> None:
    wider = networks.mlp([16, 64, 5])
    tuned, new_base = draw(MLP, 0), draw(wider, 1)
    fitted = fit_head(MLP, tuned, new_base, BATCHES, new_model=wider)
    answers = torch.cat(predict(wider, fitted, BATCHES)), torch.cat(predict(MLP, tuned, BATCHES))
    assert float((answers[0].argmax(-1) == answers[1].argmax(-1)).float().mean()) > 0.8


# ---------------------------------------------------------------- distil


def test_distilling_agrees_more_than_its_start_and_changes_nothing_it_is_given() -> None:
    base, tuned = draw(MLP, 0), draw(MLP, 1)
    before = {name: tensor.clone() for name, tensor in base.items()}
    trained = distil(MLP, tuned, base, BATCHES, steps=400, lr=1e-2)
    assert agreement(MLP, trained, tuned, BATCHES) > max(0.9, agreement(MLP, base, tuned, BATCHES))
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())


def test_distilling_the_fine_tune_itself_leaves_it() -> None:
    tuned = draw(MLP, 1)
    trained = distil(MLP, tuned, tuned, BATCHES, steps=1, lr=0.0)
    assert all(torch.equal(trained[name], tensor) for name, tensor in tuned.items())


# ---------------------------------------------------------------- by the command's function


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """BASE, a fine-tune of it, and NEW_BASE that was permuted: what "functional" ports all but exactly."""
    base = draw(MLP, 0)
    tuned = {name: torch.lerp(tensor, draw(MLP, 1)[name], 0.3) for name, tensor in base.items()}
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    new = base | {"layers.0.weight": base["layers.0.weight"][order], "layers.0.bias": base["layers.0.bias"][order]}
    new["layers.1.weight"] = base["layers.1.weight"][:, order]
    paths = []
    for name, tensors in {"base": base, "tuned": tuned, "new": new}.items():
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, paths[-1])
    return paths


def test_data_without_labels_are_ported_by_auto_and_judged_by_agreement(three: list[Path], tmp_path: Path) -> None:
    done = regraft.port(*three, tmp_path / "out", model=MLP, inputs=torch.randn(2, 16), data=inputs(40, 16))
    assert done.plan.method == "auto"
    assert done.measured["chosen"] in done.measured["candidates"]
    assert "few-shot" not in done.measured["candidates"]  # which wants labels
    assert done.measured["agreement"]["result"] > 0.9
    assert done.measured["relation"]["cosine_matched"] > 0.999 > done.measured["relation"]["cosine"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "agreement with the fine-tune, on validation" in card and "| functional |" in card


def test_labels_are_left_aside_on_request(three: list[Path], tmp_path: Path) -> None:
    labelled = [(batch, torch.zeros(40, dtype=torch.long)) for batch in inputs(40, 16)]  # which say nothing
    settings = {"model": MLP, "inputs": torch.randn(2, 16), "data": {"train": labelled}}
    done = regraft.port(*three, tmp_path / "out", method="functional", labels="none", **settings)
    assert done.measured["agreement"]["result"] > 0.9
    with pytest.raises(ValueError, match="'few-shot' trains on labels"):
        regraft.port(*three, tmp_path / "other", method="few-shot", labels="none", **settings)


@pytest.mark.parametrize("method", ["head", "functional", "distil", "functional+distil", "theseus", "fgmt+gradfix"])
def test_every_method_works_without_labels(method: str, three: list[Path], tmp_path: Path) -> None:
    data = [batch if "gradfix" in method else {"images": batch} for batch in inputs(40, 16)]
    done = regraft.port(
        *three, tmp_path / "out", model=MLP, inputs=torch.randn(2, 16), data=data, method=method, steps=4
    )
    agreement = done.measured["agreement"]
    assert agreement["result"] >= agreement["new base"] - 0.1


def test_predictions_of_one_class_are_warned_of(three: list[Path], tmp_path: Path) -> None:
    data = [torch.full((40, 16), 3.0) + 0.01 * batch for batch in inputs(40, 16)]
    done = regraft.port(*three, tmp_path / "out", model=MLP, inputs=torch.randn(2, 16), data=data, method="head")
    assert "puts all of" in done.measured["warning"]
    assert done.measured["warning"] in (tmp_path / "out" / "README.md").read_text()


def test_folders_of_images_without_classes_are_read(three: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(30):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    named = NamedModel(networks.residual8(5, 3, 0.125), torch.randn(1, 3, 8, 8))
    data = data_by_name(str(folder), named)
    assert data.unlabelled == {"train"} and next(iter(data.train))[0].shape == (30, 3, 8, 8)
    held = data.hold_out()
    assert [len(next(iter(part))[0]) for part in (held.train, held.validation)] == [24, 6]
    (folder / "readme.txt").write_text("no image")
    assert len(list(data_by_name(str(folder), named).train)) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.txt").write_text("no image")
    with pytest.raises(BadFile, match="holds no image"):
        data_by_name(str(empty), named)


WIDER = networks.mlp([16, 40, 7])


@pytest.mark.parametrize("method", [None, "head", "distil", "theseus"])
def test_a_new_base_of_another_width_and_other_classes(method: str | None, three: list[Path], tmp_path: Path) -> None:
    new = tmp_path / "wider.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in draw(WIDER, 2).items()}, new)
    done = regraft.port(
        *three[:2], new, tmp_path / "out", model=MLP, new_model=WIDER, inputs=torch.randn(2, 16),
        data=inputs(60, 16), method=method, steps=10,
    )  # fmt: skip
    assert done.plan.method == (method or "auto")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["layers.0.weight"].shape == (40, 16) and written["layers.1.weight"].shape == (5, 40)
    assert done.measured["agreement"]["result"] > 0.6


def test_methods_that_need_one_model_say_so(three: list[Path], tmp_path: Path) -> None:
    settings = {"model": MLP, "new_model": WIDER, "inputs": torch.randn(2, 16), "data": inputs(60, 16)}
    with pytest.raises(ValueError, match="'functional' needs a new base of the fine-tune's model"):
        regraft.port(*three, tmp_path / "out", method="functional", **settings)
    with pytest.raises(BadFile, match=r"tensor 'layers\.0\.weight' has shape"):
        regraft.port(*three, tmp_path / "out", method="head", **settings)  # NEW_BASE is none of that model's
    assert not (tmp_path / "out").exists()


def test_what_is_held_out_of_a_shuffled_loader_is_never_trained_on() -> None:
    numbers = torch.arange(40.0)[:, None]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(numbers), batch_size=10, shuffle=True)
    held = data_of(loader).hold_out()
    assert held.unlabelled == {"train", "validation"}
    for _ in range(3):
        parts = [torch.cat([inputs_of(batch) for batch in part]).flatten() for part in (held.train, held.validation)]
        assert sorted(torch.cat(parts).tolist()) == numbers.flatten().tolist()


def test_alignment_and_sums_refuse_data_without_labels(three: list[Path], tmp_path: Path) -> None:
    settings = {"model": MLP, "inputs": torch.randn(2, 16), "data": inputs(40, 16)}
    with pytest.raises(ValueError, match="match measures accuracies: it needs data with labels"):
        regraft.match_checkpoints(three[0], three[2], tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="fuse measures accuracies: it needs data with labels"):
        regraft.fuse_checkpoints(three[:2], [0.5, 0.5], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
