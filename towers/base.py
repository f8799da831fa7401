"""Base classes of towers, and loading of weights."""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.devices import full_precision

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from config import Config
from core.errors import LabError
from core.tensor_files import load_tensors

HALF = (0.5, 0.5, 0.5)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite's own preprocessing
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CachedTower(nn.Module):
    """Replaces a tower whose features are cached: the identity, with a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, width), in float32 at least. Raises: LabError on anything else."""
        if not isinstance(features, Tensor) or features.shape[1:] != (self.width,):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise LabError(
                f"a cached tower takes (batch, {self.width}) features, not {got}; "
                "encode the images or texts first, or set the tower's mode to frozen."
            )
        return full_precision(features)


class PixelTower(nn.Module):
    """Normalizes uint8 images on the device.

    Args:
        width: of its output.
        mean, std: of the images it was trained on, in [0, 1].
    """

    def __init__(self, width: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.width = width
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 in 0..255 to normalized float; float images are returned unchanged."""
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)


class ImageTower(PixelTower):
    """A convolutional encoder.

    Args:
        body: maps normalized (B, 3, H, W) to the feature map (B, width, h, w).
        width: channels of the feature map.
        mean, std: of the images the body was trained on, in [0, 1].
    """

    def __init__(self, body: nn.Module, width: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(width, mean, std)
        self.body = body

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width, h, w)."""
        return self.body(self.normalise(images))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or normalized float -> (B, width), averaged over positions."""
        return self.feature_map(images).mean(dim=(2, 3))


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is first imported


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within, transformers shows no bar for reading local weights; bars of downloads are not changed."""
    import transformers

    bars = transformers.utils.logging
    were_on, hub_hidden = bars.is_progress_bar_enabled(), huggingface_hub.utils.are_progress_bars_disabled()
    bars.disable_progress_bar()  # the hub's, too
    try:
        yield
    finally:
        if were_on:
            bars.enable_progress_bar()
        hub = huggingface_hub.utils
        (hub.disable_progress_bars if hub_hidden else hub.enable_progress_bars)()


def is_local(name: str) -> bool:
    """Whether a model is a folder or in the hub's local cache."""
    return os.path.isdir(name) or hub_snapshot(name) is not None


def hub_snapshot(name: str) -> str | None:
    """The commit of a hub model in the local cache, or None for a folder or a model not cached."""
    if os.path.isdir(name):
        return None
    try:
        path = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path, not a name on the hub
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def load(auto_class: Any, name: str, **options: Any) -> Any:
    """`from_pretrained` from a folder, the hub's local cache or the hub, in this order.

    Raises: LabError if none has it, after seconds instead of the hub client's minutes of retries.
    """
    local = is_local(name)
    where = "its folder is incomplete" if local else "there is no such folder, and the hub does not have it"
    try:
        if not local and not _hub_answers():
            where = "there is no such folder, and the hub does not respond"
            raise OSError("no connection")
        with no_progress_bars() if local else contextlib.nullcontext():
            return auto_class.from_pretrained(name, local_files_only=local, **options)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError where shapes do not fit
        raise LabError(
            f"model {name!r} could not be loaded: {where} ({str(error).splitlines()[0]}); go online once "
            "to download it, or pass a folder created by save_pretrained."
        ) from error


def _hub_answers() -> bool:
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def load_whole(auto_class: Any, name: str, **options: Any) -> Any:
    """As `load`, but a missing weight is an error: it would be random."""
    model, info = load(auto_class, name, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise LabError(
            f"the weights of {name!r} lack {min(info['missing_keys'])}; give a model that was saved with it."
        )
    return model


def load_weights(module: nn.Module, path: str, rename: Callable[[Any], Any] = lambda state: state) -> None:
    """Load a file of weights, safetensors or torch's without its code, into a module.

    Args: rename: gives the file's entries the module's names.
    """
    if not Path(path).is_file():
        raise LabError(
            f"image_weights {path!r} is not a file; give a weights file, 'pretrained' or 'random'."
        )
    try:
        if path.endswith(".safetensors"):
            state = load_tensors(path, "give another file")[0]
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise many kinds of errors
        raise LabError(
            f"image_weights {path!r} cannot be read: it is damaged or not a file of weights."
        ) from error
    try:
        module.load_state_dict(rename(state))
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise LabError(
            f"{path} does not hold this tower's weights: {str(error).splitlines()[-1].strip()}"
        ) from error


def model_config(name: str) -> Any:
    """The configuration of a hub model or folder; afterwards `hub_snapshot` knows its commit."""
    from transformers import AutoConfig

    return load(AutoConfig, name)


def load_clip_half(auto_class: Any, name: str) -> Any:
    """One half of a CLIP with its projection, whose width may only be in the whole model's configuration."""
    width = getattr(model_config(name), "projection_dim", None)
    if width is None:
        raise LabError(f"model {name!r} is not a CLIP model: it has no joint image-text space.")
    return load_whole(auto_class, name, projection_dim=width)


def checkpointed(model: Any, on: bool) -> Any:
    """A transformers model, with gradient checkpointing if `on`."""
    if on:  # older versions know the second name
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    return model


def tower_fields(make: Callable[..., Any], config: Config) -> dict[str, Any]:
    """The configuration's fields with the names of a tower function's parameters after the first."""
    names = list(inspect.signature(make).parameters)[1:]
    return {name: config[name] for name in names if name in Config.model_fields}
