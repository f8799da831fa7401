"""Every figure over nothing and over one row: it is drawn, or one sentence says what is missing."""

import warnings

import numpy as np
import pandas as pd
import pytest

from core.errors import LabError
from plots import features, figures, ranks, tuning

IMAGE = np.zeros((8, 8, 3), np.uint8)
EPOCH = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.1, "learning_rate": 1e-3, "i2t_recall@1": 0.5}
EPOCH |= {"t2i_recall@1": 0.5, "modality_gap": 0.1, "alignment": 0.2, "image_uniformity": -1.0}
TRIAL = {"number": 0, "state": "complete", "value": 0.5, "learning_rate": 1e-3}
METRICS = {"i2t_recall@1": 0.5, "t2i_recall@1": 0.5}
NAN = float("nan")
NO_FIELD = ["number", "state", "value"]


def report_of(images):
    """A data check's report of so many images without a caption."""
    sizes = {"images_per_split": {"train": images}, "captions_per_image": {0: images}}
    lists = {"image_sizes": [[8, 8]] * images, "caption_lengths": [0] * images}
    return {**sizes, **lists, "undecodable": {"empty file": 1} if images else {}}


FIGURES = {
    "captioned_images": lambda n: figures.captioned_images([IMAGE] * n, ["a dog"] * n),
    "captioned_images, no caption": lambda n: figures.captioned_images([IMAGE] * n, [[]] * n),
    "retrieval_grid": lambda n: figures.retrieval_grid(
        ["a dog"] * n, [[IMAGE]] * n, [[0.5]] * n, [[True]] * n
    ),
    "retrieval_grid, nothing found": lambda n: figures.retrieval_grid(["a dog"] * n, [[]] * n),
    "learning_curves": lambda n: figures.learning_curves({"run": pd.DataFrame([EPOCH] * n)}, chance=0.1),
    "learning_curves of runs": lambda n: figures.learning_curves(
        {f"run{i}": pd.DataFrame([EPOCH]) for i in range(n)}
    ),
    "learning_curves, no values": lambda n: figures.learning_curves(
        pd.DataFrame([{**dict.fromkeys(EPOCH, NAN), "epoch": 1}] * n)
    ),
    "learning_curves, no rate": lambda n: figures.learning_curves(
        pd.DataFrame([{**EPOCH, "learning_rate": 0.0}] * n)
    ),
    "recall_bars": lambda n: figures.recall_bars(pd.DataFrame([METRICS] * n)),
    "recall_bars, no values": lambda n: figures.recall_bars(pd.DataFrame([dict.fromkeys(METRICS, NAN)] * n)),
    "comparison_bars": lambda n: figures.comparison_bars(pd.DataFrame([METRICS] * n)),
    "comparison_bars, no values": lambda n: figures.comparison_bars(
        pd.DataFrame([dict.fromkeys(METRICS, NAN)] * n)
    ),
    "comparison_bars, metrics": lambda n: figures.comparison_bars(
        pd.DataFrame([METRICS]), metrics=[*METRICS][:n]
    ),
    "zero_shot_bars": lambda n: figures.zero_shot_bars([IMAGE], ["dog"] * n, np.ones((1, n))),
    "zero_shot_bars of images": lambda n: figures.zero_shot_bars(
        [IMAGE] * n, ["dog"], np.ones((n, 1)), ["dog"] * n
    ),
    "attention_maps": lambda n: figures.attention_maps([IMAGE] * n, [np.ones((2, 2)) / 4] * n),
    "attention_maps, empty map": lambda n: figures.attention_maps([IMAGE], [np.ones((n, n))]),
    "modality_gap": lambda n: features.modality_gap(pd.DataFrame([EPOCH] * n)),
    "similarity_matrix": lambda n: features.similarity_matrix(np.ones((n, 1)), ["a dog"], [IMAGE] * n),
    "similarity_matrix of texts": lambda n: features.similarity_matrix(
        np.ones((1, n)), ["a dog"] * n, [IMAGE]
    ),
    "modality_map, no plane": lambda n: features.modality_map(
        np.ones((n, 4)), np.ones((n, 4)), pairs=[(0, 0)] * n
    ),
    "modality_map of texts, no plane": lambda n: features.modality_map(np.ones((n, 4)), np.ones((1, 4))),
    "modality_map, tsne, no plane": lambda n: features.modality_map(
        np.ones((n, 4)), np.ones((1, 4)), method="tsne"
    ),
    "failures": lambda n: features.failures(["a dog"] * n, [IMAGE] * n, [2] * n, [[IMAGE]] * n),
    "failures, nothing above": lambda n: features.failures(["a dog"] * n, [IMAGE] * n, [1] * n, [[]] * n),
    "confusion_matrix": lambda n: ranks.confusion_matrix(np.ones((n, n)), ["dog"] * n),
    "confusion_matrix, no counts": lambda n: ranks.confusion_matrix(np.zeros((n, n)), ["dog"] * n),
    "reliability_diagram": lambda n: ranks.reliability_diagram(np.full(n, 0.5), np.ones(n)),
    "rank_histogram": lambda n: ranks.rank_histogram({"i2t": np.ones(n)}, galleries={"i2t": (1, 1)}),
    "rank_histogram of ways": lambda n: ranks.rank_histogram({f"{i}": np.ones(1) for i in range(n)}),
    "recall_by_gallery_size": lambda n: ranks.gallery_size_curves(
        {"run": {"sizes": [1] * n, "t2i": [1.0] * n}}
    ),
    "recall_by_gallery_size of runs": lambda n: ranks.gallery_size_curves(
        {f"{i}": {"sizes": [1], "t2i": [1.0]} for i in range(n)}
    ),
    "recall_by_gallery_size, published": lambda n: ranks.gallery_size_curves({}, [("CLIP", 1000, 0.5)] * n),
    "data_report": lambda n: figures.data_report(report_of(n)),
    "data_report of nothing": lambda n: figures.data_report(
        {"images_per_split": {}, "image_sizes": [[8, 8]] * n}
    ),
    "study_history": lambda n: tuning.study_history(pd.DataFrame([TRIAL] * n), "recall"),
    "study_history, none finished": lambda n: tuning.study_history(
        pd.DataFrame([{**TRIAL, "state": "fail", "value": NAN}] * n), "recall"
    ),
    "importances": lambda n: tuning.importances({"learning_rate": 1.0} if n else {}),
    "importances, all 0": lambda n: tuning.importances(dict.fromkeys("ab"[: n + 1], 0.0)),
    "parallel_coordinates": lambda n: tuning.parallel_coordinates(pd.DataFrame([TRIAL] * n), "recall"),
    "parallel_coordinates, no field": lambda n: tuning.parallel_coordinates(
        pd.DataFrame([TRIAL] * n, columns=NO_FIELD), "recall"
    ),
    "slices": lambda n: tuning.slices(pd.DataFrame([TRIAL] * n), "recall", log=["learning_rate"]),
    "slices, no field": lambda n: tuning.slices(pd.DataFrame([TRIAL] * n, columns=NO_FIELD), "recall"),
}


def drawn(draw, rows):
    """The figure, or why there is none."""
    try:
        return draw(rows), ""
    except LabError as error:
        return None, str(error)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_over_nothing_or_one_row_is_drawn_or_says_what_is_missing(name, rows, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's mean of nothing, matplotlib's limits that are equal
        figure, refusal = drawn(FIGURES[name], rows)
        if figure is not None:
            figure.savefig(tmp_path / "figure.png", dpi=30)
    assert refusal == "" or rows == 0 or any(word in name for word in ("no ", "none", "nothing")), refusal
    assert "\n" not in refusal
