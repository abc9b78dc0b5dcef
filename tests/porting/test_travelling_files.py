"""What stands beside the weights travels with a result: all of it, and nothing that lies elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import drawn, files, near, one_line, save, written

BESIDE = {
    "config.json": '{"model_type": "own"}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "vocab.txt": "a\nb\n",
    "merges.txt": "a b\n",
    "spiece.model": "pieces",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "generation_config.json": '{"max_length": 3}',
    "chat_template.jinja": "{{ messages }}",
}


def folder(place: Path, seed: int, beside: dict[str, str], tensors=None) -> Path:
    place.mkdir(parents=True)
    save(place / "model.safetensors", drawn(seed) if tensors is None else tensors)
    for name, text in beside.items():
        (place / name).write_text(text)
    return place


@pytest.fixture
def words(tmp_path, module):
    """verb -> (the words of the command, the folder whose files are to travel)."""
    base = folder(tmp_path / "base", 0, {"config.json": '{"of": "base"}'})
    tuned = folder(tmp_path / "tuned", 0, BESIDE, near(drawn(0)))
    new = folder(tmp_path / "new", 1, {"config.json": '{"of": "new"}'})
    model = ["--model", f"{module()}:mlp", "--shape", 1, 6, "--out", tmp_path / "out"]
    return {
        "port": (["port", base, tuned, new, "--method", "weights", *model], tuned),
        "match": (["match", new, tuned, *model], tuned),
        "fuse": (["fuse", tuned, new, "--weights", ".5", ".5", "--out", tmp_path / "out"], tuned),
    }


VERBS = ["port", "match", "fuse"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_file_that_is_not_weights_travels(verb, tmp_path, run, words):
    """Configuration, tokenizer, processor, generation and templates: from the fine-tune, b, or the first network."""
    command, _ = words[verb]
    assert run(*command).status == 0
    for name, text in BESIDE.items():
        assert (tmp_path / "out" / name).is_file(), f"{name} did not travel"
        assert (tmp_path / "out" / name).read_text() == text


@pytest.mark.parametrize("verb", VERBS)
def test_weights_and_what_a_training_left_do_not_travel(verb, tmp_path, run, words):
    """Other weights, optimizer states, logs and hidden files stay where they are; the card is our own."""
    command, source = words[verb]
    for name in ("optimizer.pt", "pytorch_model.bin.bak", "training_args.bin", ".git", "model.onnx"):
        (source / name).write_text("x")
    (source / "README.md").write_text("their card")
    (source / "runs").mkdir()
    (source / "runs" / "events").write_text("x")
    command = [word if word != source else source / "model.safetensors" for word in command]
    assert run(*command).status == 0
    out = files(tmp_path / "out")
    assert not out & {"optimizer.pt", "training_args.bin", ".git", "runs/events", "model.onnx"}
    assert "regraft" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("how", ["to a file", "by a relative path", "through a second link"])
def test_a_link_out_of_the_folder_is_refused(how, name, verb, tmp_path, run, words):
    """A file that is a symlink out of its folder would publish what lies there: refused by name, nothing is written."""
    command, source = words[verb]
    (tmp_path / "secret").write_text("password")
    (source / name).unlink()
    target: Path | str = tmp_path / "secret"
    if how == "by a relative path":
        target = "../secret"
    if how == "through a second link":
        (source / "inner").symlink_to(tmp_path / "secret")
        target = "inner"
    (source / name).symlink_to(target)
    done = run(*command)
    assert not any("password" in (tmp_path / "out" / f).read_text("utf-8", "replace") for f in files(tmp_path / "out"))
    one_line(done, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dangling", "to itself", "fifo", "folder"])
def test_a_file_that_is_none_is_said_or_left_out(kind, tmp_path, run, words):
    """A config.json that cannot be read does not end in a traceback, and does not block."""
    import os

    command, source = words["port"]
    config = source / "config.json"
    config.unlink()
    if kind == "fifo":
        os.mkfifo(config)
    elif kind == "folder":
        config.mkdir()
    else:
        config.symlink_to(config if kind == "to itself" else tmp_path / "nowhere")
    done = run(*command)
    if done.status:
        one_line(done, "config.json")
    else:
        assert "config.json" not in files(tmp_path / "out")


def test_a_link_within_the_folder_travels_as_a_file(tmp_path, run, words):
    """Caches of the Hub keep links beside blobs: what stays inside is copied."""
    command, source = words["port"]
    (source / "config.json").rename(source / "blob.json")
    (source / "config.json").symlink_to("blob.json")
    assert run(*command).status == 0
    config = tmp_path / "out" / "config.json"
    assert config.read_text() == BESIDE["config.json"] and not config.is_symlink()


def test_a_snapshot_of_the_hub_travels(tmp_path, run, module):
    """The cache of the Hub: snapshots/HASH/FILE is a link to ../../blobs/HASH, which is its own store."""
    store = tmp_path / "models--own--net"
    folder(store / "blobs", 0, BESIDE)
    snapshot = store / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (store / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    done = run("fuse", snapshot, "--weights", 1, "--out", tmp_path / "out")
    assert done.status == 0, done.text
    assert (tmp_path / "out" / "config.json").read_text() == BESIDE["config.json"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_small_result_is_one_file(verb, tmp_path, run, words):
    """One shard is model.safetensors, as every library looks for it."""
    command, _ = words[verb]
    assert run(*command).status == 0
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert not index.exists() or set(json.loads(index.read_text())["weight_map"].values()) == {"model.safetensors"}
    assert written(tmp_path / "out")
