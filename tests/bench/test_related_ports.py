"""Ports between related bases, without labels: how bases branch, what rows say of them, and that no label is read."""

from dataclasses import replace

import pytest
import torch

from regraft.core.clock import Clock
from regraft.networks import papers as networks
from regraft.symmetry import trace, verify
from regraft.training.loop import Recipe
from regraft_bench.run import run
from regraft_bench.study import RunPaths, Scenario, Task
from regraft_bench.text import WORDS, load_text, text_transformer
from regraft_bench.transfer import STUDY
from regraft_bench.transfer.methods import label_free, ports
from regraft_bench.transfer.relatedness import BARRIER, COSINE, MATCHED
from regraft_bench.transfer.setting import Branching, PortSettings, Stage, TransferSetting

RECIPE = Recipe(epochs=1, lr=0.05, schedule="constant")
STAGE = Stage(Task("digits", per_class=40), RECIPE)
RELATIONS = {
    "independent": Branching((STAGE, STAGE), None, (STAGE, STAGE)),
    "0%": Branching((STAGE, STAGE), 0, (STAGE, STAGE)),
    "50%": Branching((STAGE, STAGE), 1, (STAGE,)),
    "further": Branching((STAGE, STAGE), 2, (replace(STAGE, others=True),)),
    "same": Branching((STAGE, STAGE), 2, ()),
}
SETTINGS = PortSettings(
    task=Task("digits"),
    model=networks.residual8,
    arguments={"num_classes": 10, "width": 0.0625, "in_channels": 1},
    recipe=RECIPE,
    subsequent=None,
    steps=2,
    schedule="uniform",
    bn_batches=5,
    images=(4,),
    alphas=(0.0, 1.0),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return RunPaths(cache=tmp_path_factory.mktemp("related"))


@pytest.fixture(scope="module")
def settings(place) -> dict[str, TransferSetting]:
    made = {
        name: TransferSetting(Scenario(name, (), replace(SETTINGS, pretraining=branching)), 0, place)
        for name, branching in RELATIONS.items()
    }
    for own in made.values():
        own._trace = made["same"]._trace  # one network, traced once
    return made


def test_the_later_bases_part_the_more_related_they_are(settings):
    cosines = [settings[name].relatedness[COSINE] for name in ("independent", "50%", "same")]
    assert cosines == sorted(cosines) and abs(cosines[0]) < 0.2 and cosines[-1] == pytest.approx(1)
    independent = settings["independent"].relatedness
    assert independent[COSINE + MATCHED] > independent[COSINE]
    assert settings["same"].relatedness[BARRIER] == pytest.approx(0, abs=1e-6)
    assert settings["independent"].relatedness[BARRIER] > 0.1


def test_bases_share_their_stages_and_nothing_else(settings):
    def first_stages(name: str, role: str) -> list[str]:
        return [purpose for purpose, _ in RELATIONS[name].list_stages(role)]

    assert first_stages("50%", "target") == ["source stage 0", "target stage 1"]
    assert first_stages("further", "target") == ["source stage 0", "source stage 1", "target stage 2 on others"]
    assert not set(first_stages("0%", "target")) & set(first_stages("0%", "source"))
    old, new = (settings["further"].pretrain(role) for role in ("source", "target"))
    assert any(not torch.equal(old[name], new[name]) for name in old)
    starts = [settings[name].build("target").state_dict() for name in ("0%", "same", "independent")]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert not torch.equal(starts[0]["fc.weight"], starts[2]["fc.weight"])


def test_other_images_of_the_same_classes(settings):
    own = settings["further"]
    once, others = (own.stage_data(replace(STAGE, others=flag)).train for flag in (False, True))
    assert once.labels.bincount().tolist() == others.labels.bincount().tolist() == [40] * 10
    pixels = [{tuple(image.flatten().tolist()) for image in split.images} for split in (once, others)]
    assert not pixels[0] & pixels[1]


def test_a_row_says_how_related_the_bases_are(place, settings):
    scenario = Scenario("related-tiny", label_free.related_methods(0.05), settings["50%"].settings, seeds=1)
    rows = list(run(STUDY, [scenario], place=place, rows=place.cache / "rows.jsonl"))
    assert not [row.failure for row in rows if row.failure]
    assert [row.method for row in rows] == [method.name for method in scenario.methods]
    for row in rows:
        assert {name: row.values[name] for name in settings["50%"].relatedness} == settings["50%"].relatedness
        assert 0 <= row.values[ports.metric_name(4)] <= 1


def test_on_the_same_base_naive_is_the_fine_tune(settings):
    own = settings["same"]
    moved = label_free.run_port_method("naive", own, ports.few_shot_data(own, 8), Clock())
    tuned = ports.fine_tune_base(own).tensors
    assert all(torch.allclose(moved[name], tuned[name], atol=1e-6) for name, _ in own.model.named_parameters())


@pytest.mark.parametrize("name", ["gradfix", "theseus", "auto"])
def test_methods_without_labels_read_none(settings, name):
    own = settings["50%"]
    seen = ports.few_shot_data(own, 4)
    wrong = replace(seen, split=replace(seen.split, labels=torch.zeros_like(seen.split.labels)))
    one, other = (label_free.run_port_method(name, own, given, Clock()) for given in (seen, wrong))
    assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)


def test_texts_of_the_standard_library():
    modules = ("turtle", "pydoc", "argparse")
    data, again = (load_text(modules, seed, 0.1) for seed in (0, 1))
    assert data.classes == modules and data.train.images.shape[1:] == (1, 1, WORDS)
    assert torch.equal(data.test.images, again.test.images)
    assert len(data.train) == len(again.train) and not torch.equal(data.train.images, again.train.images)
    batch, _ = next(iter(data.train.batches(8)))
    assert torch.equal(batch, data.train.images[:8])  # word numbers as they are
    model = text_transformer(3, width=8, depth=1, heads=2)
    assert model(batch).shape == (8, 3)
    verify(trace(model, (batch,)), model, (batch,))
