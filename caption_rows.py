"""Rows of the text files that captions come in, however they are quoted."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import Any

from data_folder import PICTURE_SUFFIXES, DataFolder
from errors import LabError

Row = tuple[int, str, str]  # line, image, caption
_SUFFIXES = "|".join(suffix[1:] for suffix in PICTURE_SUFFIXES)
_NEW_ROW = re.compile(rf'"?[^",\n]+\.({_SUFFIXES})"?\s*,', re.IGNORECASE)
_LONGEST_RECORD = 50  # lines that a quoted caption may go on over


def csv_rows(folder: DataFolder, file: str) -> Iterator[Row]:
    """Rows of a CSV file whose header names image and caption; malformed ones are noted and left out.

    Raises: LabError if a column is missing.
    """
    records = _records(folder.read_text(file))
    columns = next(_fields(next(records, (1, ""))[1]), [])
    names = [name.strip().lower() for name in columns]
    if "image" not in names or "caption" not in names:
        raise LabError(
            f"{folder.root / file} has the columns {columns}; its first line must be image,caption"
        )
    image, caption = names.index("image"), names.index("caption")
    for number, record in records:
        try:
            row = next(_fields(record), [])
        except csv.Error as error:
            folder.problems.add("malformed row", file, f"no CSV row ({error})", f"line {number}")
            continue
        if len(row) > 2 and names == ["image", "caption"] and '"' not in record:
            row = record.split(",", 1)  # commas that nobody quoted
        if len(row) == len(names):
            yield number, row[image].strip(), row[caption]
        elif record.strip():
            what = f"{len(row)} columns in place of {len(names)}"
            folder.problems.add("malformed row", file, what, f"line {number}")


def _fields(record: str) -> Iterator[list[str]]:
    return csv.reader([record], strict=True)


def _records(text: str) -> Iterator[tuple[int, str]]:
    """(line, record) pairs: a quoted caption goes on over lines, but a stray quote swallows no rows."""
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        first, record = number, lines[number]
        number += 1
        last = min(len(lines), first + _LONGEST_RECORD)
        while record.count('"') % 2 and number < last and not _NEW_ROW.match(lines[number]):
            record += "\n" + lines[number]
            number += 1
        yield first + 1, record


def piped_rows(folder: DataFolder, file: str) -> Iterator[Row]:
    """Rows `image_name| comment_number| comment`; a caption may hold more bars.

    Flickr30k's own file has one row without its second bar; it is noted and left out like others.
    Raises: LabError if a column is missing.
    """
    lines = folder.read_text(file).split("\n")
    columns = [name.strip() for name in lines[0].split("|")]
    if columns != ["image_name", "comment_number", "comment"]:
        expected = "image_name| comment_number| comment"
        raise LabError(f"{folder.root / file} has the columns {columns}; its first line must be {expected}")
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("|", 2)
        if len(fields) == 3:
            yield number, fields[0].strip(), fields[2]
        elif line.strip():
            what = f"{len(fields)} columns in place of 3"
            folder.problems.add("malformed row", file, what, f"line {number}")


def karpathy_object(record: dict[str, Any]) -> Any:
    """Of an object in Karpathy's files what a table needs; his token lists are most of the file."""
    if "raw" in record:
        return record["raw"]
    if "sentences" not in record:
        return record
    kept = {key: record.get(key) for key in ("split", "filepath", "filename", "sentences")}
    return {**kept, "id": record.get("cocoid", record.get("imgid"))}
