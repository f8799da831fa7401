"""Searching an encoded split: texts, images and combinations of both find images.

A text is a `str`. An image is its number in the gallery, a `Path`, a file's bytes, a PIL image, or an array (H, W, 3)
of uint8. An image of the gallery, given by number or path, is never its own result.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from core.errors import LabError
from core.files import fingerprint
from plots.style import Cell, SavePath, image_rows, saved
from reports.gallery import Gallery
from retrieval.hubness import Correction
from retrieval.index import Index, build_index, combine
from sources.decode import UndecodableImage, decode, decode_rgb
from towers.features import image_features, text_features
from utils import Run

Term = Any  # a text or an image
OUTSIDE = -1  # the id of an image that is not in the gallery
CHANNELS = ((), (3,), (4,))  # gray, RGB, RGB with alpha
COLUMNS = 5


@dataclass
class SearchResult:
    """The images that a query found, nearest first, with their scores: cosine similarities, less a
    bias where hubs are corrected.

    Args:
        correct: whether the query is a caption of each, where it is a caption of the gallery.
        query_images: the images in the query.
    """

    query: str
    images: list[Path]
    scores: list[float]
    correct: list[bool] | None
    query_images: list[Any]

    def table(self) -> pd.DataFrame:
        """One row per image: query, rank from 1, score, image, and correct where it is known."""
        ranks = range(1, len(self.images) + 1)
        columns = {"score": self.scores, "image": list(map(str, self.images)), "correct": self.correct}
        return pd.DataFrame({"query": self.query, "rank": ranks, **columns})


@dataclass
class GallerySearch:
    """A gallery that can be searched. Raises: LabError if the data are not captioned images.

    Args: correction: of hubs, see `retrieval.hubness`, for queries of texts alone; None: cosine similarity.
    """

    gallery: Gallery
    correction: Correction | None = None

    def __post_init__(self) -> None:
        check_captioned(self.gallery.dataset)

    @cached_property
    def images(self) -> Index:
        return build_index(self.gallery.image_features, self.gallery.image_id)

    def by_text(self, texts: Sequence[str], k: int = 5) -> list[SearchResult]:
        """The k nearest images of each text. Raises: as `combined`."""
        if isinstance(texts, str):
            raise LabError(f"texts are given as a list; write [{texts!r}].")
        return [self.combined([(text, 1.0)], k) for text in texts]

    def by_image(self, images: Sequence[Any], k: int = 5) -> list[SearchResult]:
        """The k nearest other images of each; a `str` is a path here. Raises: as `combined`."""
        return [self.combined([(as_image(image), 1.0)], k) for image in images]

    def combined(self, terms: Sequence[tuple[Term, float]], k: int = 5) -> SearchResult:
        """The k images nearest to a weighted sum of texts and images.

        Args: terms: texts or images with their weights, negative for what the images should not show, such as
            `[(Path("dog.jpg"), 1), ("snow", 1), ("grass", -1)]`.
        Raises: LabError if there is no term, a text is empty, the terms cancel out, or k is out of range;
            UndecodableImage if an image cannot be read.
        """
        if not terms:
            raise LabError("a query needs at least one text or image.")
        features, ids = zip(*(self._encode(term) for term, _ in terms), strict=True)
        query = combine(torch.stack(features), [weight for _, weight in terms])
        own = set(ids) - {OUTSIDE}
        most = len(self.images) - len(own)
        if not 1 <= k <= most:
            raise LabError(
                f"k is {k} but {most} images of the gallery can be found; choose k from 1 to {most}."
            )
        images = self.images
        queries = query[None]
        if self.correction is not None:
            if not all(isinstance(term, str) for term, _ in terms):
                raise LabError(
                    "hubs are corrected for texts alone; search for an image by cosine similarity."
                )
            queries, corrected = self.correction.extended(queries, images.features)
            images = Index(corrected, images.ids)
        hits = images.query(queries, k + len(own))
        places = [place for place, ident in enumerate(hits.ids[0].tolist()) if ident not in own][:k]
        return SearchResult(
            query_name(terms),
            self.gallery.dataset.image_files(hits.rows[0, places].tolist()),
            hits.scores[0, places].tolist(),
            self._correct(terms, hits.ids[0, places]),
            [self._viewable(term) for term, _ in terms if not isinstance(term, str)],
        )

    def _encode(self, term: Term) -> tuple[Tensor, int]:
        """(D,) features, and the id of an image of the gallery; images of the gallery are not encoded again."""
        if isinstance(term, str):
            if not term.strip():
                raise LabError("a query's text is empty; write what the image should show.")
            return text_features(self.gallery.run.model, self.gallery.run.config, [term])[0], OUTSIDE
        item = self._item(term)
        if item is None:
            return encode_image(self.gallery.run, term), OUTSIDE
        return self.images.features[item], int(self.images.ids[item])

    def _item(self, image: Any) -> int | None:
        """The number of an image of the gallery, given by number or path; None for any other."""
        if isinstance(image, Path):
            return self._items.get(os.path.abspath(image))
        if not isinstance(image, Integral):
            return None
        if not 0 <= int(image) < len(self.images):
            raise LabError(f"image {image} does not exist; the gallery's are 0 to {len(self.images) - 1}.")
        return int(image)

    @cached_property
    def _items(self) -> dict[str, int]:
        files = self.gallery.dataset.image_files(range(len(self.images)))
        return {os.path.abspath(file): item for item, file in enumerate(files)}

    def _viewable(self, image: Any) -> Any:
        if isinstance(image, Integral):
            return self.gallery.dataset.image_files([int(image)])[0]
        return decode(image) if isinstance(image, bytes) else image

    def _correct(self, terms: Sequence[tuple[Term, float]], ids: Tensor) -> list[bool] | None:
        """Which images have the query as a caption; None if it is not a caption of the gallery."""
        (text, _), *others = terms
        if others or not isinstance(text, str):
            return None
        table = self.gallery.dataset.table
        owners = {int(table.caption_image_ids[row]) for row, own in enumerate(table.captions) if own == text}
        return [ident in owners for ident in ids.tolist()] if owners else None


def check_captioned(dataset: Any) -> None:
    """Raises: LabError if a data set is not one of captioned images."""
    if dataset.table is None:
        raise LabError(f"split {dataset.split!r} has no captioned images, so there is nothing to search.")


# --- images in every form ---


def as_image(image: Any) -> Any:
    """An image, of which a path may be given as `str`."""
    return Path(image) if isinstance(image, str) else image


def encode_image(run: Run, image: Any) -> Tensor:
    """(D,) features of an image that is not in the gallery. Raises: as `image_file`."""
    pixels = decode_rgb(image_file(image), run.config.image_size, run.config.image_resize)  # (S, S, 3)
    return image_features(run.model, run.config, torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]


def image_file(image: Any) -> Path | bytes:
    """An image as `decode_rgb` takes it; pixels are written as PNG, without loss.

    Raises: LabError if it is in none of the accepted forms; UndecodableImage if PIL cannot read it.
    """
    if isinstance(image, (Path, bytes)):
        return image
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype == np.uint8 and image.ndim > 1 and image.shape[2:] in CHANNELS:
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise LabError(
            "an image is its number in the gallery, a Path, bytes, a PIL image or uint8 pixels (H, W, 3), not "
            f"{type(image).__name__}{f' {image.shape} of {image.dtype}' if is_array else ''}."
        )
    file = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        (upright.convert("RGB") if upright.mode in ("CMYK", "YCbCr") else upright).save(file, "PNG")
    except OSError as error:
        raise UndecodableImage("cannot be read", str(error)) from error
    return file.getvalue()


# --- names and figures ---


def query_name(terms: Sequence[tuple[Term, float]]) -> str:
    """A query in tables, figures and file names: `dog.jpg + snow − 0.5 × grass`."""
    parts = []
    for term, weight in terms:
        name = term.name if isinstance(term, Path) else term if isinstance(term, str) else "an image"
        name = f"image {term}" if isinstance(term, Integral) else name
        size = "" if abs(weight) == 1 else f"{abs(weight):g} × "
        parts.append(f"{'−' if weight < 0 else '+'} {size}{name}")
    return " ".join(parts).removeprefix("+ ")


def search_grid(results: Sequence[SearchResult], path: SavePath = None, title: str = "") -> Figure:
    """The images that queries found, five per row, after the images in the query."""
    rows: list[tuple[str, list[Cell]]] = []
    for result in results:
        cells = [Cell(image, "query") for image in result.query_images]
        correct: Sequence[bool | None] = result.correct or [None] * len(result.images)
        found = zip(result.images, result.scores, correct, strict=True)
        cells += [
            Cell(file, f"{rank} · {score:.3f}", mark) for rank, (file, score, mark) in enumerate(found, 1)
        ]
        for start in range(0, len(cells), COLUMNS):
            rows.append(("" if start else result.query, cells[start : start + COLUMNS]))
    return saved(image_rows(rows, title, COLUMNS), path)


def file_name(query: str, longest: int = 60) -> str:
    """A query as the name of a file; one that is too long ends in a digest instead."""
    name = re.sub(r"\W+", "-", query.replace("−", "minus")).strip("-").lower() or "query"
    return name if len(name) <= longest else f"{name[:longest]}-{fingerprint([query])[:6]}"
