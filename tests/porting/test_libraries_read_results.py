"""Results are loaded by the libraries that their inputs came from, and answer as before."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import near, save

VERBS = ["port", "match", "fuse"]


@pytest.fixture
def berts(tmp_path):
    """Folders of a small BERT: base, fine-tune with its own labels and tokenizer, new base."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f", "g"]
    folders = []
    start = None
    for seed, name in enumerate(("base", "tuned", "new")):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(config)
        if name == "tuned":
            model.load_state_dict(near(start, by=0.02))
        start = start or {k: v.clone() for k, v in model.state_dict().items()}
        model.save_pretrained(tmp_path / name)
        if name == "tuned":
            (tmp_path / "vocab.txt").write_text("\n".join(words))
            transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    return folders


def words(verb, folders, tmp_path):
    base, tuned, new = folders
    model = ["--model", f"hf/{tuned}", "--out", tmp_path / "out"]
    return {
        "port": ["port", base, tuned, new, "--method", "weights", *model],
        "match": ["match", new, tuned, *model],
        "fuse": ["fuse", tuned, new, "--weights", "1", "0", "--out", tmp_path / "out"],
    }[verb]


@pytest.mark.parametrize("verb", VERBS)
def test_transformers_loads_what_is_written(verb, berts, tmp_path, run):
    """`from_pretrained` of the result finds every tensor, the labels and the tokenizer."""
    transformers = pytest.importorskip("transformers")
    done = run(*words(verb, berts, tmp_path))
    assert done.status == 0, done.text
    model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True, local_files_only=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert model.config.id2label[1] == "yes"
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True).convert_tokens_to_ids("c")
        == 7
    )


@pytest.mark.parametrize("verb", ["match", "fuse"])
def test_a_pipeline_answers_as_before(verb, berts, tmp_path, run):
    """The fine-tune's own pipeline, before and after what leaves the function as it is."""
    transformers = pytest.importorskip("transformers")
    assert run(*words(verb, berts, tmp_path)).status == 0
    before, after = (
        transformers.pipeline("text-classification", model=str(folder))("a b c")[0]
        for folder in (berts[1], tmp_path / "out")
    )
    assert after["label"] == before["label"] and after["score"] == pytest.approx(before["score"], abs=1e-4)


@pytest.mark.parametrize("verb", VERBS)
def test_timm_loads_what_is_written(verb, tmp_path, run):
    """`timm.create_model(checkpoint_path=...)` takes the path that the command prints."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name = "test_resnet.r160_in1k"
    states = []
    for number, part in enumerate(("base", "tuned", "new")):
        state = timm.create_model(name, pretrained=False).state_dict()
        states.append(state if number != 1 else near(states[0], by=0.01))
        save(tmp_path / f"{part}.safetensors", states[-1])
    folders = [tmp_path / f"{part}.safetensors" for part in ("base", "tuned", "new")]
    base, tuned, new = folders
    model = ["--model", f"timm/{name}", "--out", tmp_path / "out"]
    command = {
        "port": ["port", base, tuned, new, "--method", "weights", *model],
        "match": ["match", new, tuned, *model],
        "fuse": ["fuse", tuned, new, "--weights", "1", "0", "--out", tmp_path / "out"],
    }[verb]
    done = run(*command, "--json")
    assert done.status == 0, done.text
    printed = json.loads(done.out)["out"]
    (weights,) = list((tmp_path / "out").glob("*.safetensors"))
    for path in (printed if printed.endswith(".safetensors") else str(weights),):
        timm.create_model(name, pretrained=False, checkpoint_path=path)
