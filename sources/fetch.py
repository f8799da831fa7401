"""Data sets by name: downloaded with kagglehub or pooch, checked, and placed in one folder per set."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from core.errors import LabError, choose
from core.files import locked, make_folder, write_errors, write_text

MARKER = ".fetched.json"  # in the folder of a set: the parts that were downloaded
WORK = ".fetch"  # beside the folders of the sets: locks and unfinished downloads
KARPATHY = "karpathy"  # the part that is downloaded only on request
TIMEOUT = 30.0  # seconds without a byte after which a connection counts as lost
RETRY_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt after a lost connection
MOUNTS = {"KAGGLE_KERNEL_RUN_TYPE", "TBE_RUNTIME_ADDR"}  # set where Kaggle or Colab mount sets themselves
KAGGLE_INPUT = Path("/kaggle/input")  # the sets that were added to a Kaggle notebook
CREDENTIALS = (
    "public sets need no account: check the credentials in KAGGLE_API_TOKEN, KAGGLE_USERNAME and KAGGLE_KEY, or "
    "~/.kaggle, and accept the terms of the set on its page"
)
ADVICE = {
    401: CREDENTIALS,
    403: CREDENTIALS,
    404: "download the files by hand",
    416: "the unfinished download was deleted, run the same call again",
}
DAMAGE = (OSError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Part:
    """One archive of a data set.

    Args:
        url: https://... of a zip or tar file, or kaggle://owner/name/versions/number.
        num_bytes: approximate size of the archive, or of its unpacked files if they are larger.
        expects: minimum number of files per pattern of a path relative to the folder of the set; `*` also
            matches `/`. A part with these files is complete, also if they were put there by hand.
        checksum: "md5:..." or "sha256:..." of the archive, if it is published.
        members: files to unpack from a zip file (empty: all), or files and then the folder of a Kaggle set.
        prefix: folder of a Kaggle set that contains the members.
    """

    url: str
    num_bytes: float
    expects: Mapping[str, int]
    checksum: str | None = None
    members: Sequence[str] = ()
    prefix: str = ""

    @property
    def handle(self) -> str:
        """The handle that kagglehub takes, or "" for a plain address."""
        return self.url.removeprefix("kaggle://") if self.url.startswith("kaggle://") else ""

    @property
    def kaggle_archive(self) -> Path:
        """Where kagglehub keeps the unfinished download of a Kaggle set."""
        owner, name, _, version = self.handle.split("/")
        cache = os.environ.get("KAGGLEHUB_CACHE", Path.home() / ".cache" / "kagglehub")
        return Path(cache, "datasets", owner, name, f"{version}.archive")

    @property
    def kaggle_input(self) -> Path | None:
        """The folder of a set that was added to this Kaggle notebook."""
        owner, name, *_ = self.handle.split("/")
        folders = (KAGGLE_INPUT / name, KAGGLE_INPUT / "datasets" / owner / name)
        return next((folder for folder in folders if folder.is_dir()), None)

    @property
    def is_cached(self) -> bool:
        """Whether kagglehub needs no download: it has a Kaggle set already, or the machine mounts it."""
        return bool(MOUNTS & os.environ.keys()) or self.kaggle_archive.with_suffix(".complete").exists()


def fetch(name: str, data_dir: str | Path = "data", *, karpathy: bool = False) -> Path:
    """Download a data set to `data_dir`/`name`; files already on disk are not downloaded again.

    An interrupted download is resumed. If another process is downloading the same set, this one waits.
    kagglehub keeps the images of Kaggle sets in its own cache (`KAGGLEHUB_CACHE`, or ~/.cache/kagglehub);
    the folder of the set links to them.

    Args:
        name: a name of `SOURCES`.
        karpathy: also download Karpathy's split, `dataset_*.json`.
    Returns: the folder of the set.
    Raises: LabError if the name is unknown, a disk is too small, or a server or an archive fails.

    >>> fetch("flickr8k")  # doctest: +SKIP
    PosixPath('data/flickr8k')
    """
    parts = dict(choose(SOURCES, name, "data set"))
    if karpathy and KARPATHY not in parts:
        names = ", ".join(name for name, parts in SOURCES.items() if KARPATHY in parts)
        raise LabError(f"{name} has no Karpathy split; set karpathy to False, or fetch one of: {names}")
    if not karpathy:
        parts.pop(KARPATHY, None)
    folder = Path(data_dir) / name
    work = folder.parent / WORK / name
    if _missing(folder, parts):
        with _alone(work.parent / f"{name}.lock", name):
            missing = _missing(folder, parts)  # fewer if another process has finished
            _check_space(name, missing, work)
            make_folder(work)
            for key, part in missing.items():
                fetch_part = _fetch_kaggle if part.handle else _fetch_archive
                record = fetch_part(f"{name} {key}", part, folder, work / key)
                write_text(folder / MARKER, json.dumps({**_records(folder), key: record}))
                (work / key).unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)
    return folder


def is_linked(folder: str | Path) -> bool:
    """Whether `fetch` linked a part of the set to kagglehub's copy, which is outside of `folder`."""
    return any(record.get("linked") for record in _records(Path(folder)).values())


def is_interrupted(folder: str | Path) -> bool:
    """Whether `fetch` started to download a set to `folder` and did not finish.

    Files of a finished part that were changed or deleted since, and sets put there by hand, do not count.
    """
    folder = Path(folder)
    if folder.name not in SOURCES:
        return False
    records = _records(folder)
    started = (folder.parent / WORK / folder.name).exists()
    return started or (bool(records) and not records.keys() >= SOURCES[folder.name].keys() - {KARPATHY})


def _records(folder: Path) -> dict[str, Any]:
    """The downloaded parts by name; none if the marker is absent or damaged."""
    try:
        records = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def _missing(folder: Path, parts: Mapping[str, Part]) -> dict[str, Part]:
    """The parts that are not complete in `folder`, or whose archive was not unpacked to the end."""
    names, work = _file_names(folder), folder.parent / WORK / folder.name
    return {
        key: part
        for key, part in parts.items()
        if _shortage(names, part) or (not part.handle and (work / key).exists())
    }


def _file_names(folder: Path) -> list[str]:
    """Relative paths of all files below `folder`, also through links."""
    walk = os.walk(folder, followlinks=True)
    return [Path(place, name).relative_to(folder).as_posix() for place, _, names in walk for name in names]


def _shortage(names: Collection[str], part: Part) -> str:
    """Which expected files of a part are not among `names`, or ""."""
    for pattern, minimum in part.expects.items():
        count = sum(fnmatchcase(name, pattern) for name in names)
        if count < minimum:
            return f"{count} of {minimum} files {pattern}"
    return ""


def _alone(lock: Path, label: str) -> AbstractContextManager[None]:
    """While this is entered, no other process downloads the same files."""
    return locked(lock, waiting=f"{label} is being downloaded by another process; waiting for it to finish")


def _check_space(name: str, parts: Mapping[str, Part], work: Path) -> None:
    """Print what is downloaded and where. Raises: LabError if a disk has too little free space."""
    plain = [part for part in parts.values() if not part.handle]
    kaggle = [part for part in parts.values() if part.handle and not part.is_cached]
    for setting, group in (("data_dir", plain), ("KAGGLEHUB_CACHE", kaggle)):
        if not group:
            continue
        place = work if group is plain else group[0].kaggle_archive.parent
        present = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        sizes = [part.num_bytes for part in group]
        needed = max(sum(sizes) + max(sizes) - present, 0)
        disk = next(parent for parent in place.absolute().parents[1:] if parent.is_dir())
        free = shutil.disk_usage(disk).free
        if free < needed:
            raise LabError(
                f"{name} needs {needed / 1e9:.1f} GB and {disk} has {free / 1e9:.1f} GB free; "
                f"free some space, or set {setting} to a folder on a larger disk"
            )
        total, needed = sum(sizes) / 1e9, needed / 1e9
        print(f"{name}: a download of {total:.2f} GB; needs {needed:.2f} GB in {disk}", flush=True)


def _fetch_kaggle(label: str, part: Part, folder: Path, archive: Path) -> dict[str, Any]:
    """Download a Kaggle set to kagglehub's cache, link its folder and copy its files into `folder`."""
    import kagglehub

    for place in (Path.cwd(), Path.cwd().parent):  # beside the notebook, where a file is uploaded to
        if (place / "kaggle.json").is_file():
            os.environ.setdefault("KAGGLE_CONFIG_DIR", str(place))
    for name in part.members:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise LabError(f"{folder / name} is incomplete; complete it by hand, or move it and fetch again")
    lock = part.kaggle_archive.with_suffix(".lock")  # two folders of data sets share one cache
    with _alone(lock, label), _one_sentence(label, part, part.kaggle_archive):
        copy = part.kaggle_input or Path(_retry(lambda: kagglehub.dataset_download(part.handle)))
    root = copy / part.prefix
    if shortage := _shortage(_file_names(root), part):
        raise LabError(f"{label}: {copy} has only {shortage}; delete that folder and fetch again")
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
        return {"url": part.url, "linked": [n for n in part.members if _place(root / n, folder / n, archive)]}


def _place(source: Path, place: Path, unfinished: Path) -> bool:
    """Link a folder, or copy a file or what cannot be linked; an existing file is kept. Returns: linked."""
    if source.is_dir():
        place.unlink(missing_ok=True)  # a link to a copy that was deleted
        with suppress(OSError):  # some disks and Windows accounts have no links
            place.symlink_to(source.resolve(), target_is_directory=True)
            return True
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        os.replace(unfinished, place)
    elif not place.exists():
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, place)
    return False


def _fetch_archive(label: str, part: Part, folder: Path, archive: Path) -> dict[str, Any]:
    """Download a zip or tar file and unpack it; all of it is in `folder` afterwards, or nothing."""
    unpacked = archive.with_name(f"{archive.name}.unpacked")
    with _one_sentence(label, part, archive):
        _retry(lambda: _download(part, archive))
        shutil.rmtree(unpacked, ignore_errors=True)
        _unpack(archive, unpacked, part.members)
        if shortage := _shortage(_file_names(unpacked), part):
            raise ValueError(f"only {shortage}")
    with write_errors(folder):
        shutil.copytree(unpacked, folder, dirs_exist_ok=True, copy_function=os.replace)
    return {"url": part.url}


def _download(part: Part, archive: Path) -> None:
    """Download a file with pooch, which starts from zero after a cut unless its downloader resumes."""
    import pooch

    partial = archive.with_name(f"{archive.name}.part")

    def resume(url: str, output_file: str, _: Any) -> None:
        with partial.open("ab") as file:
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
            downloader = pooch.HTTPDownloader(True, chunk_size=2**16, timeout=TIMEOUT, headers=headers)
            downloader(url, file, None)
        os.replace(partial, output_file)

    pooch.get_logger().setLevel("WARNING")
    pooch.retrieve(part.url, part.checksum, fname=archive.name, path=archive.parent, downloader=resume)


def _unpack(archive: Path, folder: Path, members: Sequence[str]) -> None:
    """Unpack a zip or tar file; zipfile and tarfile's data filter write nothing outside of `folder`."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder, [name for name in file.namelist() if not members or name in members])
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def _retry(download: Callable[[], Any]) -> Any:
    """The result of `download`, called again after a lost connection; it resumes."""
    import requests

    for wait in RETRY_WAITS:
        try:
            return download()
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            time.sleep(wait)
    return download()


@contextmanager
def _one_sentence(label: str, part: Part, archive: Path) -> Iterator[None]:
    """Turn an error of a server, an archive or a disk into a LabError; a damaged archive is deleted."""
    import requests
    from kagglehub.exceptions import DataCorruptionError

    server = "Kaggle" if part.handle else urlsplit(part.url).hostname
    with write_errors(archive):
        try:
            yield
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status == 416:  # the file on the server is shorter than what was downloaded
                archive.with_name(f"{archive.name}.part").unlink(missing_ok=True)
            advice = ADVICE.get(status, "try again later")
            raise LabError(f"{label}: {server} answers {part.url} with error {status}; {advice}") from error
        except requests.RequestException as error:
            raise LabError(
                f"{label}: the connection to {server} failed {len(RETRY_WAITS) + 1} times; check the network and "
                "run the same call again, which resumes the download"
            ) from error
        except (*DAMAGE, DataCorruptionError) as error:
            if getattr(error, "errno", None) not in (None, errno.EINVAL):  # of the disk, not of the archive
                raise
            cause = " ".join(str(error).split())
            if "credentials" in cause:
                raise LabError(f"{label}: {cause}; delete that file, public sets need no account") from error
            archive.unlink(missing_ok=True)
            raise LabError(
                f"{label}: the download of {part.url} is damaged ({cause}); it was deleted, run the same call again"
            ) from error


# --- The sets ---


def _coco_captions(year: int, checksum: str | None = None) -> Part:
    return Part(
        url=f"http://images.cocodataset.org/annotations/annotations_trainval{year}.zip",
        num_bytes=253e6,
        expects={f"*captions_{split}{year}.json": 1 for split in ("train", "val")},
        checksum=checksum,
        members=[f"annotations/captions_{split}{year}.json" for split in ("train", "val")],
    )


def _karpathy(file: str) -> Part:
    """Karpathy and Fei-Fei's splits (2015): one archive with one file for each of the three sets."""
    url = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
    return Part(url, num_bytes=145e6, expects={file: 1}, members=(file,))


# Sizes are rounded. Comments state the published number of images; a little less is expected, because the copies
# on Kaggle may lack some.
SOURCES: dict[str, dict[str, Part]] = {
    "coco2014": {
        "captions": _coco_captions(  # the checksum that TensorFlow Datasets uses
            2014, "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"
        ),
        "images": Part(
            url="kaggle://jeffaudi/coco-2014-dataset-for-yolov3/versions/4",
            num_bytes=20.2e9,
            expects={"*COCO_train2014_*.jpg": 82_000, "*COCO_val2014_*.jpg": 40_000},  # 82,783 and 40,504
            members=("images",),
            prefix="coco2014/",
        ),
        KARPATHY: _karpathy("dataset_coco.json"),
    },
    "coco2017": {
        "captions": _coco_captions(2017),
        "val_images": Part(
            "http://images.cocodataset.org/zips/val2017.zip",
            num_bytes=820e6,
            expects={"val2017/*.jpg": 5_000},
        ),
        "images": Part(
            url="http://images.cocodataset.org/zips/train2017.zip",
            num_bytes=19.4e9,
            expects={"train2017/*.jpg": 118_287},
        ),
    },
    "flickr30k": {
        "images": Part(
            url="kaggle://hsankesara/flickr-image-dataset/versions/1",
            num_bytes=9e9,  # it contains the folder of images twice
            expects={"*.jpg": 31_000, "*results.csv": 1},  # 31,783
            members=("results.csv", "flickr30k_images"),
            prefix="flickr30k_images/",
        ),
        KARPATHY: _karpathy("dataset_flickr30k.json"),
    },
    "flickr8k": {
        "images": Part(
            url="kaggle://adityajn105/flickr8k/versions/1",
            num_bytes=1.12e9,
            expects={"Images/*.jpg": 8_000, "captions.txt": 1},  # 8,091
            members=("captions.txt", "Images"),
        ),
        KARPATHY: _karpathy("dataset_flickr8k.json"),
    },
    "cifar100": {
        "images": Part(  # address and MD5 of torchvision.datasets.CIFAR100
            url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            num_bytes=187e6,
            expects={f"cifar-100-python/{file}": 1 for file in ("train", "test", "meta")},
            checksum="md5:eb9058c3a382ffc7106e4002c42a8d85",
        ),
    },
}
