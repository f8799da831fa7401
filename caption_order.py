"""Whether a model reads the order of words: a true caption against one of the same words that is false."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from encode import text_features
from errors import LabError
from gallery import Gallery
from retrieval_evaluation import mean_with_ends
from scene_captions import swap_captions
from scenes import load_scenes


def order_margins(gallery: Gallery) -> pd.DataFrame:
    """How much nearer each generated picture is to its true caption than to the exchanged one.

    Left and right (or above and below) are turned round in one, two colours exchanged in the other; see
    `scene_captions.swap_captions`.

    Returns: a row a pair of captions: `image_id`, `kind` ("relation" or "colour"), `margin` (cosine).
    Raises: LabError if the gallery's pictures are not generated scenes.
    """
    scenes = load_scenes(gallery.dataset.table.root, gallery.split)
    found = [
        (item, ident, swap)
        for item, ident in enumerate(gallery.image_id.tolist())
        for swap in swap_captions(scenes[ident])
    ]
    if not found:
        raise LabError(f"split {gallery.split!r} has no scene of two objects; choose another.")
    texts = [text for *_, swap in found for text in (swap.right, swap.wrong)]
    right, wrong = (
        text_features(gallery.run.model, gallery.run.config, texts).view(len(found), 2, -1).unbind(1)
    )
    images = gallery.image_features[torch.tensor([item for item, *_ in found])]
    margins = (images * (right - wrong)).sum(dim=1)
    columns = {"image_id": [ident for _, ident, _ in found], "kind": [swap.kind for *_, swap in found]}
    return pd.DataFrame({**columns, "margin": margins.numpy()})


def order_table(margins: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of pairs in [0, 1] whose true caption is nearer, chance being 0.5, of several models; a row each.

    The first one is the baseline. Intervals are the normal ones over pairs; the difference is paired.

    Args: margins: model -> its `order_margins` of the same pictures.
    Returns: by model and `kind` the `pairs`, `accuracy` and `difference`, these with their `_low` and `_high`.
    """
    base = next(iter(margins.values()))
    rows: list[dict[str, Any]] = []
    for name, found in margins.items():
        for kind, part in found.groupby("kind", sort=False):
            right = (part["margin"] > 0).to_numpy(float)
            base_right = (base.loc[base["kind"] == kind, "margin"] > 0).to_numpy(float)
            row = {"model": name, "kind": kind, "pairs": len(part)}
            gain = mean_with_ends("difference", right - base_right)
            rows.append({**row, **mean_with_ends("accuracy", right), **gain})
    return pd.DataFrame(rows).set_index(["model", "kind"])
