"""Embeddings made elsewhere, one row a pair: `{split}_image_embeddings.pt`, `_text_embeddings.pt`, `_metadata.json`.

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
    size = image_size(config.image_tower, config.image_weights) or config.image_size
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
