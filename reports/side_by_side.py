"""Evaluates runs on pairs of pictures: each pair against all C * C captions, order mistakes counted apart.

`python -m labs.side_by_side RUN [RUN ...]` measures training, validation and test pictures; `--comprehensive` adds
classes and examples; with several runs, their table by setting. Files go into each run's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from core.errors import LabError, choose
from core.files import csv_text, write_json, write_text
from dataset import PairedPictures, fixed_pairs, make_loader
from interface.cli import Parser, one_sentence
from plots.figures import captioned_images, learning_curves
from reports.compare import markdown_table, save_table, settings_label
from reports.gallery import data_digest, results_folder, results_of
from retrieval.statistics import TEST_SAMPLE_ONLY
from sources.side_by_side import PairRanks
from training.checkpoints import read_kept
from utils import Run, encode_loader, load_run

TRAIN_PAIRS = 2000  # as many as the published figure was measured on
SHOWN = ("top1", "top10", "top100", "top1_same", "top1_different", "swapped", "order")


@dataclass
class PairResult:
    """A split's pairs and where their captions stand under a run's best model."""

    pairs: PairedPictures
    ranks: PairRanks
    weights: str = ""

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Figures in [0, 1] with 95 % intervals, chance and protocol."""
        found: dict[str, Any] = {**self.ranks.figures()}
        for name, (low, high) in self.ranks.intervals().items():
            found |= {f"{name}_low": low, f"{name}_high": high}
        captions = self.pairs.num_classes**2
        chance = {f"top{k}_chance": k / captions for k in (1, 10, 100) if f"top{k}" in found}
        about = {"pictures": len(self.pairs), "captions": captions, "split": self.pairs.split}
        about |= {"gallery": data_digest(self.pairs), "weights": self.weights}
        counts = {"num_different": self.ranks.different.sum(), "num_swapped": self.ranks.is_swapped.sum()}
        about |= {name: int(count) for name, count in counts.items()}
        return {**about, **found, **chance, "intervals": f"95 %, bootstrap over pairs, {TEST_SAMPLE_ONLY}"}


def evaluate_pairs(
    run: Run, splits: Sequence[str] = ("train", "val", "test"), *, show: bool = True
) -> dict[str, PairResult]:
    """A run's best model on fixed pairs of each split; of the training split at most `TRAIN_PAIRS`.

    Raises: LabError if the run was not trained on pairs.
    """
    config = run.config
    if config.reader != "paired_cifar":
        raise LabError(f"{run.folder} was trained on reader {config.reader!r}, not on 'paired_cifar'.")
    results = {}
    for split in splits:
        pairs: Any = fixed_pairs(config, split, progress=show)
        if split in config.train_splits:
            pairs.num_pairs = min(len(pairs), TRAIN_PAIRS)
        features, _ = encode_loader(run.model, make_loader(pairs, config.batch_size), config, show=show)
        results[split] = PairResult(pairs, pairs.ranks(run.model, features), run.weights)
    return results


# --- tables ---


def percent(metrics: dict[str, Any], name: str) -> str:
    """`62.0 [58.1, 65.7]`."""
    low, high = (100 * metrics[f"{name}_{end}"] for end in ("low", "high"))
    return f"{100 * metrics[name]:.1f} [{low:.1f}, {high:.1f}]"


def pairs_table(results: dict[str, PairResult]) -> pd.DataFrame:
    """A row a split, in percent with 95 % intervals over pairs, and one for chance."""
    rows = []
    for split, result in results.items():
        found = result.metrics
        about = {"pictures of": split, "pairs": found["pictures"], "captions": found["captions"]}
        counts = {"swap count": f"{found['num_swapped']} of {found['num_different']}"}
        rows.append({**about, **{name: percent(found, name) for name in SHOWN if name in found}, **counts})
    chance = {name: f"{100 * found[f'{name}_chance']:g}" for name in SHOWN if f"{name}_chance" in found}
    rows.append({"pictures of": "chance", "pairs": "", "captions": found["captions"], **chance})
    return pd.DataFrame(rows).fillna("").set_index("pictures of")


def settings_table(results: Sequence[tuple[Run, dict[str, Any]]]) -> pd.DataFrame:
    """Runs side by side: a row a preset and setting, percent as mean ± standard deviation over seeds.

    Args: results: a run and its metrics of one split each, as `PairResult.metrics` gives them.
    """
    rows = []
    for run, found in results:
        label = f"{run.config.preset}: {settings_label(run.config)}"
        rows.append({"setting": label, **{name: 100 * found[name] for name in SHOWN if name in found}})
    groups = pd.DataFrame(rows).groupby("setting", sort=False)
    mean, spread = groups.mean(), groups.std()
    table = mean.map("{:.1f}".format) + spread.map(lambda value: "" if np.isnan(value) else f" ± {value:.1f}")
    table.insert(0, "seeds", groups.size())
    return table


# --- examples ---


def guesses(result: PairResult, items: Sequence[int]) -> list[str]:
    """What the model calls some pairs, marked right, swapped or wrong, with the truth where it is not right."""
    ranks, captions = result.ranks, result.pairs.captions
    texts = []
    for item in items:
        first, truth = captions[ranks.first[item]], captions[ranks.truth[item]]
        if ranks.rank[item] == 1:
            texts.append(f"✓ {first}")
        else:
            word = "swapped:" if ranks.is_swapped[item] else "✗"
            texts.append(f"{word} {first} (truth: {truth})")
    return texts


def show_examples(result: PairResult, path: str | Path | None = None, count: int = 8) -> Any:
    """A figure of pairs with the model's first caption: the first right ones, swapped ones, and wrong ones."""
    right, swapped = result.ranks.rank == 1, result.ranks.is_swapped
    kinds = [np.flatnonzero(kind) for kind in (right, swapped, ~right & ~swapped)]
    wanted = [count - 2 * (count // 4), count // 4, count // 4]
    items = [int(item) for kind, number in zip(kinds, wanted, strict=True) for item in kind[:number]]
    images = result.pairs.__getitems__(items)["image"].numpy() if items else []
    return captioned_images(list(images), guesses(result, items), path)


# --- a run's files ---


def report_pairs(
    run: Run,
    *,
    comprehensive: bool = False,
    output_file: str | Path | None = None,
    no_plotting: bool = False,
    show: bool = True,
) -> dict[str, PairResult]:
    """Evaluate a run and write pair_metrics.json and tables into its folder, figures unless `no_plotting`.

    Args:
        comprehensive: also a table by class and a figure of examples for the test split.
        output_file: a further copy: all metrics (.json) or the table of splits (.csv, .md).
    Raises: LabError if output_file has another ending.
    """
    write_copy = (
        None if output_file is None else choose(COPIES, Path(output_file).suffix, "output_file ending")
    )
    splits = dict.fromkeys([*run.config.train_splits, *run.config.val_splits, *run.config.test_splits])
    results = evaluate_pairs(run, list(splits), show=show)
    last = results[(run.config.test_splits or run.config.val_splits)[-1]]
    found = {name: of.metrics for name, of in results.items()}
    kept = read_kept(run.folder / "pair_metrics.json", "it is written again").get(last.pairs.split, {})
    folder = run.results = results_folder(run, kept.get("gallery"), found[last.pairs.split]["gallery"])
    write_json(folder / "pair_metrics.json", found, seal=True)
    tables, figures = folder / "tables", folder / "figures"
    save_table(pairs_table(results), tables / "pairs")
    if comprehensive:
        save_table(last.ranks.by_class(last.pairs.pictures.names), tables / "pairs_by_class")
    if not no_plotting:
        save_curves(folder, run.history, run.best_epoch, name=run.name)
    if comprehensive and not no_plotting:
        show_examples(last, figures / "pair_examples.png")
    if output_file is not None and write_copy is not None:
        write_copy(results, Path(output_file))
    return results


COPIES = {
    ".json": lambda results, path: write_json(path, {name: of.metrics for name, of in results.items()}),
    ".csv": lambda results, path: write_text(path, csv_text(pairs_table(results))),
    ".md": lambda results, path: write_text(path, markdown_table(pairs_table(results))),
}


def save_curves(folder: Path, history: pd.DataFrame, best_epoch: int | None = None, name: str = "") -> Path:
    """Write the learning curves so far as PNG into a run's folder; quick enough after every epoch."""
    path = folder / "figures" / "learning_curves.png"
    learning_curves({name or folder.name: history}, path, best_epoch=best_epoch)
    return path


def main() -> None:
    """Evaluate runs, print their tables, and say where everything lies."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "folders", nargs="+", metavar="RUN", help="runs' folders, such as runs/paired_small_s0"
    )
    parser.add_argument("--comprehensive", action="store_true", help="classes and examples as well")
    parser.add_argument("--output_file", help="a further copy of the results, of one run: .json, .csv, .md")
    parser.add_argument("--no_plotting", action="store_true", help="write no figure")
    parser.add_argument("--data_dir", help="where the pictures lie now")
    given = vars(parser.parse_args())
    folders, data_dir = given.pop("folders"), given.pop("data_dir")
    with one_sentence():
        if given["output_file"] and len(folders) > 1:
            raise LabError("output_file is of one run; evaluate the others on their own.")
        measured = []
        for folder in folders:
            run = load_run(folder, **({"data_dir": data_dir} if data_dir else {}))
            results = report_pairs(run, **given)
            print(f"\n{results_of(run)}: pair_metrics.json, tables/, figures/")
            print(pairs_table(results).to_string())
            measured.append((run, results[(run.config.test_splits or run.config.val_splits)[-1]].metrics))
        if len(folders) > 1:
            print(f"\n{settings_table(measured).to_string()}")


if __name__ == "__main__":
    main()
