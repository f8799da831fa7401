"""Datasets of embeddings made elsewhere: the pairwise layout, and features beside a captioned set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from cache import Rows
from config import Config
from dataset import COCOClipDataset
from errors import LabError
from models import build_image_tower, build_text_tower
from preencoded import Pairs, encoders, file_splits, image_ids, joined, read_division, read_pairs
from readers import read_captions
from training_set import captioned_set

FEATURES_FILE = "features.safetensors"


def open_pairs(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """Splits of the pairwise layout (see `preencoded.read_pairs`).

    Raises: LabError as `read_pairs`, or if an image is both in a split that is trained on and in one that
        is validated or tested on.
    """
    _refuse_leaks(config)
    parts = [read_pairs(config.data_dir, split, config.image_root) for split in splits]
    return _dataset(config, parts, splits)


def open_features(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """Splits of a captioned set in Flickr8k's layout with a file of features beside it.

    `features.safetensors` holds `image_features` (I, W), rows in ascending order of file names, and
    `text_features` (T, V), each image's captions in the order of the captions' file.
    Raises: LabError if the file is missing or does not fit the captions.
    """
    whole = _read_features(config)
    pairs = [whole.take(np.flatnonzero(whole.table.splits == split)) for split in splits]
    for split in splits:
        whole.table.split(split)  # raises the one explanation where it is empty
    return _dataset(config, pairs, splits)


def _read_features(config: Config) -> Pairs:
    folder = config.data_dir
    table = read_captions(
        "flickr8k", folder, split_seed=config.split_seed, cache_dir=config.cache_dir / "captions"
    )
    table = table.take(np.argsort(np.array(table.paths), kind="stable"))
    path = folder / FEATURES_FILE
    try:
        with safe_open(str(path), framework="pt") as file:
            images, texts = file.get_tensor("image_features"), file.get_tensor("text_features")
    except (SafetensorError, OSError) as error:
        raise LabError(
            f"{path} cannot be read ({error}); it needs image_features and text_features."
        ) from error
    if (len(images), len(texts)) != (len(table), len(table.captions)):
        raise LabError(
            f"{path} has {len(images):,} images and {len(texts):,} texts, but {folder} has {len(table):,} and "
            f"{len(table.captions):,}; encode the set anew."
        )
    return Pairs(table, Rows([images]), Rows([texts]))


def _dataset(config: Config, parts: Sequence[Pairs], splits: Sequence[str]) -> COCOClipDataset:
    pairs = joined([_thinned(part, config.max_samples) for part in parts])
    _check_widths(config, pairs)
    return captioned_set(config, tuple(splits), **pairs._asdict())


def _check_widths(config: Config, pairs: Pairs) -> None:
    """Raises: LabError if embeddings have another width than the configuration's towers."""
    sides = (("image", pairs.images, build_image_tower), ("text", pairs.text_features, build_text_tower))
    for side, rows, build in sides:
        if config[f"{side}_tower_mode"] != "cached":
            raise LabError(f"reader {config.reader!r} brings embeddings; set {side}_tower_mode to 'cached'.")
        wanted: Any = build(config).width
        found = rows.shape[1]
        if wanted != found:
            tower = config[f"{side}_tower"]
            raise LabError(
                f"{side} embeddings in {config.data_dir} are {found} numbers wide, but {side}_tower {tower!r} has "
                f"{wanted}; name the tower that made them, or set {side}_tower to 'embeddings' and {side}_width "
                f"to {found}."
            )


def _thinned(pairs: Pairs, max_samples: int | None) -> Pairs:
    """At most so many images, evenly spread."""
    count = len(pairs.table)
    if max_samples is None or count <= max_samples:
        return pairs
    return pairs.take(np.linspace(0, count - 1, max_samples).astype(np.int64))


def _refuse_leaks(config: Config) -> None:
    """Raises: LabError if two of a configuration's groups of splits share images."""
    ids = {
        splits: np.concatenate([image_ids(config.data_dir, split) for split in splits])
        for splits in config.split_groups()
    }
    for first, second in combinations(ids, 2):
        shared = np.intersect1d(ids[first], ids[second])
        if len(shared):
            raise LabError(
                f"splits {'+'.join(first)} and {'+'.join(second)} in {config.data_dir} share {len(shared):,} "
                f"images, such as {shared[0]}; choose other splits, or divide the folder with "
                "`python preencoded.py split`."
            )


def embeddings_at(path: str | Path) -> dict[str, Any]:
    """The fields of a configuration that open the embeddings at a path.

    Args: path: a folder of the pairwise layout, divided or not, or a features file beside a captioned set.
    Returns: data_dir, reader, the splits, and the towers as far as the files name them.
    Raises: LabError if nothing of the kind is there.
    """
    path = Path(path)
    folder = path.parent if path.name == FEATURES_FILE else path
    if (folder / FEATURES_FILE).is_file():
        return {"data_dir": folder, "reader": "features", "test_splits": ("test",)}
    names = list(read_division(folder).get("splits", {})) or file_splits(folder)
    missing = [name for name in ("train", "val") if name not in names]
    if missing:
        raise LabError(
            f"{folder} has the splits {', '.join(names)} and no {' or '.join(missing)}; divide it with "
            f"`python preencoded.py split {folder}`."
        )
    tests = tuple(name for name in names if name not in ("train", "tune", "val"))
    splits = {"train_splits": ("train",), "val_splits": ("val",), "test_splits": tests or ("val",)}
    return {"data_dir": folder, "reader": "pairs", **splits, **_towers_of(folder)}


def _towers_of(folder: Path) -> dict[str, Any]:
    """The encoders that a folder's metadata names, or their widths."""
    named = encoders(folder)
    if named:
        return named
    pairs = read_pairs(folder, "train")
    return {
        "image_tower": "embeddings",
        "image_width": pairs.images.shape[1],
        "text_tower": "embeddings",
        "text_width": pairs.text_features.shape[1],
    }
