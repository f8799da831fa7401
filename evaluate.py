"""Evaluates finished runs: figures with their protocol, zero-shot classes, search, comparison, reports.

`python evaluate.py runs/NAME [--comprehensive]` writes metrics.json, tables, figures and report.html into the
run's folder; `compare`, `search` and `export` in front of the folder do what they say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cli import Parser, one_sentence
from comparison import compare_runs, finished_runs, flag_settings, settings_label
from config import Config
from gallery import (
    INTERVALS,
    Gallery,
    chance,
    evaluate_run,
    metrics_table,
    open_gallery,
    recalls_of,
    results_of,
)
from queries import Found, search_command, search_text
from run_report import open_runs, report_comparison, report_run
from runs import load_run
from zero_shot import DEFAULT_TEMPLATES, class_features, classify, known_labels, zero_shot, zero_shot_accuracy

__all__ = [
    "DEFAULT_TEMPLATES",
    "INTERVALS",
    "Found",
    "Gallery",
    "chance",
    "class_features",
    "classify",
    "compare_runs",
    "evaluate_run",
    "finished_runs",
    "flag_settings",
    "known_labels",
    "metrics_table",
    "open_gallery",
    "recalls_of",
    "report_comparison",
    "report_run",
    "search_text",
    "settings_label",
    "zero_shot",
    "zero_shot_accuracy",
]

PLACES = ("data_dir", "cache_dir", "device")


def evaluate_command(folder: str, places: dict[str, Any], **options: Any) -> None:
    """Evaluate a run, print its table, and say where everything lies."""
    run = load_run(folder, **places)
    report_run(run, **options)
    print(metrics_table(run.metrics).to_string())
    print(f"{results_of(run)}: metrics.json, tables/, figures/, report.html")


def compare_command(folders: list[str], folder: str, baseline: str | None, places: dict[str, Any]) -> None:
    """Compare runs, print the table, and say where everything lies."""
    runs = open_runs(folders, partial(load_run, **places))
    report_comparison(runs, folder, baseline)
    print(Path(folder, "comparison.md").read_text(encoding="utf-8"))
    print(f"{folder}: comparison.csv, comparison.md, comparison.png, learning_curves.png, report.html")


def search_run(folder: str, text: str, places: dict[str, Any], **options: Any) -> None:
    """Search a run's test pictures, and say where the grid lies."""
    print(search_command(load_run(folder, **places), text, **options))


def export_command(folder: str, output: str | None, places: dict[str, Any]) -> None:
    """Export a run's model, and say which files it became."""
    from export import export_run  # it needs transformers, which is slow to import

    run = load_run(folder, **places)
    for path in export_run(run, Path(output) if output else run.folder / "export"):
        print(path)


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--comprehensive", action="store_true", help="every table and figure there is")
    parser.add_argument("--labelled", action="append", default=[], metavar="DIR",
                        help="class folders or CIFAR's files to classify; may be given again")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure again what metrics.json holds")
    parser.add_argument(
        "--output_file", help="a further copy of the page, metrics or results: .html, .json, .csv, .md"
    )


def _compare_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", default="outputs/comparison", help="where tables, figures and report.html go"
    )
    parser.add_argument("--baseline", help="setting or run that the others are judged against; the first")


def _search_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", default="", help="what the pictures should show")
    parser.add_argument("--image", help="a picture that they should be like")
    parser.add_argument("--minus", default="", help="what they should not show")
    parser.add_argument("--k", type=int, default=10, help="how many pictures")


def _export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", dest="output", help="where to; export/ in the run's folder")


COMMANDS: dict[str, tuple[Callable[..., None], Callable[[argparse.ArgumentParser], None], str]] = {
    "run": (evaluate_command, _evaluate_flags, "evaluate a run; the word may be left out"),
    "compare": (compare_command, _compare_flags, "put finished runs side by side"),
    "search": (search_run, _search_flags, "find a run's test pictures by text or picture"),
    "export": (export_command, _export_flags, "write a run's model for other libraries"),
}


def make_parser() -> Parser:
    """The command line; where data and device are found is told by the configuration's own fields."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, add_flags, words) in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        if name == "compare":
            command.add_argument("folders", metavar="RUN", nargs="+", help="runs' folders, such as runs/*")
        else:
            command.add_argument("folder", metavar="RUN", help="a run's folder, such as runs/quickstart_s0")
        add_flags(command)
        for place in PLACES:
            command.add_argument(
                f"--{place}", help=f"{Config.model_fields[place].description} None: as trained."
            )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """`evaluate.py RUN ...` is `evaluate.py run RUN ...`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "run")
    given = vars(make_parser().parse_args(words))
    command = COMMANDS[given.pop("command")][0]
    places = {name: value for name in PLACES if (value := given.pop(name)) is not None}
    with one_sentence():
        command(places=places, **given)


if __name__ == "__main__":
    main()
