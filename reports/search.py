"""A run answers: texts, pictures and combinations of both find its pictures; pictures find captions.

A text is a `str`. A picture is the number of one in the gallery, a `Path`, a file's bytes, a PIL image, or an
array (H, W, 3) of uint8. One of the gallery's own, by number or file, is never its own answer.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from plots.style import Cell, image_rows, saved
from reports.gallery import Gallery
from retrieval.index import Index, build_index, combine
from sources.decode import UndecodableImage, decode, decode_rgb
from towers.features import image_features, text_features

Picture = Any
OUTSIDE = -1  # the id of a picture that is not the gallery's
PIXELS = ((), (3,), (4,))  # grey, RGB, RGB with alpha
IN_A_ROW = 5


@dataclass
class Found:
    """What a query found: pictures, nearest first, with their cosine similarities.

    Args:
        correct: whether each is the query's own picture, where the query is a caption of the gallery.
        asked: pictures that stand in the query.
    """

    query: str
    pictures: list[Any]
    scores: list[float]
    correct: list[bool] | None
    asked: list[Picture] = field(default_factory=list)

    @property
    def marks(self) -> list[bool | None]:
        """`correct`, with None for each answer where it is not known."""
        return [None] * len(self.pictures) if self.correct is None else list(self.correct)


@dataclass
class FoundCaptions:
    """What a picture found: captions, nearest first, with their cosine similarities.

    Args: correct: whether each is the picture's own, where the picture is one of the gallery's.
    """

    query: str
    captions: list[str]
    scores: list[float]
    correct: list[bool] | None


@dataclass
class GallerySearch:
    """A gallery that can be searched. Raises: LabError if the data are not captioned images."""

    gallery: Gallery

    def __post_init__(self) -> None:
        check_captioned(self.gallery.dataset)

    @cached_property
    def images(self) -> Index:
        return build_index(self.gallery.image_features, self.gallery.image_id)

    @cached_property
    def captions(self) -> Index:
        return build_index(self.gallery.text_features, self.gallery.text_id)

    def by_text(self, texts: Sequence[str], k: int = 5) -> list[Found]:
        """The k nearest pictures of each text. Raises: LabError if a text is empty or k not in 1..pictures."""
        hits = self.images.query(self._text_features(texts), k)
        return [
            Found(text, *self._pictures(hits.rows[row], hits.scores[row]), self._owned(text, hits.ids[row]))
            for row, text in enumerate(texts)
        ]

    def by_picture(self, pictures: Sequence[Picture], k: int = 5) -> list[Found]:
        """The k nearest other pictures of each. Raises: as `by_text`; UndecodableImage if one cannot be read."""
        features, ids = self._picture_features(pictures)
        hits = self.images.query(features, k, ids)
        return [
            Found(label(one), *self._pictures(hits.rows[row], hits.scores[row]), None, [self._shown(one)])
            for row, one in enumerate(pictures)
        ]

    def captions_of(self, pictures: Sequence[Picture], k: int = 5) -> list[FoundCaptions]:
        """The k nearest captions of each picture. Raises: as `by_picture`."""
        features, ids = self._picture_features(pictures)
        hits = self.captions.query(features, k)
        rows = self.gallery.dataset.caption_rows(self.gallery.dataset.rows)  # of the table, in text order
        texts = self.gallery.dataset.table.captions
        return [
            FoundCaptions(
                label(one),
                [texts[row] for row in rows[hits.rows[place].numpy()]],
                hits.scores[place].tolist(),
                None if ids[place] == OUTSIDE else (hits.ids[place] == ids[place]).tolist(),
            )
            for place, one in enumerate(pictures)
        ]

    def combined(self, terms: Sequence[tuple[Any, float]], k: int = 5) -> Found:
        """The k pictures nearest to a weighted sum of texts and pictures.

        Args: terms: texts or pictures with their weights, negative for what is not wanted, such as
            `[(Path("dog.jpg"), 1), ("snow", 1), ("grass", -1)]`.
        Raises: as `by_picture`, and LabError if there is no term or the terms cancel out.
        """
        if not terms:
            raise LabError("a combination needs at least one text or picture.")
        features, ids = zip(*(self._term(term) for term, _ in terms), strict=True)
        query = combine(torch.stack(features), [weight for _, weight in terms])
        own = set(ids) - {OUTSIDE}
        most = len(self.images) - len(own)
        if not 1 <= k <= most:
            raise LabError(
                f"k is {k} but the gallery holds {most} pictures that can answer; choose k between."
            )
        hits = self.images.query(query[None], k + len(own))
        others = [place for place, ident in enumerate(hits.ids[0].tolist()) if ident not in own][:k]
        answers = self._pictures(hits.rows[0, others], hits.scores[0, others])
        shown = [self._shown(term) for term, _ in terms if not isinstance(term, str)]
        return Found(label_of(terms), *answers, None, shown)

    def _term(self, term: Any) -> tuple[Tensor, int]:
        """(D,) features, and the id where it is one of the gallery's pictures."""
        if isinstance(term, str):
            return self._text_features([term])[0], OUTSIDE
        features, ids = self._picture_features([term])
        return features[0], int(ids)

    def _text_features(self, texts: Sequence[str]) -> Tensor:
        """(Q, D)."""
        if isinstance(texts, str):
            raise LabError(f"texts are given as a list; write [{texts!r}].")
        if not texts or not all(text.strip() for text in texts):
            raise LabError("a query's text is empty; write what the picture should show.")
        return text_features(self.gallery.run.model, self.gallery.run.config, list(texts))

    def _picture_features(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """(Q, D) features and (Q,) ids; the gallery's own pictures are not encoded again."""
        if not pictures:
            raise LabError("there is no picture to search by; give at least one.")
        items = [self._item(picture) for picture in pictures]
        features = [
            self._encoded(picture) if item is None else self.images.features[item]
            for picture, item in zip(pictures, items, strict=True)
        ]
        ids = [OUTSIDE if item is None else int(self.images.ids[item]) for item in items]
        return torch.stack(features), torch.tensor(ids)

    def _item(self, picture: Picture) -> int | None:
        """The number of a picture of the gallery, given by number or file; None for any other."""
        if isinstance(picture, Path):
            return self._files.get(os.path.abspath(picture))
        if not isinstance(picture, Integral):
            return None
        if not 0 <= int(picture) < len(self.images):
            raise LabError(
                f"picture {picture} does not exist; the gallery's are 0 to {len(self.images) - 1}."
            )
        return int(picture)

    @cached_property
    def _files(self) -> dict[str, int]:
        files = self.gallery.dataset.image_files(range(len(self.images)))
        return {os.path.abspath(file): item for item, file in enumerate(files)}

    def _encoded(self, picture: Picture) -> Tensor:
        run = self.gallery.run
        pixels = decode_rgb(encoded(picture), run.config.image_size, run.config.image_resize)  # (S, S, 3)
        return image_features(run.model, run.config, torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]

    def _pictures(self, rows: Tensor, scores: Tensor) -> tuple[list[Any], list[float]]:
        return self.gallery.dataset.image_files(rows.tolist()), scores.tolist()

    def _shown(self, picture: Picture) -> Picture:
        if isinstance(picture, Integral):
            return self.gallery.dataset.image_files([int(picture)])[0]
        return decode(picture) if isinstance(picture, bytes) else picture

    def _owned(self, text: str, ids: Tensor) -> list[bool] | None:
        """Which answers have this caption, or None where no picture of the gallery has it."""
        table = self.gallery.dataset.table
        owners = {int(table.caption_image_ids[row]) for row, own in enumerate(table.captions) if own == text}
        return [ident in owners for ident in ids.tolist()] if owners else None


def check_captioned(dataset: Any) -> None:
    if dataset.table is None:
        raise LabError(f"split {dataset.split!r} holds no captioned pictures, so there is nothing to search.")


def search_text(gallery: Gallery, queries: Sequence[str], k: int = 5) -> list[Found]:
    """The k nearest pictures of each text. Raises: LabError if a text is empty or k is not in 1..pictures."""
    return GallerySearch(gallery).by_text(queries, k)


# --- queries in words and in bytes ---


def label(query: Any) -> str:
    """How a text or picture is called in tables and figures."""
    if isinstance(query, str):
        return query
    if isinstance(query, Integral):
        return f"picture {query}"
    return query.name if isinstance(query, Path) else "a picture"


def label_of(terms: Sequence[tuple[Any, float]]) -> str:
    """Of a combination: `dog.jpg + snow − 0.5 × grass`."""
    parts = []
    for term, weight in terms:
        size = "" if abs(weight) == 1 else f"{abs(weight):g} × "
        parts.append(f"{'−' if weight < 0 else '+'} {size}{label(term)}")
    return " ".join(parts).removeprefix("+ ")


def encoded(picture: Picture) -> Path | bytes:
    """A picture as `pictures.decode_rgb` takes it; pixels are written as PNG, without loss.

    Raises: LabError if it is none of the accepted forms; UndecodableImage if PIL cannot read it.
    """
    if isinstance(picture, (Path, bytes)):
        return picture
    is_array = isinstance(picture, np.ndarray)
    if is_array and picture.dtype == np.uint8 and picture.ndim > 1 and picture.shape[2:] in PIXELS:
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise LabError(
            "a picture is a gallery's number, a Path, bytes, a PIL image or uint8 pixels (H, W, 3), not "
            f"{type(picture).__name__}{f' {picture.shape} of {picture.dtype}' if is_array else ''}."
        )
    file = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(picture)
        (upright.convert("RGB") if upright.mode in ("CMYK", "YCbCr") else upright).save(file, "PNG")
    except OSError as error:
        raise UndecodableImage("cannot be read", str(error)) from error
    return file.getvalue()


# --- what is shown and written ---


def search_grid(found: Sequence[Found], path: str | Path | None = None, title: str = "") -> Figure:
    """What queries found, five pictures a row; a query's own pictures stand before its answers."""
    rows = [row for each in found for row in _grid_rows(each)]
    return saved(image_rows(rows, title, IN_A_ROW), path)


def _grid_rows(found: Found) -> list[tuple[str, list[Cell]]]:
    cells = [Cell(picture, "query") for picture in found.asked]
    answers = zip(found.pictures, found.scores, found.marks, strict=True)
    for rank, (picture, score, mark) in enumerate(answers, start=1):
        cells.append(Cell(picture, f"{rank} · {score:.3f}", mark))
    parts = [cells[start : start + IN_A_ROW] for start in range(0, len(cells), IN_A_ROW)]
    return [("" if number else found.query, part) for number, part in enumerate(parts)]


def found_table(found: Sequence[Found]) -> pd.DataFrame:
    """A row an answer: query, rank from 1, cosine score, picture, and correct where it is known."""
    rows = [
        {"query": each.query, "rank": rank, "score": score, "picture": str(picture), "correct": mark}
        for each in found
        for rank, (picture, score, mark) in enumerate(
            zip(each.pictures, each.scores, each.marks, strict=True), start=1
        )
    ]
    return pd.DataFrame(rows)


def file_name(query: str, longest: int = 60) -> str:
    """A query as the name of a file; one that is too long ends in a digest instead."""
    name = re.sub(r"\W+", "-", query.replace("−", "minus")).strip("-").lower() or "query"
    return name if len(name) <= longest else f"{name[:longest]}-{fingerprint([query])[:6]}"
