"""Runs a tower once over texts or images and fills a cache; opens datasets with what is cached.

`python encode.py --image_tower siglip --text_tower e5 --data_dir DIR --reader coco --folder OUT` encodes every
split: into this lab's caches, and into OUT as tensors with one row a pair.
"""

from __future__ import annotations

import functools
import hashlib
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compat import get_device, reuse_freed_memory

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

import towers
from cache import as_rows, cached_features, fill_share
from captions import UNUSED, CaptionTable
from cli import run_command
from config import Config
from dataset import COCOClipDataset, load_table, open_images, prepare_data
from distributed import barrier, is_main, join_group, rank, world_size
from errors import LabError
from files import fingerprint
from image_cache import ImageCache
from models import CLIPModel, build_image_tower, build_text_tower
from preencoded import ENCODERS, write_pairs
from training_set import captioned_set

TOKENS_PER_BATCH = 4096
TEXTS_PER_FILE, PICTURES_PER_FILE = 2048, 1024  # encoded between two writes: what an interruption costs
WHOLE = (0, 1)
PIXELS_PER_BATCH = {
    "cpu": 4 * 224**2
}  # activations stay in the processor's cache: 2.5 to 3.6 times 64 pictures


def encode_texts(tower: towers.TextTower, texts: Sequence[str], bar: tqdm | None = None) -> Tensor:
    """(T, width) float32 features of texts, in their order.

    Texts are sorted by length and batched to about `TOKENS_PER_BATCH` tokens, each batch padded to its
    own longest: captions of 12 tokens padded to 77 cost several times the arithmetic.
    """
    tower.eval()
    lengths = np.array(tower.lengths(texts))
    order = np.argsort(-lengths, kind="stable")
    features = torch.empty(len(texts), tower.width)
    start = 0
    with torch.inference_mode():
        while start < len(order):
            rows = order[start : start + max(1, TOKENS_PER_BATCH // int(lengths[order[start]]))]
            features[as_rows(rows)] = tower([texts[row] for row in rows.tolist()]).float().cpu()
            start += len(rows)
            if bar is not None:
                bar.update(len(rows))
    return features


def encode_images(
    tower: towers.ImageTower, images: ImageCache, rows: Sequence[int], bar: tqdm | None = None
) -> Tensor:
    """(len(rows), width) float32 features of decoded pictures."""
    tower.eval()
    reuse_freed_memory()
    device = next(tower.parameters()).device
    batch = max(1, PIXELS_PER_BATCH.get(device.type, 256 * 224**2) // images.size**2)
    features = []
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            some = np.asarray(rows[start : start + batch])
            features.append(tower(images.gather(some).to(device)).float().cpu())
            if bar is not None:
                bar.update(len(some))
    return torch.cat(features)


def weights_revision(name: str) -> str:
    """What a tower's weights are: a hub's commit, or a digest of the files' contents."""
    snapshot = towers.hub_snapshot(name)
    if snapshot is not None:
        return snapshot
    path = Path(name)
    kinds = ("*.safetensors", "*.bin", "*.json", "*.txt")  # a tokenizer's files count too
    files = sorted(file for kind in kinds for file in path.glob(kind)) if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    return _digest(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)) or name


def model_revision(name: str) -> str:
    """The same of a hub name or folder; a model not here yet is asked for first, so that its commit counts."""
    if not Path(name).exists():
        towers.model_config(name)
    return weights_revision(name)


def image_header(config: Config, images: ImageCache) -> dict[str, str]:
    """What a cache of image features is made from: the tower, its weights and normalisation, the pictures."""
    tower, weights = config.image_tower, config.image_weights
    if tower in towers.IMAGE_MODELS:
        revision = model_revision(towers.image_model_name(tower, weights))
    else:
        norm = towers.IMAGE_NORMS.get(tower, "its own")
        revision = (
            f"{weights if weights == 'pretrained' else weights_revision(weights)}, normalised by {norm}"
        )
    return {"encoder": tower, "revision": revision, "images": images.identity}


@functools.lru_cache(maxsize=16)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else ""


def cached_text_features(
    config: Config, captions: Sequence[str], *, progress: bool = True, shard: tuple[int, int] = WHOLE
) -> Tensor:
    """(T, width) float16 features of captions, from the cache or encoded now into it.

    The cache's name and header hold the digest of captions and weights, so another set of captions or
    another encoder never meets it.

    Args: shard: (rank, world) of several processes that fill it together; each gets no rows back.
    """
    name = towers.text_model_name(config.text_tower, config.text_model)
    pooling, max_length = towers.TEXT_SETTINGS[config.text_tower]
    header = {
        "encoder": config.text_tower,
        "revision": model_revision(name),
        "max_length": str(max_length),
        "pooling": pooling,
        "captions": fingerprint(captions),
    }
    path = _cache_path(config, "text", config.text_tower, header)
    tower: list[towers.TextTower] = []

    def compute(rows: Sequence[int]) -> Tensor:
        if not tower:
            tower.append(frozen_tower(config, "text"))
        return encode_texts(tower[0], [captions[row] for row in rows], bar)

    with tqdm(total=len(captions), desc="captions", unit="", disable=not progress, delay=1) as bar:
        return _fill(path, header, len(captions), compute, shard, TEXTS_PER_FILE)


def cached_image_features(
    config: Config, table: CaptionTable, *, progress: bool = True, shard: tuple[int, int] = WHOLE
) -> tuple[Tensor, ImageCache]:
    """(I, width) float16 features of a table's images, and the images; rows that cannot be decoded are NaN.

    Args: shard: as in `cached_text_features`.
    Raises: LabError where the tower's weights are random, for they would differ the next time.
    """
    if config.image_weights == "random":
        raise LabError(
            "image_tower_mode 'cached' needs fixed weights; set image_weights or image_tower_mode."
        )
    images = open_images(table, config.cache_dir, config.image_size, config.image_resize, config.num_workers)
    header = image_header(config, images)
    rows = np.setdiff1d(np.arange(len(table)), np.fromiter(images.bad, np.int64, len(images.bad)))
    path = _cache_path(config, "image", config.image_tower, header)
    tower: list[towers.ImageTower] = []

    def compute(chunk: Sequence[int]) -> Tensor:
        if not tower:
            tower.append(frozen_tower(config, "image").to(memory_format=torch.channels_last))
        return encode_images(tower[0], images, rows[np.asarray(chunk)], bar)

    with tqdm(total=len(rows), desc="pictures", unit="", disable=not progress, delay=1) as bar:
        good = _fill(path, header, len(rows), compute, shard, PICTURES_PER_FILE)
    if len(rows) == len(table) or not len(good):
        return good, images
    features = torch.full((len(table), good.shape[1]), float("nan"), dtype=good.dtype)
    features[as_rows(rows)] = good
    return features, images


def _fill(
    path: Path,
    header: dict[str, str],
    num_rows: int,
    compute: Callable[[Sequence[int]], Tensor],
    shard: tuple[int, int],
    chunk: int,
) -> Tensor:
    """The whole cache; or no rows, after computing one process's share of it."""
    if shard == WHOLE:
        return cached_features(path, header, num_rows, compute, chunk)
    fill_share(path, header, num_rows, compute, shard, chunk)
    return torch.empty(0, 0)


def _cache_path(config: Config, kind: str, encoder: str, header: dict[str, str]) -> Path:
    name = fingerprint(f"{key}={value}" for key, value in sorted(header.items()))[:16]
    return config.cache_dir / "features" / f"{kind}-{encoder}-{name}.safetensors"


def open_captioned(config: Config, splits: Sequence[str], *, progress: bool = True) -> COCOClipDataset:
    """The dataset of some splits, its pictures decoded and its cached features filled."""
    table = load_table(config, tuple(splits))
    texts = (
        cached_text_features(config, table.captions, progress=progress)
        if config.text_tower_mode == "cached"
        else None
    )
    parts: dict[str, Any]
    if config.image_tower_mode == "cached":
        features, images = cached_image_features(config, table, progress=progress)
        parts = {"images": features, "decoded": images}
    else:
        images = open_images(
            table, config.cache_dir, config.image_size, config.image_resize, config.num_workers
        )
        parts = {"images": images}
    return captioned_set(config, tuple(splits), table=table, **parts, text_features=texts)


def text_cache_report(config: Config) -> pd.DataFrame:
    """Opens or fills the text caches of all a configuration's splits; a row each: captions, MB, seconds, rate."""
    rows = []
    for splits in config.split_groups():
        captions = load_table(config, splits).captions
        start = time.perf_counter()
        features = cached_text_features(config, captions)
        seconds = time.perf_counter() - start
        megabytes = features.numel() * features.element_size() / 1e6
        rows.append(
            {
                "split": "+".join(splits),
                "captions": len(captions),
                "width": features.shape[1],
                "MB": round(megabytes, 1),
                "seconds": round(seconds, 2),
                "captions/s": round(len(captions) / seconds),
            }
        )
    return pd.DataFrame(rows).set_index("split")


def frozen_tower(config: Config, side: str) -> Any:
    """The `image` or `text` tower of a configuration, loaded now, on its device."""
    build = build_image_tower if side == "image" else build_text_tower
    return build(config.updated(**{f"{side}_tower_mode": "frozen"})).to(get_device(config.device)).eval()


_towers_of: weakref.WeakKeyDictionary[CLIPModel, dict[str, Any]] = weakref.WeakKeyDictionary()


def tower_of(model: CLIPModel, config: Config, side: str) -> Any:
    """`frozen_tower` beside a model whose cached features it made, kept as long as that model, and no longer."""
    kept = _towers_of.setdefault(model, {})
    if side not in kept:
        kept[side] = frozen_tower(config, side).to(model.logit_scale.device)
    return kept[side]


@torch.inference_mode()
def text_features(model: CLIPModel, config: Config, texts: Sequence[str]) -> Tensor:
    """(T, D) joint-space features of any texts, by the encoder and pooling of training.

    Raises: LabError if a text is no valid Unicode, as a name that is not UTF-8 gives it.
    """
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise LabError(f"the text {text!r} is no valid Unicode; write it again.")
    model.eval()
    if config.text_tower_mode != "cached":
        return model.encode_text(list(texts)).float().cpu()
    device = model.logit_scale.device
    features = encode_texts(tower_of(model, config, "text"), texts)
    return model.encode_text(features.to(device)).float().cpu()


@torch.inference_mode()
def image_features(model: CLIPModel, config: Config, images: Tensor) -> Tensor:
    """(I, D) joint-space features of decoded pictures, (I, 3, S, S) uint8."""
    model.eval()
    device = model.logit_scale.device
    images = images.to(device)
    if config.image_tower_mode == "cached":
        images = tower_of(model, config, "image")(images)
    return model.encode_image(images).float().cpu()


def preencode(
    config: Config, folder: str | Path, *, progress: bool = True, shard: tuple[int, int] = WHOLE
) -> pd.DataFrame:
    """Encode every split's pictures and captions and write them to `folder`, one row a pair.

    The caches are filled on the way; interrupted, it continues from them. A tower that takes one size of
    picture gets it, whatever image_size says.

    Args:
        shard: (rank, world) of several processes: each fills its share of the caches and writes no pairs; a
            last call without it joins the shares.
    Returns: images, captions and pairs of each split, and the widths of their features; of a share, nothing.
    """
    config = _at_its_size(config)
    about = config.model_dump(mode="json", include=set(ENCODERS))
    rows = []
    for split in [split for split in load_table(config).split_sizes() if split != UNUSED]:
        table = load_table(config, (split,))
        texts = cached_text_features(config, table.captions, progress=progress, shard=shard)
        features, images = cached_image_features(config, table, progress=progress, shard=shard)
        if shard != WHOLE:
            continue
        pairs = write_pairs(folder, split, table, features, texts, bad=list(images.bad), about=about)
        rows.append(
            {
                "split": split,
                "images": len(table) - len(images.bad),
                "captions": len(table.captions),
                "pairs": pairs,
                "image width": features.shape[1],
                "text width": texts.shape[1],
            }
        )
    return pd.DataFrame(rows).set_index("split") if rows else pd.DataFrame()


def _at_its_size(config: Config) -> Config:
    """The configuration at the only size of picture that its image tower takes, saying so."""
    size = towers.image_size(config.image_tower, config.image_weights) or config.image_size
    if size == config.image_size:
        return config
    print(f"pictures are {size} x {size} pixels, as image tower {config.image_tower!r} takes them.")
    return config.updated(image_size=size)


def main(config: Config, folder: str = "outputs/embeddings") -> None:
    """Pre-encode a data set for training heads alone, and say where everything lies.

    Under `accelerate launch encode.py ...` every process, each on its GPU, encodes its share.
    """
    join_group(get_device(config.device))
    if is_main():
        prepare_data(config)
    barrier()
    if world_size() > 1:
        preencode(config, folder, progress=is_main(), shard=(rank(), world_size()))
        barrier()
    if not is_main():
        return
    print(preencode(config, folder).to_string())
    print(f"{folder}: {{split}}_image_embeddings.pt, {{split}}_text_embeddings.pt, {{split}}_metadata.json")
    print(f"{config.cache_dir / 'features'}: the same by image and caption, for towers in mode 'cached'")


if __name__ == "__main__":
    run_command(main, __doc__)
