"""Zero-shot classification: class names and prompt templates become a classifier, measured and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import plots_ranks
from encode import image_features, text_features
from errors import LabError
from gallery import Gallery
from labelled import Labelled, known_labels, labelled_of
from pictures import decode_rgb
from queries import encoded
from runs import Run

DEFAULT_TEMPLATES = ("a photo of {}.", "a picture of {}.", "an image with {} in it.")


def class_features(run: Run, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
    """(L, D) classifier: each label's feature averaged over the templates.

    Text features come from training's own encoder and pooling.

    Args: templates: texts with `{}` where the label stands.
    Raises: LabError if a label is empty or given twice, a template lacks `{}`, or a feature is not finite.
    Source: prompt ensembles, Radford et al. 2021, section 3.1.4.
    """
    labels = [label.strip() for label in labels]
    if len(set(labels)) < max(2, len(labels)) or not all(labels):
        raise LabError("zero-shot labels must be at least two, none empty and none given twice.")
    if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
        raise LabError("prompt templates are a list, and every one needs {} where the label stands.")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    features = text_features(run.model, run.config, texts).view(len(labels), len(templates), -1)
    _check_finite(features, "label")
    return torch.nn.functional.normalize(features.mean(dim=1), dim=-1)


def _check_finite(features: Tensor, what: str) -> None:
    if not torch.isfinite(features).all():
        raise LabError(f"a {what}'s feature holds NaN or infinite values; look for a diverged run.")


@torch.inference_mode()
def probabilities(run: Run, features: Tensor, classes: Tensor) -> Tensor:
    """(N, L) probabilities of labels for pictures' features (N, D), at the model's temperature.

    A sigmoid loss's bias changes nothing here. Raises: LabError if a feature is not finite.
    """
    _check_finite(features, "picture")
    scale = run.model.logit_parts()["logit_scale"].cpu()
    return (scale * features @ classes.T).softmax(dim=1)


def zero_shot(
    gallery: Gallery,
    items: Sequence[int],
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> Tensor:
    """(len(items), L) probabilities of labels for some pictures of a gallery."""
    classes = class_features(gallery.run, labels, templates)
    return probabilities(gallery.run, gallery.image_features[list(items)], classes)


def classify(
    run: Run,
    picture: Any,
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
) -> pd.DataFrame:
    """Labels of any picture, likeliest first: `probability` in [0, 1] and cosine `similarity`, by `label`.

    Args: picture: a file's path or bytes (such as an upload's), a PIL image, or uint8 pixels (H, W, 3).
    Raises: LabError on labels as in `class_features`; UndecodableImage if the picture cannot be read.
    """
    config = run.config
    source = encoded(Path(picture) if isinstance(picture, str) else picture)
    pixels = decode_rgb(source, config.image_size, config.image_resize)  # (S, S, 3)
    feature = image_features(run.model, config, torch.from_numpy(pixels).permute(2, 0, 1)[None])
    classes = class_features(run, labels, templates)
    columns = {
        "probability": probabilities(run, feature, classes)[0].numpy(),
        "similarity": (feature @ classes.T)[0].numpy(),
    }
    names = pd.Index([label.strip() for label in labels], name="label")
    return pd.DataFrame(columns, index=names).sort_values("probability", ascending=False)


# --- measuring ---


@dataclass(frozen=True)
class ZeroShot:
    """What a classifier made of a labelled set.

    Args:
        summary: `top1` and `top5` in [0, 1], `chance` of a random first choice, `calibration_error`,
            `pictures`, `labels`, `left_out`, and the `rule` of what counts as right.
        per_class: by `label`, how many `pictures` show it and the `accuracy`: on how many of them it is
            among the likeliest R labels, R the number of labels that the picture shows.
        confusion: (L, L) counts, row the true label, of pictures with one label.
        confidence, correct: (N,) probability of each picture's first choice, and whether it is right.
    """

    name: str
    labels: list[str]
    summary: dict[str, Any]
    per_class: pd.DataFrame
    confusion: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


def measure(run: Run, labelled: Labelled, templates: Sequence[str] = DEFAULT_TEMPLATES) -> ZeroShot:
    """Classify a labelled set and count.

    Raises: LabError as `class_features` and `probabilities`.
    """
    classes = class_features(run, labelled.labels, templates)
    likely = probabilities(run, labelled.features, classes).numpy()  # (N, L)
    order, truth = np.argsort(-likely, axis=1, kind="stable"), labelled.truth
    hits = np.take_along_axis(truth, order, axis=1)  # (N, L) is the label at each place true?
    confidence, correct = likely.max(axis=1), hits[:, 0]
    summary = {
        "top1": float(correct.mean()),
        "top5": float(hits[:, :5].any(axis=1).mean()),
        "chance": float(truth.mean()),
        "calibration_error": plots_ranks.calibration_error(plots_ranks.calibration_bins(confidence, correct)),
        "pictures": len(truth),
        "labels": len(labelled.labels),
        "left_out": labelled.left_out,
        "rule": labelled.rule,
    }
    return ZeroShot(
        labelled.name,
        labelled.labels,
        summary,
        _per_class(truth, order, labelled.labels),
        _confusion(truth, order[:, 0]),
        confidence,
        correct,
    )


def _per_class(truth: np.ndarray, order: np.ndarray, labels: list[str]) -> pd.DataFrame:
    places = np.argsort(order, axis=1)  # (N, L) place of each label, 0 is likeliest
    named = truth & (places < truth.sum(axis=1, keepdims=True))
    shown = truth.sum(axis=0)
    with np.errstate(invalid="ignore"):
        columns = {"pictures": shown, "accuracy": named.sum(axis=0) / shown}
    return pd.DataFrame(columns, index=pd.Index(labels, name="label"))


def _confusion(truth: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(L, L) counts over the pictures of one label."""
    single = truth.sum(axis=1) == 1
    counts = np.zeros((truth.shape[1],) * 2, dtype=np.int64)
    np.add.at(counts, (truth[single].argmax(axis=1), chosen[single]), 1)
    return counts


def zero_shot_accuracy(gallery: Gallery, templates: Sequence[str] = DEFAULT_TEMPLATES) -> dict[str, float]:
    """Top-1 and top-5 accuracy in [0, 1] over the pictures of one known label, among all labels met."""
    known = known_labels(gallery)
    labels = sorted(set(known.values()))
    if len(labels) < 2:
        raise LabError(f"split {gallery.split!r} knows no two labels; give labels of your own to zero_shot.")
    truth = np.array([[label == name for name in labels] for label in known.values()])
    labelled = Labelled(gallery.split, labels, truth, gallery.image_features[list(known)])
    found = measure(gallery.run, labelled, templates).summary
    return {name: found[name] for name in ("top1", "top5", "chance", "pictures", "labels")}


def measure_gallery(gallery: Gallery, templates: Sequence[str] = DEFAULT_TEMPLATES) -> list[ZeroShot]:
    """Every labelling that a gallery's data bring, measured."""
    return [measure(gallery.run, labelled, templates) for labelled in labelled_of(gallery)]


def summary_table(results: Sequence[ZeroShot]) -> pd.DataFrame:
    """A row a labelled set, accuracies and calibration error in percent."""
    rows = []
    for result in results:
        shares = ("top1", "top5", "chance", "calibration_error")
        percent = {f"{name} (%)": round(100 * result.summary[name], 1) for name in shares}
        counts = {name: result.summary[name] for name in ("pictures", "labels", "left_out", "rule")}
        rows.append({"set": result.name, **percent, **counts})
    return pd.DataFrame(rows).set_index("set")
