"""Archives unpacked safely: nothing outside the folder, no links, no bombs, all of it or nothing."""

from __future__ import annotations

import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, Self

from tqdm.auto import tqdm

from core.errors import LabError
from sources.downloads import AGAIN, CHUNK, disk_errors


class _ArchiveError(Exception):
    """An archive that is damaged, or not what it should be."""


MAX_HEADER = 2**20  # bytes of a long name or of PAX records; tarfile reads them at once


class _Header(tarfile.TarInfo):
    """A header of a tar archive; those that would make tarfile read without bound are refused."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _ArchiveError(f"its member {header.name!r} is a sparse file")
        if header.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and header.size > MAX_HEADER:
            raise _ArchiveError(f"one of its headers has {header.size:,} bytes, more than {MAX_HEADER:,}")
        return header


_DAMAGED = (
    _ArchiveError,
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,  # a compression that zipfile does not know
    ValueError,
    RecursionError,  # header after header for one member
    OSError,  # gzip's and bz2's; the disk's own are LabError by then
)


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    crc: int | None
    open: Callable[[], IO[bytes] | None]


def kept(name: str, keep: Sequence[str]) -> bool:
    """Whether a path matches one of the patterns `keep`; `*` spans folders."""
    return any(fnmatchcase(name, pattern) for pattern in keep)


def _zip_member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    if stat.S_ISLNK(info.external_attr >> 16):
        raise _ArchiveError(f"its member {info.filename!r} is a link")
    if info.flag_bits & 1:
        raise _ArchiveError(f"its member {info.filename!r} asks for a password")
    return _Member(info.filename, info.file_size, info.CRC, partial(file.open, info))


def _tar_members(file: tarfile.TarFile) -> Iterator[_Member]:
    for info in file:
        if not (info.isfile() or info.isdir()):
            raise _ArchiveError(f"its member {info.name!r} is a link or a device")
        if info.isfile():
            yield _Member(info.name, info.size, None, partial(file.extractfile, info))


def _members(archive: Path, stack: ExitStack) -> Iterable[_Member]:
    """The files in an archive: a list for a zip, whose directory says it all, or as a tar brings them."""
    if zipfile.is_zipfile(archive):
        file = stack.enter_context(zipfile.ZipFile(archive))
        infos = sorted(file.infolist(), key=lambda info: info.filename.count("/"))  # of copies, the outermost
        return [_zip_member(file, info) for info in infos if not info.is_dir()]
    with suppress(tarfile.ReadError):
        return _tar_members(stack.enter_context(tarfile.open(archive, tarinfo=_Header)))
    with archive.open("rb") as content:
        begins = content.read(16)
    if begins.startswith((b"PK", b"\x1f\x8b")):
        raise _ArchiveError("its end is missing")
    raise _ArchiveError(f"it begins with {begins!r} and is neither zip nor tar")


def _safe_name(name: str) -> str:
    """A member's name as a relative path. Raises: _ArchiveError if it leads anywhere but below."""
    path = PurePosixPath(name.replace("\\", "/"))
    outside = path.is_absolute() or PureWindowsPath(name).drive or "\0" in name
    if outside or not path.parts or any(not part.strip(". ") for part in path.parts):
        raise _ArchiveError(f"its member {name!r} leads outside the folder")
    return str(path)


def _write(member: _Member, target: Path, bar: Any) -> None:
    source = member.open()
    if source is None:
        raise _ArchiveError(f"its member {member.name!r} cannot be read")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise _ArchiveError(f"two of its members are called {member.name!r}") from error
    with source, file:
        while chunk := source.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    if target.stat().st_size != member.size:
        raise _ArchiveError(f"its member {member.name!r} is cut off")


def _selected(
    members: Iterable[_Member], limit: float, keep: Sequence[str], prefix: str, skip_copies: bool
) -> Iterator[tuple[str, _Member]]:
    """The members to unpack and their paths. Raises: _ArchiveError at an unsafe name, or above the limit."""
    copies: set[tuple[str, int, int]] = set()
    for member in members:
        name = _safe_name(member.name).removeprefix(prefix)
        if not kept(name, keep):
            continue
        if skip_copies and member.crc is not None:
            same = (PurePosixPath(name).name, member.size, member.crc)
            if same in copies:
                continue
            copies.add(same)
        limit -= member.size
        if limit < 0:
            raise _ArchiveError("it unpacks to more than twice what it should")
        yield name, member


def _write_all(
    selected: Iterable[tuple[str, _Member]], folder: Path, label: str, progress: bool
) -> dict[str, int]:
    total = sum(member.size for _, member in selected) if isinstance(selected, list) else None
    bar = tqdm(
        desc=f"{label}, unpacking",
        total=total,
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5,
    )
    files = {}
    with bar:
        for name, member in selected:
            _write(member, folder / name, bar)
            files[name] = member.size
    return files


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def unpack(
    archive: Path,
    folder: Path,
    *,
    unpacked_bytes: float,
    label: str = "",
    keep: Sequence[str] = ("*",),
    prefix: str = "",
    skip_copies: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Unpack a zip or tar archive into the new folder `folder`; all of it, or nothing is left there.

    Args:
        unpacked_bytes: what `keep` takes up, about; an archive that holds twice as much is refused.
        keep: patterns of the members to unpack, matched after `prefix` is taken off; `*` spans folders.
        prefix: a folder in the archive whose contents are meant, such as "coco2014/".
        skip_copies: of a file that a zip holds several times (same name, size and CRC), unpack the outermost.
    Returns: bytes of each file, by its path below `folder`.
    Raises: LabError, and deletes the archive, if it is damaged, or if a member is a link or leads
        outside `folder`; LabError, and keeps it, if the disk is full.
    """
    label = label or archive.name
    limit = 2 * unpacked_bytes
    try:
        with (
            disk_errors(label, folder.parent, "the archive is kept"),
            _all_or_nothing(folder),
            ExitStack() as stack,
        ):
            members = _members(archive, stack)
            selected: Iterable[tuple[str, _Member]] = _selected(members, limit, keep, prefix, skip_copies)
            if isinstance(members, list):
                selected = list(selected)  # refused before a byte is written, and the bar knows its end
            return _write_all(selected, folder, label, progress)
    except LabError:
        raise
    except _DAMAGED as error:
        archive.unlink()
        raise LabError(
            f"{label}: the archive is damaged or not what it should be ({error}); it was deleted, {AGAIN}"
        ) from error
