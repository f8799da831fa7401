"""Runs side by side: a row a setting, seeds averaged, what is and is not a difference; the page that tells it."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd

from config import FLAGS, NOT_IN_NAME, Config, make_config
from core.errors import LabError, choose
from core.files import csv_text, write_text
from metrics import as_text, is_recall
from retrieval.statistics import TEST_SAMPLE_ONLY, PairedTest
from utils import Run

# --- Comparison ---


BASELINE, OTHER_GALLERY, TOO_FEW = "baseline", "not compared: another gallery", "too few seeds"
WORDS = {True: "higher", False: "lower", None: "no difference shown"}


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


def told_test(found: PairedTest) -> str:
    """A paired test in words: `higher (test sample only, p = 0.003)`."""
    word = WORDS[found.difference > 0 if found.is_difference else None]
    p_value = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    return f"{word} ({TEST_SAMPLE_ONLY}, {p_value})"


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
