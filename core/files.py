"""Files that are complete or absent: atomic writes, checksums, locks, temporary files.

A file is written under a temporary name, flushed to disk and renamed. A failed write keeps the earlier file, removes
the temporary one and raises an error of one sentence.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core.errors import LabError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_WORDS = ("no space left", "os error 28", "disk is full", "quota exceeded", "file too large")
TORN_WORDS = (
    "PytorchStreamWriter failed",
    "unexpected pos",
    "requested and",
)  # torch and NumPy on a full disk, without the cause
FORMULA = re.compile(r"[=+\-@\t\r](?![\d.,]+( %)?( ± [\d.,]+)?$)")  # text that is not a number
ABANDONED_SECONDS = 3600.0  # an older temporary file was abandoned, even if its process id is in use


class DiskFullError(LabError):
    """A write failed because no space is left; the earlier file is kept."""


def read_bytes(path: str | os.PathLike[str], max_bytes: int = 2 * 2**30) -> bytes:
    """A file's content.

    Raises: LabError if it is not a regular file (reading a pipe would block), has more than `max_bytes`, or cannot be
        read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise LabError(f"{path} is not a regular file; give the path of a file")
        if status.st_size > max_bytes:
            raise LabError(
                f"{path} has {status.st_size:,} bytes; such a file has at most {max_bytes:,}, check what it is"
            )
        return Path(path).read_bytes()
    except (OSError, MemoryError) as error:
        raise LabError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'out of memory'}"
        ) from error


class DamagedFileError(LabError):
    """A file whose content is not what was written.

    Args: advice: what to do.
    """

    def __init__(self, path: str | Path, reason: str, advice: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); {advice}.")


def make_folder(path: str | Path) -> Path:
    """A folder and its parents, created if absent. Raises: LabError if that is impossible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        taken = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)
        cause = f"{taken} is a file" if taken else error.strerror or str(error)
        raise LabError(f"the folder {path} cannot be made ({cause}); choose another folder.") from error
    return path


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error or its cause says that a disk, quota or file size is exhausted."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in FULL or any(word in text.lower() for word in FULL_WORDS):
            return True
        if any(word in text for word in TORN_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def csv_text(table: Any, **options: Any) -> str:
    """A pandas table as CSV in which texts are not formulas for a spreadsheet: `=1+1` becomes `'=1+1`.

    Args: options: of DataFrame.to_csv.
    """

    def escaped(cell: Any) -> Any:
        return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell

    return table.map(escaped).rename(index=escaped, columns=escaped).to_csv(**options)


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Within, a failed write to `path` raises LabError, a full disk DiskFullError; other exceptions are unchanged."""
    path = Path(path)
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(path) from error
        if isinstance(error, OSError):
            cause = error.strerror or error
            raise LabError(f"{path} could not be written ({cause}); the earlier file is kept.") from error
        raise


def disk_full(path: Path) -> DiskFullError:
    """The error that names a full folder and the file that did not fit."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    return DiskFullError(
        f"no space left in {folder}: {path.name} needs more than the {free / 1e6:,.1f} MB that are free; free some "
        "space or choose a folder on another disk, then run again. The earlier file is kept."
    )


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, flushed to disk and renamed to `path` at the end.

    Raises: LabError if it cannot be written; the earlier file at `path` is kept.
    """
    path = Path(path)
    make_folder(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with write_errors(path):
        try:
            yield beside
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def sweep(folder: str | Path) -> None:
    """Remove temporary files of `atomic_path` that ended processes left in a folder and its subfolders."""
    for path in Path(folder).rglob(".*.tmp"):
        number = path.name.split(".")[-2]
        if number.isdigit() and _is_abandoned(path, int(number)):
            path.unlink(missing_ok=True)


def _is_abandoned(path: Path, process: int) -> bool:
    try:
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            return True
        os.kill(process, 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:
        return False
    return False


@contextmanager
def locked(path: str | Path, timeout: float = -1, *, waiting: str = "") -> Iterator[None]:
    """Within, this process alone holds the lock file `path`; the lock is released when the process ends.

    Args: waiting: printed if another process holds the lock.
    Raises: Timeout after `timeout` seconds; LabError if the folder cannot hold a lock.
    """
    path = Path(path)
    make_folder(path.parent)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0 if waiting else timeout)
        except Timeout:
            if not waiting:
                raise
            print(waiting, flush=True)
            lock.acquire(timeout=timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        raise LabError(
            f"{path.parent} cannot hold a lock file ({error}); choose a folder on a local disk."
        ) from error
    try:
        yield
    finally:
        lock.release()


# --- Text and JSON ---


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically; returns the path."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return Path(path)


SEAL, SEAL_PREFIX = "checksum", "crc32:"


def sealed(code: int) -> str:
    """A CRC-32 as it is written in files."""
    return f"{SEAL_PREFIX}{code:08x}"


def checksum(content: Any) -> int:
    """CRC-32 of content as JSON, independent of the layout."""
    plain = json.loads(json.dumps(content, default=str))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def seal_of(content: dict[str, Any]) -> str | None:
    """Remove the checksum from a file's content and return it; None where there is none.

    It is recognized by its name or its value, so that one damaged letter cannot hide it.
    """
    stated = [name for name, value in content.items() if name == SEAL or str(value).startswith(SEAL_PREFIX)]
    values = [content.pop(name) if name == SEAL else "" for name in stated]
    return str(values[0]) if len(values) == 1 else None if not values else ""


def read_json(path: Path, advice: str = "delete it and run again") -> dict[str, Any]:
    """A JSON object, or {} where there is no file.

    Args: advice: what to do if the file is damaged, for the message.
    Raises: DamagedFileError if it is not a JSON object or does not match its checksum.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"not JSON: {error}", advice) from error
    if not isinstance(content, dict):
        raise DamagedFileError(path, "it is not a JSON object", advice)
    stated = seal_of(content)
    if stated is not None and stated != sealed(checksum(content)):
        raise DamagedFileError(path, "its checksum does not match", advice)
    return content


def write_json(path: str | Path, content: dict[str, Any], *, seal: bool = False) -> None:
    """Write JSON atomically; with `seal`, a checksum is the last entry."""
    content = {**content, SEAL: sealed(checksum(content))} if seal else content
    write_text(path, json.dumps(content, indent=1, default=str))


# --- Digests ---


def fingerprint(items: Iterable[str]) -> str:
    """SHA-256 of a list of strings; lists with the same concatenation differ."""
    digest = hashlib.sha256()
    for item in items:
        data = item.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def file_digest(*paths: str | Path) -> str:
    """SHA-256 of the concatenated bytes of files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class StaleCacheError(LabError):
    """A cache that is damaged or belongs to other inputs or another encoder."""
