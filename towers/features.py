"""Features of frozen towers: cache files, encoding a data set once, and encoding new texts and images.

A cache is one safetensors file with `features` (N, width) float16 and a header that names the input and the encoder.
It is written to a temporary file and renamed, so it is complete or absent.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from core.devices import encode_in_batches, reuse_freed_memory

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from config import Config
from core.errors import LabError
from core.files import DamagedFileError, StaleCacheError, fingerprint, locked, sweep
from core.tensor_files import load_tensors, save_tensors
from sources.embeddings import as_rows
from sources.image_cache import ImageCache, open_images
from sources.table import CaptionTable
from towers.base import ImageTower, hub_snapshot, model_config
from towers.image import IMAGE_MODELS, IMAGE_NORMS, build_image_tower, choose_device, image_model_name
from towers.text import TEXT_SETTINGS, TextTower, build_text_tower, text_model_name

# --- Files ---


Header = dict[str, str]
WHOLE = (0, 1)  # the share of a single process


def write_features(path: str | Path, features: Tensor, header: Header) -> None:
    """Write (N, width) features as float16 with their header. Raises: LabError if a value is not finite."""
    features = features.to(torch.float16).contiguous().cpu()
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise LabError(f"row {row} of {path} is not finite in half precision; nothing was written.")
    save_tensors(path, {"features": features}, {"header": json.dumps(header, sort_keys=True)})


def open_features(path: str | Path, header: Header) -> Tensor:
    """(N, width) float16, memory-mapped.

    Raises: StaleCacheError if the file is damaged or its header differs.
    """
    try:
        tensors, metadata = load_tensors(path, "delete it and run again")
        stored, features = json.loads(metadata.get("header", "{}")), tensors["features"]
    except DamagedFileError as error:
        raise StaleCacheError(f"cache {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise StaleCacheError(f"cache {path} is damaged ({error}); delete it and run again.") from error
    differing = [
        name for name in sorted(header.keys() | stored.keys()) if header.get(name) != stored.get(name)
    ]
    if differing:
        raise StaleCacheError(
            f"cache {path} belongs to another {', '.join(differing)}; delete it and run again."
        )
    return features


def cached_features(
    path: str | Path,
    header: Header,
    num_rows: int,
    compute: Callable[[Sequence[int]], Tensor],
    chunk: int = 2048,
    shard: tuple[int, int] = WHOLE,
) -> Tensor:
    """Open the cache at `path`, or compute it in chunks that survive an interruption and open it.

    Args:
        compute: maps row numbers to their (n, width) features; called once per chunk, in order.
        chunk: rows per file that is written.
        shard: (rank, world) of several processes that compute a share each; no rows are returned then.
    Returns: (N, width) float16, memory-mapped.
    """
    path = Path(path)
    if shard != WHOLE:
        fill_share(path, header, num_rows, compute, shard, chunk)
        return torch.empty(0, 0)
    with locked(f"{path}.lock"):
        sweep(path.parent)
        # a second process waits here and then opens the complete cache
        if path.exists():
            try:
                return open_features(path, header)
            except StaleCacheError as stale:
                print(f"{stale} It is rebuilt.")
                path.unlink()
        fill_share(path, header, num_rows, compute, chunk=chunk)
        pieces = [open_features(*_part(path, header, start, chunk)) for start in range(0, num_rows, chunk)]
        write_features(path, torch.cat(pieces), header)
        shutil.rmtree(path.with_suffix(".parts"))
        return open_features(path, header)


def fill_share(
    path: Path,
    header: Header,
    num_rows: int,
    compute: Callable[[Sequence[int]], Tensor],
    shard: tuple[int, int] = WHOLE,
    chunk: int = 2048,
) -> None:
    """Compute one process's share of a cache: every `world`-th chunk from `rank` on.

    `cached_features` joins the chunks of all processes; chunks already on disk are not computed again.

    Args: shard: (rank, world).
    """
    rank, world = shard
    if path.exists():
        return
    for start in range(rank * chunk, num_rows, world * chunk):
        part, part_header = _part(path, header, start, chunk)
        if not _is_good(part, part_header):
            write_features(part, compute(range(start, min(start + chunk, num_rows))), part_header)


def _part(path: Path, header: Header, start: int, chunk: int) -> tuple[Path, Header]:
    """File and header of the chunk that starts at row `start`."""
    name = path.with_suffix(".parts") / f"{start:09d}.safetensors"
    return name, {**header, "start": str(start), "chunk": str(chunk)}


def _is_good(path: Path, header: Header) -> bool:
    try:
        open_features(path, header)
    except StaleCacheError:
        return False
    return True


TOKENS_PER_BATCH = 4096
TEXTS_PER_FILE, IMAGES_PER_FILE = 2048, 1024  # rows between two writes
PIXELS_PER_BATCH = {
    "cpu": 4 * 224**2
}  # activations fit the processor's cache: 2.5 to 3.6 times as fast as 64 images


def encode_texts(tower: TextTower, texts: Sequence[str], bar: tqdm | None = None) -> Tensor:
    """(T, width) float32 features of texts, in their order.

    Texts are sorted by length into batches of about `TOKENS_PER_BATCH` tokens, each padded to its longest text:
    padding captions of 12 tokens to 77 costs several times the arithmetic.
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
    tower: ImageTower, images: ImageCache, rows: Sequence[int], bar: tqdm | None = None
) -> Tensor:
    """(len(rows), width) float32 features of decoded images."""
    tower.eval()
    reuse_freed_memory()
    device = next(tower.parameters()).device
    batch = max(1, PIXELS_PER_BATCH.get(device.type, 256 * 224**2) // images.size**2)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(rows), batch):
            part = np.asarray(rows[start : start + batch])
            yield images.gather(part)
            if bar is not None:
                bar.update(len(part))

    return encode_in_batches(tower, batches(), device)


def weights_revision(name: str) -> str:
    """Identifies a tower's weights: the hub's commit, or a digest of the files."""
    snapshot = hub_snapshot(name)
    if snapshot is not None:
        return snapshot
    path = Path(name)
    kinds = ("*.safetensors", "*.bin", "*.json", "*.txt")  # a tokenizer's files count too
    files = sorted(file for kind in kinds for file in path.glob(kind)) if path.is_dir() else [path]
    files = [file for file in files if file.is_file()]
    return _digest(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)) or name


def model_revision(name: str) -> str:
    """As `weights_revision`; a model that is not cached yet is looked up first, so that its commit is known."""
    if not Path(name).exists():
        model_config(name)
    return weights_revision(name)


def image_header(config: Config, images: ImageCache) -> dict[str, str]:
    """What image features depend on: the tower, its weights and normalization, the images."""
    tower, weights = config.image_tower, config.image_weights
    if tower in IMAGE_MODELS:
        revision = model_revision(image_model_name(tower, weights))
    else:
        norm = IMAGE_NORMS.get(tower, "its own")
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
    """(T, width) float16 features of captions, from the cache or encoded now.

    The cache's name and header contain the digests of captions and weights.

    Args: shard: (rank, world) of several processes that fill the cache together; no rows are returned then.
    """
    name = text_model_name(config.text_tower, config.text_model)
    pooling, max_length = TEXT_SETTINGS[config.text_tower]
    header = {
        "encoder": config.text_tower,
        "revision": model_revision(name),
        "max_length": str(max_length),
        "pooling": pooling,
        "captions": fingerprint(captions),
    }
    path = _cache_path(config, "text", config.text_tower, header)
    tower = functools.cache(lambda: frozen_tower(config, "text"))  # built if a row is missing

    def compute(rows: Sequence[int]) -> Tensor:
        return encode_texts(tower(), [captions[row] for row in rows], bar)

    with tqdm(total=len(captions), desc="captions", unit="", disable=not progress, delay=1) as bar:
        return cached_features(path, header, len(captions), compute, TEXTS_PER_FILE, shard)


def cached_image_features(
    config: Config, table: CaptionTable, *, progress: bool = True, shard: tuple[int, int] = WHOLE
) -> tuple[Tensor, ImageCache]:
    """(I, width) float16 features of a table's images, and the images; rows of images that cannot be decoded are NaN.

    Args: shard: as in `cached_text_features`.
    Raises: LabError if the tower's weights are random: they would differ the next time.
    """
    if config.image_weights == "random":
        raise LabError(
            "image_tower_mode 'cached' needs pretrained weights; change image_weights or image_tower_mode."
        )
    images = open_images(table, config.cache_dir, config.image_size, config.image_resize, config.num_workers)
    header = image_header(config, images)
    rows = np.setdiff1d(np.arange(len(table)), np.fromiter(images.bad, np.int64, len(images.bad)))
    path = _cache_path(config, "image", config.image_tower, header)
    tower = functools.cache(lambda: frozen_tower(config, "image").to(memory_format=torch.channels_last))

    def compute(chunk: Sequence[int]) -> Tensor:
        return encode_images(tower(), images, rows[np.asarray(chunk)], bar)

    with tqdm(total=len(rows), desc="images", unit="", disable=not progress, delay=1) as bar:
        good = cached_features(path, header, len(rows), compute, IMAGES_PER_FILE, shard)
    if len(rows) == len(table) or not len(good):
        return good, images
    features = torch.full((len(table), good.shape[1]), float("nan"), dtype=good.dtype)
    features[as_rows(rows)] = good
    return features, images


def _cache_path(config: Config, kind: str, encoder: str, header: dict[str, str]) -> Path:
    name = fingerprint(f"{key}={value}" for key, value in sorted(header.items()))[:16]
    return config.cache_dir / "features" / f"{kind}-{encoder}-{name}.safetensors"


def frozen_tower(config: Config, side: str) -> Any:
    """The `image` or `text` tower of a configuration, on its device."""
    build = build_image_tower if side == "image" else build_text_tower
    return build(config.updated(**{f"{side}_tower_mode": "frozen"})).to(choose_device(config)).eval()


_towers_of: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def tower_of(model: Any, config: Config, side: str) -> Any:
    """The frozen tower of a model that was trained on its cached features; freed together with the model."""
    towers = _towers_of.setdefault(model, {})
    if side not in towers:
        towers[side] = frozen_tower(config, side).to(model.logit_scale.device)
    return towers[side]


def text_features(model: Any, config: Config, texts: Sequence[str]) -> Tensor:
    """(T, D) joint-space features of any texts, by the encoder and pooling used in training.

    Raises: LabError if a text is not valid Unicode.
    """
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise LabError(f"the text {text!r} is not valid Unicode; correct it.")
    model.eval()
    inputs: Any = list(texts)
    if config.text_tower_mode == "cached":
        inputs = encode_texts(tower_of(model, config, "text"), texts)
    return encode_in_batches(model.encode_text, [inputs], model.logit_scale.device)


def image_features(model: Any, config: Config, images: Tensor) -> Tensor:
    """(I, D) joint-space features of decoded images, (I, 3, S, S) uint8."""
    model.eval()
    device = model.logit_scale.device
    if config.image_tower_mode == "cached":
        images = encode_in_batches(tower_of(model, config, "image"), [images], device)
    return encode_in_batches(model.encode_image, [images], device)


@torch.inference_mode()
def position_features(model: Any, config: Config, images: Tensor) -> Tensor:
    """(I, h, w, D) joint-space features of each position of the image tower's feature map, (I, 3, S, S) uint8 images.

    The head is applied to every position by itself instead of to their average or weighted sum.
    """
    model.eval()
    tower = tower_of(model, config, "image") if config.image_tower_mode == "cached" else model.image_encoder
    positions = tower.feature_map(images.to(model.logit_scale.device)).movedim(1, -1)  # (I, h, w, width)
    features = model.image_head(positions.flatten(0, 2))
    return torch.nn.functional.normalize(features, dim=1).unflatten(0, positions.shape[:3]).float().cpu()


def word_contributions(model: Any, config: Config, text: str, features: Tensor) -> list[float]:
    """By how much a text's mean cosine with images (I, D) falls without each of its words."""
    words = text.split()
    others = [" ".join(words[:place] + words[place + 1 :]) for place in range(len(words))]
    whole, *without = (text_features(model, config, [text, *others]) @ features.T).mean(dim=1).tolist()
    return [whole - cosine for cosine in without]
