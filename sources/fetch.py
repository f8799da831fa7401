"""Where data comes from: the sets that can be fetched, and how each ends up whole in its folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from core.errors import LabError, choose
from sources.archives import kept, unpack
from sources.downloads import disk_errors, download, human_size, kagglehub_copy, require_space

MARKER = ".fetched.json"  # in a set's folder, written last: what was fetched, with names and sizes
WORK = ".fetch"  # beside the sets' folders: locks, and what is not whole yet


@dataclass(frozen=True)
class Part:
    """One archive of a set.

    Args:
        url: http://, https://, or kaggle://owner/set.
        download_bytes: the archive's size, about.
        unpacked_bytes: what `keep` takes up, about; an archive that holds twice as much is refused.
        expects: by pattern of a path below the set's folder, how many files there are at least; `*`
            spans folders. Only this tells that a part is whole which nobody fetched but put there.
        checksum: "md5:..." or "sha256:..." of the archive, where a public source states one.
        keep: patterns of the members to unpack, after `prefix` is taken off.
        prefix: the archive's folder whose contents belong into the set's folder.
        skip_copies: the archive holds files several times; unpack them once.
    """

    url: str
    download_bytes: float
    unpacked_bytes: float
    expects: Mapping[str, int]
    checksum: str | None = None
    keep: Sequence[str] = ("*",)
    prefix: str = ""
    skip_copies: bool = False


@dataclass(frozen=True)
class Source:
    """A set: its parts by name, in the order they are fetched, and Karpathy's split of it if there is one."""

    parts: Mapping[str, Part]
    karpathy: Part | None = None


def fetch(
    name: str,
    data_dir: str | Path = "data",
    *,
    karpathy: bool = False,
    timeout: float = 60.0,
    progress: bool = True,
) -> Path:
    """Bring a data set to `data_dir`/`name`; at once, and asking no server, if it is there already.

    An interrupted fetch, even a killed one, goes on where it was. Another process that fetches the
    same set is waited for. Where kagglehub has the images already (its own cache, or a mount of
    Kaggle or Colab) they are linked, not copied: see `is_linked`.

    Args:
        name: a name of `SOURCES`.
        karpathy: bring Karpathy's split too, as `dataset_*.json`.
        timeout: seconds a server may be silent.
    Returns: the set's folder.
    Raises: LabError if the name is unknown, the disk is too small, or a server or an archive fails.

    >>> fetch("flickr8k")  # doctest: +SKIP
    PosixPath('data/flickr8k')
    """
    folder = Path(data_dir) / name
    parts = _wanted(name, karpathy)
    if _missing(folder, parts):
        with _alone(name, folder.parent / WORK):
            missing = _missing(folder, parts)  # less, if another process was waited for
            _link_copies(folder, missing)
            _fetch_missing(folder, _missing(folder, missing), timeout, progress)
    return folder


def is_linked(folder: str | Path) -> bool:
    """Whether `fetch` linked a part of the set to where kagglehub has it, outside of `folder`."""
    return any(record.get("linked") for record in _records(Path(folder)).values())


def is_interrupted(folder: str | Path) -> bool:
    """Whether `fetch` began to bring a set to `folder` and did not end.

    Files of a finished part that were changed or deleted since, and sets that were put there by hand, are the user's.
    """
    folder = Path(folder)
    if folder.name not in SOURCES:
        return False
    records, work = _records(folder), folder.parent / WORK / folder.name
    return work.exists() or (bool(records) and not records.keys() >= SOURCES[folder.name].parts.keys())


def _wanted(name: str, karpathy: bool) -> dict[str, Part]:
    source = choose(SOURCES, name, "data set")
    if not karpathy:
        return dict(source.parts)
    if source.karpathy is None:
        names = ", ".join(name for name, source in SOURCES.items() if source.karpathy)
        raise LabError(f"{name} has no Karpathy split; set karpathy to False, or fetch one of: {names}")
    return {**source.parts, "karpathy": source.karpathy}


@contextmanager
def _alone(name: str, work: Path) -> Iterator[None]:
    """Hold the set's lock, which ends with its process; wait for it, saying for whom."""
    holder = work / f"{name}.holder"
    lock = FileLock(work / f"{name}.lock")
    with disk_errors(name, work, "nothing was fetched"):
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            print(f"{name} is being fetched by {who}; waiting for it", flush=True)
            lock.acquire()
    me = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%H:%M:%S}"
    try:
        with disk_errors(name, work, "nothing was fetched"):
            holder.write_text(me)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _fetch_missing(folder: Path, parts: Mapping[str, Part], timeout: float, progress: bool) -> None:
    name, work = folder.name, folder.parent / WORK / folder.name
    if not parts:
        return
    with disk_errors(name, work, "nothing was fetched"):
        work.mkdir(parents=True, exist_ok=True)
    _announce(name, parts, work, progress)
    for key, part in parts.items():
        _fetch_part(f"{name} {key}", part, work / key, folder, timeout, progress)
    shutil.rmtree(work, ignore_errors=True)


def _announce(name: str, parts: Mapping[str, Part], work: Path, progress: bool) -> None:
    """Tell what the fetch takes. Raises: LabError if the disk has less."""
    downloads = [max(part.download_bytes - _downloaded(work / key), 0) for key, part in parts.items()]
    unpacked = sum(part.unpacked_bytes for part in parts.values())
    free = require_space(work, unpacked + max(downloads), name)  # an archive goes before the next one comes
    if progress:
        print(
            f"{name}: about {human_size(sum(downloads))} to download and {human_size(unpacked)} unpacked; "
            f"{human_size(free)} free in {work.parent.parent.resolve()}",
            flush=True,
        )


def _downloaded(archive: Path) -> int:
    files = (archive, archive.with_name(archive.name + ".part"))
    return sum(file.stat().st_size for file in files if file.exists())


def _fetch_part(label: str, part: Part, archive: Path, folder: Path, timeout: float, progress: bool) -> None:
    unpacked = archive.with_name(archive.name + ".unpacked")
    download(part.url, archive, label=label, checksum=part.checksum, timeout=timeout, progress=progress)
    files = unpack(
        archive,
        unpacked,
        unpacked_bytes=part.unpacked_bytes,
        label=label,
        keep=part.keep,
        prefix=part.prefix,
        skip_copies=part.skip_copies,
        progress=progress,
    )
    if lacking := _lacking(files, part):
        archive.unlink()
        shutil.rmtree(unpacked)
        raise LabError(
            f"{label}: the archive of {part.url} {lacking}, so it is not what it was and was deleted; "
            f"put the files into {folder} by hand"
        )
    with disk_errors(label, folder, "the archive is kept"):
        folder.mkdir(exist_ok=True)
        _merge(unpacked, folder)
        _record(folder, archive.name, {"url": part.url, "checksum": part.checksum, "files": files})
    archive.unlink()


def _link_copies(folder: Path, parts: Mapping[str, Part]) -> None:
    """Link the parts that kagglehub has somewhere already; those that cannot be linked stay missing."""
    for key, part in parts.items():
        copy = kagglehub_copy(part.url) if part.url.startswith("kaggle:") else None
        if copy is None:
            continue
        root = copy / part.prefix if (copy / part.prefix).is_dir() else copy
        entries = [entry for entry in root.iterdir() if kept(entry.name + "/" * entry.is_dir(), part.keep)]
        try:
            folder.mkdir(exist_ok=True)
            for entry in entries:
                _link(folder / entry.name, entry.resolve())
            if not _lacking(_walk(folder), part):
                names = [entry.name for entry in entries]
                _record(folder, key, {"url": part.url, "to": str(root), "linked": names})
        except OSError:
            continue  # something else is there, or this disk or user has no links


def _link(place: Path, target: Path) -> None:
    if place.is_symlink():
        place.unlink()  # an old link, perhaps to what is gone
    place.symlink_to(target, target_is_directory=target.is_dir())


def _merge(source: Path, target: Path) -> None:
    """Move what is in `source` to `target`, whole folders where there is none of that name yet."""
    for entry in list(source.iterdir()):
        place = target / entry.name
        if place.is_symlink():
            place.unlink()
        if entry.is_dir() and place.is_dir():
            _merge(entry, place)
        else:
            os.replace(entry, place)


# ---- what is there


def _records(folder: Path) -> dict[str, Any]:
    """The marker's records by part; none if it is absent or broken."""
    try:
        records = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def _record(folder: Path, key: str, record: dict[str, Any]) -> None:
    marker, new = folder / MARKER, folder / f"{MARKER}.new"
    new.write_text(json.dumps({**_records(folder), key: record}))
    os.replace(new, marker)


def _missing(folder: Path, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts that are not whole in `folder`."""
    if not folder.is_dir():
        return dict(parts)
    records = _records(folder)
    names: list[str] | None = None
    missing = {}
    for key, part in parts.items():
        if key in records:
            whole = _is_whole(folder, records[key])
        elif (folder.parent / WORK / folder.name / key).exists():
            whole = False  # killed while it was moved here
        else:
            names = _walk(folder) if names is None else names
            whole = not _lacking(names, part)
        if not whole:
            missing[key] = part
    return missing


def _is_whole(folder: Path, record: Mapping[str, Any]) -> bool:
    try:
        if "linked" in record:
            return all((folder / name).exists() for name in record["linked"])
        return all(os.stat(folder / name).st_size == size for name, size in record["files"].items())
    except (OSError, KeyError, TypeError, AttributeError):  # gone, or a marker that somebody edited
        return False


def _walk(folder: Path) -> list[str]:
    """Paths of all files below `folder`, through links too, but through no link twice."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        relative = PurePosixPath(Path(place).relative_to(folder))
        found += [str(relative / name) for name in names]
    return found


def _lacking(names: Collection[str], part: Part) -> str:
    """What part of what a part promises is not among these files, or ""."""
    for pattern, least in part.expects.items():
        count = sum(fnmatchcase(name, pattern) for name in names)
        if count < least:
            return f"holds {count} of {least} files {pattern}"
    return ""


# ---- the sets


def _karpathy(file: str, unpacked_bytes: float) -> Part:
    """Karpathy & Fei-Fei's splits (2015): one archive with a file for each of the three sets."""
    return Part(
        url="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        download_bytes=37e6,
        unpacked_bytes=unpacked_bytes,
        expects={file: 1},
        keep=(file,),
    )


# Sizes are rounded. Where the published count of images is in a comment, the least that is expected lies
# a little below it: nobody vouches that the copies on Kaggle hold every one.
SOURCES: dict[str, Source] = {
    "coco2014": Source(
        {
            "captions": Part(
                url="http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
                download_bytes=252_872_794,
                unpacked_bytes=100e6,
                expects={"*captions_train2014.json": 1, "*captions_val2014.json": 1},
                # as TensorFlow Datasets states it
                checksum="sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
                keep=("annotations/captions_*.json",),
            ),
            "images": Part(
                url="kaggle://jeffaudi/coco-2014-dataset-for-yolov3",
                download_bytes=20.2e9,
                unpacked_bytes=20.2e9,
                expects={"*COCO_train2014_*.jpg": 82_000, "*COCO_val2014_*.jpg": 40_000},  # 82,783 and 40,504
                keep=("images/*", "train2014/*", "val2014/*"),
                prefix="coco2014/",
            ),
        },
        karpathy=_karpathy("dataset_coco.json", 145e6),
    ),
    "coco2017": Source(
        {
            "captions": Part(
                url="http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
                download_bytes=253e6,
                unpacked_bytes=100e6,
                expects={"*captions_train2017.json": 1, "*captions_val2017.json": 1},
                keep=("annotations/captions_*.json",),
            ),
            "val_images": Part(
                url="http://images.cocodataset.org/zips/val2017.zip",
                download_bytes=816e6,
                unpacked_bytes=820e6,
                expects={"val2017/*.jpg": 5_000},
            ),
            "images": Part(
                url="http://images.cocodataset.org/zips/train2017.zip",
                download_bytes=19.4e9,
                unpacked_bytes=19.4e9,
                expects={"train2017/*.jpg": 118_287},
            ),
        },
    ),
    "flickr30k": Source(
        {
            "images": Part(
                url="kaggle://hsankesara/flickr-image-dataset",
                download_bytes=8.8e9,
                unpacked_bytes=4.5e9,
                expects={"*.jpg": 31_000, "*results.csv": 1},  # 31,783
                keep=("flickr30k_images/*", "results.csv"),
                prefix="flickr30k_images/",
                skip_copies=True,  # it holds its own images folder again
            ),
        },
        karpathy=_karpathy("dataset_flickr30k.json", 40e6),
    ),
    "flickr8k": Source(
        {
            "images": Part(
                url="kaggle://adityajn105/flickr8k",
                download_bytes=1.12e9,
                unpacked_bytes=1.12e9,
                expects={"Images/*.jpg": 8_000, "captions.txt": 1},  # 8,091
                keep=("Images/*", "captions.txt"),
            ),
        },
        karpathy=_karpathy("dataset_flickr8k.json", 10e6),
    ),
    "cifar100": Source(
        {
            # torchvision's own address and MD5 (datasets/cifar.py); its download has no time-out and starts over
            "images": Part(
                url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                download_bytes=169_001_437,
                unpacked_bytes=187e6,
                expects={f"cifar-100-python/{file}": 1 for file in ("train", "test", "meta")},
                checksum="md5:eb9058c3a382ffc7106e4002c42a8d85",
            ),
        },
    ),
}
