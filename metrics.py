"""Every retrieval figure, made from one set of exact ranks (`ranks.py`).

Values are fractions in [0, 1], save ranks (1 is nearest) and rsum (percentage points). A query without
a match is left out of every average and counted as left out. A k over the gallery's size looks at the
whole gallery: recall is then 1, and so is the chance level beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import core.threads  # noqa: F401  read when torch is imported

import numpy as np
import pandas as pd
import torch

from core.errors import LabError, choose
from retrieval.figures import summarise
from retrieval.ranks import IdList, as_ids, match_ranks


def retrieval_metrics(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_id: IdList,
    text_id: IdList,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Retrieval figures both ways over distinct images, beside chance; see `match_ranks`, `summarise`.

    >>> eye = torch.eye(3)
    >>> retrieval_metrics(eye, eye[[0, 0, 1, 2]], [7, 8, 9], [7, 7, 8, 9], ks=(1,))["t2i_recall@1"]
    1.0
    """
    return summarise(match_ranks(image_features, text_features, image_id, text_id), ks)


# ---- protocols -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How a gallery is made from an evaluation set."""

    description: str
    num_images: int | None = None  # the set must hold exactly so many
    captions: int | None = None  # the first so many of each image; None for all
    folds: int = 1  # consecutive equal parts, each a gallery of its own; figures are their means
    split_source: str = ""  # what divided its data, see `CaptionTable.split_source`; "" for any


PROTOCOLS: Mapping[str, Protocol] = {
    "full": Protocol("every image and caption given"),
    "one_caption": Protocol("every image given, only its first caption", captions=1),
    "coco_5k": Protocol(
        "COCO Karpathy test, 5,000 images, five captions each", 5000, 5, 1, "Karpathy's split of coco"
    ),
    "coco_1k_fivefold": Protocol(
        "COCO Karpathy test, mean of five galleries of 1,000 images, five captions each",
        *(5000, 5, 5, "Karpathy's split of coco"),
    ),
    "flickr_1k": Protocol(
        "Flickr30k Karpathy test, 1,000 images, five captions each",
        1000,
        5,
        1,
        "Karpathy's split of flickr30k",
    ),
    "flickr8k_1k": Protocol(
        "Flickr8k official test, 1,000 images, five captions each", 1000, 5, 1, "Flickr8k's official lists"
    ),
}


def evaluate_protocol(
    name: str,
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_id: IdList,
    text_id: IdList,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float | str]:
    """`retrieval_metrics` under a named protocol of PROTOCOLS, with its name and description.

    Captions count in the order of their rows, folds in the order of the images' first rows. Folds and
    limits on captions leave out whatever has id -1. The mean over folds stands under each name.

    Raises: LabError if there is no such protocol or the set is not the one it is defined on.
    """
    protocol = choose(PROTOCOLS, name, "protocol")
    image_ids = as_ids(image_id, len(image_features), "image_id")
    text_ids = as_ids(text_id, len(text_features), "text_id")
    figures = [
        retrieval_metrics(
            image_features[images], text_features[texts], image_ids[images], text_ids[texts], ks
        )
        for images, texts in _galleries(name, protocol, image_ids, text_ids)
    ]
    columns = {key: [fold[key] for fold in figures] for key in figures[0]}
    means = {k: v[0] if len(set(v)) == 1 else float(np.mean(v)) for k, v in columns.items()}
    return {"protocol": name, "protocol_description": protocol.description, **means}


def _galleries(
    name: str, protocol: Protocol, image_id: np.ndarray, text_id: np.ndarray
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of images and of texts of each of the protocol's galleries."""
    if protocol.captions is None:
        return [(torch.arange(len(image_id)), torch.arange(len(text_id)))]
    ids, first = np.unique(image_id, return_index=True)
    rows = np.sort(first[ids != -1])
    position = pd.Series(text_id).groupby(text_id).cumcount().to_numpy()  # earlier rows with the same id
    chosen = np.isin(text_id, image_id[rows]) & (position < protocol.captions)
    if protocol.num_images is not None:
        short = len(rows) * protocol.captions - np.count_nonzero(chosen)
        if len(rows) != protocol.num_images or short:
            raise LabError(
                f"protocol {name!r} is {protocol.description}; this set holds {len(rows):,} images "
                f"and lacks {short:,} captions. Choose 'full' or 'one_caption'"
            )
    parts = np.array_split(rows, protocol.folds)
    texts = [np.flatnonzero(chosen & np.isin(text_id, image_id[part])) for part in parts]
    return [(torch.from_numpy(part), torch.from_numpy(text)) for part, text in zip(parts, texts, strict=True)]


@dataclass(frozen=True)
class Published:
    """One system's figures; recalls are at 1, 5 and 10, or at 1 alone."""

    system: str
    protocol: str  # a name in PROTOCOLS
    dataset: str
    num_images: int
    captions_per_image: int
    i2t: tuple[float, ...]
    t2i: tuple[float, ...]


# fmt: off
PUBLISHED: tuple[Published, ...] = (
    Published("ResNet50, frozen CLIP text (course labs)", "one_caption", "COCO val2014", 40_504, 1,
              (0.064, 0.178, 0.253), (0.093, 0.229, 0.314)),
    Published("ResNet50 with BatchNorm, frozen CLIP text (course labs)", "one_caption", "COCO val2014", 40_504, 1,
              (0.086, 0.218, 0.303), (0.118, 0.280, 0.371)),
    Published("CLIP ViT-B/32 zero-shot", "coco_5k", "COCO Karpathy test", 5_000, 5,
              (0.501, 0.750, 0.835), (0.304, 0.559, 0.669)),
    Published("LiT coco_B16B, trained on COCO alone", "coco_5k", "COCO test", 5_000, 5,
              (0.472,), (0.321,)),
    Published("VSE++ ResNet152", "coco_5k", "COCO Karpathy test", 5_000, 5,
              (0.413, 0.711, 0.812), (0.303, 0.594, 0.724)),
    Published("CLIP ViT-B/32 fine-tuned on COCO", "coco_5k", "COCO Karpathy test", 5_000, 5,
              (0.622, 0.856, 0.917), (0.469, 0.749, 0.836)),
    Published("VSE++ ResNet152", "flickr_1k", "Flickr30k test", 1_000, 5,
              (0.529, 0.805, 0.872), (0.396, 0.701, 0.795)),
    Published("CLIP ViT-B/32 zero-shot", "flickr_1k", "Flickr30k test", 1_000, 5,
              (0.789, 0.949, 0.982), (0.588, 0.836, 0.900)),
)
# fmt: on


def published_points(direction: str = "t2i", k: int = 1) -> list[tuple[str, int, float]]:
    """(system, gallery size in images, Recall@K) of every published system that reports this K."""
    place = choose({"1": 0, "5": 1, "10": 2}, str(k), "published k")
    recalls = [choose({"i2t": point.i2t, "t2i": point.t2i}, direction, "direction") for point in PUBLISHED]
    points = zip(PUBLISHED, recalls, strict=True)
    return [
        (point.system, point.num_images, values[place]) for point, values in points if place < len(values)
    ]


# --- figures ---


def chance(metrics: dict[str, Any]) -> dict[str, float]:
    """Chance levels, by the metric they belong to."""
    return {
        name.replace("_chance@", "_recall@").removesuffix("_chance"): value
        for name, value in metrics.items()
        if "_chance" in name
    }


def is_recall(name: str) -> bool:
    return bool(re.fullmatch(r"(i2t|t2i)_recall@\d+", name))


def recalls_of(metrics: dict[str, Any]) -> dict[str, float]:
    """The recalls among the figures, without their intervals' ends."""
    return {name: value for name, value in metrics.items() if is_recall(name)}


def figures_of(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures that tables show: the recalls, or every number where the data set measures itself."""
    numbers = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not re.search(r"^num_|^left_out$|_(low|high|chance)$", name)
    }
    return recalls_of(metrics) or numbers


PERCENT = re.compile(r"(recall|chance)@|^(top\d+|swapped|order)(_|$)|%")
"""Names of figures in [0, 1] that tables show in percent."""


def as_text(
    name: str, value: float, ends: Sequence[float] = (), std: float = math.nan, sign: str = ""
) -> str:
    """A figure as tables show it: `27.1`, `27.1 [25.0, 29.3]` or `27.1 ± 0.4`.

    Recalls, accuracies and their chance levels are in percent, other figures have three digits.

    Args:
        ends: of the interval, where one is known.
        std: standard deviation over seeds.
        sign: `+` for differences.
    """

    def text(number: float, sign: str = sign) -> str:
        if PERCENT.search(name):
            return f"{100 * number:{sign}.1f}"
        return f"{number:{sign},.0f}" if abs(number) >= 100 else f"{number:{sign}.3g}"

    interval = f" [{', '.join(map(text, ends))}]" if len(ends) else ""
    return text(value) + interval + ("" if math.isnan(std) else f" ± {text(std, '')}")


def with_interval(metrics: Mapping[Any, Any], name: str) -> str:
    """`metrics[name]` as text, with its interval where `NAME_low` and `NAME_high` are known."""
    ends = [metrics[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in metrics]
    return as_text(name, metrics[name], ends)


def metrics_table(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Figures with intervals and protocol, recalls in percent; one row per split and one for its chance level.

    A split that was measured with other scoring rules too has a row for each.
    """
    rows = []
    for split, figures in metrics.items():
        sizes = {"images": figures["num_images"], "captions": figures["num_texts"]}
        protocol = {"split": split, "protocol": figures["protocol"], **sizes}
        texts = {name: with_interval(figures, name) for name in figures_of(figures)}
        scorings = figures.get("scorings", {})
        rows.append({**protocol, "": "model, cosine" if scorings else "model", **texts})
        for scoring, corrected in scorings.items():
            texts = {name: with_interval(corrected, name) for name in figures_of(corrected)}
            rows.append({**protocol, "": f"model, {scoring}", **texts})
        by_chance = {name: as_text(name, value) for name, value in chance(figures).items()}
        rows += [{**protocol, "": "chance", **by_chance}] if by_chance else []
    columns = ["split", "protocol", "images", "captions", ""]
    return pd.DataFrame(rows, columns=None if rows else columns).fillna("").set_index(columns)
