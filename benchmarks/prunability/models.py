"""Models of torchvision, timm and transformers that the table is about, with an input that each of them takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

LISTS = ("torchvision", "timm", "hf")
_LIBRARIES: list[torch.library.Library] = []  # a library that nobody holds is undone


@dataclass(frozen=True)
class Model:
    """A model of a list.

    Args:
        name: Its name.
        build: Makes it, with random parameters, and an example input.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any]]


def declare_operators() -> None:
    """Let torchvision import beside a build of torch that its compiled operators do not fit: their schemas are enough."""
    found = importlib.util.find_spec("torchvision")
    if found is None or _LIBRARIES:
        return
    compiled = next(Path(found.origin).parent.glob("_C*.so"), None)
    try:
        torch.ops.load_library(str(compiled))
    except OSError:
        _LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _LIBRARIES[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def models(which: str) -> list[Model]:
    """The models of a list; torchvision's smallest first.

    Args:
        which: One of `LISTS`.
    """
    declare_operators()
    return {"torchvision": _torchvision, "timm": _timm, "hf": _transformers}[which]()


def _torchvision() -> list[Model]:
    import torchvision

    def build(name: str) -> tuple[nn.Module, torch.Tensor]:
        settings: dict[str, Any] = {}
        size = 64
        if name.startswith("vit"):
            size = settings["image_size"] = 28 if name.endswith("14") else 64
        elif name.startswith("maxvit"):
            size = 224  # whose partitions divide it
        elif name.startswith("inception"):
            size = 299  # what its auxiliary classifier needs
        if name.startswith(("inception", "googlenet")):
            settings["init_weights"] = False
        return torchvision.models.get_model(name, **settings), torch.zeros(1, 3, size, size)

    def size(name: str) -> int:
        return torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]

    names = sorted(torchvision.models.list_models(module=torchvision.models), key=size)
    return [Model(name, lambda name=name: build(name)) for name in names]


SMALL = (
    "test",
    "atto",
    "pico",
    "femto",
    "nano",
    "micro",
    "xxs",
    "xxt",
    "tiny",
    "xs",
    "_t",
    "mini",
    "_s",
    "small",
    "18",
    "_b0",
    "a0",
    "_050",
)
"""Parts of the names of timm's small models, the smallest first."""


LARGEST, SMALLER = 512, 256
"""Pixels above which a model of a fixed size is made for fewer."""


def _timm() -> list[Model]:
    import timm

    def build(name: str) -> tuple[nn.Module, torch.Tensor]:
        model = timm.create_model(name)
        channels, *size = model.default_cfg["input_size"]
        if model.default_cfg.get("fixed_input_size") and min(size) > LARGEST:
            model, size = timm.create_model(name, img_size=SMALLER), [SMALLER, SMALLER]
        if not model.default_cfg.get("fixed_input_size") and min(size) > 128 and _runs(model, channels, 128):
            size = [128, 128]
        return model, torch.zeros(1, channels, *size)

    def rank(name: str) -> tuple:
        place = next((number for number, part in enumerate(SMALL) if part in name), len(SMALL))
        return place, len(name), name

    found = []
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if names:
            name = min(names, key=rank)
            found.append(Model(name, lambda name=name: build(name)))
    return found


def _runs(model: nn.Module, channels: int, size: int) -> bool:
    """Whether a model takes images of a size."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from catode.prune.describe.trace.recording import Failed, fake_copy, record

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        record(fake_copy(model, mode), torch.zeros(2, channels, size, size), mode)
    except Failed:
        return False
    return True


def _transformers() -> list[Model]:
    import transformers as hf

    image = {"image_size": 32, "patch_size": 8}
    small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    silent = {"attention_probs_dropout_prob": 0.0}
    text = {**small, "vocab_size": 99, "max_position_embeddings": 32}
    tokens = {"input_ids": torch.arange(12).view(1, 12)}
    pixels = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    plain = {"attn_implementation": "eager"}

    def of(model: Any, config: Any, example: dict[str, torch.Tensor]) -> Callable[[], tuple[nn.Module, Any]]:
        return lambda: (model(config), example)

    swin = hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    gpt = hf.GPT2Config(vocab_size=99, n_positions=32, n_embd=48, n_layer=2, n_head=4, use_cache=False, attn_pdrop=0.0)
    grouped = {**text, "num_key_value_heads": 2, "use_cache": False}
    clip = hf.CLIPVisionConfig(**small, **image, projection_dim=48)
    whisper = hf.WhisperConfig(
        d_model=48,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        num_mel_bins=8,
        max_source_positions=16,
    )
    sound = {"input_features": torch.zeros(1, 8, 32)}
    return [
        Model("vit", of(hf.ViTForImageClassification, hf.ViTConfig(**small, **image, **plain), pixels)),
        Model("deit", of(hf.DeiTForImageClassification, hf.DeiTConfig(**small, **image, **plain), pixels)),
        Model("swin", of(hf.SwinForImageClassification, swin, pixels)),
        Model("bert", of(hf.BertForSequenceClassification, hf.BertConfig(**text, **silent), tokens)),
        Model("gpt2", of(hf.GPT2LMHeadModel, gpt, tokens)),
        Model("llama", of(hf.LlamaForCausalLM, hf.LlamaConfig(**grouped), tokens)),
        Model("qwen2", of(hf.Qwen2ForCausalLM, hf.Qwen2Config(**grouped), tokens)),
        Model("mistral", of(hf.MistralForCausalLM, hf.MistralConfig(**grouped), tokens)),
        Model("clip", of(hf.CLIPVisionModel, clip, pixels)),
        Model("whisper encoder", lambda: (hf.WhisperModel(whisper).encoder, sound)),
    ]
