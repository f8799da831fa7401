"""A split encoded by a finished run's model: features, exact ranks, protocol, metrics."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from core.errors import LabError
from core.files import DamagedFileError, fingerprint
from core.tensor_files import load_tensors, save_tensors
from dataset import make_loader, open_dataset
from metrics import PROTOCOLS
from retrieval.figures import summarise
from retrieval.ranks import Ranks, match_ranks
from retrieval.statistics import bootstrap_intervals
from sources.readers import COCO_2014
from sources.table import stamp
from training.checkpoints import read_metrics
from utils import Run, encode_loader

INTERVALS = "95 % bootstrap interval over test images; variation between training seeds is not included"
OWN_PROTOCOL = "the data set's own"
VAL2014_IMAGES = 40_504


@dataclass
class Gallery:
    """One split, encoded by a run's model.

    Args:
        dataset: as `open_dataset` gives it; one with `metrics(model, features, config, intervals=True)` is
            measured by that instead of by retrieval.
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
        """Whether its data set has metrics of its own instead of retrieval's."""
        return self.dataset.metrics is not None

    @functools.cached_property
    def ranks(self) -> Ranks:
        """The exact rank of every match, from which all retrieval figures follow."""
        return match_ranks(self.image_features, self.text_features, self.image_id, self.text_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the data: images, captions, and which of them are in use."""
        return data_digest(self.dataset)

    @property
    def has_images(self) -> bool:
        """Whether its items have image files and captions to show."""
        return self.dataset.table is not None and self.dataset.image_files([0])[0].is_file()

    @functools.cached_property
    def captions(self) -> list[str]:
        """T captions, in the order of `text_features`."""
        table = self.dataset.table
        rows = self.dataset.caption_rows(self.dataset.rows)
        return [table.captions[row] for row in rows.tolist()]

    def metrics(self) -> dict[str, Any]:
        """Its figures with their protocol; of retrieval also 95 % intervals of the recalls.

        A K of `recall_ks` over the number of images is left out: it would count every query as answered.
        Raises: LabError if no K is left, if nothing matches, or if features hold NaN.
        """
        figures: dict[str, Any]
        if self.measures_itself:
            figures = {"num_images": len(self.image_id), "num_texts": len(self.text_id)}
            figures |= self.dataset.metrics(self.run.model, self.features, self.run.config, intervals=True)
        else:
            figures = self.figures_of(self.ranks)
        left_out = self.dataset.left_out
        return {
            "split": self.split,
            "protocol": protocol_of(self),
            "gallery": self.fingerprint,
            **figures,
            "left_out": len(left_out),
            "left_out_files": left_out,
            "recall_ks": list(self.run.config.recall_ks),
            "intervals": INTERVALS,
        }

    def figures_of(self, ranks: Ranks) -> dict[str, float]:
        """All figures of ranks in this gallery, with 95 % intervals of the recalls."""
        figures = summarise(ranks, self.recall_ks)
        intervals = bootstrap_intervals(ranks, [name for name in figures if "_recall@" in name])
        for name, interval in intervals.items():
            figures |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        return figures

    @property
    def recall_ks(self) -> tuple[int, ...]:
        """Every K of `recall_ks` up to the number of images. Raises: LabError if there is none."""
        ks = tuple(k for k in self.run.config.recall_ks if k <= self.ranks.num_images)
        if not ks:
            raise LabError(
                f"every K of recall_ks {self.run.config.recall_ks} is over the {self.ranks.num_images} images of "
                f"split {self.split!r}; set recall_ks to smaller numbers."
            )
        return ks


def data_digest(dataset: Any) -> str:
    """Digest of what a data set's metrics depend on."""
    about = dataset.describe()
    return fingerprint([about["sha256"], about.get("form", "")])


# --- protocols ---


def fitting_protocols(gallery: Gallery) -> list[str]:
    """Names in `metrics.PROTOCOLS` that this gallery can be measured under."""
    return [name for name in PROTOCOLS if _fits(gallery, name)]


def _fits(gallery: Gallery, name: str) -> bool:
    protocol = PROTOCOLS[name]
    if protocol.split_source and (gallery.split, _split_source(gallery)) != ("test", protocol.split_source):
        return False  # a split drawn by seed is a different one, even with as many images
    counts = _captions_each(gallery)
    enough = len(counts) == len(gallery.image_id) and counts.min() >= (protocol.captions or 1)
    return protocol.num_images is None or bool(enough and len(gallery.image_id) == protocol.num_images)


def _split_source(gallery: Gallery) -> str:
    table = gallery.dataset.table
    return "" if table is None else table.split_source


def _captions_each(gallery: Gallery) -> np.ndarray:
    """Captions of each image that has any."""
    ids = gallery.text_id.numpy()
    return np.unique(ids[np.isin(ids, gallery.image_id.numpy())], return_counts=True)[1]


def protocol_of(gallery: Gallery) -> str:
    """What measuring the whole gallery with all its captions is called.

    One of `metrics.PROTOCOLS` where it is that exactly, `full val2014` for all of COCO's val2014, else `full`.
    """
    counts = _captions_each(gallery)
    if gallery.measures_itself:
        return OWN_PROTOCOL
    for name in fitting_protocols(gallery):
        protocol = PROTOCOLS[name]
        if protocol.num_images and protocol.folds == 1 and counts.max() == protocol.captions:
            return name
    val2014 = (COCO_2014, "val", VAL2014_IMAGES)
    is_val2014 = (_split_source(gallery), gallery.split, len(gallery.image_id)) == val2014
    return "full val2014" if is_val2014 else "full"


# --- saved features and results ---


def results_of(run: Run) -> Path:
    """Folder of a measured run's figures, tables and report, see `results_folder`."""
    return run.results or run.folder


def results_folder(run: Run, split: str, digest: str) -> Path:
    """Folder of a run's results on data of this digest; the first call decides it.

    That is the run's folder for the data it was trained on, wherever they are now, and for the first data it is
    measured on; for any other data `on_DIGEST` in it, so that these never replace the run's own results.
    """
    if run.results is None:
        known = read_metrics(run.folder / "metrics.json", show=False).get(split, {}).get("gallery")
        run.results = run.folder
        if not run.own_data and known not in (None, digest):
            run.results = run.folder / f"on_{digest[:8]}"
            print(
                f"{run.config.data_dir} holds other data than {run.name} was measured on: "
                f"results go to {run.results.name}/."
            )
    return run.results


def open_split(run: Run, split: str, *, show: bool = True) -> Any:
    """A split's data set as an evaluation reads it. Raises: LabError if the split does not exist."""
    return open_dataset(run.config, (split,), evaluation=True, progress=show)


def encode_split(run: Run, dataset: Any, *, show: bool = True) -> Gallery:
    """A data set encoded by a run's model. Raises: LabError if the run has no weights yet."""
    loader = make_loader(dataset, run.config.batch_size)
    features, _ = encode_loader(run.model, loader, run.config, show=show)
    return Gallery(run, dataset, **features)


def load_or_encode(run: Run, dataset: Any, *, again: bool = False, show: bool = True) -> Gallery:
    """A data set's features under a run's best model, saved as `features_SPLIT.safetensors` with the run's results.

    They are encoded again if the weights or the data have changed, or the file is damaged.
    Args: again: encode again in any case.
    Raises: LabError if the run has no weights yet.
    """
    digest = data_digest(dataset)
    path = results_folder(run, dataset.split, digest) / f"features_{dataset.split}.safetensors"
    features = None if again else _saved_features(path, run.weights, digest)
    if features is not None:
        return Gallery(run, dataset, **features)
    gallery = encode_split(run, dataset, show=show)
    save_tensors(path, gallery.features, {"weights": run.weights, "data": digest})
    return gallery


def _saved_features(path: Path, weights: str, data: str) -> dict[str, Any] | None:
    """Features and ids as `load_or_encode` wrote them; None if there are none of these weights and data."""
    try:
        features, metadata = load_tensors(path, "it is encoded again")
    except FileNotFoundError:
        return None
    except DamagedFileError as damaged:
        print(damaged)
        return None
    return features if (metadata.get("weights"), metadata.get("data")) == (weights, data) else None


def ranks_of(run: Run, split: str, *, show: bool = True) -> Ranks:
    """The ranks behind a split's metrics, from its saved features; encoded again only if these are missing."""
    path = results_of(run) / f"features_{split}.safetensors"
    metrics = run.metrics.get(split, {})
    if path.is_file():
        ranks = _saved_ranks(path, stamp(path), metrics.get("weights", ""), metrics.get("gallery", ""))
        if ranks is not None:
            return ranks
    return load_or_encode(run, open_split(run, split, show=show), show=show).ranks


@functools.lru_cache(maxsize=16)  # a comparison asks for the baseline's ranks again and again
def _saved_ranks(path: Path, stamp: tuple[int, int], weights: str, data: str) -> Ranks | None:
    features = _saved_features(path, weights, data)
    return None if features is None else match_ranks(**features)
