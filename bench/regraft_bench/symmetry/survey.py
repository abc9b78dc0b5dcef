"""Many more models than the rows prove: the families of timm, transformers, diffusers and others, traced and proved.

    python -m regraft_bench.symmetry.survey timm transformers --out survey.jsonl

Models are built from configuration objects, with random weights, and tiny where the configuration allows; nothing is
downloaded. One line of JSON for each: what moves, the proof's error, warnings, or why there is neither. Models that a
file has already are passed over, so that an interrupted survey goes on; ``--table`` prints what a file holds.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.symmetry import trace, verify

SurveyModel = Callable[[], tuple[nn.Module, Any]]

MOST_PARAMETERS = 30_000_000
"""Larger models are passed over: the survey is of operators, not of sizes."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside after so many seconds of this process."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examine(make: SurveyModel, limit: int) -> dict[str, Any]:
    """What the tracer and the proof say of one model."""
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    start = time.process_time()
    stage = "build"
    try:
        with time_limit(limit), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with torch.device("meta"):
                count = sum(p.numel() for p in make()[0].parameters())
            if count > MOST_PARAMETERS:
                return {"skipped": f"{count} parameters"}
            torch.manual_seed(0)
            model, inputs = make()
            model.eval()
            stage = "run"
            with torch.no_grad():
                model(**inputs) if isinstance(inputs, dict) else model(*inputs)
            stage = "trace"
            caught.clear()
            spec = trace(model, inputs, verify=False)
            row["moved"], row["both"] = spec.shares()
            row["groups"] = len(spec.groups)
            row["stay"] = spec.reasons
            row["warnings"] = sorted({str(w.message) for w in caught if w.category is UserWarning})
            stage = "verify"
            row["error"] = verify(spec, model, inputs)
    except Exception as error:
        row |= {"stage": stage, "problem": f"{type(error).__name__}: {error}"[:600]}
    return row | {"cpu": round(time.process_time() - start, 1)}


# ---- timm


def timm_models() -> dict[str, SurveyModel]:
    """The smallest-looking model of every module of timm."""
    import timm

    def make(name: str, size: int) -> tuple[nn.Module, Any]:
        return timm.create_model(name, num_classes=7), (torch.rand(1, 3, size, size),)

    made: dict[str, SurveyModel] = {}
    small = ("nano", "atto", "femto", "pico", "tiny", "_t_", "xx", "_s", "18", "26", "b0", "000", "100")
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        names.sort(key=lambda n: (not any(s in n for s in small), len(n)))
        for name in names[:1]:
            config = timm.get_pretrained_cfg(name)
            size = (config.input_size if config else (3, 224, 224))[-1]
            made[f"timm/{module}/{name}"] = lambda name=name, size=size: make(name, size)  # type: ignore[misc]
    return made


# ---- transformers

TINY: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "n_dim": 32,
    "num_hidden_layers": 2, "n_layers": 2, "n_layer": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_encoder_layers": 2, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_heads": 4, "n_head": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "attention_head_size": 8,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "hidden_dim": 48, "ffn_hidden_size": 48, "max_position_embeddings": 32, "n_positions": 32, "embedding_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "image_size": 32,
    "patch_size": 8, "num_labels": 3, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 2,
    "topk_group": 1, "state_size": 4, "mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2,
    "time_step_rank": 4, "mamba_dt_rank": 4, "conv_kernel": 4, "expand": 2, "attention_hidden_size": 32, "n_groups": 1,
    "first_k_dense_replace": 1, "sliding_window": 16, "rotary_dim": 4, "num_mel_bins": 16, "max_source_positions": 16,
    "max_target_positions": 16, "num_channels": 3, "use_cache": False, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 60, "num_kv_shared_layers": 0, "tie_word_embeddings": True, "lru_width": 32,
    "mlp_dim": 48, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "global_head_dim": 8, "attention_window": 4,
}  # fmt: skip


def tiny_config(kind: type) -> Any:
    """A configuration of this class, tiny in all that it knows."""
    known: set[str] = set()
    for cls in kind.__mro__[:-1]:
        known |= set(inspect.signature(cls).parameters) | set(getattr(cls, "__annotations__", {}))
    known |= set(getattr(kind, "attribute_map", {}))
    chosen = {key: value for key, value in TINY.items() if key in known}
    attempts = [chosen, {k: v for k, v in chosen.items() if k != "head_dim"}]
    for attempt in attempts:
        with contextlib.suppress(Exception):
            return kind(**attempt)
    return kind()


TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING", "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING", "video": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING",
    "segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", "series": "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING",
}  # fmt: skip


def transformers_models(tasks: tuple[str, ...] = tuple(TASKS)) -> dict[str, SurveyModel]:
    """Every architecture of these tasks, from its configuration class."""
    import transformers.models.auto.modeling_auto as auto

    made: dict[str, SurveyModel] = {}
    for task in tasks:
        mapping = getattr(auto, TASKS[task], {})
        for kind in mapping:
            architecture = mapping[kind]
            architecture = architecture[0] if isinstance(architecture, tuple) else architecture
            name = f"transformers/{task}/{architecture.__name__}"
            made[name] = lambda k=kind, a=architecture, t=task: _architecture(k, a, t)  # type: ignore[misc]
    return made


def _architecture(kind: type, architecture: type, task: str) -> tuple[nn.Module, Any]:
    config = tiny_config(kind)
    with contextlib.suppress(Exception):
        config.num_labels = 3
    model = architecture(config)
    with contextlib.suppress(Exception):
        model.set_experts_implementation("batched_mm")
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(int(getattr(config, "vocab_size", 60) or 60), 60)
    tokens = torch.randint(3, vocabulary, (1, 7), generator=generator, device="cpu")
    main = getattr(model, "main_input_name", "input_ids")
    if task in ("causal", "masked"):
        return model, {"input_ids": tokens}
    if task == "seq2seq":
        first = (
            {main: tokens} if main == "input_ids" else {main: torch.rand(1, getattr(config, "num_mel_bins", 16), 32)}
        )
        return model, {**first, "decoder_input_ids": tokens[:, :4]}
    size = getattr(config, "image_size", 32) or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if task == "video":
        return model, {main: torch.rand(1, getattr(config, "num_frames", 4), 3, height, width, device="cpu")}
    if task == "audio":
        shape = (1, 800) if main == "input_values" else (1, 32, getattr(config, "num_mel_bins", 16))
        return model, {main: torch.rand(shape, device="cpu")}
    channels = getattr(config, "num_channels", 3) or 3
    return model, {main: torch.rand(1, channels, height, width, device="cpu")}


# ---- diffusers, segmentation, graphs, audio


def diffusers_models() -> dict[str, SurveyModel]:
    """Denoisers and autoencoders at toy sizes."""
    import diffusers

    blocks = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
    image, step = torch.rand(1, 4, 16, 16), torch.tensor([3])
    text = torch.rand(1, 5, 16)
    cross = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    made: dict[str, Callable[[], tuple[Any, Any]]] = {
        "UNet2DConditionModel": lambda: (
            diffusers.UNet2DConditionModel(
                sample_size=16, cross_attention_dim=16, attention_head_dim=4, down_block_types=cross[0],
                up_block_types=cross[1], **blocks,
            ), (image, step, text),
        ),
        "UNet2DModel": lambda: (
            diffusers.UNet2DModel(
                sample_size=16, in_channels=4, out_channels=4, attention_head_dim=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                **blocks,
            ), (image, step),
        ),
        "AutoencoderKL": lambda: (
            diffusers.AutoencoderKL(
                in_channels=4, out_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2, **blocks,
            ), (image,),
        ),
        "AutoencoderTiny": lambda: (
            diffusers.AutoencoderTiny(
                in_channels=4, out_channels=4, encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16),
                num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
            ), (image,),
        ),
        "VQModel": lambda: (
            diffusers.VQModel(
                in_channels=4, out_channels=4, num_vq_embeddings=16, down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2, **blocks,
            ), (image,),
        ),
    }  # fmt: skip
    made |= _diffusion_transformers(image, step, text)
    return {f"diffusers/{name}": make for name, make in made.items()}


def _diffusion_transformers(image: Tensor, step: Tensor, text: Tensor) -> dict[str, SurveyModel]:
    import diffusers

    return {
        "DiTTransformer2DModel": lambda: (
            diffusers.DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
                sample_size=16, patch_size=4, num_embeds_ada_norm=10, norm_num_groups=4,
            ), (image, step, torch.tensor([1])),
        ),
        "PixArtTransformer2DModel": lambda: (
            diffusers.PixArtTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, patch_size=4,
                sample_size=16, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
                norm_num_groups=4,
            ), {"hidden_states": image, "encoder_hidden_states": text, "timestep": step,
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        ),
        "SD3Transformer2DModel": lambda: (
            diffusers.SD3Transformer2DModel(
                sample_size=16, patch_size=4, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
            ), (image, text, torch.rand(1, 12), step),
        ),
        "FluxTransformer2DModel": lambda: (
            diffusers.FluxTransformer2DModel(
                in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
            ), {"hidden_states": torch.rand(1, 6, 4), "encoder_hidden_states": text,
                "pooled_projections": torch.rand(1, 12), "timestep": step, "img_ids": torch.rand(6, 3),
                "txt_ids": torch.rand(5, 3)},
        ),
        "PriorTransformer": lambda: (
            diffusers.PriorTransformer(
                num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=5,
                additional_embeddings=4,
            ), {"hidden_states": torch.rand(1, 16), "timestep": step, "proj_embedding": torch.rand(1, 16),
                "encoder_hidden_states": text},
        ),
    }  # fmt: skip


def segmentation_models() -> dict[str, SurveyModel]:
    """segmentation_models_pytorch, every decoder on a small encoder."""
    import segmentation_models_pytorch as smp

    names = (
        "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet",
        "Segformer",
    )  # fmt: skip

    def make(name: str) -> tuple[nn.Module, Any]:
        return getattr(smp, name)("resnet18", encoder_weights=None, classes=2), (torch.rand(1, 3, 64, 64),)

    return {f"segmentation/{name}": lambda name=name: make(name) for name in names}  # type: ignore[misc]


class GraphNet(nn.Module):
    """Two layers of one kind, then classes of nodes."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(4, 8), layer(8, 8), layer(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """x [N, 4], edges int64 [2, E] -> logits [N, 2]."""
        h = self.first(self.stem(x).relu(), edges).relu()
        return self.out(self.second(h, edges).relu())


def graph_models() -> dict[str, SurveyModel]:
    """Layers of torch_geometric, two of each."""
    from torch_geometric import nn as layers

    plain = ("GCNConv", "SAGEConv", "GraphConv", "LEConv", "ClusterGCNConv", "TAGConv", "SGConv", "ARMAConv", "MFConv",
             "FeaStConv", "GatedGraphConv", "ResGatedGraphConv", "TransformerConv", "GATConv", "GATv2Conv",
             "GeneralConv", "FiLMConv", "GENConv", "LGConv", "EGConv", "SuperGATConv", "SSGConv", "APPNP")  # fmt: skip

    def layer(name: str, inward: int, outward: int) -> nn.Module:
        kind = getattr(layers, name)
        if name == "GatedGraphConv":
            return kind(outward, 2)
        if name == "LGConv":
            return kind()
        if name == "APPNP":
            return kind(2, 0.1)
        return kind(inward, outward)

    def make(name: str) -> tuple[nn.Module, Any]:
        edges = torch.tensor([[0, 1, 2, 2, 4, 3], [1, 0, 3, 4, 2, 0]], device="cpu")
        return GraphNet(lambda i, o: layer(name, i, o)), (torch.rand(5, 4, device="cpu"), edges)

    made: dict[str, SurveyModel] = {f"graph/{name}": lambda name=name: make(name) for name in plain}  # type: ignore[misc]

    def isomorphism() -> tuple[nn.Module, Any]:
        net = GraphNet(lambda i, o: layers.GINConv(nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))))
        return net, make("GCNConv")[1]

    return {**made, "graph/GINConv": isomorphism}


def audio_models() -> dict[str, SurveyModel]:
    """torchaudio, at toy sizes."""
    from torchaudio import models

    made: dict[str, Callable[[], tuple[Any, Any]]] = {
        "Conformer": lambda: (models.Conformer(16, 4, 24, 2, 3), (torch.rand(1, 9, 16), torch.tensor([9]))),
        "ConvTasNet": lambda: (
            models.ConvTasNet(2, 16, 16, 3, 16, 24, 2, 2), (torch.rand(1, 1, 400),)
        ),
        "DeepSpeech": lambda: (models.DeepSpeech(16, 24, 5), (torch.rand(1, 1, 9, 16),)),
        "Emformer": lambda: (models.Emformer(16, 4, 24, 2, 4), (torch.rand(1, 8, 16), torch.tensor([8]))),
        "HDemucs": lambda: (
            models.HDemucs(
                ["a", "b"], audio_channels=1, channels=8, nfft=256, depth=3, norm_starts=2, dconv_attn=2, dconv_lstm=2
            ), (torch.rand(1, 1, 4096),),
        ),
        "Wav2Letter": lambda: (models.Wav2Letter(5, "mfcc", 16), (torch.rand(1, 16, 200),)),
        "WaveRNN": lambda: (
            models.WaveRNN([2, 2, 2], 5, 8, 1, 16, 16, 3, 16, 8, 16), (torch.rand(1, 1, 32), torch.rand(1, 1, 16, 8))
        ),
    }  # fmt: skip
    return {f"audio/{name}": make for name, make in made.items()}


FAMILIES: dict[str, Callable[[], dict[str, SurveyModel]]] = {
    "timm": timm_models, "transformers": transformers_models, "diffusers": diffusers_models,
    "segmentation": segmentation_models, "graph": graph_models, "audio": audio_models,
}  # fmt: skip


# ---- the command


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: counts for each family, then what is refused, and what is below half of "both", with the reasons."""
    ran = [row for row in rows if row.get("stage") not in ("build", "run") and "skipped" not in row]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in ran:
        families.setdefault(row["name"].partition("/")[0], []).append(row)
    lines = [
        "# Survey of the symmetry of library models", "",
        "Made by `python -m regraft_bench.symmetry.survey FAMILY ... --out survey.jsonl` and `--table`: tiny models",
        "with random weights, one example each, batch of one. *Error*: the largest of the proofs. *Both*: the share of",
        "the weights that move along both axes. Only models that run are counted.",
        "", "| family | models | proved | unsound | refused in a sentence | below half of both | largest error |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for family, members in families.items():
        proved = [row for row in members if "error" in row]
        unsound = [row for row in members if "changes the function" in row.get("problem", "")]
        below = [row for row in proved if row["both"] < 0.5]
        worst = max((row["error"] for row in proved), default=0.0)
        counts = (len(members), len(proved), len(unsound), len(members) - len(proved) - len(unsound), len(below))
        lines.append(f"| {family} | " + " | ".join(map(str, counts)) + f" | {worst:.1e} |")
    lines += ["", "## Below half of both", "", "| model | moved | both | what stays, and why |", "|---|---|---|---|"]
    for row in sorted((row for row in ran if row.get("both", 1) < 0.5 and "error" in row), key=lambda row: row["both"]):
        lines.append(f"| {row['name']} | {row['moved']:.0%} | {row['both']:.0%} | {_shorten(_main_reason(row))} |")
    lines += ["", "## Not proved", "", "| model | stage | message |", "|---|---|---|"]
    lines += [f"| {r['name']} | {r['stage']} | {_shorten(r['problem'])} |" for r in ran if "error" not in r]
    return "\n".join(lines) + "\n"


def _main_reason(row: dict[str, Any]) -> str:
    """The first reason that is no end of the network and no table of rows."""
    reasons = [why for why in row.get("stay", {}).values() if why not in ("an input", "an output")]
    lost = [why for why in reasons if "embedding" not in why and "lets them meet" not in why]
    return (lost or row["warnings"] or reasons or ["inputs and outputs alone"])[0]


def _shorten(text: str) -> str:
    """One table cell."""
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= 150 else text[:147] + "..."


def run_survey() -> None:
    """The command of this module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("survey.jsonl"))
    parser.add_argument("--match", default="")
    parser.add_argument("--limit", type=int, default=240)
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    if chosen.table:
        print(format_table([json.loads(line) for line in chosen.out.read_text().splitlines()]), end="")
        return
    torch.set_num_threads(1)
    done = {json.loads(line)["name"] for line in chosen.out.read_text().splitlines()} if chosen.out.exists() else set()
    with chosen.out.open("a") as out:
        for family in chosen.families:
            for name, make in FAMILIES[family]().items():
                if chosen.match in name and name not in done:
                    out.write(json.dumps({"name": name, **examine(make, chosen.limit)}) + "\n")
                    out.flush()


if __name__ == "__main__":
    run_survey()
