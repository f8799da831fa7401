"""Readers: each makes one table of images and captions from a layout of files; the table is kept between runs."""

from __future__ import annotations

import csv
import functools
import gzip
import inspect
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from core.errors import LabError, choose, nearest
from core.files import DamagedFileError, atomic_path, fingerprint, read_bytes, sweep
from core.tensor_files import load_arrays
from sources.table import (
    IMAGE_SUFFIXES,
    UNUSED,
    CaptionTable,
    DataFolder,
    TableBuilder,
    is_id,
    is_image,
    join,
    same_name,
    split_rank,
    stamp,
)

# --- Rows of caption files ---


Row = tuple[str, str, str, str]  # place in the file, image, caption, split or ""
_SUFFIXES = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_NEW_ROW = re.compile(rf'(\d*[,;\t])?"?[^",;\t\n]+\.({_SUFFIXES})"?\s*[,;\t]', re.IGNORECASE)
_TOKEN_ROW = re.compile(r"\S[^\t]*#\d+\t")
_LONGEST_RECORD = 50  # lines that a quoted caption may extend over
IMAGE_COLUMNS = ("image", "image_name", "image_path", "filepath", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "comment", "title", "text", "raw")


def caption_rows(folder: DataFolder, file: str) -> Iterator[Row]:
    """Rows of a file of captions; malformed ones are noted and left out.

    Reads Flickr's token files (`name.jpg#0`, a tab, the caption) and tables whose first line names the columns
    (`IMAGE_COLUMNS`, `CAPTION_COLUMNS`, perhaps `split`), separated by commas, tabs, semicolons or bars. A caption
    in the last column may contain separators without quotes; a cell of column `raw` may be a JSON list of captions.
    Raises: LabError if a column is missing.
    """
    text = folder.read_text(file)
    if _TOKEN_ROW.match(text):
        yield from _token_rows(folder, file, text)
        return
    separator, names = _columns(text.partition("\n")[0])
    image, caption = (next((n for n in of if n in names), "") for of in (IMAGE_COLUMNS, CAPTION_COLUMNS))
    if not image or not caption:
        raise LabError(
            f"{folder.root / file} has the columns {names}; its first line must be image,caption or "
            "image_name| comment_number| comment"
        )
    # Flickr30k's own file, with bars between fields, has no quoting.
    records = enumerate(text.split("\n"), start=1) if separator == "|" else _records(text)
    for number, record in records:
        if number == 1 or not record.strip():
            continue
        place = f"line {number}"
        try:
            row = _fields(record, separator, len(names), last=caption == names[-1])
        except csv.Error as error:
            folder.problems.add("malformed row", file, f"not a CSV row ({error})", place)
            continue
        if len(row) != len(names):
            what = f"{len(row)} columns, expected {len(names)}"
            folder.problems.add("malformed row", file, what, place)
            continue
        cells = dict(zip(names, row, strict=True))
        for each in _listed(cells[caption]) if caption == "raw" else [cells[caption]]:
            yield place, cells[image].strip(), each, cells.get("split", "").strip()


def _columns(header: str) -> tuple[str, list[str]]:
    """The separator of a first line and the names in it; the comma if no separator fits."""
    for separator in ",\t;|":
        names = [name.strip().strip('"').lower() for name in header.split(separator)]
        if set(names) & set(IMAGE_COLUMNS) and set(names) & set(CAPTION_COLUMNS):
            return separator, names
    return ",", header.split(",")


def _listed(cell: str) -> list[str]:
    """The texts of a cell that is a JSON list of them, else the cell itself."""
    try:
        captions = json.loads(cell)
    except (ValueError, RecursionError):
        return [cell]
    return captions if isinstance(captions, list) else [cell]


def _token_rows(folder: DataFolder, file: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if _TOKEN_ROW.match(line):
            image, _, caption = line.partition("\t")
            yield f"line {number}", image.rpartition("#")[0], caption, ""
        elif line.strip():
            folder.problems.add("malformed row", file, "no name#number and tab", f"line {number}")


def _fields(record: str, separator: str, count: int, last: bool) -> list[str]:
    """The cells of a row. Raises: csv.Error if its quotes do not match, or a cell is far too long."""
    parts = record.split(separator, count - 1)
    quoted = separator != "|" and any(part.lstrip().startswith('"') for part in parts)
    if last and not quoted and len(record) < csv.field_size_limit():
        return parts
    return next(csv.reader([record], strict=True, delimiter=separator), [])


def _records(text: str) -> Iterator[tuple[int, str]]:
    """(line, record) pairs: a quoted caption may extend over lines, but a stray quote swallows no rows."""
    lines = text.split("\n")
    end = 0
    while end < len(lines):
        start, end = end, end + 1
        last = min(len(lines), start + _LONGEST_RECORD)
        quotes = lines[start].count('"')
        while quotes % 2 and end < last and not _NEW_ROW.match(lines[end]):
            quotes += lines[end].count('"')
            end += 1
        yield start + 1, "\n".join(lines[start:end])


def karpathy_object(record: dict[str, Any]) -> Any:
    """What a table needs of an object in Karpathy's files; most of them are lists of tokens."""
    if "raw" in record:
        return record["raw"]
    if "sentences" not in record:
        return record
    image = {key: record.get(key) for key in ("split", "filepath", "filename", "sentences")}
    return {**image, "id": record.get("cocoid", record.get("imgid"))}


# --- The table, kept between runs ---


FORMAT = 4  # raise it when readers make another table of the same files, or the cached file changes
ARRAYS = ("image_ids", "caption_image_ids", "splits", "categories")


def cache_path(cache_dir: str | Path, **settings: Any) -> Path:
    """The file of the table that this reader makes of this folder with these options."""
    key = json.dumps({"format": FORMAT, **settings}, sort_keys=True, default=str)
    return Path(cache_dir) / f"captions-{settings['reader']}-{fingerprint([key])[:12]}.npz"


def keep_table(path: Path, table: CaptionTable, stamps: dict[str, tuple[int, int]]) -> None:
    """Write a table beside the stamps of every file and folder it was read from, all or nothing."""
    names = ("paths", "captions", "problems", "split_source")
    texts = {"stamps": stamps, **{name: getattr(table, name) for name in names}}
    arrays = {name: getattr(table, name) for name in ARRAYS if getattr(table, name) is not None}
    sweep(path.parent)
    with atomic_path(path) as beside, open(beside, "wb") as file:
        np.savez(file, texts=np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8), **arrays)


def read_kept_table(path: Path, root: Path) -> CaptionTable | None:
    """The table of `keep_table`, or None if it is absent, damaged, or older than its sources."""
    try:
        arrays = load_arrays(path, "it is read again from its sources")
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        print(error)
        return None
    texts = json.loads(arrays.pop("texts").tobytes())
    if any(stamp(source) != tuple(then) for source, then in texts.pop("stamps").items()):
        return None
    return CaptionTable(root=root, **arrays, **texts)


# --- Plain folders ---


SPLIT_FOLDERS = {
    "train": "train",
    "test": "test",
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}


def split_aliases(names: Iterable[str]) -> dict[str, str]:
    """This project's name for each split (`dev` is `val`), unless two would get the same one."""
    aliases = {name: SPLIT_FOLDERS.get(name.lower(), name) for name in names}
    uses = Counter(aliases.values())
    return {name: alias if uses[alias] == 1 else name for name, alias in aliases.items()}


def read_sidecar(folder: DataFolder) -> TableBuilder:
    """A folder of images, `a.jpg` beside `a.txt` with one caption per line, and perhaps `a.json`.

    Folders in it are read too. Those named train, val, test at the top are the splits, images
    outside them are "unused"; without such folders the split is seeded, by image. Of the metadata,
    `category` is taken, and `caption` (one or a list) where there is no text file.
    """
    table = TableBuilder(folder)
    splits = split_aliases(name for name in folder.folders() if name.lower() in SPLIT_FOLDERS)
    for path in folder.images():
        split = splits.get(path.partition("/")[0], UNUSED if splits else None)
        stem = path.rpartition(".")[0]
        metadata = _metadata(table, folder.true_path(f"{stem}.json"))
        table.add_image(path, split, category=metadata.get("category"))
        file = folder.true_path(f"{stem}.txt")
        if folder.has_file(file):
            captions: list[Any] = [line for line in folder.read_text(file).split("\n") if line.strip()]
        else:
            file, captions = f"{stem}.json", _as_list(metadata.get("caption", []))
        for number, caption in enumerate(captions, start=1):
            table.add_caption(path, caption, file, f"caption {number}")
    _note_lone_captions(table)
    return table


def _as_list(captions: Any) -> list[Any]:
    return captions if isinstance(captions, list) else [captions]


def _note_lone_captions(table: TableBuilder) -> None:
    """Note the caption files whose image is missing, in every folder that has images."""
    stems = {same_name(path).rpartition(".")[0] for path in table.images}
    for place in sorted({path.rpartition("/")[0] for path in table.images}):
        for name, is_folder in sorted(table.folder.listing(place).items()):
            stem, _, ending = same_name(join(place, name)).rpartition(".")
            if ending == "txt" and not is_folder and stem not in stems:
                table.folder.problems.add("missing image", place, "a caption file without its image", name)


def _metadata(table: TableBuilder, file: str) -> dict[str, Any]:
    if not table.folder.has_file(file):
        return {}
    try:
        content = table.folder.read_json(file)
    except LabError as error:
        table.malformed(file, "", str(error))
        return {}
    if isinstance(content, dict):
        return content
    table.malformed(file, "", "metadata must be one JSON object")
    return {}


def read_class_folders(folder: DataFolder, *, template: str = "a photo of a {}") -> TableBuilder:
    """A folder of class folders, perhaps below `train/`, `val/`, `test/`; each class's name is the caption.

    Folders are splits if they contain class folders and are named train and at least one other split; a lone
    "train" beside other folders is a class. Images outside the splits are noted.

    Args:
        template: the caption, with {} for the class.
    Raises: LabError if a class folder is an ImageFolder of Hugging Face with a caption for each file.
    """
    if template.count("{}") != 1:
        raise LabError(f"template {template!r} must have {{}} once, where the class's name goes")
    tops = folder.folders()
    named = [name for name in tops if name.lower() in SPLIT_FOLDERS]
    complete = named == tops or {"train"} < {SPLIT_FOLDERS[name.lower()] for name in named}
    has_splits = complete and any(folder.folders(name) for name in named)
    table = TableBuilder(folder)
    splits = split_aliases(sorted(named, key=split_rank))
    for place in ["", *named] if has_splits else [""]:
        for name in filter(is_image, folder.listing(place)):
            folder.problems.add("no caption", place, "an image outside the class folders", name)
    for top in sorted(set(tops) - set(named)) if has_splits else ():
        for path in folder.images(top):
            folder.problems.add("no caption", top, "an image outside the splits", path)
    for top, split in splits.items() if has_splits else [("", None)]:
        for class_folder in folder.folders(top):
            name = class_folder.replace("_", " ")
            _refuse_captions_by_file(folder, join(top, class_folder))
            for path in folder.images(join(top, class_folder)):
                table.add_image(path, split, category=name)
                table.add_caption(path, template.replace("{}", name), join(top, class_folder), "")
    return table


def _refuse_captions_by_file(folder: DataFolder, place: str) -> None:
    names = folder.listing(place).keys() & {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
    if names:
        raise LabError(
            f"{folder.root / place} is a Hugging Face ImageFolder with {min(names)}, not a class: its captions are by "
            "file; choose reader 'table'"
        )


# --- Layouts of captioned sets ---


COCO_FILE = re.compile(r"captions_(\w+)(20\d\d)\.json")
COCO_2014 = "COCO 2014"
KARPATHY_SETS = ("coco", "flickr8k", "flickr30k")
FLICKR8K_FILES = ("captions.txt", "captions.csv", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")
FLICKR30K_FILES = (
    "results.csv",
    "flickr30k_images/results.csv",
    "flickr30k_images/flickr30k_images/results.csv",
    "flickr_annotations_30k.csv",
    "results_20130124.token",
)
FLICKR8K_LISTS = "Flickr8k's official lists"
OFFICIAL_SHARE = 0.95  # of a folder's images; 91 of Flickr8k's 8,091 are in no list
MANY_ROWS = 100_000  # of a file that takes over two seconds to read


def read_coco(folder: DataFolder, *, karpathy_file: str | Path | None = None) -> TableBuilder:
    """COCO 2014 or 2017: `annotations/captions_{split}2014.json` and `{split}2014/` or `images/{split}2014/`.

    Both may be in a folder `coco2014` or `coco2017`, as the Kaggle sets unpack.

    Args:
        karpathy_file: dataset_coco.json, for train/restval/val/test in place of COCO's own splits.
    Raises: LabError if there is no such file, or there are files of two years, which share images.
    """
    top = folder.first("coco2014", "coco2017") or ""
    if karpathy_file is not None:
        return _read_karpathy(folder, karpathy_file, (top, join(top, "images")))
    place = join(top, "annotations")
    matches = [match for name in sorted(folder.listing(place)) if (match := COCO_FILE.fullmatch(name))]
    years = sorted({match[2] for match in matches})
    if not matches:
        raise LabError(
            f"no captions_*2014.json or captions_*2017.json in {folder.root / place}; they are in COCO's "
            "annotations_trainval2014.zip or 2017.zip (instances_*.json has no captions)"
        )
    if len(years) > 1:
        raise LabError(
            f"{folder.root / place} has captions of {' and '.join(years)}, which share images; move "
            "the files of one year to another folder"
        )
    table = TableBuilder(folder)
    table.split_source = f"COCO {years[0]}"
    names = split_aliases(match[1] for match in matches)
    for match in sorted(matches, key=lambda match: split_rank(match[1])):
        candidates = [join(top, match[1] + match[2]), join(top, f"images/{match[1]}{match[2]}")]
        images = folder.first(*candidates) or candidates[0]
        _read_coco_split(table, names[match[1]], join(place, match[0]), images)
    return table


def _read_coco_split(table: TableBuilder, split: str, file: str, image_folder: str) -> None:
    content = table.folder.read_json(file, object_hook=_coco_object)
    paths: dict[int, str] = {}
    for place, image in _rows(table.folder, content, "images", file):
        if not isinstance(image, tuple) or len(image) != 3 or not is_id(image[0]):
            table.malformed(file, place, "an image needs file_name and a whole number as id")
        elif name := table.relative(image[1], file, place):
            paths[image[0]] = join(image_folder, name)
            table.add_image(paths[image[0]], split, image_id=image[0], category=image[2])
    for place, annotation in _rows(table.folder, content, "annotations", file):
        if not isinstance(annotation, tuple) or len(annotation) != 2 or not is_id(annotation[0]):
            table.malformed(file, place, "an annotation needs image_id and caption")
        elif annotation[0] not in paths:
            table.malformed(file, place, f"image_id {annotation[0]} is not among the images")
        else:
            table.add_caption(paths[annotation[0]], annotation[1], file, place)


def _coco_object(record: dict[str, Any]) -> Any:
    """What the table needs of COCO's objects, in a fifth of the memory."""
    if "caption" in record:
        return record.get("image_id"), record["caption"]
    if "file_name" in record:
        return record.get("id"), record["file_name"], record.get("category")
    return record


def _rows(folder: DataFolder, content: Any, key: str, file: str) -> Iterator[tuple[str, Any]]:
    """The entries of a list in a JSON file, each with its place, and a progress bar if there are many."""
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise LabError(f"{folder.root / file} has no list {key!r}; it is not a caption file of this layout")
    bar = tqdm(rows, f"Reading {key}", leave=False, unit=" rows", disable=len(rows) < MANY_ROWS)
    return ((f"{key}[{number}]", row) for number, row in enumerate(bar))


def _read_karpathy(folder: DataFolder, file: str | Path, image_folders: tuple[str, ...]) -> TableBuilder:
    """Karpathy's dataset_*.json: captions and splits in one file; restval stays a split of its own."""
    name = folder.user_path(file)
    if not folder.look(name):
        raise LabError(
            f"karpathy_file {str(file)!r} does not exist; it is in Karpathy's caption_datasets.zip"
        )
    content = folder.read_json(name, object_hook=karpathy_object)
    table = TableBuilder(folder)
    dataset = content.get("dataset")
    table.split_source = f"Karpathy's split of {dataset}" if dataset in KARPATHY_SETS else "karpathy_file"
    for place, image in _rows(folder, content, "images", name):
        if not isinstance(image, dict) or not isinstance(image.get("sentences"), list) or not image["split"]:
            table.malformed(name, place, "an image needs split, filename and sentences")
        elif not is_id(image["id"]):
            table.malformed(name, place, "an image needs a whole number as cocoid or imgid")
        else:
            file_name, split = image["filename"], str(image["split"])
            if isinstance(file_name, str) and file_name:
                file_name = join(str(image["filepath"] or ""), file_name)
            table.add(file_name, split, image["sentences"], name, place, image["id"], folders=image_folders)
    _note_official(table)
    return table


def read_flickr8k(
    folder: DataFolder,
    *,
    karpathy_file: str | Path | None = None,
    annotation_file: str | Path | None = None,
) -> TableBuilder:
    """Flickr8k as on Kaggle: `Images/` and `captions.txt`, a CSV file with the columns image, caption; or as
    published: `Flicker8k_Dataset/` and `Flickr8k.token.txt`.

    The lists `Flickr_8k.{train,dev,test}Images.txt`, if they exist, give the splits train, val and test, and the
    split of images in none of them is "unused". Without lists the official ones are used if the images are
    Flickr8k's; else a seeded split by image.
    """
    images = folder.with_images(
        "Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset", ""
    )
    if karpathy_file is not None:
        return _read_karpathy(folder, karpathy_file, (images,))
    file = _needed(folder, annotation_file, *FLICKR8K_FILES)
    table = TableBuilder(folder)
    rows = list(caption_rows(folder, file))
    lists = _flickr8k_lists(folder) or _official_lists({image for _, image, _, _ in rows})
    _add_rows(table, file, images, rows, lists)
    _note_official(table)
    return table


def read_flickr30k(
    folder: DataFolder,
    *,
    karpathy_file: str | Path | None = None,
    annotation_file: str | Path | None = None,
) -> TableBuilder:
    """Flickr30k as on Kaggle: `results.csv`, separated by `|`, or `captions.txt`, and a folder of images.

    Karpathy's dataset_flickr30k.json gives captions and the usual 29,000 / 1,014 / 1,000 images;
    without it the split is seeded, by image.
    """
    nested = ("flickr30k_images/flickr30k_images", "flickr30k_images", "flickr30k-images", "Images", "images")
    images = folder.with_images(*nested, "")
    if karpathy_file is not None:
        return _read_karpathy(folder, karpathy_file, (images,))
    file = _needed(folder, annotation_file, *FLICKR30K_FILES, "captions.txt", "captions.csv")
    table = TableBuilder(folder)
    _add_rows(table, file, images, list(caption_rows(folder, file)), {})
    return table


def _add_rows(
    table: TableBuilder,
    file: str,
    images: str,
    rows: Sequence[Row],
    lists: dict[str, list[str]],
) -> None:
    """Add the rows; their splits are those of the lists, else of the rows themselves."""
    names = split_aliases({split for *_, split in rows if split})
    for place, image, caption, split in rows:
        if name := table.relative(image, file, place):
            path = join(images, name)
            for each in (
                lists.get(same_name(name), [UNUSED])
                if lists
                else [names.get(split, UNUSED if names else None)]
            ):
                table.add_image(path, each)
            table.add_caption(path, caption, file, place)


def _flickr8k_lists(folder: DataFolder) -> dict[str, list[str]]:
    """The splits that the official lists give each file name; empty without lists."""
    splits: dict[str, list[str]] = {}
    for name, split in {"train": "train", "dev": "val", "test": "test"}.items():
        file = folder.first(f"Flickr_8k.{name}Images.txt", f"Flickr8k_text/Flickr_8k.{name}Images.txt")
        for line in folder.read_text(file).split("\n") if file else ():
            if line.strip():
                splits.setdefault(same_name(line.strip()), []).append(split)
    return splits


@functools.cache
def official_flickr8k() -> dict[str, str]:
    """File name -> split of the 8,000 images in Flickr8k's official lists (Hodosh et al. 2013)."""
    file = Path(__file__).parent.parent / "configs" / "splits" / "flickr8k.tsv.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    return {name: split for split, name in (line.split("\t") for line in lines)}


def _official_lists(names: Collection[str]) -> dict[str, list[str]]:
    """The official splits if nearly all of these images are Flickr8k's and every split has some; else {}."""
    known = {name: [split] for name, split in official_flickr8k().items() if name in names}
    is_flickr8k = len(known) >= OFFICIAL_SHARE * len(names) and len({s for [s] in known.values()}) == 3
    return known if is_flickr8k else {}


def _note_official(table: TableBuilder) -> None:
    """Note in a table if its splits are those of Flickr8k's official lists, whatever file they came from."""
    splits = {PurePosixPath(path).name: image.split for path, image in table.images.items()}
    official = official_flickr8k()
    if splits and all(official.get(name, UNUSED) == split for name, split in splits.items()):
        table.split_source = FLICKR8K_LISTS


def _needed(folder: DataFolder, given: str | Path | None, *candidates: str) -> str:
    """The caption file that the user gave, else the first of these that exists."""
    if given is not None:
        candidates = (folder.user_path(given),)
    file = folder.first(*candidates)
    if file is None:
        raise LabError(
            f"{folder.root} has no {' or '.join(candidates)}; check data_dir and the reader, or name the file "
            "with annotation_file"
        )
    return file


def read_json(folder: DataFolder, *, annotation_file: str | Path | None = None) -> TableBuilder:
    """A JSON file `{"splits": {"train": [{"image_path", "caption", "id", "category"?}]}}`.

    `caption` is one text or a list of them, and an image may have several rows. The rows' `id` are the images' ids if
    they are whole numbers and unique; else positions are.

    Args:
        annotation_file: the file; None: annotations.json, or the only JSON file in the folder.
    """
    file = _annotation_file(folder, annotation_file)
    content = folder.read_json(file)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict):
        raise LabError(
            f'{folder.root / file} has no object "splits"; it needs {{"splits": {{"train": [...]}}}}'
        )
    table = TableBuilder(folder, strict_ids=False)
    names = split_aliases(splits)
    for key, rows in splits.items():
        if not isinstance(rows, list):
            raise LabError(f"split {key!r} in {folder.root / file} is not a list of rows")
        for number, row in enumerate(rows):
            place = f"{key}[{number}]"
            if not isinstance(row, dict) or "caption" not in row or "image_path" not in row:
                table.malformed(file, place, "a row needs image_path and caption")
                continue
            own = (row.get("id"), row.get("category"))
            captions = _as_list(row["caption"])
            table.add(row["image_path"], names[key], captions, file, place, *own, folders=("", "images"))
    return table


def _annotation_file(folder: DataFolder, given: str | Path | None) -> str:
    files = [name for name, is_folder in sorted(folder.listing("").items()) if not is_folder]
    names = [name for name in files if name.endswith(".json")]
    candidates = ["annotations.json", *names] if len(names) == 1 else ["annotations.json"]
    file = folder.first(*candidates if given is None else [folder.user_path(given)])
    if file is not None:
        return file
    raise LabError(
        f"{folder.root} has no {given or 'annotations.json'}; name the file with annotation_file "
        f"(JSON files there: {', '.join(names) or 'none'})"
    )


# --- Any table ---


TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
COLUMNS = {
    "image": (*IMAGE_COLUMNS, "path", "file", "image_file"),
    "caption": (*CAPTION_COLUMNS, "captions", "description", "sentence", "sentences"),
    "split": ("split", "subset", "partition"),
}
"""Names of columns that are recognized, in any case."""


def read_table(
    folder: DataFolder,
    *,
    annotation_file: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    split_column: str | None = None,
) -> TableBuilder:
    """A CSV, TSV, JSONL or parquet table with the paths of images and their captions, in columns of any name.

    The paths are below the table's folder, or `images/` beside it, or absolute inside image_root. A cell of captions
    is one text or a list of them, and an image may have several rows. The splits are those of a column, else the names
    of the tables (`train.csv`) or of their folders (`train/metadata.csv`), as in Hugging Face's imagefolder, else
    those of the images' folders; without any the split is seeded, by image.

    Args:
        annotation_file: the table; None: metadata.*, the only table in the folder, or one for each split.
        image_column, caption_column, split_column: None: guessed by name and content where that is unambiguous.
    Raises: LabError if there is no table or several, or a column is missing, ambiguous or named twice.
    """
    given = {"image": image_column, "caption": caption_column, "split": split_column}
    table, rows = TableBuilder(folder), []
    files = _tables(folder) if annotation_file is None else [_needed(folder, annotation_file)]
    if not files:
        raise LabError(f"{folder.root} has no {', '.join(TABLE_SUFFIXES)} file; name it with annotation_file")
    for file in files:
        place = "" if os.path.isabs(file) else file.rpartition("/")[0]
        frame = _frame(folder, file)
        image, caption, split = _chosen(frame, given, folder.root / file)
        splits = frame[split].tolist() if split else [_split_of(file)] * len(frame)
        cells = zip(frame[image].tolist(), frame[caption].tolist(), splits, strict=True)
        rows += [(file, place, number, *row) for number, row in enumerate(cells, start=1)]
    tops = {name.lower() for name in folder.folders()} & SPLIT_FOLDERS.keys()
    named = [name if isinstance(name, str) else "" for *_, name in rows]
    if not any(named) and tops:
        firsts = [str(row[3]).partition("/")[0].lower() for row in rows]
        named = [first if first in tops else "" for first in firsts]
    aliases = split_aliases({name.strip() for name in named if name.strip()})
    for (file, place, number, path, captions, _), split_name in zip(rows, named, strict=True):
        own = aliases.get(split_name.strip(), UNUSED if aliases else None)
        texts = captions.tolist() if isinstance(captions, np.ndarray) else captions
        texts = _listed(texts) if isinstance(texts, str) and texts.startswith("[") else _as_list(texts)
        places = (place, join(place, "images"), join(place, "Images"), "")
        table.add(path, own, texts, file, f"row {number}", folders=places)
    return table


def _split_of(file: str) -> str:
    """The split that a table's name or folder says, or ""."""
    path = PurePosixPath(file)
    return next((name for name in (path.stem, path.parent.name) if name.lower() in SPLIT_FOLDERS), "")


def _tables(folder: DataFolder) -> list[str]:
    """The tables of a folder, or of its splits' folders, without those of other layouts; [] if there are none.

    Raises: LabError if there are several and they are not one for each split.
    """
    claimed = {*FLICKR8K_FILES, *FLICKR30K_FILES} - {"captions.csv"}
    places = ["", *(name for name in folder.folders() if name.lower() in SPLIT_FOLDERS)]
    paths = [join(place, name) for place in places for name in sorted(folder.listing(place))]
    paths = [path for path in paths if path.lower().endswith(TABLE_SUFFIXES) and folder.has_file(path)]
    top = [path for path in paths if "/" not in path and path not in claimed]
    named = [path for path in top if path.startswith("metadata.")]
    below = [path for path in paths if "/" in path and PurePosixPath(path).stem == "metadata"]
    tables = named or top or below
    if len(tables) > 1 and len(set(map(_split_of, tables)) - {""}) < len(tables):
        raise LabError(
            f"{folder.root} has the tables {', '.join(tables)}; name one with annotation_file, or name them after "
            "their splits (train.csv, val.csv)"
        )
    return tables


def _frame(folder: DataFolder, file: str) -> pd.DataFrame:
    """A table's rows; malformed ones are noted. Raises: LabError if it cannot be read or a column is named twice."""
    suffix = PurePosixPath(file).suffix.lower()
    if suffix == ".parquet":
        folder.look(file)
        data = read_bytes(folder.root / file)
        try:
            return pd.read_parquet(io.BytesIO(data))
        except ImportError as error:
            message = f"reading {folder.root / file} needs pyarrow; install it with `pip install pyarrow`"
            raise LabError(f"{message}, or save the table as CSV") from error
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise LabError(f"{folder.root / file} is not a parquet file ({str(error)[:120]})") from error
    text = folder.read_text(file)
    if suffix == ".jsonl":
        return pd.DataFrame(_json_lines(folder, file, text), dtype=object)
    header = text.partition("\n")[0]
    separator = max("\t,;|" if suffix == ".tsv" else ",\t;|", key=header.count)
    names = next(csv.reader([header], delimiter=separator), [])
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise LabError(f"{folder.root / file} has the column {twice[0]!r} twice; rename one of them")

    def note(cells: list[str]) -> None:
        what = f"{len(cells)} columns, expected {len(names)}"
        folder.problems.add("malformed row", file, what, separator.join(cells)[:60])

    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "index_col": False, "engine": "python"}
    try:
        return pd.read_csv(io.StringIO(text), sep=separator, on_bad_lines=note, **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, csv.Error) as error:
        raise LabError(f"{folder.root / file} is not a table ({str(error)[:120]})") from error


def _json_lines(folder: DataFolder, file: str, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = line
        if isinstance(row, dict):
            yield row
        elif row is not None:
            folder.problems.add("malformed row", file, "not a JSON object", f"line {number}")


def _chosen(frame: pd.DataFrame, given: dict[str, str | None], file: Path) -> list[str]:
    """The columns of image, caption and split ("" if there is none), printed where one was guessed.

    Raises: LabError with the table's columns if one is missing or ambiguous.
    """
    columns = list(map(str, frame.columns))
    chosen: dict[str, str] = {}
    for kind, name in given.items():
        matches = [each for each in columns if each.strip().lower() in COLUMNS[kind]]
        if kind == "image" and len(matches) != 1:
            matches = [each for each in columns if frame[each].map(_is_image_path).mean() > 0.5]
        if kind == "caption" and not matches:
            rest = [
                each for each in columns if each != chosen["image"] and each.lower() not in COLUMNS["split"]
            ]
            matches = [each for each in rest if frame[each].map(_is_sentence).mean() > 0.5]
        matches = matches if name is None else [each for each in columns if each == name]
        if len(matches) > 1 or (not matches and (kind != "split" or name is not None)):
            problem = f"several columns that may be the {kind}s." if matches else f"no column of {kind}s."
            problem = problem if name is None else f"no column {name!r}{nearest(name, columns) or '.'}"
            raise LabError(f"{file} has {problem} Set {kind}_column to one of: {', '.join(columns)}.")
        chosen[kind] = matches[0] if matches else ""
    if len(frame) and isinstance(frame[chosen["image"]].iloc[0], (bytes, dict)):
        raise LabError(
            f"column {chosen['image']!r} of {file} has the images themselves; write them to files and the files' "
            "paths into the column"
        )
    if None in (given["image"], given["caption"]):
        print(f"{file}: " + ", ".join(f"{kind}s in column {name!r}" for kind, name in chosen.items() if name))
    return list(chosen.values())


def _is_image_path(cell: Any) -> bool:
    return isinstance(cell, str) and is_image(PurePosixPath(cell.strip()).name)


def _is_sentence(cell: Any) -> bool:
    return isinstance(cell, (list, np.ndarray)) or (isinstance(cell, str) and " " in cell.strip())


# --- All readers ---


def read_captions(
    reader: str,
    data_dir: str | Path,
    *,
    split_seed: int = 0,
    cache_dir: str | Path | None = None,
    follow_links: bool = False,
    image_root: str | Path | None = None,
    **options: Any,
) -> CaptionTable:
    """The images and captions of a data set on disk.

    Args:
        reader: a name of `READERS`; `auto`, also with the name of the reader that was recognized, as in `auto:json`:
            the one that `recognize` returns.
        data_dir: the data set's folder; for the readers `json` and `table` also the annotation file itself.
        split_seed: of the split by image, if the data set has no split of its own.
        cache_dir: folder of parsed tables; one is used again as long as no source file or folder has changed.
        follow_links: follow links that lead outside `data_dir`.
        image_root: a folder outside `data_dir` that links and absolute image paths may lead into.
        options: the reader's own keywords; None means not given.
    Raises: LabError if there are no files of this layout, none of its images exists, or a split leaks.
    """
    reader = reader.removeprefix("auto:")
    if reader == "auto":
        files = {name: options.get(name) for name in ("karpathy_file", "annotation_file")}
        reader = recognize(data_dir, follow_links=follow_links, image_root=image_root, **files)
    read = choose(READERS, reader, "reader")
    options = _options(read, reader, options)
    data_dir = Path(data_dir)
    if data_dir.is_file() and read in (read_json, read_table):
        data_dir, options["annotation_file"] = data_dir.parent, data_dir.absolute()
    folder = DataFolder(data_dir, follow_links=follow_links, image_root=image_root)
    if cache_dir is None:
        return read(folder, **options).build(split_seed)
    settings = {"options": options, "split_seed": split_seed, "follow_links": follow_links}
    roots = {"data_dir": data_dir.absolute(), "image_root": image_root and Path(image_root).absolute()}
    path = cache_path(cache_dir, reader=reader, **settings, **roots)
    table = read_kept_table(path, data_dir)
    if table is None:
        table = read(folder, **options).build(split_seed)
        keep_table(path, table, folder.stamps)
    return table


def _options(read: Callable[..., TableBuilder], reader: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options that are not None. Raises: LabError on one that the reader does not have."""
    names = [name for name in inspect.signature(read).parameters if name != "folder"]
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in names:
            guess = nearest(name, names) or "."
            known = ", ".join(names) or "none"
            raise LabError(f"reader {reader!r} has no option {name!r}{guess} Its options: {known}.")
    return given


READERS: dict[str, Callable[..., TableBuilder]] = {
    "coco": read_coco,
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "json": read_json,
    "sidecar": read_sidecar,
    "class_folders": read_class_folders,
    "table": read_table,
}


# --- The reader of a folder ---


def _has_coco(folder: DataFolder) -> bool:
    names = [
        name for top in ("", "coco2014", "coco2017") for name in folder.listing(join(top, "annotations"))
    ]
    return any(re.fullmatch(r"(captions|instances)_\w+\.json", name) for name in names)


def _has_json(folder: DataFolder) -> bool:
    names = [
        name for name, is_folder in folder.listing("").items() if name.endswith(".json") and not is_folder
    ]
    if "annotations.json" in names or len(names) != 1 or not (folder.root / names[0]).is_file():
        return "annotations.json" in names
    with open(folder.root / names[0], "rb") as file:
        return b'"splits"' in file.read(1000)


def _has_table(folder: DataFolder) -> bool:
    try:
        return bool(_tables(folder))
    except LabError:  # several, which reading reports
        return True


def _has_sidecars(folder: DataFolder) -> bool:
    """Whether some image has a file of captions or metadata beside it."""
    stems = (path.rpartition(".")[0] for path in folder.images())
    return any(folder.has_file(f"{stem}.txt") or folder.has_file(f"{stem}.json") for stem in stems)


def _has_classes(folder: DataFolder) -> bool:
    """Whether there are two folders of images, in the folder itself or in those of its splits."""
    tops = folder.folders()
    splits = [name for name in tops if name.lower() in SPLIT_FOLDERS]
    nested = {name: join(top, name) for top in splits for name in folder.folders(top)}
    places = nested if nested else {name: name for name in set(tops) - set(splits)}
    return len([place for place in places.values() if any(folder.images(place))]) > 1


LAYOUTS: dict[str, tuple[str, Callable[[DataFolder], bool]]] = {
    "coco": ("annotations/captions_*2014.json or captions_*2017.json", _has_coco),
    "flickr8k": (
        "captions.txt or Flickr8k.token.txt",
        lambda folder: folder.first(FLICKR8K_FILES[0], *FLICKR8K_FILES[2:]) is not None,
    ),
    "flickr30k": (
        "results.csv, flickr_annotations_30k.csv or results_20130124.token",
        lambda folder: folder.first(*FLICKR30K_FILES) is not None,
    ),
    "json": ('annotations.json, or a single JSON file with "splits"', _has_json),
    "sidecar": ("a.txt or a.json beside a.jpg", _has_sidecars),
    "table": ("a .csv, .tsv, .jsonl or .parquet file of another name, or metadata.* in train/", _has_table),
    "class_folders": ("a folder of images for each class, and no captions", _has_classes),
}
"""What a folder is recognized by: reader -> what it looks for, and whether a folder has that."""


def recognize(
    data_dir: str | Path,
    *,
    follow_links: bool = False,
    image_root: str | Path | None = None,
    karpathy_file: str | Path | None = None,
    annotation_file: str | Path | None = None,
) -> str:
    """The reader of a data set, by its files; class folders only where no other reader fits.

    Raises: LabError with what each reader looks for, if none or several of them fit.
    """
    for file in (annotation_file, data_dir if Path(data_dir).is_file() else None):
        if file is not None:
            suffix = Path(file).suffix.lower()
            return "json" if suffix == ".json" else "table" if suffix in TABLE_SUFFIXES else "flickr8k"
    for name in KARPATHY_SETS if karpathy_file is not None else ():
        if name in Path(str(karpathy_file)).name:
            return name
    folder = DataFolder(data_dir, follow_links=follow_links, image_root=image_root)
    fitting = [name for name, (_, fits) in LAYOUTS.items() if name != "class_folders" and fits(folder)]
    if not fitting and _has_classes(folder):
        fitting = ["class_folders"]
    if len(fitting) == 1:
        return fitting[0]
    listed = "".join(f"\n  {name}: {LAYOUTS[name][0]}" for name in fitting or LAYOUTS)
    if fitting:
        raise LabError(f"{data_dir} fits several readers; set reader to one of them. What is there:{listed}")
    raise LabError(
        f"{data_dir} fits no reader; set reader to one of these, or arrange the files as it reads them. "
        f"What each looks for and did not find:{listed}"
    )
