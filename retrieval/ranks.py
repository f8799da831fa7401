"""The exact rank of every match, from features, in tiles of bounded memory.

Ids define matches: an image and a text match if and only if their ids are equal; id -1 matches nothing and is only a
distractor. The gallery contains every image once, however many captions it has. Ties count against the model: an item
that scores exactly as much as a match, and is not a match itself, ranks before it. A query without a match has no rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tqdm.auto import tqdm

from core.errors import LabError

TILES = {"cpu": (2048, 512)}  # texts by images: fits into a CPU's cache
GPU_TILE = (8192, 4096)
IdList = Sequence[int] | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class QueryRanks:
    """Ranks of every match of Q queries in one direction; 1 is nearest.

    The ranks of query q are `values[offsets[q]:offsets[q + 1]]`, ascending and distinct.
    `closer[q]` counts the other images of the gallery that rank before q's nearest match, themselves
    or by at least one of their captions.
    """

    values: np.ndarray  # (M,)
    offsets: np.ndarray  # (Q + 1,)
    rows: np.ndarray  # (Q,) the query's row in the features it came from
    image_id: np.ndarray  # (Q,) the image that the query is, or belongs to
    gallery_size: int
    num_left_out: int  # queries without a match
    closer: np.ndarray  # (Q,)

    @property
    def num_queries(self) -> int:
        return len(self.rows)

    @cached_property
    def counts(self) -> np.ndarray:
        """(Q,) how many matches each query has."""
        return np.diff(self.offsets)

    @cached_property
    def best(self) -> np.ndarray:
        """(Q,) rank of each query's nearest match."""
        return self.values[self.offsets[:-1]]

    @cached_property
    def slots(self) -> np.ndarray:
        """(M,) 1 for a query's nearest match, 2 for its second, and so on."""
        return np.arange(1, len(self.values) + 1) - np.repeat(self.offsets[:-1], self.counts)


@dataclass(frozen=True)
class Ranks:
    """Ranks of every match of one gallery, both ways."""

    i2t: QueryRanks
    t2i: QueryRanks

    @property
    def num_images(self) -> int:
        return self.t2i.gallery_size

    @property
    def num_texts(self) -> int:
        return self.i2t.gallery_size


def match_ranks(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_id: IdList,
    text_id: IdList,
    tile: tuple[int, int] | None = None,
) -> Ranks:
    """The exact rank of every match, image-to-text and text-to-image.

    Scores are inner products in float32. Features are not normalized here: normalize them for cosine similarity.
    Rows that repeat an image (a list of pairs) are merged. All scores come from tiles of one shape, so equal features
    tie exactly.

    Args:
        image_features: (I, D); the products are made on its device.
        text_features: (T, D) on any device, any number of captions per image.
        image_id: (I,) whole numbers; -1 is an image without a caption.
        text_id: (T,) whole numbers; -1 is a caption without an image.
        tile: (texts, images) of one tile of the product, which bounds the memory; a tile has more texts where a
            single image has more captions.
    Raises: LabError on NaN, on shapes or ids that do not fit, if an id names two different images, or if there is no
        match at all.
    """
    _check_features(image_features, text_features)
    image_ids = as_ids(image_id, len(image_features), "image_id")
    text_ids = as_ids(text_id, len(text_features), "text_id")
    layout = _lay_out(image_ids, text_ids, _distinct_images(image_features, image_ids))
    default = TILES.get(image_features.device.type, GPU_TILE)
    with full_float32(), torch.inference_mode():  # products with `out=` ignore autocast
        tiles = _Tiles(image_features, text_features, layout, tile or default)
        scores = _match_scores(tiles, layout)
        better = _count_better(tiles, layout, scores)
    return _collect(layout, image_ids, *(count.cpu().numpy() for count in better))


# --- input ---


def as_ids(ids: IdList, rows: int, name: str) -> np.ndarray:
    """(rows,) int64 ids. Raises: LabError if they are not whole numbers, one per row."""
    array = torch.as_tensor(ids).detach().cpu().numpy()
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise LabError(
            f"{name} must be a list of whole numbers, one per row; got shape {array.shape} of {array.dtype}"
        )
    if len(array) != rows:
        raise LabError(f"{name} has {len(array)} ids for {rows} rows of features; give one id per row")
    return array.astype(np.int64)


def _largest(features: torch.Tensor, name: str) -> float:
    """The largest magnitude in (N, D) features. Raises: LabError if they cannot be ranked."""
    if not isinstance(features, torch.Tensor):
        raise LabError(f"{name} must be a torch tensor, not {type(features).__name__}; convert it first")
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        raise LabError(
            f"{name} must be a (rows, width) tensor of floats with at least one row; "
            f"got shape {tuple(features.shape)} of {features.dtype}"
        )
    low, high = (float(end) for end in torch.aminmax(features.detach()))
    if not math.isfinite(low + high):
        raise LabError(f"{name} contain NaN or infinite values; look for a diverged run or a broken cache")
    return max(-low, high)


def _check_features(image_features: torch.Tensor, text_features: torch.Tensor) -> None:
    largest = _largest(image_features, "image_features") * _largest(text_features, "text_features")
    width, text_width = image_features.shape[1], text_features.shape[1]
    if width != text_width:
        raise LabError(
            f"image_features are {width} wide and text_features {text_width}; "
            "take both from the same model's joint space"
        )
    if largest * width > torch.finfo(torch.float32).max:
        raise LabError("the features' products overflow float32; normalize the features first")


def _distinct_images(features: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    """Rows of the distinct images: each id's first row, and every row of id -1.

    Raises: LabError if two rows of an id differ by more than 1 % of their largest entry.
    """
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    here = np.arange(len(ids))
    original = np.where(ids == -1, here, first[inverse.reshape(-1)])
    repeated = np.flatnonzero(original != here)
    for start in range(0, len(repeated), 8192):
        rows = repeated[start : start + 8192]
        copies, originals = (
            features[torch.from_numpy(at).to(features.device)] for at in (rows, original[rows])
        )
        wrong = (copies - originals).abs().amax(1) > 0.01 * originals.abs().amax(1)
        if bool(wrong.any()):
            image = ids[rows[int(wrong.int().argmax())]]
            raise LabError(
                f"image_id {image} is the id of rows with different features; give each image its own id"
            )
    return np.flatnonzero(original == here)


# --- order ---


@dataclass(frozen=True)
class _Layout:
    """Images and texts in an order that puts every image's captions side by side.

    Images with the most captions come first, so that the images with more than p captions are a prefix; images and
    texts without a match come last.
    """

    image_rows: np.ndarray  # (I,) rows of the distinct images
    text_rows: np.ndarray  # (T,)
    offsets: np.ndarray  # (J + 1,) where each matched image's captions begin
    owner: np.ndarray  # (M,) place of each matched text's image

    @cached_property
    def prefixes(self) -> list[int]:
        """How many images have more than 0, 1, 2, ... captions."""
        counts = np.diff(self.offsets)
        return [int(np.searchsorted(-counts, -slot)) for slot in range(counts[0])]

    def matches(self, texts: tuple[int, int], images: tuple[int, int]) -> slice:
        """The texts of one tile whose image is in it."""
        last = len(self.offsets) - 1
        first, end = (int(self.offsets[min(place, last)]) for place in images)
        return slice(max(texts[0], first), max(texts[0], first, min(texts[1], end)))


def _lay_out(image_id: np.ndarray, text_id: np.ndarray, rows: np.ndarray) -> _Layout:
    ids = image_id[rows]
    by_id = np.argsort(ids, kind="stable")
    nearest = np.minimum(np.searchsorted(ids[by_id], text_id), len(ids) - 1)
    image = by_id[nearest]  # (T,)
    matched = (ids[image] == text_id) & (text_id != -1)
    if not matched.any():
        raise LabError("no text_id equals any image_id, so nothing can be ranked; give matches equal ids")
    counts = np.bincount(image[matched], minlength=len(ids))
    order = np.argsort(-counts, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    owner = np.where(matched, place[image], len(ids))
    text_rows = np.argsort(owner, kind="stable")
    ends = np.cumsum(counts[order][: np.count_nonzero(counts)])
    return _Layout(rows[order], text_rows, np.concatenate([[0], ends]), owner[text_rows][: matched.sum()])


# --- tiles ---


@contextmanager
def full_float32() -> Iterator[None]:
    """Within, products are computed in full float32, without TF32 or bfloat16."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _spans(total: int, limit: int, stops: np.ndarray | None = None) -> list[tuple[int, int]]:
    """Cut range(total) into even spans of about `limit`; with `stops`, only there."""
    if not total:
        return []
    stops = np.arange(total + 1) if stops is None else stops
    length = math.ceil(total / math.ceil(total / limit)) + int(np.diff(stops).max()) - 1
    spans, start = [], 0
    while start < total:
        end = int(stops[np.searchsorted(stops, start + length, side="right") - 1])
        spans.append((start, end))
        start = end
    return spans


def _full_tile(spans: list[tuple[int, int]]) -> int:
    """The longest span, rounded up to 16: at odd edges the product is slower and differs in last bits."""
    return math.ceil(max(end - start for start, end in spans) / 16) * 16


class _Tiles:
    """Tiles of the product, texts by images, all of one shape so that equal rows give equal bits."""

    def __init__(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        layout: _Layout,
        tile: tuple[int, int],
    ):
        self.layout = layout
        self.device = image_features.device
        self.image_features, self.text_features = image_features.detach(), text_features.detach()
        num_texts, num_matched = len(layout.text_rows), len(layout.owner)
        rest = _spans(num_texts - num_matched, tile[0])
        self.images = _spans(len(layout.image_rows), tile[1])
        self.texts = _spans(num_matched, tile[0], layout.offsets)
        self.texts += [(num_matched + start, num_matched + end) for start, end in rest]
        height, width = _full_tile(self.texts), _full_tile(self.images)
        self.text_block = torch.zeros(height, image_features.shape[1], device=self.device)
        self.image_block = torch.zeros(width, image_features.shape[1], device=self.device)
        self.product = torch.empty(height, width, device=self.device)
        self.hits = torch.empty_like(self.product)

    def scores(
        self, matches_only: bool = False
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int], torch.Tensor]]:
        """Text span, image span and their scores, tile by tile; a tile lives until the next one."""
        for texts in tqdm(self.texts, "ranking", unit="tile row", delay=2, leave=False, disable=matches_only):
            _load(self.text_block, self.text_features, self.layout.text_rows[slice(*texts)])
            for images in self.images:
                own = self.layout.matches(texts, images)
                if matches_only and own.start == own.stop:
                    continue
                _load(self.image_block, self.image_features, self.layout.image_rows[slice(*images)])
                torch.mm(self.text_block, self.image_block.T, out=self.product)
                yield texts, images, self.product[: texts[1] - texts[0], : images[1] - images[0]]


def _load(block: torch.Tensor, features: torch.Tensor, rows: np.ndarray) -> None:
    """Put the named rows into `block` as float32."""
    rows_there = torch.from_numpy(rows).to(features.device)
    part = block[: len(rows)]
    if (features.dtype, features.device) == (block.dtype, block.device):
        torch.index_select(features, 0, rows_there, out=part)
    else:
        part.copy_(features.index_select(0, rows_there))


# --- counting ---


def _match_scores(tiles: _Tiles, layout: _Layout) -> torch.Tensor:
    """(M,) scores of the matches, from the tiles that contain any."""
    owner = torch.from_numpy(layout.owner).to(tiles.device)
    scores = torch.empty(len(owner), device=tiles.device)
    for texts, images, tile in tiles.scores(matches_only=True):
        own = layout.matches(texts, images)
        rows = torch.arange(own.start - texts[0], own.stop - texts[0], device=tiles.device)
        scores[own] = tile[rows, owner[own] - images[0]]
    return scores


def _count_better(
    tiles: _Tiles, layout: _Layout, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many rivals, never a match of the same query, score at least as much as each match.

    Returns: (M,) texts before each image's nearest, second, ... match; (M,) images before each text's
        match; (J,) other images with a caption before an image's nearest match.
    """
    owner, offsets = (torch.from_numpy(x).to(tiles.device) for x in (layout.owner, layout.offsets))
    falling = scores[torch.from_numpy(np.lexsort((-scores.cpu().numpy(), layout.owner))).to(tiles.device)]
    texts_before, images_before = torch.zeros(2, len(owner), dtype=torch.int64, device=tiles.device)
    closer = torch.zeros(len(offsets) - 1, dtype=torch.int64, device=tiles.device)
    for texts, images, tile in tiles.scores():
        hits = tiles.hits[: tile.shape[0], : tile.shape[1]]
        own, span = layout.matches(texts, images), slice(*texts)
        rows = torch.arange(own.start - texts[0], own.stop - texts[0], device=tiles.device)
        tile[rows, owner[own] - images[0]] = -math.inf  # matches are no rivals
        matched = texts[0] < len(owner)
        if matched:
            images_before[span] += torch.ge(tile, scores[span, None], out=hits).sum(1).long()
        for slot, prefix in enumerate(layout.prefixes):
            width = min(prefix, images[1]) - images[0]
            if width <= 0:
                break
            at_images = slice(images[0], images[0] + width)
            at = offsets[at_images] + slot
            above = torch.ge(tile[:, :width], falling[at], out=hits[:, :width])
            texts_before[at] += above.sum(0).long()
            if matched and slot == 0:  # whole rows, unused columns too, add up ten times faster than cut ones
                group = owner[span] - owner[texts[0]]
                captions = hits.new_zeros(int(group[-1]) + 1, tiles.hits.shape[1])
                captions.index_add_(0, group, tiles.hits[: len(tile)])
                closer[at_images] += (captions > 0).sum(0)[:width]
    return texts_before, images_before, closer


def _collect(
    layout: _Layout,
    image_ids: np.ndarray,
    texts_before: np.ndarray,
    images_before: np.ndarray,
    closer: np.ndarray,
) -> Ranks:
    """Ranks from counts, queries in the order of the rows that were given."""
    num_images, num_texts, num_matched = len(layout.image_rows), len(layout.text_rows), len(layout.owner)
    num_queries, counts = len(layout.offsets) - 1, np.diff(layout.offsets)
    slot = np.arange(num_matched) - np.repeat(layout.offsets[:-1], counts)
    rows = layout.image_rows[:num_queries]
    order = np.argsort(rows)
    values = (texts_before + slot + 1)[np.lexsort((slot, rows[layout.owner]))]
    i2t = QueryRanks(
        values,
        np.concatenate([[0], np.cumsum(counts[order])]),
        rows[order],
        image_ids[rows[order]],
        num_texts,
        num_images - num_queries,
        closer[order],
    )
    text_rows = layout.text_rows[:num_matched]
    order = np.argsort(text_rows)
    t2i = QueryRanks(
        (images_before + 1)[order],
        np.arange(num_matched + 1),
        text_rows[order],
        image_ids[rows[layout.owner[order]]],
        num_images,
        num_texts - num_matched,
        images_before[order],
    )
    return Ranks(i2t, t2i)
