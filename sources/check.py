"""The data check: opens every image and reads every caption once, and reports what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from core.errors import LabError
from core.files import write_text
from core.processes import in_processes
from sources.decode import UndecodableImage, decode, read_bytes, stored_size
from sources.table import UNUSED, CaptionTable

REPORT_FILE = "data_report.json"
CHECK_SIZE = 32  # pixels; a JPEG is decoded at an eighth: all of its data is read, few pixels are computed
MIN_IMAGES_FOR_PROCESSES = 500  # fewer are checked in this process
CHUNK = 64  # images per task
CAPTION_CHUNK = 1000
EXTRA_TOKENS = 8  # a tokenizer makes at most one token per byte and this many of its own
NAMES_SHOWN = 3


OTHER_FINDINGS = {
    "malformed row": "malformed rows",
    "refused path": "refused paths",
    "missing image": "missing images",
    "no caption": "images without captions",
}


class CheckedImage(NamedTuple):
    """One checked image file."""

    digest: bytes
    width: int
    height: int
    cause: str  # why it cannot be decoded, or ""


def check(
    table: CaptionTable,
    *,
    tokenizer: Callable[[list[str]], Any] | None = None,
    max_length: int = 77,
    num_workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Check every image and caption of a table.

    Args:
        tokenizer: texts -> lists of token ids without truncation, or {"input_ids": such lists}, as
            transformers' tokenizers are called; None: caption lengths in tokens are not checked.
        max_length: tokens that the text tower keeps of a caption.
        num_workers: processes; None: one per core; 0: this process only.
        progress: show a progress bar.
    Returns: a report that can be written as JSON:
        root: the data folder; images, captions: how many the table holds;
        images_per_split {split: images}; split_source: where the splits come from;
        captions_per_image {captions: images};
        image_sizes [[width, height], ...] of the decodable images; caption_lengths [words, ...];
        bad_images {path: cause};
        undecodable {cause: images};
        duplicates [{"paths", "splits"}, ...], identical files in several splits;
        duplicates_within: identical files in one split, not counting one of each;
        empty_captions: captions left out; undecodable_text: captions repaired or with U+FFFD;
        over_length: None, or {max_length, captions, tokens_cut, tokens, longest}, tokens being those
        of the captions that are cut;
        problems: what the reader left out or repaired; problem_counts {kind: rows}.
    Raises: LabError if a checking process dies.
    """
    images = _check_images(table, num_workers, progress)
    bad = {path: image.cause for path, image in zip(table.paths, images, strict=True) if image.cause}
    counts = table.problem_counts()
    damaged = sum("\ufffd" in caption for caption in table.captions)  # it stands for lost characters
    per_image, num_images = np.unique(np.diff(table.offsets), return_counts=True)
    return {
        "root": str(table.root),
        "images": len(table),
        "captions": len(table.captions),
        "images_per_split": table.split_sizes(),
        "split_source": table.split_source,
        "captions_per_image": dict(zip(per_image.tolist(), num_images.tolist(), strict=True)),
        "image_sizes": [[image.width, image.height] for image in images if not image.cause],
        "caption_lengths": [len(caption.split()) for caption in table.captions],
        "bad_images": bad,
        "undecodable": dict(Counter(bad.values()).most_common()),
        **_duplicates(table, images),
        "empty_captions": counts.get("empty caption", 0),
        "undecodable_text": counts.get("repaired text", 0) + damaged,
        "over_length": tokenizer and _over_length(table.captions, tokenizer, max_length, progress),
        "problems": table.problems,
        "problem_counts": counts,
    }


# --- Images ---


def _check_images(table: CaptionTable, num_workers: int | None, progress: bool) -> list[CheckedImage]:
    paths = [os.fspath(table.root / path) for path in table.paths]
    workers = 0 if len(paths) <= MIN_IMAGES_FOR_PROCESSES else num_workers
    results = in_processes(_check_file, paths, workers, chunk_size=CHUNK)
    return list(tqdm(results, "Checking images", len(paths), unit="img", disable=not progress))


def _check_file(path: str) -> CheckedImage:
    data = b""
    try:
        data = read_bytes(path)
        decode(data, CHECK_SIZE)
        return CheckedImage(_digest(data), *stored_size(data), "")
    except UndecodableImage as error:
        return CheckedImage(_digest(data) if data else b"", 0, 0, error.cause)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _duplicates(table: CaptionTable, images: Sequence[CheckedImage]) -> dict[str, Any]:
    """Identical files; an image that is in two splits makes the test easier than it looks."""
    rows = defaultdict(list)
    for row, image in enumerate(images):
        if image.digest:
            rows[image.digest].append(row)
    across, within = [], 0
    for same in (rows for rows in rows.values() if len(rows) > 1):
        splits = table.splits[same].tolist()
        within += len(same) - len(set(splits))
        if len(set(splits) - {UNUSED}) > 1:
            across.append({"paths": [table.paths[row] for row in same], "splits": splits})
    return {"duplicates": across, "duplicates_within": within}


# --- Captions ---


def _over_length(
    captions: Sequence[str], tokenizer: Callable[[list[str]], Any], max_length: int, progress: bool
) -> dict[str, int]:
    """How many captions are longer than the text tower's limit, and how many of their tokens are cut."""
    suspects = [text for text in captions if len(text.encode()) + EXTRA_TOKENS > max_length]
    lengths: list[int] = []
    starts = range(0, len(suspects), CAPTION_CHUNK)
    for start in tqdm(starts, desc="Counting tokens", disable=not progress or len(suspects) < CAPTION_CHUNK):
        tokens = tokenizer(suspects[start : start + CAPTION_CHUNK])
        rows = tokens["input_ids"] if isinstance(tokens, Mapping) else tokens
        lengths += [len(row) for row in rows]
    over = np.array([length for length in lengths if length > max_length], dtype=np.int64)
    return {
        "max_length": max_length,
        "captions": len(over),
        "tokens_cut": int((over - max_length).sum()),
        "tokens": int(over.sum()),
        "longest": max(lengths, default=0),
    }


# --- The report ---


def report_table(report: Mapping[str, Any]) -> pd.DataFrame:
    """A report as a table: finding, count, detail."""
    rows = [*_general(report), *_undecodable(report), *_duplicate_files(report), *_texts(report)]
    rows += [
        (finding, report["problem_counts"].get(kind, 0), _examples(report, kind))
        for kind, finding in OTHER_FINDINGS.items()
    ]
    return pd.DataFrame(rows, columns=["finding", "count", "detail"])


def save_report(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write a report as JSON, one key per line; `path` is the file or the folder for `data_report.json`."""
    path = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items()]
    return write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def load_report(path: str | Path) -> dict[str, Any]:
    """A saved report. Raises: LabError if it does not exist or is not a report."""
    path = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["captions_per_image"] = {int(key): n for key, n in report["captions_per_image"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"{path} is not a data report; make one with `python dataset.py check DIR`") from error
    return report


Row = tuple[str, int, str]


def _general(report: Mapping[str, Any]) -> Iterator[Row]:
    splits = ", ".join(f"{split} {count:,}" for split, count in report["images_per_split"].items())
    source = report.get("split_source")
    yield "images", report["images"], f"{splits} ({source})" if source else splits
    each = sorted(report["captions_per_image"])
    mean = report["captions"] / max(report["images"], 1)
    detail = f"{each[0]} to {each[-1]} per image, {mean:.2f} on average" if each else ""
    yield "captions", report["captions"], detail
    if sizes := Counter(map(tuple, report["image_sizes"])):
        (width, height), count = sizes.most_common(1)[0]
        least, most = min(map(min, sizes)), max(map(max, sizes))
        detail = f"sides of {least} to {most} px; {count:,} images are {width} x {height}"
        yield "sizes", len(sizes), detail


def _undecodable(report: Mapping[str, Any]) -> Iterator[Row]:
    bad = report["bad_images"]
    yield "undecodable images", len(bad), "left out everywhere" if bad else ""
    for cause, count in report["undecodable"].items():
        yield f"  {cause}", count, _some([path for path, why in bad.items() if why == cause])


def _duplicate_files(report: Mapping[str, Any]) -> Iterator[Row]:
    groups = [" = ".join(group["paths"]) for group in report["duplicates"]]
    yield "identical files in several splits", len(groups), _some(groups)
    yield "identical files in one split", report["duplicates_within"], ""


def _texts(report: Mapping[str, Any]) -> Iterator[Row]:
    yield "empty captions", report["empty_captions"], "left out" if report["empty_captions"] else ""
    yield "repaired or damaged captions", report["undecodable_text"], _examples(report, "repaired text")
    if over := report["over_length"]:
        share = over["tokens_cut"] / max(over["tokens"], 1)
        detail = (
            f"{over['tokens_cut']:,} tokens cut, {share:.0%} of theirs; the longest has {over['longest']}"
        )
        finding = f"captions over {over['max_length']} tokens"
        yield finding, over["captions"], detail if over["captions"] else ""


def _examples(report: Mapping[str, Any], kind: str) -> str:
    problems = [problem for problem in report["problems"] if problem["kind"] == kind]
    return _some([f"{problem['where']} ({problem['what']})" for problem in problems])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
