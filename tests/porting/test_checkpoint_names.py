"""Files as libraries lay them out: names, wrappers, several networks, shards; read, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import drawn, mlp, near, one_line, save, three_verbs, written

# ---------------------------------------------------------------------------------------------------
# Names


def averaged(tensors):
    return {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in tensors.items()}}


WRAPPED = {
    "averaged": averaged,
    "averaged, compiled": lambda t: averaged({f"_orig_mod.{n}": v for n, v in t.items()}),
    "compiled, in parallel": lambda t: {f"module._orig_mod.{n}": v for n, v in t.items()},
    "in parallel inside Lightning": lambda t: {f"model.module.{n}": v for n, v in t.items()},
    "FSDP": lambda t: {f"_fsdp_wrapped_module.{n}": v for n, v in t.items()},
    "checkpointed activations": lambda t: {
        n.replace("0.", "0._checkpoint_wrapped_module.", 1): v for n, v in t.items()
    },
    "compiled inside": lambda t: {n.replace("2.", "2._orig_mod.", 1): v for n, v in t.items()},
    "Lightning with a loss's weight": lambda t: (
        {f"model.{n}": v for n, v in t.items()} | {"loss.weight": torch.ones(5)}
    ),
    "Lightning with a metric's counter": lambda t: (
        {f"net.{n}": v for n, v in t.items()} | {"acc.total": torch.tensor(3)}
    ),
    "another name for the network": lambda t: {f"network.{n}": v for n, v in t.items()},
    "two wrappers with words between": lambda t: {f"module.backbone.{n}": v for n, v in t.items()},
}


@pytest.mark.parametrize("verb", ["port", "match"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_off(kind, verb, tmp_path, run, module):
    """Names of wrappers, wherever they stand, and tensors beside the model's own: read, with a note."""
    base, new = drawn(0), drawn(1)
    model = ["--model", f"{module()}:mlp", "--shape", 1, 6]
    verbs = three_verbs(tmp_path, base, near(base), new, model)
    save(tmp_path / "new.safetensors", WRAPPED[kind](new))
    if verb == "port":
        save(tmp_path / "tuned.safetensors", WRAPPED[kind](near(base)))
    done = run(*verbs[verb])
    assert done.status == 0, done.text
    assert written(tmp_path / "out").keys() == mlp().state_dict().keys()
    assert "took" in done.out or "left out" in done.out


def test_another_architecture_is_still_refused(tmp_path, run, module):
    """Where some of the model's own tensors are lacking, foreign names are not left out."""
    a = save(tmp_path / "a.safetensors", drawn(0))
    b = save(tmp_path / "b.safetensors", {"0.weight": torch.ones(8, 6), "3.weight": torch.ones(5, 8)})
    done = run("match", a, b, "--model", f"{module()}:mlp", "--shape", 1, 6, "--out", tmp_path / "out")
    one_line(done, "b.safetensors", status=[1])


# ---------------------------------------------------------------------------------------------------
# Several networks in one file

SEVERAL = {
    "raw and average": ("model", "ema"),
    "raw and average, prefixed": ("model", "model_ema"),
    "Lightning and average": ("state_dict", "state_dict_ema"),
    "parameters and average": ("params", "params_ema"),
    "student and teacher": ("student", "teacher"),
    "two players": ("generator", "discriminator"),
    "two of any name": ("first", "second"),
}


@pytest.mark.parametrize("verb", ["fuse", "match"])
@pytest.mark.parametrize("kind", SEVERAL)
def test_several_networks_are_listed_and_one_is_chosen(kind, verb, tmp_path, run, module):
    """A file with two networks: both keys are named, and --key chooses; none is taken in silence."""
    keys = SEVERAL[kind]
    networks = {key: drawn(seed) for seed, key in enumerate(keys)}
    torch.save(networks | {"epoch": 3}, tmp_path / "a.pt")
    files = [tmp_path / "a.pt"] * (1 if verb == "fuse" else 2)
    how = ["--weights", 1] if verb == "fuse" else ["--model", f"{module()}:mlp", "--shape", 1, 6]
    words = [verb, *files, *how, "--out", tmp_path / "out"]
    one_line(run(*words), "--key", *keys)
    for seed, key in enumerate(keys):
        done = run(*words[:-1], tmp_path / f"out-{key}", "--key", key)
        assert done.status == 0, done.text
        # In the card, and so in what decides whether an interrupted run may be resumed.
        assert f'"key": "{key}"' in (tmp_path / f"out-{key}" / "README.md").read_text()
        for name, value in written(tmp_path / f"out-{key}").items():
            assert torch.equal(value, networks[key][name]), seed


@pytest.mark.parametrize("key", ["net", "network", "params", "weights", "module", "model_state", "backbone", "ema"])
def test_one_network_under_any_key_is_read(key, tmp_path, run):
    """`{"net": ..., "epoch": 3}`: the only network in the file, and the note says where it was."""
    torch.save(
        {key: drawn(0), "epoch": 3, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}},
        tmp_path / "a.pt",
    )
    done = run("fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out")
    assert done.status == 0, done.text
    assert written(tmp_path / "out").keys() == drawn(0).keys()
    assert repr(key) in done.out


def test_a_key_that_is_not_there_lists_those_that_are(tmp_path, run):
    """--key of another name: one line with the keys."""
    torch.save({"model": drawn(0), "ema": drawn(1)}, tmp_path / "a.pt")
    words = ["fuse", tmp_path / "a.pt", "--weights", 1, "--out", tmp_path / "out", "--key", "teacher"]
    one_line(run(*words), "teacher", "model", "ema")


# ---------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("where", ["shards", "deep/inside", "."])
def test_shards_in_a_subfolder_are_found(where, form, tmp_path, run):
    """An index whose shards lie below its folder."""
    tensors = drawn(0)
    names = list(tensors)
    folder = tmp_path / "net" / where
    folder.mkdir(parents=True)
    where_is = {}
    for number, own in enumerate((names[:2], names[2:])):
        save(folder / f"part-{number}.{form}", {name: tensors[name] for name in own})
        where_is |= {name: f"{where}/part-{number}.{form}" for name in own}
    stem = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    (tmp_path / "net" / f"{stem}.index.json").write_text(json.dumps({"weight_map": where_is}))
    done = run("fuse", tmp_path / "net", "--weights", 1, "--out", tmp_path / "out")
    assert done.status == 0, done.text
    assert written(tmp_path / "out").keys() == tensors.keys()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "shards/../../secret.safetensors"])
def test_shards_outside_the_folder_are_refused(name, tmp_path, run):
    """An index must not name files outside its folder: refused, and not called missing."""
    save(tmp_path / "secret.safetensors", drawn(0))
    (tmp_path / "net" / "shards").mkdir(parents=True)
    index = tmp_path / "net" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(drawn(0), name)}))
    said = one_line(run("fuse", index, "--weights", 1, "--out", tmp_path / "out"), index.name, status=[1])
    assert "missing" not in said


def test_an_overlay_index_is_refused_with_its_reason(tmp_path, run):
    """An index that gives one tensor of a file that holds more: the tensor and both files are named."""
    save(tmp_path / "old.safetensors", drawn(0))
    save(tmp_path / "new.safetensors", {"2.weight": torch.ones(5, 8)})
    where = dict.fromkeys(drawn(0), "old.safetensors") | {"2.weight": "new.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    done = run("fuse", index, "--weights", 1, "--out", tmp_path / "out")
    if done.status:
        one_line(done, "2.weight", "old.safetensors", "new.safetensors")
    else:
        assert torch.equal(written(tmp_path / "out")["2.weight"], torch.ones(5, 8))


@pytest.mark.parametrize("what", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_says_merge_first(what, tmp_path, run):
    """A LoRA folder is no network: the refusal says to merge it."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    held = {
        "base_model.model.0.lora_A.weight": torch.ones(2, 6),
        "base_model.model.0.lora_B.weight": torch.ones(8, 2),
    }
    save(tmp_path / "lora" / what, held)
    base = save(tmp_path / "base.safetensors", drawn(0))
    said = one_line(run("fuse", base, tmp_path / "lora", "--weights", 1, 1, "--out", tmp_path / "out"), "lora")
    assert "merge" in said.lower()


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/vit-base-patch16-224"])
def test_the_id_of_a_hub_says_that_a_folder_is_wanted(name, tmp_path, run, monkeypatch):
    """What looks like a model's id and is no path here: says that folders and files are wanted."""
    monkeypatch.chdir(tmp_path)
    said = one_line(run("fuse", name, "--weights", 1, "--out", tmp_path / "out"), name)
    assert "folder" in said and ("download" in said.lower() or "hub" in said.lower())
