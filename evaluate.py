"""Evaluates a finished run: retrieval, text queries, zero-shot classification, comparison of runs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import plots
from cli import one_sentence
from config import FLAGS, Config, make_config
from dataset import COCOClipDataset, make_loader
from encode import text_features
from errors import LabError
from metrics import summarise
from open_data import open_dataset
from ranks import Ranks, match_ranks
from scenes import load_scenes
from uncertainty import TEST_SAMPLE_ONLY, bootstrap_intervals
from utils import Run, encode_loader, load_run, write_json

INTERVALS = f"95 %, bootstrap over images, {TEST_SAMPLE_ONLY}"
DEFAULT_TEMPLATES = ("a photo of {}.", "a picture of {}.", "an image with {} in it.")


@dataclass
class Gallery:
    """One split, encoded by a run's model.

    Args:
        image_features: (I, D); text_features: (T, D); image_id: (I,); text_id: (T,).
    """

    run: Run
    dataset: COCOClipDataset
    image_features: Tensor
    text_features: Tensor
    image_id: Tensor
    text_id: Tensor

    @property
    def split(self) -> str:
        return self.dataset.split

    @cached_property
    def ranks(self) -> Ranks:
        """The exact rank of every match, from which all figures follow."""
        return match_ranks(self.image_features, self.text_features, self.image_id, self.text_id)

    def metrics(self) -> dict[str, Any]:
        """Exact retrieval metrics with their protocol, and 95 % intervals of the recalls."""
        ks = tuple(k for k in self.run.config.recall_ks if k <= len(self.image_id))
        found = summarise(self.ranks, ks)
        recalls = [name for name in found if "_recall@" in name]
        intervals = bootstrap_intervals(self.ranks, recalls)
        ends = {
            f"{name}_{end}": getattr(of, end) for name, of in intervals.items() for end in ("low", "high")
        }
        about = {"left_out": len(self.dataset.left_out), "intervals": INTERVALS}
        return {"split": self.split, **found, **ends, **about}


def open_gallery(run: Run, split: str, *, show: bool = True) -> Gallery:
    """Encode a split by a run's best model."""
    dataset = open_dataset(run.config.updated(captions_per_image=None), (split,), progress=show)
    loader = make_loader(dataset, run.config.batch_size)
    features, _ = encode_loader(run.model, loader, run.config, show=show)
    return Gallery(run, dataset, **features)


def evaluate_run(run: Run, *, again: bool = False, show: bool = True) -> dict[str, dict[str, Any]]:
    """Metrics of a run's test splits, measured once and kept in metrics.json.

    Args:
        again: measure anew.
    Returns: split -> metrics; recalls in [0, 1].
    """
    missing = [split for split in run.config.test_splits if again or split not in run.metrics]
    if missing:
        for split in missing:
            run.metrics[split] = open_gallery(run, split, show=show).metrics()
        write_json(run.folder / "metrics.json", run.metrics)
    figures = run.folder / "figures"
    plots.learning_curves({run.name: run.history}, figures / "learning_curves.png", best_epoch=run.best_epoch)
    for split in run.config.test_splits:
        found = run.metrics[split]
        plots.recall_bars(found, figures / f"recall_{split}.png", chance=chance(found))
    return run.metrics


def chance(metrics: dict[str, Any]) -> dict[str, float]:
    """Recalls of a random ranking, by the metric they stand beside."""
    return {
        name.replace("_chance@", "_recall@"): value for name, value in metrics.items() if "_chance@" in name
    }


def recalls_of(metrics: dict[str, Any]) -> dict[str, float]:
    """The recalls among the figures, without their intervals' ends."""
    return {name: value for name, value in metrics.items() if re.fullmatch(r"(i2t|t2i)_recall@\d+", name)}


def metrics_table(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Recalls in percent with intervals and protocol, a row a split and one for its chance level."""
    rows = []
    for split, found in metrics.items():
        protocol = {"split": split, "images": found["num_images"], "captions": found["num_texts"]}
        recalls = {
            name: f"{100 * value:.1f} [{100 * found[f'{name}_low']:.1f}, {100 * found[f'{name}_high']:.1f}]"
            for name, value in recalls_of(found).items()
        }
        rows.append({**protocol, "": "model", **recalls})
        by_chance = {name: f"{100 * value:.1f}" for name, value in chance(found).items()}
        rows.append({**protocol, "": "chance", **by_chance})
    return pd.DataFrame(rows).set_index(["split", "images", "captions", ""])


# --- queries ---


@dataclass
class Found:
    """What a query found: pictures, nearest first, with their cosine similarities.

    Args: correct: whether each is the query's own picture, where the query is a caption of the gallery.
    """

    query: str
    pictures: list[Path]
    scores: list[float]
    correct: list[bool] | None


def search_text(gallery: Gallery, queries: Sequence[str], k: int = 5) -> list[Found]:
    """The k nearest pictures of each text. Raises: LabError if k is not in 1..images."""
    if not 1 <= k <= len(gallery.image_id):
        raise LabError(f"k is {k} but the gallery holds {len(gallery.image_id)} pictures; choose k between.")
    texts = text_features(gallery.run.model, gallery.run.config, list(queries))
    scores, rows = (texts @ gallery.image_features.T).topk(k, dim=1)
    return [
        Found(query, gallery.dataset.pictures(items.tolist()), score.tolist(), _own(gallery, query, items))
        for query, items, score in zip(queries, rows, scores, strict=True)
    ]


def _own(gallery: Gallery, query: str, items: Tensor) -> list[bool] | None:
    """Which items have this caption, or None where no picture of the gallery has it."""
    table = gallery.dataset.table
    owners = {int(table.caption_image_ids[row]) for row, text in enumerate(table.captions) if text == query}
    return [int(gallery.image_id[item]) in owners for item in items.tolist()] if owners else None


def class_features(run: Run, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
    """(L, D) classifier: each label's feature averaged over the templates.

    Args: templates: texts with `{}` where the label stands.
    Raises: LabError if a label is empty or given twice, or a template lacks `{}`.
    Source: prompt ensembles, Radford et al. 2021, section 3.1.4.
    """
    labels = [label.strip() for label in labels]
    if len(set(labels)) < max(2, len(labels)) or not all(labels):
        raise LabError("zero-shot labels must be at least two, none empty and none given twice.")
    if not templates or not all("{}" in template for template in templates):
        raise LabError("every prompt template needs {} where the label stands.")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    features = text_features(run.model, run.config, texts).view(len(labels), len(templates), -1)
    return torch.nn.functional.normalize(features.mean(dim=1), dim=-1)


@torch.inference_mode()
def zero_shot(
    gallery: Gallery,
    items: Sequence[int],
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> Tensor:
    """(len(items), L) probabilities of labels for some pictures of a gallery, at the model's temperature."""
    classes = class_features(gallery.run, labels, templates)
    scale = gallery.run.model.logit_scale.exp().cpu()
    return (scale * gallery.image_features[list(items)] @ classes.T).softmax(dim=1)


def known_labels(gallery: Gallery) -> dict[int, str]:
    """Item -> its one true label, where the data says: generated pictures of one object, or categories."""
    table, rows = gallery.dataset.table, gallery.dataset.rows
    if (table.root / "scenes.json").is_file():
        scenes = load_scenes(table.root, gallery.split)
        objects = {item: scenes[int(table.image_ids[row])].objects for item, row in enumerate(rows)}
        return {
            item: f"{found[0].colour} {found[0].shape}" for item, found in objects.items() if len(found) == 1
        }
    if table.categories is None:
        return {}
    return {item: str(table.categories[row]) for item, row in enumerate(rows) if table.categories[row]}


def zero_shot_accuracy(gallery: Gallery, templates: Sequence[str] = DEFAULT_TEMPLATES) -> dict[str, float]:
    """Top-1 and top-5 accuracy in [0, 1] over the pictures whose label is known, among all labels met."""
    known = known_labels(gallery)
    labels = sorted(set(known.values()))
    if len(labels) < 2:
        raise LabError(f"split {gallery.split!r} knows no two labels; give labels of your own to zero_shot.")
    truth = torch.tensor([labels.index(label) for label in known.values()])
    probabilities = zero_shot(gallery, list(known), labels, templates)
    hits = probabilities.argsort(dim=1, descending=True) == truth[:, None]
    return {
        "top1": hits[:, 0].float().mean().item(),
        "top5": hits[:, :5].any(dim=1).float().mean().item(),
        "chance": 1 / len(labels),
        "pictures": len(known),
        "labels": len(labels),
    }


# --- comparison ---


def finished_runs(runs_dir: str | Path, preset: str) -> list[Run]:
    """Every finished run of a preset, by name."""
    folders = sorted(path.parent for path in Path(runs_dir).glob("*/training.json"))
    runs = [load_run(folder) for folder in folders]
    return [run for run in runs if run.finished and run.config.preset == preset]


def flag_settings(config: Config) -> list[Config]:
    """The configuration under each setting of the flags; a cached image tower has no map to pool."""
    pooling = (False,) if config.image_tower_mode == "cached" else (False, True)
    flags = [
        {"use_batch_norm": norm, "use_attention_pooling": pool} for norm in (False, True) for pool in pooling
    ]
    return [config.updated(**setting) for setting in flags]


def settings_label(config: Config) -> str:
    """What sets a run apart from its preset, seeds and places apart: `plain`, `bn`, `attn, num_epochs=2`."""
    flags = [short for field, short in FLAGS.items() if config[field]]
    base = make_config(config.preset)
    other = [f"{n}={config[n]}" for n in config.differences(base) if n not in FLAGS and n not in NOT_SETTINGS]
    return ", ".join([*flags, *other]) or "plain"


NOT_SETTINGS = {"seed", "data_dir", "cache_dir", "runs_dir", "device", "num_workers"}


def compare_runs(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a setting: how many seeds, and mean and standard deviation of its recalls on the first test split.

    Recalls are in [0, 1]; `_std` over seeds is nan for a single one.
    Raises: LabError if there is no run.
    """
    if not runs:
        raise LabError("there is no finished run to compare; train one first.")
    rows = []
    for run in runs:
        found = evaluate_run(run)[run.config.test_splits[0]]
        recalls = recalls_of(found)
        seconds = run.training.get("train_seconds", math.nan)
        rows.append({"run": settings_label(run.config), "seconds": seconds, **recalls})
    groups = pd.DataFrame(rows).groupby("run", sort=False)
    table = groups.mean()
    table.insert(0, "seeds", groups.size())
    return table.join(groups.std().drop(columns="seconds").add_suffix("_std"))


def main(folder: str, again: bool = False) -> None:
    """Evaluate the run in `folder` and print its table."""
    run = load_run(folder)
    print(metrics_table(evaluate_run(run, again=again)).to_string())
    print(f"{run.folder}: metrics.json, figures/")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a run's folder, such as runs/quickstart_s0")
    parser.add_argument("--again", action="store_true", help="measure again what metrics.json holds")
    with one_sentence():
        main(**vars(parser.parse_args()))
