"""Pre-encoded embeddings (lab 1): reading, checking, dividing and writing folders of image and text embeddings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from core.errors import LabError
from core.files import (
    DamagedFileError,
    atomic_path,
    fingerprint,
    read_bytes,
    read_json,
    write_json,
    write_text,
)
from sources.table import CaptionTable, is_below, safe_relative, stamp


def as_rows(rows: Sequence[int] | np.ndarray) -> Tensor:
    """Row numbers as an index tensor."""
    return torch.as_tensor(np.asarray(rows, dtype=np.int64))


# --- Views of features that stay on disk ---


ROWS_AT_ONCE = 65_536


class Rows:
    """Some rows of tensors, which stay on disk or in shared memory; indexing copies only the rows asked for.

    Args:
        parts: tensors of one width; their rows are numbered across all of them.
        numbers: (N,) which of these rows, in which order; None: all.
    Raises: LabError if the widths differ.
    """

    def __init__(self, parts: Sequence[Tensor], numbers: np.ndarray | None = None) -> None:
        widths = {part.shape[1] for part in parts}
        if len(widths) > 1:
            raise LabError(
                f"embeddings are {sorted(widths)} numbers wide; one encoder gives all of them one width."
            )
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.numbers = np.arange(self.starts[-1]) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.parts[0].shape[1]

    def take(self, rows: np.ndarray) -> Rows:
        """Some of these rows, as another view."""
        return Rows(self.parts, self.numbers[rows])

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, (at most size, width) at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def __getitem__(self, index: Any) -> Tensor:
        """(n, width) rows by index tensor, array, slice or mask."""
        numbers = self.numbers[index.numpy() if isinstance(index, Tensor) else index]
        if len(self.parts) == 1:
            return self.parts[0][as_rows(numbers)]
        result = torch.empty(len(numbers), self.shape[1], dtype=self.parts[0].dtype)
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        for owner in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == owner)
            result[as_rows(mine)] = self.parts[owner][as_rows(numbers[mine] - self.starts[owner])].to(
                result.dtype
            )
        return result


def stacked(views: Sequence[Rows]) -> Rows:
    """Views one after another as one view."""
    parts = [part for view in views for part in view.parts]
    before = np.cumsum([0, *(view.starts[-1] for view in views)])
    return Rows(parts, np.concatenate([view.numbers + b for view, b in zip(views, before, strict=False)]))


def row_digests(features: Tensor | Rows, rows: np.ndarray) -> np.ndarray:
    """(len(rows),) uint64, a digest of each of these rows' bytes."""
    digests = [
        hashlib.blake2b(row.tobytes(), digest_size=8).digest()
        for start in range(0, len(rows), ROWS_AT_ONCE)
        for row in features[as_rows(rows[start : start + ROWS_AT_ONCE])]
        .contiguous()
        .view(torch.uint8)
        .numpy()
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def same_rows(images: Rows) -> np.ndarray:
    """(I,) a number for each row; rows that are bit-for-bit equal have the same number."""
    return np.unique(row_digests(images, np.arange(len(images))), return_inverse=True)[1]


def divide(table: CaptionTable, same: np.ndarray, sizes: dict[str, int]) -> dict[str, Any]:
    """Pairs and image ids of each split, drawn at random by seed.

    Args:
        same: (I,) number of each image; images of one number stay together.
        sizes: pairs of `train`, `tune`, `val`, `test`, and the `seed`.
    Raises: LabError if a split would hold no image.
    """
    counts = np.diff(table.offsets)  # (I,) captions of each image
    group_counts = np.bincount(same, weights=counts).astype(np.int64)
    order = np.random.default_rng(sizes["seed"]).permutation(len(group_counts))
    before = np.empty_like(group_counts)  # pairs drawn before each group
    before[order] = np.cumsum(group_counts[order]) - group_counts[order]
    drawn = before[same]  # (I,) the same of each image
    total = int(counts.sum())
    test, val = (min(sizes[name], total // 10) for name in ("test", "val"))
    train = min(sizes["train"], total - test - val)
    tune = min(sizes["tune"], train // 4)
    start = test + val
    ranges = {
        "train": (start, start + train),
        "tune": (start, start + tune),
        "val": (test, start),
        "test": (0, test),
        "unused": (start + train, total),
    }
    chosen = {name: (drawn >= low) & (drawn < high) for name, (low, high) in ranges.items()}
    if not all(chosen[name].any() for name in ranges if name != "unused"):
        raise LabError(f"{len(group_counts)} different images are too few to divide; at least 40 are needed.")
    return {
        "pairs": {name: int(counts[mask].sum()) for name, mask in chosen.items()},
        "splits": {name: table.image_ids[mask].tolist() for name, mask in chosen.items() if name != "unused"},
    }


ROWS_PER_WRITE = 65_536
ROUNDING = 1e-2  # of a row's largest number: two encodings of one image in half precision differ by less
NAMES_SHOWN = 5
SPLITS_FILE = "splits.json"
ENCODERS = ("image_tower", "image_weights", "text_tower", "text_model")  # fields that metadata may hold
COCO_PAIRS = {"train": 473_000, "tune": 100_000, "val": 5_000, "test": 24_000}
"""Pairs of each split, for as many pairs as COCO 2017's 617,000."""


class Pairs(NamedTuple):
    """What `COCOClipDataset(split, **pairs._asdict())` takes.

    table: (I images, T captions) ids that say what matches; captions are empty if none were given.
    images: (I, W) features, each distinct image once.
    text_features: (T, V), in the order of the table's captions.
    """

    table: CaptionTable
    images: Rows
    text_features: Rows

    def take(self, rows: np.ndarray) -> Pairs:
        """Some images with their captions; no feature is copied."""
        texts = self.text_features.take(self.table.caption_rows(rows))
        return Pairs(self.table.take(rows), self.images.take(rows), texts)


def read_pairs(folder: str | Path, split: str = "train", image_root: str | Path | None = None) -> Pairs:
    """A split of pre-encoded embeddings; no code in the files is run, and text embeddings stay on disk.

    The metadata has `image_ids`, one per row: whole numbers, or texts, which become the table's paths. It may have
    `captions` and `image_paths`, also one per row, and `image_root`, the folder of these paths. Images are shown only
    from below `folder` or the argument `image_root`: a file that was downloaded must not choose what is read.

    If the folder was divided, `split` is one of the division's names, or of the files'.

    Raises: LabError if a file is missing or would run code, the numbers of rows and ids differ, a row is not
        finite, rows of one id have different images, or the folder has other pairs than were divided.
    """
    folder = Path(folder)
    division = read_division(folder)
    if split not in division.get("splits", {}):
        return _with_images(_read_file(folder, split), folder, image_root)
    whole = joined([_read_file(folder, source) for source in division["sources"]])
    pairs = _with_images(whole, folder, image_root)
    part = pairs.take(np.flatnonzero(np.isin(pairs.table.image_ids, division["splits"][split])))
    splits = np.full(len(part.table), split, dtype=object)
    return part._replace(table=dataclasses.replace(part.table, splits=splits))


def _with_images(pairs: Pairs, folder: Path, image_root: str | Path | None) -> Pairs:
    """The pairs, if their images are below a folder that the user named; else with a note, and without images."""
    named = os.path.realpath(folder / pairs.table.root)
    bases = [os.path.realpath(base) for base in (folder, image_root) if base is not None]
    problems: list[dict[str, Any]] = []
    if not any(is_below(named, base) for base in bases):
        what = f"image_root {named} is outside; set image_root to it to show its images"
        problems = [{"kind": "refused path", "where": "metadata.json", "what": what, "count": 1}]
        named = bases[0]
    paths = [_below(path) for path in pairs.table.paths]
    return pairs._replace(
        table=dataclasses.replace(pairs.table, root=Path(named), paths=paths, problems=problems)
    )


def _below(path: str) -> str:
    """A path without parts that lead out of the folder it is joined to."""
    safe, refusal = safe_relative(path)
    return safe if not refusal else re.sub(r"[^\w.-]+|\.{2,}", "_", path)


def image_ids(folder: str | Path, split: str) -> np.ndarray:
    """(I,) distinct ids of a split's images, without reading the embeddings."""
    folder = Path(folder)
    divided = read_division(folder).get("splits", {})
    if split in divided:
        return np.array(divided[split], dtype=np.int64)
    file = _existing(folder, split, "metadata.json")
    return np.unique(_number(_read_metadata(file)["image_ids"], file)[0])


def encoders(folder: str | Path) -> dict[str, Any]:
    """Fields of the configuration that name what made a folder's embeddings; {} if its files do not say."""
    folder = Path(folder)
    metadata = _read_metadata(_existing(folder, file_splits(folder)[0], "metadata.json"))
    return {name: metadata[name] for name in ENCODERS if name in metadata}


def _read_file(folder: Path, split: str) -> Pairs:
    """The content of a split's three files, read again only when they change."""
    ends = ("image_embeddings.pt", "text_embeddings.pt", "metadata.json")
    stamps = tuple(stamp(_existing(folder, split, end)) for end in ends)
    return _read_once(folder.resolve(), split, stamps)


@functools.lru_cache(maxsize=4)
def _read_once(folder: Path, split: str, stamps: tuple[tuple[int, int], ...]) -> Pairs:
    images = _open_tensor(folder, split, "image")
    texts = _open_tensor(folder, split, "text")
    file = _existing(folder, split, "metadata.json")
    metadata = _read_metadata(file)
    lengths = {"image rows": len(images), "text rows": len(texts), "image_ids": len(metadata["image_ids"])}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count:,} {name}" for name, count in lengths.items())
        raise LabError(f"split {split!r} in {folder} has {counts}; a pair needs one of each.")
    ids, names = _number(metadata["image_ids"], file)
    image_of_row, _ = pd.factorize(ids)  # numbers images in order of appearance
    first = np.unique(image_of_row, return_index=True)[1]  # each image's first row
    _refuse_different(
        images, first, image_of_row, metadata["image_ids"], folder / f"{split}_image_embeddings.pt"
    )
    order = np.argsort(image_of_row, kind="stable")  # captions grouped by image
    captions = metadata.get("captions") or [""] * len(ids)
    paths = metadata.get("image_paths") or names
    table = CaptionTable(
        root=Path(metadata.get("image_root") or folder),
        image_ids=ids[first],
        paths=[paths[row] for row in first.tolist()],
        splits=np.full(len(first), split, dtype=object),
        captions=[captions[row] for row in order.tolist()],
        caption_image_ids=ids[order],
    )
    return Pairs(table, Rows([images[as_rows(first)]]), Rows([texts], order))


def joined(sources: Sequence[Pairs]) -> Pairs:
    """The images of several files as one."""
    if len(sources) == 1:
        return sources[0]
    tables = [pairs.table for pairs in sources]
    table = CaptionTable(
        root=tables[0].root,
        image_ids=np.concatenate([table.image_ids for table in tables]),
        paths=[path for table in tables for path in table.paths],
        splits=np.concatenate([table.splits for table in tables]),
        captions=[text for table in tables for text in table.captions],
        caption_image_ids=np.concatenate([table.caption_image_ids for table in tables]),
    )
    images = stacked([pairs.images for pairs in sources])
    return Pairs(table, images, stacked([pairs.text_features for pairs in sources]))


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
        bad: rows of images that cannot be decoded; their pairs are left out.
        about: further metadata, such as the encoders' names.
    Returns: how many pairs were written.
    """
    image_rows = np.repeat(np.arange(len(table)), np.diff(table.offsets))  # (T,)
    texts = np.flatnonzero(~np.isin(image_rows, np.fromiter(bad, np.int64, len(bad))))
    rows = image_rows[texts]
    for kind, features, index in (("image", image_features, rows), ("text", text_features, texts)):
        with atomic_path(Path(folder) / f"{split}_{kind}_embeddings.pt") as beside:
            torch.save(features[as_rows(index)].to(torch.float16), beside)
    metadata = {
        **(about or {}),
        "image_root": str(table.root.resolve()),
        "image_ids": table.image_ids[rows].tolist(),
        "image_paths": [table.paths[row] for row in rows.tolist()],
        "captions": [table.captions[row] for row in texts.tolist()],
    }
    write_text(Path(folder) / f"{split}_metadata.json", json.dumps(metadata))
    return len(texts)


def _existing(folder: Path, split: str, end: str) -> Path:
    path = folder / f"{split}_{end}"
    if not path.is_file():
        splits = sorted(file.name.removesuffix("_metadata.json") for file in folder.glob("*_metadata.json"))
        raise LabError(f"{path} does not exist; splits in {folder}: {', '.join(splits) or 'none'}.")
    return path


def _open_tensor(folder: Path, split: str, kind: str) -> Tensor:
    """(N, W) of a .pt file, memory-mapped if its format allows it."""
    path = _existing(folder, split, f"{kind}_embeddings.pt")
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which error damaged bytes cause depends on where they are
        raise LabError(
            f"{path} is refused: it is damaged, or contains more than a tensor and would run code; "
            "write it with torch.save(tensor, path)."
        ) from error
    is_table = (
        isinstance(loaded, Tensor)
        and (loaded.layout, loaded.device.type, loaded.ndim) == (torch.strided, "cpu", 2)
        and loaded.is_floating_point()
        and loaded.nbytes <= loaded.untyped_storage().nbytes()  # an expanded tensor repeats one row
    )
    if not is_table:
        what = type(loaded).__name__
        if isinstance(loaded, Tensor):
            what = f"{loaded.dtype} of shape {tuple(loaded.shape)} ({loaded.layout}, {loaded.device})"
        raise LabError(
            f"{path} must be one dense (rows, width) tensor of floating point numbers with every row stored, not "
            f"{what}; write it with torch.save(tensor.to_dense().cpu().clone(), path)."
        )
    for start in tqdm(range(0, len(loaded), ROWS_PER_WRITE), desc=f"checking {path.name}", delay=2):
        finite = torch.isfinite(loaded[start : start + ROWS_PER_WRITE]).all(dim=1)
        if not finite.all():
            raise LabError(
                f"row {start + int(finite.logical_not().nonzero()[0])} of {path} is not finite; encode it again."
            )
    return loaded


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path).decode("utf-8-sig"))
    except LabError:
        raise
    except (ValueError, RecursionError) as error:
        raise LabError(f"{path} is not JSON ({str(error)[:120]}); write it with json.dump.") from error
    ids = content.get("image_ids") if isinstance(content, dict) else None
    if not isinstance(ids, list) or not ids:
        raise LabError(f"{path} has no list 'image_ids'; it needs one id for each row of the embeddings.")
    if not isinstance(content.get("image_root", ""), str):
        raise LabError(f"image_root in {path} must be text, the folder of the images.")
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


def _number(ids: list[Any], path: Path) -> tuple[np.ndarray, list[str]]:
    """(N,) int64 ids and the ids as text; a text's number is a digest, the same in every split."""
    if all(isinstance(ident, int) and not isinstance(ident, bool) and 0 <= ident < 2**63 for ident in ids):
        return np.array(ids, dtype=np.int64), [str(ident) for ident in ids]
    for row, ident in enumerate(ids):
        if not isinstance(ident, str) or not ident:
            raise LabError(
                f"image_ids[{row}] in {path} is {ident!r}; ids are all whole numbers from 0, or all texts."
            )
    digests = {ident: hashlib.sha256(ident.encode("utf-8", "surrogatepass")).digest() for ident in set(ids)}
    numbers = {ident: int.from_bytes(digest[:8], "big") >> 1 for ident, digest in digests.items()}
    return np.array([numbers[ident] for ident in ids], dtype=np.int64), ids


def _refuse_different(
    images: Tensor, first: np.ndarray, image_of_row: np.ndarray, ids: list[Any], path: Path
) -> None:
    """Raises: LabError if a row differs from the first row of its id by more than rounding."""
    for start in range(0, len(images), ROWS_PER_WRITE):
        rows = images[start : start + ROWS_PER_WRITE].float()
        same = images[as_rows(first[image_of_row[start : start + ROWS_PER_WRITE]])].float()
        wrong = (rows - same).abs().amax(dim=1) > ROUNDING * same.abs().amax(dim=1)
        if wrong.any():
            row = start + int(wrong.nonzero()[0])
            raise LabError(
                f"rows {first[image_of_row[row]]} and {row} of {path} have the same image id {ids[row]!r} but "
                "have different images; give each image its own id."
            )


# --- Dividing a folder ---


def split_pairs(
    folder: str | Path,
    *,
    train_pairs: int = COCO_PAIRS["train"],
    tune_pairs: int = COCO_PAIRS["tune"],
    val_pairs: int = COCO_PAIRS["val"],
    test_pairs: int = COCO_PAIRS["test"],
    seed: int = 0,
) -> dict[str, int]:
    """Divide a folder's images into `train`, `tune` (a part of `train`), `val` and `test`; written once.

    The images of all its files are divided together. Images with bit-for-bit equal embeddings count as one, so that
    an image stored under two ids is never in two splits. Val and test are at most a tenth each, and `tune` at most a
    quarter of `train`, so that small folders are divided sensibly too.

    Returns: pairs of each split; `unused` are those beyond the requested numbers.
    Raises: LabError if the folder is divided already in another way, or has too few images.
    """
    folder = Path(folder)
    division = read_division(folder)
    sizes = {"train": train_pairs, "tune": tune_pairs, "val": val_pairs, "test": test_pairs, "seed": seed}
    if division and division["wanted"] != sizes:
        raise LabError(
            f"{folder / SPLITS_FILE} divides this folder with {division['wanted']}, not {sizes}; "
            "use it as it is, or delete it together with the runs that were trained on it."
        )
    if not division:
        sources = file_splits(folder)
        pairs = joined([_read_file(folder, source) for source in sources])
        repeated = pd.Series(pairs.table.paths)[pd.Series(pairs.table.image_ids).duplicated()].tolist()
        if repeated:
            names = ", ".join(repeated[:NAMES_SHOWN]) + (", ..." if len(repeated) > NAMES_SHOWN else "")
            raise LabError(
                f"{len(repeated):,} images are in several files of {folder}: {names}; leave each in one file only."
            )
        division = {
            "wanted": sizes,
            "sources": {source: _ids_digest(folder, source) for source in sources},
            **divide(pairs.table, same_rows(pairs.images), sizes),
        }
        write_json(folder / SPLITS_FILE, division, seal=True)
    return division["pairs"]


def file_splits(folder: Path) -> list[str]:
    """Splits that a folder has files of. Raises: LabError if it has none."""
    splits = sorted(file.name.removesuffix("_metadata.json") for file in folder.glob("*_metadata.json"))
    if not splits:
        raise LabError(f"{folder} has no embeddings ({{split}}_metadata.json beside two .pt files).")
    return splits


def read_division(folder: Path) -> dict[str, Any]:
    """A folder's splits.json, or {} if it is not divided. Raises: LabError if its files have changed since."""
    path = folder / SPLITS_FILE
    if not path.is_file():
        return {}
    stamps = tuple(stamp(file) for file in (path, *sorted(folder.glob("*_metadata.json"))))
    return _division_once(folder.resolve(), stamps)


@functools.lru_cache(maxsize=4)
def _division_once(folder: Path, stamps: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    path = folder / SPLITS_FILE
    advice = "delete it and divide the folder again"
    division = read_json(path, advice)
    known = division.get("sources")
    if not isinstance(known, dict):
        raise DamagedFileError(path, "it has no 'sources'", advice)
    if {source: _ids_digest(folder, source) for source in known} != known:
        raise LabError(f"{path} divides other pairs than {folder} has; delete it and divide again.")
    return division


def _ids_digest(folder: Path, source: str) -> str:
    metadata = _read_metadata(_existing(folder, source, "metadata.json"))
    return fingerprint(str(ident) for ident in metadata["image_ids"])
