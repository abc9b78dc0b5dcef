"""The models whose symmetry is traced and proved: torchvision's, timm's, transformers', diffusers', and plain torch's.

A name is a family and a model of it ("timm/resnet18"). Nothing is downloaded: weights are random, those of transformers
and diffusers in tiny configurations that keep what the architecture does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regraft.core.extras import describe_install
from regraft.data import MissingData

Inputs = tuple[Any, ...]
"""Positional arguments of a model's forward."""

TORCHVISION = (
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "densenet121",
    "densenet161", "densenet169", "densenet201", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2",
    "efficientnet_b3", "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
    "efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2",
    "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf",
    "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf", "regnet_y_128gf",
    "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf", "regnet_y_400mf",
    "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet152", "resnet18", "resnet34", "resnet50",
    "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s",
    "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16",
    "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32",
    "wide_resnet101_2", "wide_resnet50_2",
)  # fmt: skip
"""Its classification models, all 80. Named here, so that to know them nothing need be imported."""

TIMM = (
    "resnet18", "resnext50_32x4d", "vit_tiny_patch16_224", "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224", "convnext_atto", "mixer_s16_224", "efficientnet_b0", "mobilevit_xs",
    "regnety_002", "edgenext_xx_small", "coatnet_0_rw_224", "maxvit_tiny_tf_224", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "poolformer_s12", "xcit_nano_12_p16_224", "levit_128s", "dla34",
    "hrnet_w18_small", "ghostnet_100", "eca_nfnet_l0", "visformer_tiny", "twins_svt_small",
    "tiny_vit_5m_224", "hiera_tiny_224", "cspresnet50", "ese_vovnet19b_dw", "res2net50_26w_4s",
    "skresnet18", "efficientformer_l1", "mobilenetv4_conv_small", "fastvit_t8", "repvgg_a0",
    "volo_d1_224", "convit_tiny", "crossvit_tiny_240",
)  # fmt: skip
SMALL_IMAGES = {
    "cspresnet50",
    "dla34",
    "ghostnet_100",
    "res2net50_26w_4s",
    "resnet18",
    "resnext50_32x4d",
    "skresnet18",
}
"""Models of timm that take images of 64 pixels, and are slow at their own size."""

Make = Callable[[], tuple[nn.Module, Inputs]]


def list_models(*families: str) -> tuple[str, ...]:
    """All models of some families, whether the package that makes them is installed or not."""
    models = {
        "torchvision": TORCHVISION,
        "timm": TIMM,
        **{family: tuple(made) for family, made in MADE.items()},
    }
    return tuple(f"{family}/{name}" for family in families for name in models[family])


def make_model(name: str) -> tuple[nn.Module, Inputs]:
    """A model in evaluation mode with random weights (of the global seed), and inputs of a small batch.

    Raises MissingData where the package that makes it is not installed, KeyError for an unknown name.
    """
    family, _, model = name.partition("/")
    try:
        if family == "torchvision":
            made = _from_torchvision(model)
        elif family == "timm":
            made = _from_timm(model)
        else:
            made = MADE[family][model]()
    except ModuleNotFoundError as problem:
        raise MissingData(f"{name} needs {problem.name}: {describe_install('models')}") from None
    return made[0].eval(), made[1]


def _images(pixels: int, channels: int = 3) -> Inputs:
    return (torch.rand(1, channels, pixels, pixels, generator=torch.Generator().manual_seed(0)),)


def _tokens(count: int, length: int = 7) -> Tensor:
    return torch.randint(3, count, (1, length), generator=torch.Generator().manual_seed(0))


# ---- torchvision and timm

PIXELS = {"inception_v3": 299, "maxvit_t": 224}
"""Where the auxiliary head, or the windows, need more than 64; vision transformers take 224 alone."""


def _from_torchvision(name: str) -> tuple[nn.Module, Inputs]:
    """Without the slow initialisation that two of the models have."""
    from torchvision import models

    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    pixels = PIXELS.get(name, 224 if name.startswith("vit_") else 64)
    return models.get_model(name, **slow), _images(pixels)


def _from_timm(name: str) -> tuple[nn.Module, Inputs]:
    import timm

    model = timm.create_model(name, num_classes=1000)  # some have no head of their own, others 21,841 classes
    return model, _images(64 if name in SMALL_IMAGES else model.default_cfg["input_size"][-1])


# ---- transformers and diffusers, tiny

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 60, "max_position_embeddings": 32}
GROUPED = {**WIDE, **TEXT, "num_key_value_heads": 2}
SEEN = {"image_size": 16, "patch_size": 4}


def _bert() -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**WIDE, **TEXT, num_labels=3)), (_tokens(60),)


def _distilbert() -> tuple[nn.Module, Inputs]:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, **TEXT)
    return DistilBertForSequenceClassification(config), (_tokens(60),)


def _gpt2() -> tuple[nn.Module, Inputs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=60)
    return GPT2LMHeadModel(config), (_tokens(60),)


def _llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**GROUPED)), (_tokens(60),)


def _qwen2() -> tuple[nn.Module, Inputs]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**GROUPED)), (_tokens(60),)


def _mixtral() -> tuple[nn.Module, Inputs]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("batched_mm")  # torch's grouped product knows no float64
    return model, (_tokens(60),)


def _t5() -> tuple[nn.Module, Inputs]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=60)
    tokens = _tokens(60)
    return T5ForConditionalGeneration(config), (tokens, torch.ones_like(tokens), tokens[:, :4])


def _vit() -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**WIDE, **SEEN, num_labels=3)), _images(16)


def _clip() -> tuple[nn.Module, Inputs]:
    from transformers import CLIPConfig, CLIPModel

    text = {**WIDE, **TEXT, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**WIDE, **SEEN}, projection_dim=24)
    return CLIPModel(config), (_tokens(60), *_images(16))


def _wav2vec2() -> tuple[nn.Module, Inputs]:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **WIDE, vocab_size=20, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config), (torch.randn(1, 400, generator=torch.Generator().manual_seed(0)),)


def _unet2d() -> tuple[nn.Module, Inputs]:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (*_images(16), torch.tensor([3]))


# ---- plain torch


class Recurrent(nn.Module):
    """Tokens -> embedding -> two recurrent layers -> the last step's logits."""

    def __init__(self, layer: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 24)
        self.layers = layer(24, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> logits [B, 5]."""
        return self.head(self.layers(self.embedding(tokens))[0][:, -1])


class Encoder(nn.Module):
    """nn.TransformerEncoder between an embedding with positions and a head on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 32)
        self.positions = nn.Parameter(torch.randn(7, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, 7] -> logits [B, 5]."""
        return self.head(self.layers(self.embedding(tokens) + self.positions).mean(1))


class UNet(nn.Module):
    """Two levels down and up, with skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down, self.bottom = _twice(3, 16), _twice(16, 32), _twice(32, 64)
        self.up1, self.up2 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join1, self.join2 = _twice(64, 32), _twice(32, 16)
        self.leave = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> [B, 2, H, W], H and W multiples of 4."""
        pool = nn.functional.max_pool2d
        first = self.enter(x)
        second = self.down(pool(first, 2))
        bottom = self.bottom(pool(second, 2))
        second = self.join1(torch.cat([self.up1(bottom), second], 1))
        return self.leave(self.join2(torch.cat([self.up2(second), first], 1)))


def _twice(inward: int, outward: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inward, outward):
        layers += [nn.Conv2d(channels, outward, 3, padding=1), nn.BatchNorm2d(outward), nn.ReLU()]
    return nn.Sequential(*layers)


MADE: dict[str, dict[str, Make]] = {
    "transformers": {
        "bert": _bert,
        "gpt2": _gpt2,
        "llama": _llama,
        "t5": _t5,
        "vit": _vit,
        "distilbert": _distilbert,
        "qwen2": _qwen2,
        "mixtral": _mixtral,
        "clip": _clip,
        "wav2vec2": _wav2vec2,
    },
    "diffusers": {"unet2d": _unet2d},
    "torch": {
        "lstm": lambda: (Recurrent(nn.LSTM), (_tokens(60),)),
        "gru": lambda: (Recurrent(nn.GRU), (_tokens(60),)),
        "transformer_encoder": lambda: (Encoder(), (_tokens(60),)),
        "unet": lambda: (UNet(), _images(16)),
    },
}
