"""A caption table on disk, opened again in a fraction of a second while its sources are unchanged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from captions import CaptionTable, Strings
from data_folder import stamp
from files import DamagedFileError, atomic_path
from tensor_files import load_arrays

FORMAT = 2  # raise it when what readers make of the same files changes


def cache_path(cache_dir: str | Path, **asked: Any) -> Path:
    """The file of the table that was asked for with this reader, folder and options."""
    key = json.dumps({"format": FORMAT, **asked}, sort_keys=True, default=str)
    return Path(cache_dir) / f"captions-{asked['reader']}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"


def save_table(path: Path, table: CaptionTable, stamps: dict[str, tuple[int, int]]) -> None:
    """Write a table beside the stamps of every file and folder it was read from, all or nothing."""
    split_names, split_codes = np.unique(table.splits, return_inverse=True)
    arrays = {
        "image_ids": table.image_ids,
        "counts": np.diff(table.offsets).astype(np.int32),
        "split_names": split_names,
        "split_codes": split_codes.astype(np.int16),
        "stamps": np.array(list(stamps.values()), dtype=np.int64).reshape(-1, 2),
        "problems": np.frombuffer(json.dumps([table.split_source, table.problems]).encode(), dtype=np.uint8),
        **_pack("captions", table.captions),
        **_pack("paths", table.paths),
        **_pack("sources", list(stamps)),
    }
    if table.categories is not None:
        arrays["category_names"], codes = np.unique(table.categories, return_inverse=True)
        arrays["category_codes"] = codes.astype(np.int32)
    with atomic_path(path) as beside, open(beside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_table(path: Path, root: Path) -> CaptionTable | None:
    """The table of `save_table`, or None where it is absent, broken, or older than its sources."""
    try:
        file = load_arrays(path, "it is read again from its sources")
        sources = zip(_unpack(file, "sources"), file["stamps"].tolist(), strict=True)
        if any(stamp(source) != tuple(then) for source, then in sources):
            return None
        return _table(file, root)
    except DamagedFileError as damaged:
        print(damaged)
    except (OSError, KeyError, ValueError):
        pass
    return None


def _table(file: Any, root: Path) -> CaptionTable:
    image_ids = file["image_ids"]
    has_categories = "category_codes" in file
    split_source, problems = json.loads(file["problems"].tobytes())
    return CaptionTable(
        root=root,
        image_ids=image_ids,
        paths=list(_unpack(file, "paths")),
        splits=file["split_names"][file["split_codes"]],
        captions=_unpack(file, "captions"),
        caption_image_ids=np.repeat(image_ids, file["counts"]),
        categories=file["category_names"][file["category_codes"]] if has_categories else None,
        problems=problems,
        split_source=split_source,
    )


def _pack(name: str, texts: Any) -> dict[str, np.ndarray]:
    packed = Strings.pack(texts)
    return {
        f"{name}_buffer": packed.buffer,
        f"{name}_lengths": (packed.ends - packed.starts).astype(np.int32),
    }


def _unpack(file: Any, name: str) -> Strings:
    ends = np.cumsum(file[f"{name}_lengths"], dtype=np.int64)
    return Strings(file[f"{name}_buffer"], ends - file[f"{name}_lengths"], ends)
