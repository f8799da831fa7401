"""Pre-encode a data set, one row per pair: `{split}_image_embeddings.pt`, `_text_embeddings.pt`, `_metadata.json`.

`python encode.py split DIR` divides such a folder by image into splits `train`, `tune` (a part of `train`),
`val` and `test`, once: the division is kept in DIR/splits.json.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from interface import cli

    cli.encode()
    raise SystemExit

import time
from pathlib import Path

from core.devices import get_device

import pandas as pd

from config import Config
from dataset import load_table, prepare_data
from sources.embeddings import ENCODERS, SPLITS_FILE, split_pairs, write_pairs
from sources.table import UNUSED
from towers.features import WHOLE, cached_image_features, cached_text_features
from towers.image import image_size
from training.distributed import barrier, is_main, join_group, rank, world_size


def split_command(folder: str, **options: int) -> None:
    """Divide a folder of embeddings into splits and print their sizes."""
    for name, count in split_pairs(folder, **options).items():
        print(f"{name:7} {count:>9,} pairs")
    print(f"{Path(folder) / SPLITS_FILE}: the images of each split; no image is in two splits")


def text_cache_report(config: Config) -> pd.DataFrame:
    """Open or fill the text caches of all splits: one row per split with captions, MB, seconds and rate."""
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


def preencode(
    config: Config, folder: str | Path, *, progress: bool = True, shard: tuple[int, int] = WHOLE
) -> pd.DataFrame:
    """Encode every split's images and captions and write them to `folder`, one row per pair.

    The feature caches are filled first, so an interrupted call continues from them. A tower that takes only one
    image size gets images of that size, whatever image_size is.

    Args:
        shard: (rank, world) of several processes: each fills its share of the caches and writes no pairs; a
            final call without it joins the shares.
    Returns: images, captions and pairs and feature widths, one row per split; empty for a share.
    """
    config = _at_its_size(config)
    encoders = config.model_dump(mode="json", include=set(ENCODERS))
    rows = []
    for split in [split for split in load_table(config).split_sizes() if split != UNUSED]:
        table = load_table(config, (split,))
        texts = cached_text_features(config, table.captions, progress=progress, shard=shard)
        features, images = cached_image_features(config, table, progress=progress, shard=shard)
        if shard != WHOLE:
            continue
        pairs = write_pairs(folder, split, table, features, texts, bad=list(images.bad), about=encoders)
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
    """The configuration with the only image size that its image tower takes."""
    size = image_size(config.image_tower, config.image_weights) or config.image_size
    if size == config.image_size:
        return config
    print(f"image_size is {size}, the only size that image tower {config.image_tower!r} takes.")
    return config.updated(image_size=size)


def main(config: Config, folder: str = "outputs/embeddings") -> None:
    """Pre-encode a data set for training heads alone, and print the output paths.

    With `accelerate launch encode.py ...` every process encodes its share on its own GPU.
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
