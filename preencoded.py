"""Embeddings made elsewhere, one row a pair: `{split}_image_embeddings.pt`, `_text_embeddings.pt`, `_metadata.json`."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache import as_rows, atomic_path
from captions import CaptionTable, Strings
from errors import LabError

ROWS_AT_ONCE = 65_536
ROUNDING = 1e-2  # of a row's largest number: two encodings of one picture in half precision differ by less
NAMES_SHOWN = 5


class Pairs(NamedTuple):
    """What `COCOClipDataset(split, **pairs._asdict())` takes.

    table: (I images, T captions) ids that say what matches; captions are empty where none were given.
    images: (I, W) features, each distinct image once.
    text_features: (T, V), in the order of the table's captions.
    """

    table: CaptionTable
    images: Tensor
    text_features: Tensor


def read_pairs(folder: str | Path, split: str = "train") -> Pairs:
    """A split of pre-encoded embeddings; no file's code is run, and what can stays on disk.

    The metadata holds `image_ids`, one a row: whole numbers, or texts, which become the table's paths.
    It may hold `captions` and `image_paths`, also one a row.

    Raises: LabError if a file is missing or would run code, rows and ids are not equally many, a row is not
        finite, or rows of one id hold different images.
    """
    folder = Path(folder)
    images = _open_tensor(folder, split, "image")
    texts = _open_tensor(folder, split, "text")
    file = _existing(folder, split, "metadata.json")
    metadata = _read_metadata(file)
    lengths = {"image rows": len(images), "text rows": len(texts), "image_ids": len(metadata["image_ids"])}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count:,} {name}" for name, count in lengths.items())
        raise LabError(f"split {split!r} in {folder} has {found}; a pair needs one of each.")
    ids, names = _number(metadata["image_ids"], file)
    first, image_of_row = _first_rows(ids)
    _refuse_different(
        images, first, image_of_row, metadata["image_ids"], folder / f"{split}_image_embeddings.pt"
    )
    order = np.argsort(image_of_row, kind="stable")  # captions grouped by image
    grouped = bool((order == np.arange(len(order))).all())
    captions = metadata.get("captions") or [""] * len(ids)
    paths = metadata.get("image_paths") or names
    table = CaptionTable(
        root=folder,
        image_ids=ids[first],
        paths=[paths[row] for row in first.tolist()],
        splits=np.full(len(first), split),
        captions=Strings.pack(captions[row] for row in order.tolist()),
        caption_image_ids=ids[order],
    )
    return Pairs(table, images[as_rows(first)], texts if grouped else texts[as_rows(order)])


def read_splits(folder: str | Path, *splits: str) -> dict[str, Pairs]:
    """Some splits of one folder. Raises: LabError as `read_pairs`, or if an image is in two of them."""
    found = {split: read_pairs(folder, split) for split in splits}
    owner: dict[int, str] = {}
    for split, pairs in found.items():
        named = zip(pairs.table.image_ids.tolist(), pairs.table.paths, strict=True)
        shared = [name for ident, name in named if owner.setdefault(ident, split) != split]
        if shared:
            shown = ", ".join(shared[:NAMES_SHOWN]) + (", ..." if len(shared) > NAMES_SHOWN else "")
            raise LabError(
                f"{len(shared):,} images of split {split!r} are in another split too: {shown}; "
                "take each out of all splits but one."
            )
    return found


def write_pairs(
    folder: str | Path,
    split: str,
    table: CaptionTable,
    image_features: Tensor,
    text_features: Tensor,
    *,
    bad: Sequence[int] = (),
    about: dict[str, Any] | None = None,
) -> int:
    """Write a split in the layout that `read_pairs` reads, float16; the metadata last.

    Args:
        image_features: (I, W), a row for each of the table's images.
        text_features: (T, V), a row for each of the table's captions.
        bad: rows of images without a usable picture; their pairs are left out.
        about: further metadata, such as the encoders' names.
    Returns: how many pairs were written.
    """
    image_rows = np.repeat(np.arange(len(table)), np.diff(table.offsets))  # (T,)
    kept = np.flatnonzero(~np.isin(image_rows, np.fromiter(bad, np.int64, len(bad))))
    rows = image_rows[kept]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind, features, index in (("image", image_features, rows), ("text", text_features, kept)):
        with atomic_path(Path(folder) / f"{split}_{kind}_embeddings.pt") as beside:
            torch.save(features[as_rows(index)].to(torch.float16), beside)
    metadata = {
        **(about or {}),
        "image_ids": table.image_ids[rows].tolist(),
        "image_paths": [table.paths[row] for row in rows.tolist()],
        "captions": [table.captions[row] for row in kept.tolist()],
    }
    with atomic_path(Path(folder) / f"{split}_metadata.json") as beside:
        beside.write_text(json.dumps(metadata), encoding="utf-8")
    return len(kept)


def _existing(folder: Path, split: str, end: str) -> Path:
    path = folder / f"{split}_{end}"
    if not path.is_file():
        splits = sorted(file.name.removesuffix("_metadata.json") for file in folder.glob("*_metadata.json"))
        raise LabError(f"{path} does not exist; splits in {folder}: {', '.join(splits) or 'none'}.")
    return path


def _open_tensor(folder: Path, split: str, kind: str) -> Tensor:
    """(N, W) of a .pt file, memory-mapped where its format allows."""
    path = _existing(folder, split, f"{kind}_embeddings.pt")
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise LabError(
            f"{path} is refused: it is damaged, or holds more than a tensor and would run code; "
            "write it with torch.save(tensor, path)."
        ) from error
    if not isinstance(loaded, Tensor) or loaded.ndim != 2 or not loaded.is_floating_point():
        what = (
            f"{loaded.dtype} of shape {tuple(loaded.shape)}" if isinstance(loaded, Tensor) else type(loaded)
        )
        raise LabError(f"{path} must hold one (rows, width) tensor of floating point numbers, not {what}.")
    for start in range(0, len(loaded), ROWS_AT_ONCE):
        finite = torch.isfinite(loaded[start : start + ROWS_AT_ONCE]).all(dim=1)
        if not finite.all():
            raise LabError(
                f"row {start + int(finite.logical_not().nonzero()[0])} of {path} is not finite; encode it anew."
            )
    return loaded


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LabError(f"{path} is not JSON ({error}); write it with json.dump.") from error
    ids = content.get("image_ids") if isinstance(content, dict) else None
    if not isinstance(ids, list) or not ids:
        raise LabError(f"{path} has no list 'image_ids'; it needs one id for each row of the embeddings.")
    for name in ("captions", "image_paths"):
        texts = content.get(name)
        if texts is None:
            continue
        if (
            not isinstance(texts, list)
            or len(texts) != len(ids)
            or not all(isinstance(t, str) for t in texts)
        ):
            raise LabError(f"{name!r} in {path} must be a list of {len(ids):,} texts, one for each image id.")
    return content


def _number(given: list[Any], path: Path) -> tuple[np.ndarray, list[str]]:
    """(N,) int64 ids and the ids as text; a text's number is a digest, the same in every split."""
    if all(isinstance(ident, int) and not isinstance(ident, bool) and 0 <= ident < 2**63 for ident in given):
        return np.array(given, dtype=np.int64), [str(ident) for ident in given]
    for row, ident in enumerate(given):
        if not isinstance(ident, str) or not ident:
            raise LabError(
                f"image_ids[{row}] in {path} is {ident!r}; ids are all whole numbers from 0, or all texts."
            )
    digests = {ident: hashlib.sha256(ident.encode("utf-8", "surrogatepass")).digest() for ident in set(given)}
    numbers = {ident: int.from_bytes(digest[:8], "big") >> 1 for ident, digest in digests.items()}
    return np.array([numbers[ident] for ident in given], dtype=np.int64), given


def _first_rows(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each distinct id, in order of appearance, and each row's place among these."""
    _, first, place = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[place]


def _refuse_different(
    images: Tensor, first: np.ndarray, image_of_row: np.ndarray, ids: list[Any], path: Path
) -> None:
    """Raises: LabError if a row differs from the first row of its id by more than rounding."""
    for start in range(0, len(images), ROWS_AT_ONCE):
        rows = images[start : start + ROWS_AT_ONCE].float()
        same = images[as_rows(first[image_of_row[start : start + ROWS_AT_ONCE]])].float()
        wrong = (rows - same).abs().amax(dim=1) > ROUNDING * same.abs().amax(dim=1)
        if wrong.any():
            row = start + int(wrong.nonzero()[0])
            raise LabError(
                f"rows {first[image_of_row[row]]} and {row} of {path} have the same image id {ids[row]!r} but "
                "hold different images; give each image its own id."
            )
