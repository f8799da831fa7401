"""Explorers of one encoded split: search, zero-shot, attention, failures; plain functions and their controls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure

import plots
import plots_features
from controls import Control
from errors import LabError
from gallery import Gallery
from labelled import known_labels
from pictures import decode
from queries import GallerySearch, search_grid
from ranks import QueryRanks
from utils import Run
from zero_shot import DEFAULT_TEMPLATES, classify

WIDE, NARROW = widgets.Layout(width="440px"), widgets.Layout(width="300px")
AS_WIDE = widgets.Layout(width="auto")  # as its label
SOME_LABELS = "a dog; a child; a bicycle; a boat"


def split_texts(texts: str) -> list[str]:
    """The parts between semicolons, without the empty ones."""
    return [text.strip() for text in texts.split(";") if text.strip()]


def _slider(count: int, label: str, start: int = 0, step: int = 1) -> widgets.IntSlider:
    wide, last = widgets.Layout(width="380px"), max(0, count - 1)
    return widgets.IntSlider(start, 0, last, step, description=label, continuous_update=False, layout=wide)


# --- search ---


def search_figure(
    search: GallerySearch, query: str, minus: str = "", k: int = 5, picture: Any = None
) -> Figure:
    """The k nearest pictures of each text; several stand between semicolons.

    Args:
        minus: what the pictures should not show, taken from each text.
        picture: a picture that is added to each text, as `queries` takes them; with no text, alone.
    Raises: LabError if there is no query, or k is not in 1..pictures; UndecodableImage.
    """
    if not split_texts(query) and picture is None:
        raise LabError("write what the picture should show, such as 'a dog in the snow'.")
    if not minus.strip() and picture is None:
        return search_grid(search.by_text(split_texts(query), k))
    around = [(picture, 1.0)] * (picture is not None) + [(text, -1.0) for text in split_texts(minus)]
    wanted: list[list[tuple[Any, float]]] = [[(text, 1.0)] for text in split_texts(query)] or [[]]
    return search_grid([search.combined([*terms, *around], k) for terms in wanted])


def search_box(gallery: Gallery, query: str = "", k: int = 5) -> Control:
    """Search while typing; begins with `query`, or with a caption of the gallery."""
    first = query or gallery.dataset.table.captions_of(int(gallery.dataset.rows[0]))[0]
    most = max(1, min(10, len(gallery.image_id) - 1))
    search = GallerySearch.of(gallery)

    def show(upload: Sequence[Any], **asked: Any) -> Figure:
        return search_figure(search, picture=bytes(upload[-1]["content"]) if upload else None, **asked)

    return Control(
        show,
        query=widgets.Text(first, description="search", layout=WIDE),
        minus=widgets.Text("", description="without", placeholder="nothing", layout=NARROW),
        k=widgets.IntSlider(min(k, most), 1, most, description="pictures", continuous_update=False),
        upload=widgets.FileUpload(accept="image/*", description="and like a picture", layout=AS_WIDE),
    )


# --- zero-shot ---


def zero_shot_figure(
    run: Run, picture: str | Path | bytes, labels: str, templates: str = "; ".join(DEFAULT_TEMPLATES)
) -> Figure:
    """Probabilities of labels for one picture.

    Args:
        picture: a file, or a file's bytes.
        labels, templates: texts between semicolons; a template has `{}` where the label stands.
    Raises: LabError for fewer than two labels, a template without `{}`, or a picture that cannot be decoded.
    """
    found = classify(run, picture, split_texts(labels), split_texts(templates))
    shown = decode(picture)
    return plots.zero_shot_bars([shown], list(found.index), found["probability"].to_numpy()[None])


def zero_shot_playground(gallery: Gallery, labels: str = "") -> Control:
    """Pick or upload a picture, write labels and templates between semicolons; the bars follow."""
    known = known_labels(gallery)
    first = next(iter(known), 0)
    some = _some_labels(known[first], set(known.values())) if known else SOME_LABELS

    def show(item: int, upload: Sequence[Any], **texts: str) -> Figure:
        picture = bytes(upload[-1]["content"]) if upload else gallery.dataset.pictures([item])[0]
        return zero_shot_figure(gallery.run, picture, **texts)

    return Control(
        show,
        item=_slider(len(gallery.image_id), "picture", first),
        upload=widgets.FileUpload(accept="image/*", description="or upload one", layout=AS_WIDE),
        labels=widgets.Text(labels or some, description="labels", layout=WIDE),
        templates=widgets.Text("; ".join(DEFAULT_TEMPLATES), description="templates", layout=WIDE),
    )


def _some_labels(own: str, names: set[str], count: int = 6) -> str:
    """A picture's own label and a few others, evenly spread over the alphabet."""
    others = sorted(names - {own})
    return "; ".join([own, *others[:: max(1, -(-len(others) // (count - 1)))]])


# --- attention and failures ---


def attention_figure(gallery: Gallery, first: int = 0, count: int = 4) -> Figure:
    """Where the pooling looks in `count` pictures. Raises: LabError without attention pooling."""
    items = list(range(first, min(first + count, len(gallery.image_id))))
    images = gallery.dataset.__getitems__(items)["image"]  # (count, 3, S, S)
    with torch.inference_mode():
        weights = gallery.run.model.attention(images.to(gallery.run.model.logit_scale.device))
    table, rows = gallery.dataset.table, gallery.dataset.rows[items]
    captions = [table.captions_of(int(row))[0] for row in rows]
    return plots.attention_maps(list(images), list(weights.cpu()), captions)


def attention_explorer(gallery: Gallery, count: int = 4) -> Control:
    """Walk through the pictures and see where the pooling looks."""
    return Control(
        partial(attention_figure, gallery, count=count),
        first=_slider(len(gallery.image_id), "pictures", step=count),
    )


def failure_figure(gallery: Gallery, first: int = 0, count: int = 3, above: int = 3) -> Figure:
    """The captions whose own picture ranks worst, one a picture, from the `first`-worst on, and what ranks above.

    Raises: LabError if every caption finds its picture first.
    """
    ranks = gallery.ranks.t2i
    worst = _worst_captions(ranks)[first : first + count]
    if not len(worst):
        raise LabError("every caption finds its own picture first; there is no failure to show.")
    rows = ranks.rows[worst].tolist()
    scores = gallery.text_features[rows] @ gallery.image_features.T  # (count, I)
    items_of = {int(number): item for item, number in enumerate(gallery.image_id)}
    own = [items_of[int(number)] for number in ranks.image_id[worst]]
    nearest = [
        [item for item in order.tolist() if item != mine][: min(above, int(rank) - 1)]
        for order, mine, rank in zip(
            scores.argsort(dim=1, descending=True), own, ranks.best[worst], strict=True
        )
    ]
    shown = [[mine, *found] for mine, found in zip(own, nearest, strict=True)]
    return plots_features.failures(
        [gallery.captions[row] for row in rows],
        gallery.dataset.pictures(own),
        ranks.best[worst].tolist(),
        [gallery.dataset.pictures(found) for found in nearest],
        [scores[place, items].tolist() for place, items in enumerate(shown)],
        gallery=len(gallery.image_id),
    )


def _worst_captions(ranks: QueryRanks) -> np.ndarray:
    """Positions of each picture's worst caption, the worst of all first; pictures always found are left out."""
    order = np.argsort(-ranks.best, kind="stable")
    failed = order[ranks.best[order] > 1]
    _, places = np.unique(ranks.image_id[failed], return_index=True)
    return failed[np.sort(places)]


def failure_explorer(gallery: Gallery, count: int = 3) -> Control:
    """Walk from the worst caption on."""
    failed = len(_worst_captions(gallery.ranks.t2i))
    return Control(
        partial(failure_figure, gallery, count=count), first=_slider(failed, "worst from", step=count)
    )
