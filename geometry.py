"""How features lie in the joint space: spread, modality gap, alignment, uniformity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import LabError

MEASURES = ("modality_gap", "alignment", "image_uniformity", "text_uniformity")
"""What `feature_geometry` gives; columns of a run's history."""


def feature_spread(features: Tensor) -> float:
    """1 - the mean cosine between rows of normalised features (N, D): 0 where all are one, near 1 at best."""
    return 1 - features.float().mean(dim=0).square().sum().item()


def _array(values: Any) -> np.ndarray:
    values = torch.as_tensor(values).detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def unit_rows(features: Any, name: str) -> np.ndarray:
    """(N, D) features on the unit sphere."""
    rows = _array(features)
    if rows.ndim != 2 or not len(rows) or not np.isfinite(rows).all():
        raise LabError(f"{name} must be finite numbers of shape (N, D); got shape {rows.shape}.")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def modality_gap_size(image_features: Any, text_features: Any) -> float:
    """Distance between the mean image feature and the mean text feature, 0 to 2.

    Args: (I, D) and (T, D) features, normalised here.
    Source: Liang et al. 2022, "Mind the Gap", the difference between the two modalities' centres.
    """
    image_mean = unit_rows(image_features, "image_features").mean(axis=0)
    text_mean = unit_rows(text_features, "text_features").mean(axis=0)
    return float(np.linalg.norm(image_mean - text_mean))


def alignment(image_features: Any, text_features: Any, image_id: Any, text_id: Any) -> float:
    """Mean squared distance of matching pairs, 0 to 4: the lower, the closer.

    Args: (I, D) and (T, D) features, normalised here; (I,) and (T,) ids, equal ids match, -1 never does.
    Raises: LabError if nothing matches.
    Source: Wang & Isola 2020, section 4.1, alpha = 2.
    """
    sums, counts = [], []
    wanted = np.intersect1d(_array(image_id), _array(text_id))
    wanted = wanted[wanted != -1]
    if not len(wanted):
        raise LabError("no image and text share an id; alignment needs matching pairs.")
    for features, ids, name in ((image_features, image_id, "image"), (text_features, text_id, "text")):
        having = np.isin(_array(ids), wanted)
        rows = unit_rows(features, f"{name}_features")[having]
        place = np.searchsorted(wanted, _array(ids)[having])
        total = torch.zeros(len(wanted), rows.shape[1], dtype=torch.float64)
        sums.append(total.index_add_(0, torch.from_numpy(place), torch.from_numpy(rows).double()).numpy())
        counts.append(np.bincount(place, minlength=len(wanted)))
    return float(2 - 2 * (sums[0] * sums[1]).sum() / (counts[0] * counts[1]).sum())


def uniformity(features: Any, chunk: int = 1024) -> float:
    """Log of the mean Gaussian potential of all pairs of rows, at most 0: the lower, the more spread out.

    Args: (N, D) features, normalised here, N > 1; takes N^2 D operations in memory N * chunk.
    Source: Wang & Isola 2020, section 4.1, t = 2.
    """
    rows = unit_rows(features, "features")
    if len(rows) < 2:
        raise LabError("uniformity needs at least two rows of features.")
    total = 0.0
    for start in range(0, len(rows), chunk):
        cosine = rows[start : start + chunk] @ rows.T  # (chunk, N)
        total += float(np.exp(4 * np.minimum(cosine, 1) - 4, dtype=np.float32).sum(dtype=np.float64))
    return float(np.log((total - len(rows)) / (len(rows) * (len(rows) - 1))))


def feature_geometry(
    image_features: Any, text_features: Any, image_id: Any, text_id: Any, most: int | None = None
) -> dict[str, float]:
    """Gap, alignment, and uniformity of both modalities.

    Args: features and ids as of a whole split; most: uniformity from so many rows, evenly spaced, for it costs
        their square; none: from all. Of a single row it is nan.
    """
    images, texts = (
        rows[:: -(-len(rows) // (most or len(rows)))] for rows in (image_features, text_features)
    )
    return {
        "modality_gap": modality_gap_size(image_features, text_features),
        "alignment": alignment(image_features, text_features, image_id, text_id),
        "image_uniformity": uniformity(images) if len(images) > 1 else math.nan,
        "text_uniformity": uniformity(texts) if len(texts) > 1 else math.nan,
    }
