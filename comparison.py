"""Runs side by side: a row a setting, seeds averaged, what is and is not a difference; the page that tells it."""

from __future__ import annotations

import base64
import html
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd

from config import FLAGS, NOT_IN_NAME, Config, make_config
from errors import LabError, choose
from files import csv_text, write_text
from gallery import as_text, figures_of, is_recall, measured, ranks_of
from runs import Run, load_run
from uncertainty import MIN_SEEDS, TEST_SAMPLE_ONLY, PairedTest, compare_settings, paired_test

# --- Comparison ---


BASELINE, OTHER_GALLERY, TOO_FEW = "baseline", "not compared: another gallery", "too few seeds"
WORDS = {True: "higher", False: "lower", None: "no difference shown"}


def finished_runs(runs_dir: str | Path, preset: str | None = None) -> list[Run]:
    """Every finished run of a preset, or of all, by name."""
    folders = sorted(path.parent for path in Path(runs_dir).glob("*/training.json"))
    runs = [run for folder in folders if (run := opened(folder, load_run)) is not None]
    return [run for run in runs if run.finished and preset in (None, run.config.preset)]


def opened(folder: Path, load: Callable[[Path], Run]) -> Run | None:
    """A run, or None where its folder is damaged, which is said: one of ten must not stop the others."""
    try:
        return load(folder)
    except LabError as error:
        print(f"{folder} is left out: {error}")
        return None


def flag_settings(config: Config) -> list[Config]:
    """The configuration under each setting of the flags; a cached image tower has no map to pool."""
    pooling = (False,) if config.image_tower_mode == "cached" else (False, True)
    flags = [
        {"use_batch_norm": norm, "use_attention_pooling": pool} for norm in (False, True) for pool in pooling
    ]
    return [config.updated(**setting) for setting in flags]


def settings_label(config: Config) -> str:
    """What sets a run apart from its preset, seed and places apart: `plain`, `bn`, `attn, num_epochs=2`."""
    flags = [short for field, short in FLAGS.items() if config[field]]
    fields = [n for n in config.differences(make_config(config.preset)) if n not in {*FLAGS, *NOT_IN_NAME}]
    return ", ".join([*flags, *(f"{name}={config[name]}" for name in fields)]) or "plain"


@dataclass(frozen=True)
class Setting:
    """The runs of one configuration, a seed each, on one gallery.

    Args:
        figures: a row a run.
        gallery: fingerprint of what they were measured on.
    """

    label: str
    runs: list[Run]
    figures: pd.DataFrame
    gallery: str

    @property
    def split(self) -> str:
        return self.runs[0].test_split

    @property
    def about(self) -> dict[str, Any]:
        """Its gallery in words, how many seeds, and mean seconds of training."""
        found = self.runs[0].metrics[self.split]
        protocol = {"split": self.split, "protocol": found["protocol"]}
        sizes = {"images": found["num_images"], "captions": found["num_texts"]}
        seconds = [run.training.get("train_seconds", math.nan) for run in self.runs]
        return {**protocol, **sizes, "seeds": len(self.runs), "seconds": sum(seconds) / len(seconds)}


def group_settings(runs: Sequence[Run], *, show: bool = True) -> list[Setting]:
    """Runs that differ in nothing but the seed, together, in the order given; evaluated where they are not yet.

    A run that cannot be evaluated is left out, which is said.
    Raises: LabError if there is no run, or none can be evaluated.
    """
    if not runs:
        raise LabError("there is no finished run to compare; train one first.")
    several = len({run.config.preset for run in runs}) > 1
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        label = settings_label(run.config)
        label = f"{run.config.preset}: {label}" if several else label
        try:
            found = measured(run, show=show)[run.test_split]
        except LabError as error:
            if run is runs[-1] and not groups:
                raise
            print(f"{run.name} is left out: {error}")
            continue
        label = ", ".join([label, *run.training.get("own", {}).values()])
        trained = run.training.get("data", {}).get("train", {}).get("sha256", "")
        groups.setdefault((label, found["gallery"], trained), []).append(run)
    twice = Counter(label for label, *_ in groups)
    return [
        _setting(
            label if twice[label] == 1 else f"{label}, on {gallery[:6]}, from {trained[:6]}", group, gallery
        )
        for (label, gallery, trained), group in groups.items()
    ]


def _setting(label: str, runs: list[Run], gallery: str) -> Setting:
    figures = [figures_of(run.metrics[run.test_split]) for run in runs]
    return Setting(label, runs, pd.DataFrame(figures, index=[run.name for run in runs]), gallery)


def compare_runs(
    runs: Sequence[Run],
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    *,
    show: bool = True,
) -> pd.DataFrame:
    """One row a setting: protocol, seeds, mean and standard deviation of its figures, and verdicts.

    Figures are of the first test split, recalls in [0, 1]; `_std` over seeds is nan for a single one. Each of
    `metrics` has a column `_verdict` against the baseline: `higher`, `lower` or `no difference shown` where both
    have three seeds or more (Welch's interval of the difference of means); for two single runs on one gallery the
    paired test, marked `test sample only`, which says nothing of another seed's training; else `too few seeds`.

    Args:
        baseline: a setting's label or a run's name; None: the first.
        metrics: figures to judge; None: Recall@1 both ways, or the first two figures where there is none.
    Raises: LabError if there is no run or no such baseline.
    """
    return comparison_table(group_settings(runs, show=show), baseline, metrics)


def comparison_table(
    settings: Sequence[Setting], baseline: str | None = None, metrics: Sequence[str] | None = None
) -> pd.DataFrame:
    """`compare_runs` of runs that are grouped already."""
    base = _baseline(settings, baseline)
    judged = metrics or judged_figures(settings)
    rows = []
    for setting in settings:
        spread = setting.figures.std().add_suffix("_std")
        verdicts = {f"{name}_verdict": verdict(setting, base, name) for name in judged}
        means = setting.figures.mean()
        rows.append({"run": setting.label, **setting.about, **means, **spread, **verdicts})
    return pd.DataFrame(rows).set_index("run")


def judged_figures(settings: Sequence[Setting]) -> list[str]:
    """Recall@1 both ways, or the first two figures where there is none."""
    names = [str(name) for name in settings[0].figures]
    recalls = [name for name in names if is_recall(name) and name.endswith("@1")]
    return recalls or names[:2]


def _baseline(settings: Sequence[Setting], wanted: str | None) -> Setting:
    if wanted is None:
        return settings[0]
    by_run = {run.name: setting for setting in settings for run in setting.runs}
    return choose({**by_run, **{setting.label: setting for setting in settings}}, wanted, "baseline")


def verdict(setting: Setting, base: Setting, metric: str) -> str:
    """What may be said of a figure of a setting against the baseline's; see `compare_runs`."""
    if setting is base:
        return BASELINE
    if setting.gallery != base.gallery:
        return OTHER_GALLERY
    if metric not in setting.figures or metric not in base.figures:
        return f"not compared: {metric} is not known of both"
    counts = {len(setting.runs), len(base.runs)}
    if min(counts) >= MIN_SEEDS:
        found = compare_settings(setting.figures[metric].tolist(), base.figures[metric].tolist())
        return WORDS[found.difference > 0 if found.is_difference else None]
    if counts == {1} and is_recall(metric):
        return told_test(paired_test_of(setting.runs[0], base.runs[0], metric))
    return TOO_FEW


def paired_test_of(first: Run, second: Run, metric: str = "i2t_recall@1") -> PairedTest:
    """The paired test of two runs on their first test split, from the ranks they kept; nothing is encoded again.

    Raises: LabError if they were measured on different galleries.
    """
    splits = [run.test_split for run in (first, second)]
    galleries = [run.metrics[split]["gallery"] for run, split in zip((first, second), splits, strict=True)]
    if galleries[0] != galleries[1]:
        raise LabError(
            f"{first.name} and {second.name} were measured on different galleries; evaluate both on the same data."
        )
    return paired_test(ranks_of(first, splits[0]), ranks_of(second, splits[1]), metric)


def told_test(found: PairedTest) -> str:
    """A paired test in words: `higher (test sample only, p = 0.003)`."""
    word = WORDS[found.difference > 0 if found.is_difference else None]
    p_value = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    return f"{word} ({TEST_SAMPLE_ONLY}, {p_value})"


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare_runs` for people: recalls in percent as `mean ± std`, verdicts beside them."""
    shown = table[["split", "protocol", "images", "captions", "seeds"]].copy()
    shown["training (s)"] = table["seconds"].round()
    for name in [str(name) for name in table if f"{name}_std" in table]:
        shown[name] = [_mean_and_spread(row, name) for _, row in table.iterrows()]
        if f"{name}_verdict" in table:
            shown[f"{name} against {BASELINE}"] = table[f"{name}_verdict"]
    return shown


def _mean_and_spread(row: pd.Series, name: str) -> str:
    mean, spread = row[name], row[f"{name}_std"]
    return as_text(name, mean) + ("" if math.isnan(spread) else f" ± {as_text(name, spread)}")


def differing_fields(runs: Mapping[str, Config]) -> pd.DataFrame:
    """Fields in which the configurations differ, seeds and places apart: a row a field, a column a name."""
    dumped = {name: config.model_dump(mode="json") for name, config in runs.items()}
    table = pd.DataFrame({name: {k: str(v) for k, v in values.items()} for name, values in dumped.items()})
    differ = table.nunique(axis=1) > 1
    return table[differ & ~table.index.isin(NOT_IN_NAME - {"preset"})]


# --- One self-contained page ---


STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --paper: #ffffff; --line: #d5d9e0; --quiet: #5b6472;
  --band: #f4f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --paper: #16181d; --line: #3a3f4a; --quiet: #a3abb8; --band: #1f232b; }
}
body { margin: 2rem auto; max-width: 74rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; margin: 0.3rem 0 1rem; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
.caption, figcaption, summary { color: var(--quiet); font-size: 0.85rem; margin: 1rem 0 0.3rem; }
th, td { padding: 0.25rem 0.6rem 0.25rem 0.2rem; vertical-align: top; text-align: left; }
th { border-bottom: 1px solid var(--line); } tbody tr:nth-child(odd) { background: var(--band); }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
img { max-width: 100%; box-sizing: border-box; background: #ffffff; border-radius: 4px; padding: 0.4rem; }
nav a { margin-right: 1rem; } a { color: inherit; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""
FOLD_ROWS = 20
NUMBER = re.compile(r"-?[\d.,]+( %)?( ± [\d.,]+)?( \[.*\])?")  # with its spread or interval
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{style}</style></head>
<body>
<h1>{title}</h1>
<nav>{links}</nav>
{body}
</body>
</html>
"""


@dataclass
class Page:
    """A report, grown part by part from the top.

    >>> page = Page("Report")
    >>> page.heading("Figures")
    >>> page.text("Recall is in percent.")
    """

    title: str
    parts: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.headings.append(text)
        self.parts.append(f'<h2 id="part{len(self.headings)}">{html.escape(text)}</h2>')

    def text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, table: pd.DataFrame, caption: str = "") -> None:
        """A table with its index as first columns; a long one is folded under its caption."""
        header, rows = _cells(table)
        columns = zip(*rows, strict=True) if rows else [[]] * len(header)
        numeric = [
            bool(rows) and all(NUMBER.fullmatch(text) for text in column if text) for column in columns
        ]
        head, *lines = (
            _html_row(tag, row, numeric) for tag, row in [("th", header), *(("td", row) for row in rows)]
        )
        body = "".join(lines)
        whole = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
        words, inner = html.escape(caption), f'<div class="scroll">{whole}</div>'
        if len(rows) > FOLD_ROWS:
            self.parts.append(f"<details><summary>{words} {len(rows):,} rows.</summary>{inner}</details>")
        else:
            self.parts.append(f'<p class="caption">{words}</p>{inner}' if caption else inner)

    def figure(self, path: Path, caption: str) -> None:
        """A PNG, inlined."""
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        words = html.escape(caption, quote=True)
        image = f'<img src="data:image/png;base64,{data}" alt="{words}">'
        self.parts.append(f"<figure>{image}<figcaption>{words}</figcaption></figure>")

    def save(self, path: str | Path) -> Path:
        """Write the page whole or not at all."""
        places = enumerate(self.headings, start=1)
        links = "".join(f'<a href="#part{place}">{html.escape(text)}</a>' for place, text in places)
        title = html.escape(self.title)
        page = PAGE.format(title=title, style=STYLE, links=links, body="\n".join(self.parts))
        return write_text(path, page)


def _cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """A table's header and rows as text, its index first."""
    whole = table.reset_index() if any(table.index.names) else table.reset_index(names="")
    rows = [[_text(value) for value in row] for row in whole.itertuples(index=False)]
    return [str(name) for name in whole.columns], rows


def _text(value: object) -> str:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def _html_row(tag: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    """A row of `th` or `td`, those of numeric columns to the right."""
    kinds = [' class="number"' if right else "" for right in numeric]
    inner = [f"<{tag}{kind}>{html.escape(text)}</{tag}>" for text, kind in zip(cells, kinds, strict=True)]
    return f"<tr>{''.join(inner)}</tr>"


def markdown_table(table: pd.DataFrame) -> str:
    """A table in Markdown, its index first."""
    header, rows = _cells(table)
    lines: list[Sequence[str]] = [header, ["---"] * len(header), *rows]
    escaped = [[" ".join(cell.replace("|", r"\|").split()) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def save_table(table: pd.DataFrame, path: Path) -> list[Path]:
    """Write a table as CSV and as Markdown: `path` with both endings."""
    files = {".csv": csv_text(table), ".md": markdown_table(table)}
    return [write_text(path.with_suffix(ending), content) for ending, content in files.items()]
