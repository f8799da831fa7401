"""A split encoded by a finished run's model: its exact ranks, its protocol, its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from cache import fingerprint
from config import Config
from dataset import make_loader
from errors import LabError
from metrics import PROTOCOLS, summarise
from open_data import open_dataset
from ranks import Ranks, match_ranks
from runs import Run
from training_set import OFF
from uncertainty import TEST_SAMPLE_ONLY, bootstrap_intervals
from utils import encode_loader

INTERVALS = f"95 %, bootstrap over images, {TEST_SAMPLE_ONLY}"
OWN_PROTOCOL = "the data set's own"
VAL2014_IMAGES = 40_504


@dataclass
class Gallery:
    """One split, encoded by a run's model.

    Args:
        dataset: as `open_dataset` gives it; one with `validation_metrics(model, features, config)` is measured
            by that instead of by retrieval.
        image_features: (I, D); text_features: (T, D); image_id: (I,); text_id: (T,).
    """

    run: Run
    dataset: Any
    image_features: Tensor
    text_features: Tensor
    image_id: Tensor
    text_id: Tensor

    @property
    def split(self) -> str:
        return self.dataset.split

    @property
    def features(self) -> dict[str, Tensor]:
        """Features and ids by name, as metrics and losses take them."""
        names = ("image_features", "text_features", "image_id", "text_id")
        return {name: getattr(self, name) for name in names}

    @property
    def measures_itself(self) -> bool:
        """Whether its data set brings metrics of its own in place of retrieval's."""
        return hasattr(self.dataset, "validation_metrics")

    @cached_property
    def ranks(self) -> Ranks:
        """The exact rank of every match, from which all retrieval figures follow."""
        return match_ranks(self.image_features, self.text_features, self.image_id, self.text_id)

    @cached_property
    def fingerprint(self) -> str:
        """Tells this gallery from any other: pictures, captions, and which of them are in use."""
        ids = [str(values.tolist()) for values in (self.image_id, self.text_id)]
        return fingerprint([self.dataset.describe()["sha256"], *ids])

    @property
    def has_pictures(self) -> bool:
        """Whether its items have picture files and captions to show."""
        return hasattr(self.dataset, "table") and self.dataset.pictures([0])[0].is_file()

    @cached_property
    def captions(self) -> Sequence[str]:
        """(T,) the captions, in the order of `text_features`."""
        table = self.dataset.table
        rows, _ = self.dataset.caption_rows(self.dataset.rows)
        return [table.captions[row] for row in rows.tolist()]

    def metrics(self) -> dict[str, Any]:
        """Its figures with their protocol; of retrieval also 95 % intervals of the recalls.

        A K of `recall_ks` over the number of images is left out: it would count every query as answered.
        Raises: LabError if no K is left, if nothing matches, or if features hold NaN.
        """
        about = {"split": self.split, "protocol": protocol_of(self), "gallery": self.fingerprint}
        files = getattr(self.dataset, "left_out", {})
        left_out = {"left_out": len(files), "left_out_files": files}
        if self.measures_itself:
            sizes = {"num_images": len(self.image_id), "num_texts": len(self.text_id)}
            found = self.dataset.validation_metrics(self.run.model, self.features, self.run.config)
            return {**about, **sizes, **found, **left_out}
        found = summarise(self.ranks, self._ks())
        intervals = bootstrap_intervals(self.ranks, [name for name in found if "_recall@" in name])
        ends = {
            f"{name}_{end}": getattr(of, end) for name, of in intervals.items() for end in ("low", "high")
        }
        return {**about, **found, **ends, **left_out, "intervals": INTERVALS}

    def _ks(self) -> tuple[int, ...]:
        wanted = self.run.config.recall_ks
        ks = tuple(k for k in wanted if k <= self.ranks.num_images)
        if not ks:
            raise LabError(
                f"every K of recall_ks {wanted} is over the {self.ranks.num_images} images of split "
                f"{self.split!r}; set recall_ks to smaller numbers."
            )
        return ks


def open_gallery(run: Run, split: str, *, show: bool = True) -> Gallery:
    """Encode a split by a run's best model.

    Raises: LabError if the split does not exist or the run has no weights yet.
    """
    dataset = open_dataset(run.config.updated(**OFF), (split,), progress=show)
    loader = make_loader(dataset, run.config.batch_size)
    features, _ = encode_loader(run.model, loader, run.config, show=show)
    return Gallery(run, dataset, **features)


# --- protocols ---


def _is_coco_test(config: Config, split: str) -> bool:
    return split == "test" and config.reader == "coco" and config.karpathy_file is not None


def _is_flickr_test(config: Config, split: str) -> bool:
    return split == "test" and config.reader.startswith("flickr")


DEFINED_ON: Mapping[str, Callable[[Config, str], bool]] = {
    "coco_5k": _is_coco_test,
    "coco_1k_fivefold": _is_coco_test,
    "flickr_1k": _is_flickr_test,
}
"""Protocols of `metrics.PROTOCOLS` that belong to one test set, and how it is known."""


def fitting_protocols(gallery: Gallery) -> list[str]:
    """Names in `metrics.PROTOCOLS` that this gallery can be measured under."""
    return [name for name in PROTOCOLS if _fits(gallery, name)]


def _fits(gallery: Gallery, name: str) -> bool:
    protocol, defined_on = PROTOCOLS[name], DEFINED_ON.get(name)
    if defined_on is not None and not defined_on(gallery.run.config, gallery.split):
        return False
    counts = _captions_each(gallery)
    enough = len(counts) == len(gallery.image_id) and counts.min() >= (protocol.captions or 1)
    return protocol.num_images is None or bool(enough and len(gallery.image_id) == protocol.num_images)


def _captions_each(gallery: Gallery) -> np.ndarray:
    """Captions of each image that has any."""
    ids = gallery.text_id.numpy()
    return np.unique(ids[np.isin(ids, gallery.image_id.numpy())], return_counts=True)[1]


def protocol_of(gallery: Gallery) -> str:
    """What measuring the whole gallery with all its captions is called.

    One of `metrics.PROTOCOLS` where it is that exactly, `full val2014` for all of COCO's val2014, else `full`.
    """
    config, counts = gallery.run.config, _captions_each(gallery)
    if gallery.measures_itself:
        return OWN_PROTOCOL
    for name in fitting_protocols(gallery):
        protocol = PROTOCOLS[name]
        if protocol.num_images and protocol.folds == 1 and counts.max() == protocol.captions:
            return name
    is_val2014 = (
        config.reader == "coco" and gallery.split == "val" and len(gallery.image_id) == VAL2014_IMAGES
    )
    return "full val2014" if is_val2014 and config.karpathy_file is None else "full"
