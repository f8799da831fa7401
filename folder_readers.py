"""Readers of plain folders of pictures: captions in files beside them, or classes as folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from captions import UNUSED, split_rank
from data_folder import DataFolder, is_picture, join
from errors import LabError
from table_builder import TableBuilder

SPLIT_FOLDERS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


def split_aliases(names: Iterable[str]) -> dict[str, str]:
    """This project's name for each split (`dev` is `val`), unless two would get the same one."""
    aliases = {name: SPLIT_FOLDERS.get(name.lower(), name) for name in names}
    uses = Counter(aliases.values())
    return {name: alias if uses[alias] == 1 else name for name, alias in aliases.items()}


def read_sidecar(folder: DataFolder, *, seed: int = 0) -> TableBuilder:
    """A folder of images, `a.jpg` beside `a.txt` with one caption a line, and perhaps `a.json`.

    Folders in it are read too. Those named train, val, test at the top are the splits, images
    outside them are "unused"; without such folders the split is seeded, by image. Of the metadata,
    `category` is taken, and `caption` (one or a list) where there is no text file.
    """
    table = TableBuilder(folder)
    splits = split_aliases(name for name in folder.folders() if name.lower() in SPLIT_FOLDERS)
    for path in folder.pictures():
        split = splits.get(path.partition("/")[0], UNUSED)
        stem = path.rpartition(".")[0]
        metadata = _metadata(table, f"{stem}.json")
        table.add_image(path, split, category=metadata.get("category"))
        if folder.has_file(f"{stem}.txt"):
            file = f"{stem}.txt"
            captions: list[Any] = [line for line in folder.read_text(file).split("\n") if line.strip()]
        else:
            file, caption = f"{stem}.json", metadata.get("caption", [])
            captions = caption if isinstance(caption, list) else [caption]
        for number, caption in enumerate(captions, start=1):
            table.add_caption(path, caption, file, f"caption {number}")
    _note_lone_captions(table)
    if not splits:
        table.split_by_seed(seed)
    return table


def _note_lone_captions(table: TableBuilder) -> None:
    """Note the caption files whose picture is missing, in every folder that holds pictures."""
    stems = {path.rpartition(".")[0] for path in table.images}
    for place in sorted({path.rpartition("/")[0] for path in table.images}):
        for name, is_folder in sorted(table.folder.listing(place).items()):
            stem, _, ending = name.rpartition(".")
            if ending == "txt" and not is_folder and join(place, stem) not in stems:
                what = "a caption file without its picture"
                table.folder.problems.add("missing image", place, what, name)


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


def read_class_folders(
    folder: DataFolder, *, template: str = "a photo of a {}", seed: int = 0
) -> TableBuilder:
    """A folder of class folders, perhaps below `train/`, `val/`, `test/`; each class's name is the caption.

    Where other folders stand beside one named train, it is a class like them.

    Args:
        template: the caption, with {} for the class.
    """
    if template.count("{}") != 1:
        raise LabError(f"template {template!r} must have {{}} once, where the class's name goes")
    tops = folder.folders()
    has_splits = bool(tops) and all(name.lower() in SPLIT_FOLDERS for name in tops)
    table = TableBuilder(folder)
    splits = split_aliases(sorted(tops, key=split_rank))
    _note_loose(table, ["", *tops] if has_splits else [""])
    for top, split in splits.items() if has_splits else [("", UNUSED)]:
        for class_folder in folder.folders(top):
            _add_class(table, join(top, class_folder), split, class_folder.replace("_", " "), template)
    if not has_splits:
        table.split_by_seed(seed)
    return table


def _note_loose(table: TableBuilder, places: list[str]) -> None:
    for place in places:
        for name in filter(is_picture, table.folder.listing(place)):
            table.folder.problems.add("no caption", place, "a picture outside the class folders", name)


def _add_class(table: TableBuilder, place: str, split: str, name: str, template: str) -> None:
    for path in table.folder.pictures(place):
        table.add_image(path, split, category=name)
        table.add_caption(path, template.replace("{}", name), place, "")
