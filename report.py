"""One self-contained page of headings, tables and figures: HTML without a network, readable in the dark."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import pandas as pd

from cache import atomic_path

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
        numeric = [
            all(NUMBER.fullmatch(text) for text in column if text) for column in zip(*rows, strict=True)
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
        with atomic_path(path) as beside:
            page = PAGE.format(title=title, style=STYLE, links=links, body="\n".join(self.parts))
            beside.write_text(page, encoding="utf-8")
        return Path(path)


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
    files = {".csv": table.to_csv(), ".md": markdown_table(table)}
    for ending, content in files.items():
        with atomic_path(path.with_suffix(ending)) as beside:
            beside.write_text(content, encoding="utf-8")
    return [path.with_suffix(ending) for ending in files]
