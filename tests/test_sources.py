"""Fetching by the real clients against loopback servers: whole, cut, silent, refused, damaged, full, hostile."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kagglesdk import kaggle_env
from PIL import Image
from servers import Fault, Server, goog_hash, serve

from config import Config
from core.errors import LabError
from dataset import prepare_data
from sources import archives, downloads
from sources import fetch as sources_fetch

ROOT = Path(__file__).resolve().parent.parent
FLICKR = ROOT.parent / "shared" / "flickr8k"
HANDLE = "adityajn105/flickr8k"
PICTURES = 12


# ---- what is served


def pictures() -> dict[str, bytes]:
    """A few JPEGs: of Flickr8k where it lies beside the repository, else noise."""
    files = sorted((FLICKR / "Images").glob("*.jpg"))[:PICTURES] if FLICKR.is_dir() else []
    if files:
        return {file.name: file.read_bytes() for file in files}
    noise = np.random.default_rng(0)
    made = {}
    for number in range(PICTURES):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(
            buffer, "JPEG", quality=95
        )
        made[f"{number}.jpg"] = buffer.getvalue()
    return made


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_file(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, content


FLICKR_FILES = {
    **{f"Images/{name}": content for name, content in pictures().items()},
    "captions.txt": b"image,caption\n" + b"".join(f"{n},a dog .\n".encode() for n in pictures()),
}
ARCHIVE = zipped(FLICKR_FILES)
SIZE = len(ARCHIVE)


def small(part: sources_fetch.Part, archive: bytes, **expects: int) -> sources_fetch.Part:
    return replace(part, download_bytes=len(archive), unpacked_bytes=2 * len(archive), expects=expects)


@pytest.fixture
def server() -> Iterator[Server]:
    """Where the archives lie: Kaggle's redirect leads here."""
    with serve() as started:
        started.files["/storage/archive.zip"] = ARCHIVE
        yield started


@pytest.fixture
def kaggle(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Kaggle's API, which kagglehub's client is pointed at; nobody's own credentials or cache are seen."""
    for name in (
        "KAGGLE_API_TOKEN",
        "KAGGLE_USERNAME",
        "KAGGLE_KEY",
        "TBE_RUNTIME_ADDR",
        "KAGGLE_KERNEL_RUN_TYPE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home" / ".kaggle"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.setattr(downloads, "RETRY_WAIT", 0.001)
    monkeypatch.setattr(downloads, "TRIES", 3)
    part = small(sources_fetch.SOURCES["flickr8k"].parts["images"], ARCHIVE, **{"Images/*.jpg": PICTURES})
    monkeypatch.setitem(sources_fetch.SOURCES, "flickr8k", sources_fetch.Source({"images": part}))
    with serve() as started:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, started.url)
        started.archives[HANDLE] = f"{server.url}/storage/archive.zip"
        yield started


def fetch(tmp_path: Path, name: str = "flickr8k", timeout: float = 5, **options: bool) -> Path:
    return sources_fetch.fetch(name, tmp_path / "data", timeout=timeout, progress=False, **options)


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != sources_fetch.MARKER)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refused(tmp_path: Path, **options: float) -> str:
    with pytest.raises(LabError) as caught:
        fetch(tmp_path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- a whole fetch


def test_fetch_brings_the_set_and_then_asks_nobody(kaggle: Server, server: Server, tmp_path: Path) -> None:
    folder = fetch(tmp_path)
    assert folder == tmp_path / "data" / "flickr8k"
    assert contents(folder) == FLICKR_FILES
    assert [request.path.rpartition("/")[2] for request in kaggle.requests] == [
        "GetDataset",
        "DownloadDataset",
    ]
    assert [(request.method, request.sent) for request in server.requests] == [("GET", SIZE)]
    record = json.loads((folder / sources_fetch.MARKER).read_text())["images"]
    assert record["files"] == {name: len(content) for name, content in FLICKR_FILES.items()}
    assert not (tmp_path / "data" / sources_fetch.WORK / "flickr8k").exists()
    fetch(tmp_path)
    assert len(kaggle.requests) + len(server.requests) == 3


def test_fetch_says_what_it_takes(kaggle: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sources_fetch.fetch("flickr8k", tmp_path / "data", timeout=5)
    told = capsys.readouterr().out
    assert f"flickr8k: about {downloads.human_size(SIZE)} to download and" in told
    assert "free in" in told


def test_a_lost_file_is_fetched_again(kaggle: Server, server: Server, tmp_path: Path) -> None:
    folder = fetch(tmp_path)
    next(folder.glob("Images/*.jpg")).unlink()
    (folder / "captions.txt").write_text("cut")
    fetch(tmp_path)
    assert contents(folder) == FLICKR_FILES
    assert len(server.requests) == 2


def test_files_put_there_by_hand_are_taken(kaggle: Server, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "flickr8k"
    for name, content in FLICKR_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert fetch(tmp_path) == folder
    assert kaggle.requests == server.requests == []


def test_too_small_a_disk_is_told_before_the_first_byte(
    kaggle: Server, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = replace(
        sources_fetch.SOURCES["flickr8k"].parts["images"], download_bytes=4e15, unpacked_bytes=5e15
    )
    monkeypatch.setitem(sources_fetch.SOURCES, "flickr8k", sources_fetch.Source({"images": part}))
    assert "flickr8k needs 9000000.0 GB and" in refused(tmp_path)
    assert kaggle.requests == server.requests == []


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="did you mean 'flickr8k'"):
        fetch(tmp_path, "flicker8k")
    with pytest.raises(LabError, match="cifar100 has no Karpathy split"):
        fetch(tmp_path, "cifar100", karpathy=True)
    (tmp_path / "data").write_text("a file")
    with pytest.raises(LabError, match=r"cannot write in .*set data_dir to another folder"):
        fetch(tmp_path, "cifar100")


# ---- interruptions


def test_a_cut_connection_is_resumed(kaggle: Server, server: Server, tmp_path: Path) -> None:
    half = SIZE // 2
    server.faults["/storage"] = [Fault(after=half, cut=True)]
    assert contents(fetch(tmp_path)) == FLICKR_FILES
    assert [request.range for request in server.requests] == ["", f"bytes={half}-"]
    assert [request.sent for request in server.requests] == [half, SIZE - half]


def test_a_connection_that_is_cut_every_time(kaggle: Server, server: Server, tmp_path: Path) -> None:
    server.faults["/storage"] = [Fault(after=1000, cut=True) for _ in range(downloads.TRIES)]
    message = refused(tmp_path)
    assert "Kaggle cuts the connection, 3 times in a row" in message
    assert "run the same call again (3.0 kB are there already)" in message
    assert contents(fetch(tmp_path)) == FLICKR_FILES
    assert server.requests[-1].range == "bytes=3000-"
    assert sum(request.sent for request in server.requests) == SIZE


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("shorter", [True, False])
def test_another_file_on_the_server_is_not_joined(
    kaggle: Server, server: Server, tmp_path: Path, if_range: bool, shorter: bool
) -> None:
    first = next(iter(FLICKR_FILES))
    new = {**FLICKR_FILES, first: bytes(len(FLICKR_FILES[first]))}  # as long as before, but for `shorter`
    if shorter:
        new |= {name: b"jpeg" for name in FLICKR_FILES if name.startswith("Images/")}

    def change() -> None:
        server.files["/storage/archive.zip"] = zipped(new)

    server.if_range = if_range
    server.faults["/storage"] = [Fault(after=SIZE // 2, cut=True, call=change)]
    assert contents(fetch(tmp_path)) == new
    assert server.requests[1].range == f"bytes={SIZE // 2}-"


def test_a_server_without_ranges_starts_over(kaggle: Server, server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.faults["/storage"] = [Fault(after=SIZE // 2, cut=True)]
    assert contents(fetch(tmp_path)) == FLICKR_FILES
    assert [request.sent for request in server.requests] == [SIZE // 2, SIZE]


@pytest.mark.parametrize(
    ("place", "after"),
    [("GetDataset", 0), ("GetDataset", 10), ("DownloadDataset", 0), ("/storage", 0), ("/storage", 1000)],
)
def test_a_silent_server(
    kaggle: Server, server: Server, tmp_path: Path, place: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "TRIES", 2)
    for one in (kaggle, server):
        one.faults[place] = [Fault(after=after, silent=True) for _ in range(2)]
    message = refused(tmp_path, timeout=0.2)  # a client without a time-out would wait for ever
    assert "Kaggle sends nothing for 0.2 s, 2 times in a row; check the network or wait" in message
    assert contents(fetch(tmp_path)) == FLICKR_FILES


def test_a_server_that_is_not_there(kaggle: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    assert "Kaggle cannot be reached, 3 times in a row" in refused(tmp_path)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from kagglesdk import kaggle_env
from sources import fetch
kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = {api!r}
part = fetch.SOURCES["flickr8k"].parts["images"]
part = replace(part, download_bytes=1, unpacked_bytes={size}, expects={{"Images/*.jpg": {pictures}}})
fetch.SOURCES["flickr8k"] = fetch.Source({{"images": part}})
print("fetched", fetch.fetch("flickr8k", {data!r}, timeout=20, progress=False), flush=True)
"""


def start(api: Server, tmp_path: Path) -> subprocess.Popen[str]:
    script = SCRIPT.format(
        root=str(ROOT), api=api.url, size=2 * SIZE, pictures=PICTURES, data=str(tmp_path / "data")
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_a_killed_fetch_goes_on(kaggle: Server, server: Server, tmp_path: Path) -> None:
    part = tmp_path / "data" / sources_fetch.WORK / "flickr8k" / "images.part"
    server.faults["/storage"] = [Fault(after=SIZE - 1000, silent=True)]
    process = start(kaggle, tmp_path)
    try:
        until(lambda: part.exists() and part.stat().st_size >= SIZE - 1000 - downloads.CHUNK)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    there = part.stat().st_size
    assert contents(fetch(tmp_path)) == FLICKR_FILES
    assert server.requests[-1].range == f"bytes={there}-"
    assert server.requests[-1].sent == SIZE - there


def test_a_second_process_waits_and_asks_nobody(kaggle: Server, server: Server, tmp_path: Path) -> None:
    holder = tmp_path / "data" / sources_fetch.WORK / "flickr8k.holder"
    second: list[subprocess.Popen[str]] = []

    def start_second() -> None:  # while the first one holds the lock and waits for its bytes
        second.append(start(kaggle, tmp_path))
        assert second[0].stdout is not None
        said.append(second[0].stdout.readline())

    said: list[str] = []
    server.faults["/storage"] = [Fault(after=1000, call=start_second)]
    first = start(kaggle, tmp_path)
    out, _ = first.communicate(timeout=25)
    rest, _ = second[0].communicate(timeout=25)
    assert out.startswith("fetched"), out
    assert f"flickr8k is being fetched by process {first.pid} on " in said[0]
    assert rest.startswith("fetched"), rest
    assert len(server.requests) == 1
    assert not holder.exists()


def test_killed_while_unpacking_or_moving(
    kaggle: Server, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("_merge", "_record"):
        with monkeypatch.context() as patch:
            patch.setattr(sources_fetch, name, die)
            with pytest.raises(KeyboardInterrupt):
                fetch(tmp_path)
    assert contents(fetch(tmp_path)) == FLICKR_FILES
    assert len(server.requests) == 1


# ---- refusals and damage


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "Kaggle refuses adityajn105/flickr8k (401) without credentials, which public sets do not need"),
        (
            403,
            "KAGGLE_API_TOKEN (or KAGGLE_USERNAME and KAGGLE_KEY), ~/.kaggle/kaggle.json or Colab's secrets",
        ),
        (404, "Kaggle has no set adityajn105/flickr8k (404)"),
        (500, "Kaggle answers with error 500, 3 times in a row; check the network or wait"),
    ],
)
@pytest.mark.parametrize("place", ["GetDataset", "DownloadDataset", "/storage"])
def test_refusals(kaggle: Server, server: Server, tmp_path: Path, status: int, told: str, place: str) -> None:
    for one in (kaggle, server):
        one.faults[place] = [Fault(status=status) for _ in range(downloads.TRIES)]
    assert told in refused(tmp_path)
    kaggle.faults.clear()
    server.faults.clear()
    assert contents(fetch(tmp_path)) == FLICKR_FILES


def test_credentials_are_named_but_neither_shown_nor_passed_on(
    kaggle: Server, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "secret")
    kaggle.faults["GetDataset"] = [Fault(status=403)]
    message = refused(tmp_path)
    assert "(403) with the credentials from KAGGLE_USERNAME and KAGGLE_KEY: public sets need none" in message
    assert "secret" not in message
    fetch(tmp_path)
    assert all("authorization" in request.headers for request in kaggle.requests)
    assert not any("authorization" in request.headers for request in server.requests)


def test_where_credentials_are_found(kaggle: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert downloads.kaggle_credentials() == ""
    file = tmp_path / "home" / ".kaggle" / "kaggle.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"username": "somebody", "key": "secret"}')
    assert downloads.kaggle_credentials() == str(file)
    file.write_text("{")
    assert "kaggle.json is no credentials file; delete it" in refused(tmp_path)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")
    assert downloads.kaggle_credentials() == "KAGGLE_API_TOKEN"


def test_a_bad_checksum_from_the_server(kaggle: Server, server: Server, tmp_path: Path) -> None:
    server.headers["x-goog-hash"] = goog_hash(b"something else")
    message = refused(tmp_path)
    assert "flickr8k images: the download's md5 is" in message
    assert "damaged and was deleted; run the same call again" in message
    server.headers["x-goog-hash"] = goog_hash(ARCHIVE)
    assert contents(fetch(tmp_path)) == FLICKR_FILES
    assert [request.range for request in server.requests] == ["", ""]


def test_a_truncated_archive(kaggle: Server, server: Server, tmp_path: Path) -> None:
    server.files["/storage/archive.zip"] = ARCHIVE[: SIZE // 2]
    assert "damaged or not what it should be (its end is missing); it was deleted" in refused(tmp_path)
    server.files["/storage/archive.zip"] = ARCHIVE
    assert contents(fetch(tmp_path)) == FLICKR_FILES


def test_an_archive_of_something_else(kaggle: Server, server: Server, tmp_path: Path) -> None:
    server.files["/storage/archive.zip"] = zipped(
        {"Images/one.jpg": b"jpeg", "captions.txt": b"image,caption"}
    )
    message = refused(tmp_path)
    assert f"the archive of kaggle://{HANDLE} holds 1 of {PICTURES} files Images/*.jpg" in message
    assert not (tmp_path / "data" / "flickr8k").exists()


# ---- full disks


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_disk_fills_up_during_the_download(kaggle: Server, server: Server, tiny_disk: Path) -> None:
    filler = tiny_disk / "filler"
    part = tiny_disk / "data" / sources_fetch.WORK / "flickr8k" / "images.part"

    def fill() -> None:  # by somebody else, after the space was checked
        until(part.exists)
        free = shutil.disk_usage(tiny_disk).free
        filler.write_bytes(bytes(max(free - 40_000, 0)))

    server.faults["/storage"] = [Fault(after=1000, call=fill)]
    message = refused(tiny_disk)
    assert "flickr8k images: the disk of" in message
    assert "is full; what was downloaded is kept: free some space, then run the same call again" in message
    filler.unlink()
    there = part.stat().st_size
    assert contents(fetch(tiny_disk)) == FLICKR_FILES
    assert server.requests[-1].range == f"bytes={there}-"
    assert 0 < there < SIZE


def test_the_disk_fills_up_while_unpacking(kaggle: Server, server: Server, tiny_disk: Path) -> None:
    swollen = zipped({**FLICKR_FILES, "Images/zero.jpg": bytes(3_000_000)}, zipfile.ZIP_DEFLATED)
    server.files["/storage/archive.zip"] = swollen
    part = sources_fetch.SOURCES["flickr8k"].parts["images"]
    sources_fetch.SOURCES["flickr8k"] = sources_fetch.Source(
        {"images": replace(part, unpacked_bytes=1_600_000)}
    )
    for _ in range(2):
        assert "is full; the archive is kept: free some space" in refused(tiny_disk)
    work = tiny_disk / "data" / sources_fetch.WORK / "flickr8k"
    assert [path.name for path in work.iterdir()] == ["images"]
    assert len(server.requests) == 1


def test_a_write_that_finds_the_disk_full(
    kaggle: Server, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no small disk can be mounted."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_receive", full)
        assert "is full; what was downloaded is kept" in refused(tmp_path)
    assert contents(fetch(tmp_path)) == FLICKR_FILES


# ---- hostile archives


def bomb() -> bytes:
    return zipped({"Images/zeros.jpg": bytes(5_000_000)}, zipfile.ZIP_DEFLATED)


def lying() -> bytes:
    """A bomb whose member states 10 bytes in place of 5,000,000, here and in the central directory."""
    content = bomb()
    return content.replace(struct.pack("<L", 5_000_000), struct.pack("<L", 10))


def zip_link() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("Images")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc")
    return buffer.getvalue()


def encrypted() -> bytes:
    content = bytearray(zipped({"captions.txt": b"image,caption"}))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("captions.txt", "one")
        archive.writestr("./captions.txt", "two")
    return buffer.getvalue()


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "parent": (lambda: zipped({"../evil": b"x"}), "'../evil' leads outside"),
    "inner parent": (lambda: zipped({"Images/../../evil": b"x"}), "leads outside"),
    "absolute": (lambda: zipped({"/nowhere/evil": b"x"}), "leads outside"),
    "backslashes": (lambda: zipped({"..\\evil": b"x"}), "leads outside"),
    "drive": (lambda: zipped({"C:\\evil": b"x"}), "leads outside"),
    "dots that Windows drops": (lambda: zipped({".. /evil": b"x"}), "leads outside"),
    "tar parent": (lambda: tarred(tar_file("../evil", b"x")), "leads outside"),
    "tar absolute": (lambda: tarred(tar_file("/nowhere/evil", b"x")), "leads outside"),
    "zip link": (zip_link, "'Images' is a link"),
    "tar link": (
        lambda: tarred(tar_file("Images", kind=tarfile.SYMTYPE, link="/etc"), tar_file("Images/evil", b"x")),
        "is a link or a device",
    ),
    "tar hard link": (lambda: tarred(tar_file("a", kind=tarfile.LNKTYPE, link="/etc/passwd")), "is a link"),
    "tar device": (lambda: tarred(tar_file("a", kind=tarfile.CHRTYPE)), "is a link or a device"),
    "tar pipe": (lambda: tarred(tar_file("a", kind=tarfile.FIFOTYPE)), "is a link or a device"),
    "bomb": (bomb, "it unpacks to more than twice what it should"),
    "tar long name": (
        lambda: tarred(
            tar_file("././@LongLink", b"a" * 2**21, tarfile.GNUTYPE_LONGNAME), tar_file("a", b"x")
        ),
        r"one of its headers has 2,097,152 bytes, more than 1,048,576",
    ),
    "tar PAX records": (
        lambda: tarred(tar_file("a", b"9 a=bcde\n" * 300_000, tarfile.XHDTYPE), tar_file("a", b"x")),
        r"one of its headers has 2,700,000 bytes",
    ),
    "tar header after header": (
        lambda: tarred(*[tar_file("././@LongLink", b"a\0", tarfile.GNUTYPE_LONGNAME)] * 2000),
        "recursion",
    ),
    "tar sparse": (lambda: tarred(tar_file("a", kind=tarfile.GNUTYPE_SPARSE)), "is a sparse file"),
    "tar bomb": (
        lambda: tarred(tar_file("a", bytes(5_000_000))),
        "it unpacks to more than twice what it should",
    ),
    "lying bomb": (lying, "Bad CRC-32"),
    "password": (encrypted, "asks for a password"),
    "one name twice": (twice, "two of its members are called"),
    "a file as a folder": (lambda: zipped({"a": b"x", "a/b": b"y"}), "two of its members are called"),
    "cut zip": (lambda: ARCHIVE[:-30], "its end is missing"),
    "cut tar": (
        lambda: tarred(tar_file("a", random.Random(0).randbytes(9000)))[:5000],
        "end",
    ),
    "damaged zip": (lambda: zipped({"a": b"good"}).replace(b"good", b"evil"), "Bad CRC-32"),
    "web page": (lambda: b"<!DOCTYPE html><html>log in</html>", "begins with b'<!DOCTYPE html><'"),
    "nothing": (lambda: b"", "begins with b''"),
}


def unpack(content: bytes, tmp_path: Path) -> dict[str, int]:
    archive = tmp_path / "inner" / "archive"
    archive.parent.mkdir(exist_ok=True)
    archive.write_bytes(content)
    return archives.unpack(archive, tmp_path / "inner" / "out", unpacked_bytes=100_000, progress=False)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(name: str, tmp_path: Path) -> None:
    make, told = HOSTILE[name]
    with pytest.raises(LabError, match=r"damaged or not what it should be .*it was deleted") as caught:
        unpack(make(), tmp_path)
    assert told in str(caught.value)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["inner"]
    assert not Path("/nowhere").exists()


def test_random_damage_is_always_told_as_such(tmp_path: Path) -> None:
    good = {"a/1": random.Random(0).randbytes(700), "a/2": bytes(900), "b": b"text" * 50}
    makes = [
        zipped(good, zipfile.ZIP_DEFLATED),
        tarred(*(tar_file(name, content) for name, content in good.items())),
    ]
    dice = random.Random(1)
    outcomes = {"refused": 0, "unpacked": 0}
    for number in range(150):
        content = bytearray(makes[number % 2])
        for _ in range(dice.randint(1, 4)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        try:
            unpack(bytes(content), tmp_path)
            outcomes["unpacked"] += 1
        except LabError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 75
    assert {path.name for path in tmp_path.iterdir()} == {"inner"}


def test_what_is_kept_of_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    picture = pictures().popitem()[1]
    archive.write_bytes(
        zipped(
            {
                "set/results.csv": b"csv",
                "set/images/images/1.jpg": picture,
                "set/images/1.jpg": picture,
                "set/images/images/2.jpg": picture,
                "set/labels/1.txt": b"0",
            }
        )
    )
    files = archives.unpack(
        archive,
        tmp_path / "out",
        unpacked_bytes=1e6,
        keep=("images/*", "results.csv"),
        prefix="set/",
        skip_copies=True,
        progress=False,
    )
    assert files == {"results.csv": 3, "images/1.jpg": len(picture), "images/images/2.jpg": len(picture)}
    assert contents(tmp_path / "out").keys() == files.keys()
    assert archive.exists()


# ---- the sets


def test_the_table_of_sets() -> None:
    import core.devices  # noqa: F401  before torchvision

    from torchvision.datasets import CIFAR100

    cifar = sources_fetch.SOURCES["cifar100"].parts["images"]
    assert (cifar.url, cifar.checksum) == (CIFAR100.url, f"md5:{CIFAR100.tgz_md5}")
    urls = {name: source.parts["images"].url for name, source in sources_fetch.SOURCES.items()}
    assert urls["coco2014"] == "kaggle://jeffaudi/coco-2014-dataset-for-yolov3"
    assert urls["coco2017"] == "http://images.cocodataset.org/zips/train2017.zip"
    assert urls["flickr30k"] == "kaggle://hsankesara/flickr-image-dataset"
    assert urls["flickr8k"] == "kaggle://adityajn105/flickr8k"


def coco_files() -> dict[str, bytes]:
    made = {
        f"images/train2014/COCO_train2014_{n:012d}.jpg": data for n, data in enumerate(pictures().values())
    }
    return {**made, "images/val2014/COCO_val2014_000000000099.jpg": b"jpeg"}


@pytest.fixture
def coco(kaggle: Server, server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small COCO on the servers, as the real ones lay it out; what should be on disk afterwards."""
    captions = {f"annotations/captions_{split}2014.json": split.encode() for split in ("train", "val")}
    kaggle_files = {f"coco2014/{name}": content for name, content in coco_files().items()}
    kaggle_files["coco2014/annotations/instances_val2014.json"] = b"boxes"
    files = {
        "images": zipped(kaggle_files),
        "captions": zipped({**captions, "annotations/instances_val2014.json": b"boxes"}),
        "karpathy": zipped({"dataset_coco.json": b"split", "dataset_flickr8k.json": b"other"}),
    }
    server.files |= {f"/{name}.zip": content for name, content in files.items()}
    kaggle.archives["jeffaudi/coco-2014-dataset-for-yolov3"] = f"{server.url}/images.zip"
    real = sources_fetch.SOURCES["coco2014"]
    assert real.karpathy is not None
    captions_part, images_part, karpathy_part = (
        replace(part, download_bytes=1, unpacked_bytes=1e6)
        for part in (real.parts["captions"], real.parts["images"], real.karpathy)
    )
    digest = hashlib.sha256(files["captions"]).hexdigest()
    parts = {
        "captions": replace(captions_part, url=f"{server.url}/captions.zip", checksum=f"sha256:{digest}"),
        "images": replace(images_part, expects=dict.fromkeys(images_part.expects, 1)),
    }
    karpathy = replace(karpathy_part, url=f"{server.url}/karpathy.zip")
    monkeypatch.setitem(sources_fetch.SOURCES, "coco2014", sources_fetch.Source(parts, karpathy))
    return {**coco_files(), **captions}


def test_coco_comes_from_two_servers(coco: dict[str, bytes], server: Server, tmp_path: Path) -> None:
    server.faults["/captions.zip"] = [Fault(after=100, cut=True)]
    folder = fetch(tmp_path, "coco2014")
    assert contents(folder) == coco
    assert [request.range for request in server.asked("/captions.zip")] == ["", "bytes=100-"]
    fetch(tmp_path, "coco2014", karpathy=True)
    assert contents(folder) == {**coco, "dataset_coco.json": b"split"}
    assert [len(server.asked(f"/{part}.zip")) for part in ("captions", "images", "karpathy")] == [2, 1, 1]


def test_only_the_part_that_failed_is_fetched_again(
    coco: dict[str, bytes], server: Server, kaggle: Server, tmp_path: Path
) -> None:
    kaggle.faults["GetDataset"] = [Fault(status=404)]
    with pytest.raises(LabError, match="Kaggle has no set jeffaudi/coco-2014-dataset-for-yolov3"):
        fetch(tmp_path, "coco2014")
    assert contents(fetch(tmp_path, "coco2014")) == coco
    assert len(server.asked("/captions.zip")) == 1


def test_the_notebook_and_train_resume_an_interrupted_fetch(
    coco: dict[str, bytes], server: Server, kaggle: Server, tmp_path: Path
) -> None:
    config = Config(data_dir=tmp_path / "data" / "coco2014", source=None)
    kaggle.faults["GetDataset"] = [Fault(status=404)]
    with pytest.raises(LabError, match="Kaggle has no set"):
        fetch(tmp_path, "coco2014")
    assert contents(config.data_dir) == {name: coco[name] for name in coco if "captions" in name}
    assert contents(prepare_data(config)) == coco  # not "none of the images listed exists"
    (config.data_dir / "annotations" / "captions_val2014.json").write_bytes(b"corrected by hand")
    (config.data_dir / "images/val2014/COCO_val2014_000000000099.jpg").unlink()
    before = contents(config.data_dir)
    asked = len(server.requests) + len(kaggle.requests)
    assert contents(prepare_data(config)) == before
    assert len(server.requests) + len(kaggle.requests) == asked


def test_a_set_put_there_by_hand_is_not_fetched(kaggle: Server, server: Server, tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path / "data" / "flickr8k", source="flickr8k")
    config.data_dir.mkdir(parents=True)
    (config.data_dir / "a.jpg").write_bytes(b"jpeg")
    assert contents(prepare_data(config)) == {"a.jpg": b"jpeg"}
    assert server.requests == kaggle.requests == []


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (403, "the server refuses http://127.0.0.1:"),
        (404, "/captions.zip does not exist any more (404)"),
        (500, "coco2014 captions: 127.0.0.1 answers with error 500, 3 times in a row"),
    ],
)
def test_refusals_of_a_plain_server(
    coco: dict[str, bytes], server: Server, tmp_path: Path, status: int, told: str
) -> None:
    server.faults["/captions.zip"] = [Fault(status=status) for _ in range(downloads.TRIES)]
    with pytest.raises(LabError) as caught:
        fetch(tmp_path, "coco2014")
    assert told in str(caught.value)


def test_a_bad_checksum_of_a_plain_server(coco: dict[str, bytes], server: Server, tmp_path: Path) -> None:
    server.files["/captions.zip"] += b"more"
    with pytest.raises(LabError, match=r"coco2014 captions: the download's sha256 is .* was deleted"):
        fetch(tmp_path, "coco2014")


def test_what_kagglehub_has_already_is_linked(
    coco: dict[str, bytes], server: Server, kaggle: Server, tmp_path: Path
) -> None:
    have = tmp_path / "kagglehub" / "datasets" / "jeffaudi" / "coco-2014-dataset-for-yolov3"
    for name, content in coco_files().items():
        file = have / "versions" / "4" / "coco2014" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (have / "4.complete").touch()
    folder = fetch(tmp_path, "coco2014")
    assert (folder / "images").resolve() == have / "versions" / "4" / "coco2014" / "images"
    assert sources_fetch.is_linked(folder)
    assert {name: (folder / name).read_bytes() for name in coco} == coco
    assert not server.asked("/images.zip")
    assert kaggle.requests == []
    shutil.rmtree(have)
    assert contents(fetch(tmp_path, "coco2014")) == coco
    assert not sources_fetch.is_linked(folder)


def test_a_mount_of_colab_is_linked(
    kaggle: Server, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = tmp_path / "mount"
    for name, content in FLICKR_FILES.items():
        (mount / "flickr8k" / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / "flickr8k" / name).write_bytes(content)
    for path in ("is_supported", "mount"):
        server.files[f"/kagglehub/datasets/{path}"] = b'{"slug": "flickr8k"}'
    monkeypatch.setenv("TBE_RUNTIME_ADDR", server.url.removeprefix("http://"))
    monkeypatch.setenv("COLAB_CACHE_MOUNT_FOLDER", str(mount))
    folder = fetch(tmp_path)
    assert {name: (folder / name).read_bytes() for name in FLICKR_FILES} == FLICKR_FILES
    assert not server.asked("/storage")
    server.requests.clear()
    fetch(tmp_path)
    assert server.requests == []


def test_torchvision_reads_what_was_fetched(
    kaggle: Server, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import core.devices  # noqa: F401  before torchvision

    from torchvision.datasets import CIFAR100

    rows = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    batch = pickle.dumps({"data": rows, "fine_labels": [3, 1], "coarse_labels": [0, 0]})
    meta = pickle.dumps({"fine_label_names": ["apple", "baby", "bed", "bee"]})
    content = tarred(
        *(
            tar_file(f"cifar-100-python/{n}", meta if n == "meta" else batch)
            for n in ("train", "test", "meta")
        )
    )
    server.files["/cifar.tar.gz"] = content
    part = replace(
        sources_fetch.SOURCES["cifar100"].parts["images"],
        url=f"{server.url}/cifar.tar.gz",
        checksum=f"md5:{hashlib.md5(content).hexdigest()}",
        download_bytes=len(content),
        unpacked_bytes=20_000,
    )
    monkeypatch.setitem(sources_fetch.SOURCES, "cifar100", sources_fetch.Source({"images": part}))

    class Small(CIFAR100):
        train_list, test_list = [["train", None]], [["test", None]]
        meta = {"filename": "meta", "key": "fine_label_names", "md5": None}  # noqa: RUF012

    read = Small(fetch(tmp_path, "cifar100"), train=False)
    assert read.targets == [3, 1]
    assert (read.data == rows.reshape(2, 3, 32, 32).transpose(0, 2, 3, 1)).all()
