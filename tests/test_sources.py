"""Data sets are downloaded with the real clients from loopback servers that cut, refuse, damage and fill the disk."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kagglesdk import kaggle_env
from servers import Fault, Server, goog_hash, serve
from small_disk import resize, small_disk

from config import Config
from core.errors import LabError
from dataset import prepare_data
from interface import cli
from sources import fetch as sources_fetch
from sources.fetch import SOURCES, Part, fetch, is_interrupted, is_linked

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 12
MIB = 2**20  # kagglehub and a cut: what is downloaded in whole MiB is kept


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


noise = random.Random(0)
FLICKR = {f"Images/{number}.jpg": noise.randbytes(200_000) for number in range(IMAGES)}
FLICKR["captions.txt"] = b"image,caption\n" + b"".join(b"%d.jpg,a dog .\n" % n for n in range(IMAGES))
ARCHIVE = zipped(FLICKR)
SIZE = len(ARCHIVE)
COCO_IMAGES = {
    "images/train2014/COCO_train2014_000000000001.jpg": noise.randbytes(300_000),
    "images/val2014/COCO_val2014_000000000099.jpg": b"jpeg",
}
COCO_CAPTIONS = {
    f"annotations/captions_{split}2014.json": noise.randbytes(300_000) for split in ("train", "val")
}
COCO = COCO_IMAGES | COCO_CAPTIONS


def small(part: Part, archive: bytes, url: str = "") -> Part:
    """A part of the table with the sizes, and for a plain server the address and checksum, of a test's archive."""
    part = replace(part, num_bytes=len(archive))
    part = replace(part, expects={pattern: min(count, 1) for pattern, count in part.expects.items()})
    return replace(part, url=url, checksum=f"md5:{hashlib.md5(archive).hexdigest()}") if url else part


@pytest.fixture
def server() -> Iterator[Server]:
    """The server that has the archives."""
    with serve() as started:
        yield started


@pytest.fixture
def kaggle(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Kaggle's API, which redirects to `server`; no credentials and no cache of the machine are used."""
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", *sources_fetch.MOUNTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home" / ".kaggle"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kagglehub"))
    monkeypatch.setattr(sources_fetch, "RETRY_WAITS", (0.0, 0.0))
    flickr = replace(small(SOURCES["flickr8k"]["images"], ARCHIVE), expects={"Images/*.jpg": IMAGES})
    monkeypatch.setitem(SOURCES, "flickr8k", {"images": flickr})
    files = {
        "flickr.zip": ARCHIVE,
        "coco.zip": zipped({f"coco2014/{name}": content for name, content in COCO_IMAGES.items()}),
        "captions.zip": zipped({**COCO_CAPTIONS, "annotations/instances_val2014.json": b"boxes"}),
        "karpathy.zip": zipped({"dataset_coco.json": b"split", "dataset_flickr8k.json": b"other"}),
    }
    server.files |= {f"/{name}": content for name, content in files.items()}
    archives = {"captions": "captions.zip", "images": "coco.zip", "karpathy": "karpathy.zip"}
    coco = {
        key: small(SOURCES["coco2014"][key], files[name], "" if key == "images" else f"{server.url}/{name}")
        for key, name in archives.items()
    }
    monkeypatch.setitem(SOURCES, "coco2014", coco)
    with serve() as started:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, started.url)
        started.archives["adityajn105/flickr8k"] = f"{server.url}/flickr.zip"
        started.archives["jeffaudi/coco-2014-dataset-for-yolov3"] = f"{server.url}/coco.zip"
        yield started


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def contents(folder: Path) -> dict[str, bytes]:
    names = sources_fetch._file_names(folder)
    return {name: (folder / name).read_bytes() for name in names if name != sources_fetch.MARKER}


def refused(data: Path, name: str = "flickr8k") -> str:
    with pytest.raises(LabError) as caught:
        fetch(name, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- complete downloads


def test_a_kaggle_set_is_linked_and_then_no_request_is_made(kaggle, server, data):
    folder = fetch("flickr8k", data)
    assert folder == data / "flickr8k"
    assert contents(folder) == FLICKR
    copy = data.parent / "kagglehub" / "datasets" / "adityajn105" / "flickr8k" / "versions" / "1"
    assert (folder / "Images").resolve() == copy / "Images"
    assert is_linked(folder)
    assert not is_interrupted(folder)
    (folder / "captions.txt").write_bytes(b"corrected by hand")
    assert (copy / "captions.txt").read_bytes() == FLICKR["captions.txt"]
    fetch("flickr8k", data)
    assert (folder / "captions.txt").read_bytes() == b"corrected by hand"
    assert len(kaggle.requests) == len(server.requests) == 1
    fetch("flickr8k", data.parent / "other")  # a second folder links to the same copy
    assert len(kaggle.requests) == len(server.requests) == 1


def test_a_lost_copy_of_kagglehub_is_downloaded_again(kaggle, server, data):
    folder = fetch("flickr8k", data)
    shutil.rmtree(data.parent / "kagglehub")
    assert contents(fetch("flickr8k", data)) == FLICKR
    shutil.rmtree(folder)
    assert contents(fetch("flickr8k", data)) == FLICKR
    assert len(server.requests) == 2


def test_a_disk_without_links_has_a_copy(kaggle, data, monkeypatch):
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError("no links")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    folder = fetch("flickr8k", data)
    assert contents(folder) == FLICKR
    assert not is_linked(folder)
    assert not (folder / "Images").is_symlink()


def test_coco_comes_from_two_servers(kaggle, server, data):
    server.faults["/captions.zip"] = [Fault(after=400_000, cut=True)]
    folder = fetch("coco2014", data)
    assert contents(folder) == COCO
    _, second = server.asked("/captions.zip")
    assert second.range == f"bytes={400_000 // 2**16 * 2**16}-"
    fetch("coco2014", data, karpathy=True)
    assert contents(folder) == {**COCO, "dataset_coco.json": b"split"}
    assert [len(server.asked(f"/{name}.zip")) for name in ("captions", "coco", "karpathy")] == [2, 1, 1]
    assert not (data / sources_fetch.WORK / "coco2014").exists()


def test_the_command_line(kaggle, data, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dataset.py", "fetch", "flickr8k", "--data_dir", str(data)])
    cli.dataset()
    printed = capsys.readouterr().out
    assert (
        f"flickr8k: a download of {SIZE / 1e9:.2f} GB; needs {2 * SIZE / 1e9:.2f} GB in {data.parent}"
        in printed
    )
    assert printed.endswith(f"{data / 'flickr8k'}\n")


def test_a_mount_of_colab_is_linked(kaggle, server, data, monkeypatch):
    for name, content in FLICKR.items():
        file = data.parent / "mount" / "flickr8k" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    for path in ("is_supported", "mount"):
        server.files[f"/kagglehub/datasets/{path}"] = b'{"slug": "flickr8k"}'
    monkeypatch.setenv("TBE_RUNTIME_ADDR", server.url.removeprefix("http://"))
    monkeypatch.setenv("COLAB_CACHE_MOUNT_FOLDER", str(data.parent / "mount"))
    assert contents(fetch("flickr8k", data)) == FLICKR
    assert not server.asked(".zip")


def test_a_set_added_to_a_kaggle_notebook_is_linked(kaggle, server, data, monkeypatch):
    monkeypatch.setattr("sources.fetch.KAGGLE_INPUT", data.parent / "input")
    for name, content in FLICKR.items():
        file = data.parent / "input" / "flickr8k" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert contents(fetch("flickr8k", data)) == FLICKR
    assert kaggle.requests == []


def test_a_tar_file_is_unpacked(kaggle, server, data, monkeypatch):
    import core.devices  # noqa: F401  before torchvision

    from torchvision.datasets import CIFAR100

    part = SOURCES["cifar100"]["images"]
    assert (part.url, part.checksum) == (CIFAR100.url, f"md5:{CIFAR100.tgz_md5}")
    files = {f"cifar-100-python/{name}": name.encode() for name in ("train", "test", "meta")}
    server.files["/cifar.tar.gz"] = tarred(files)
    part = small(part, server.files["/cifar.tar.gz"], f"{server.url}/cifar.tar.gz")
    monkeypatch.setitem(SOURCES, "cifar100", {"images": part})
    assert contents(fetch("cifar100", data)) == files


# ---- files of the user


def test_a_set_put_there_by_hand_is_kept(kaggle, server, data):
    config = Config(data_dir=data / "flickr8k", source="flickr8k", reader="flickr8k")
    (config.data_dir / "Images").mkdir(parents=True)
    (config.data_dir / "Images" / "a.jpg").write_bytes(b"jpeg")
    assert contents(prepare_data(config)) == {"Images/a.jpg": b"jpeg"}
    assert "Images is incomplete; complete it by hand, or move it and fetch again" in refused(data)
    for name, content in FLICKR.items():
        (config.data_dir / name).write_bytes(content)
    fetch("flickr8k", data)
    assert contents(config.data_dir) == {**FLICKR, "Images/a.jpg": b"jpeg"}
    assert server.requests == kaggle.requests == []


def test_the_notebook_and_train_resume_an_interrupted_fetch(kaggle, server, data):
    config = Config(data_dir=data / "coco2014", source=None)
    kaggle.faults["DownloadDataset"] = [Fault(status=404)]
    assert "coco2014 images: Kaggle answers kaggle://jeffaudi/" in refused(data, "coco2014")
    captions = config.data_dir / "annotations" / "captions_val2014.json"
    captions.write_bytes(b"corrected by hand")
    assert is_interrupted(config.data_dir)
    assert contents(prepare_data(config)) == {
        **COCO,
        "annotations/captions_val2014.json": b"corrected by hand",
    }
    captions.unlink()
    requests = len(server.requests) + len(kaggle.requests)
    prepare_data(config)  # a finished set is the user's
    assert len(server.requests) + len(kaggle.requests) == requests
    assert contents(fetch("coco2014", data)) == COCO


# ---- interruptions


def test_a_cut_connection_is_resumed(kaggle, server, data):
    server.faults["/flickr.zip"] = [Fault(after=MIB + 1000, cut=True)]
    assert contents(fetch("flickr8k", data)) == FLICKR
    assert server.requests[-1].range == f"bytes={MIB}-"
    assert server.requests[-1].sent == SIZE - MIB


def test_a_connection_that_is_always_cut(kaggle, server, data):
    server.faults["/flickr.zip"] = [Fault(after=1000, cut=True) for _ in range(5)]  # two requests per resume
    assert "the connection to Kaggle failed 3 times; check the network" in refused(data)
    assert contents(fetch("flickr8k", data)) == FLICKR


def test_another_file_on_the_server(kaggle, server, data):
    captions = server.files["/captions.zip"]
    server.files["/captions.zip"] = captions[:100]
    partial = data / sources_fetch.WORK / "coco2014" / "captions.part"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(captions[:200])
    assert "with error 416; the unfinished download was deleted, run the same call again" in refused(
        data, "coco2014"
    )
    server.files["/captions.zip"] = captions
    assert contents(fetch("coco2014", data)) == COCO


@pytest.mark.parametrize("name", ["flickr8k", "coco2014"])
def test_no_network(kaggle, data, monkeypatch, name):
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    captions = replace(SOURCES["coco2014"]["captions"], url="http://127.0.0.1:9/captions.zip")
    monkeypatch.setitem(SOURCES["coco2014"], "captions", captions)
    server = "Kaggle" if name == "flickr8k" else "127.0.0.1"
    assert f"the connection to {server} failed 3 times; check the network and run the same call" in refused(
        data, name
    )


def test_a_silent_server(kaggle, server, data, monkeypatch):
    monkeypatch.setattr(sources_fetch, "TIMEOUT", 0.2)
    server.faults["/captions.zip"] = [Fault(after=100_000, silent=True)] * 3
    assert "the connection to 127.0.0.1 failed 3 times" in refused(data, "coco2014")
    assert contents(fetch("coco2014", data)) == COCO


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from kagglesdk import kaggle_env
from sources.fetch import SOURCES, fetch
kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = {api!r}
part = replace(SOURCES["flickr8k"]["images"], num_bytes=1, expects={{"Images/*.jpg": 1}})
SOURCES["flickr8k"] = {{"images": part}}
print("fetched", fetch("flickr8k", {data!r}), flush=True)
"""


def start(api: Server, data: Path) -> subprocess.Popen[str]:
    script = SCRIPT.format(root=str(ROOT), api=api.url, data=str(data))
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until(condition: Callable[[], bool], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not reached"
        time.sleep(0.01)


def test_a_killed_download_is_resumed(kaggle, server, data):
    archive = SOURCES["flickr8k"]["images"].kaggle_archive
    server.faults["/flickr.zip"] = [Fault(after=2 * MIB, silent=True)]
    process = start(kaggle, data)
    try:
        until(lambda: archive.exists() and archive.stat().st_size >= MIB)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    assert not (data / "flickr8k").exists()
    downloaded = archive.stat().st_size
    assert contents(fetch("flickr8k", data)) == FLICKR
    assert server.requests[-1].range == f"bytes={downloaded}-"


@pytest.mark.parametrize("other", ["data", "other"])
def test_a_second_process_waits(kaggle, server, data, other):
    second: list[subprocess.Popen[str]] = []
    lines: list[str] = []

    def start_second() -> None:  # while the first process waits for its bytes
        second.append(start(kaggle, data.parent / other))
        assert second[0].stdout is not None
        while not any("waiting" in line for line in lines):
            lines.append(second[0].stdout.readline())

    server.faults["/flickr.zip"] = [Fault(after=1000, call=start_second)]
    first = start(kaggle, data)
    output, _ = first.communicate(timeout=50)
    rest, _ = second[0].communicate(timeout=50)
    assert "fetched" in output, output
    assert "is being downloaded by another process; waiting for it to finish" in lines[-1]
    assert "fetched" in rest, rest
    assert len(server.requests) == 1


@pytest.mark.parametrize("step", ["_unpack", "_place", "write_text"])
def test_an_interrupt_while_files_are_placed(kaggle, server, data, monkeypatch, step):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources_fetch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch("coco2014", data)
    assert is_interrupted(data / "coco2014")
    assert contents(fetch("coco2014", data)) == COCO
    assert len(server.requests) == 2


def test_a_half_written_file_is_not_taken_for_complete(kaggle, data, monkeypatch):
    def cut(source: str, target: str) -> None:
        if Path(target).suffix == ".json":
            Path(target).write_bytes(b"half")
            raise KeyboardInterrupt
        shutil.move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            fetch("coco2014", data)
    assert contents(fetch("coco2014", data)) == COCO


# ---- refusals and damage


@pytest.mark.parametrize("place", ["DownloadDataset", "/flickr.zip", "/captions.zip"])
@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "public sets need no account: check the credentials in KAGGLE_API_TOKEN"),
        (403, "public sets need no account: check the credentials in KAGGLE_API_TOKEN"),
        (404, "download the files by hand"),
        (500, "try again later"),
    ],
)
def test_error_status(kaggle, server, data, status, advice, place):
    name = "coco2014" if place == "/captions.zip" else "flickr8k"
    for one in (kaggle, server):
        one.faults[place] = [Fault(status=status)]
    host, url = (
        ("Kaggle", "kaggle://adityajn105/") if name == "flickr8k" else ("127.0.0.1", "http://127.0.0.1:")
    )
    message = refused(data, name)
    assert message.startswith(f"{name} {'images' if host == 'Kaggle' else 'captions'}: {host} answers {url}")
    assert message.partition("with ")[2].startswith(f"error {status}; {advice}")
    assert contents(fetch(name, data)) == (FLICKR if name == "flickr8k" else COCO)


def test_credentials(kaggle, server, data, monkeypatch):
    file = data.parent / "home" / ".kaggle" / "kaggle.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    monkeypatch.setattr("kagglehub.config.DEFAULT_KAGGLE_CREDENTIALS_FOLDER", str(file.parent))
    assert f"{file}; delete that file, public sets need no account" in refused(data)
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "secret")
    kaggle.faults["DownloadDataset"] = [Fault(status=403)]
    assert "secret" not in refused(data)
    fetch("flickr8k", data)
    assert all("authorization" in request.headers for request in kaggle.requests)
    assert not any("authorization" in request.headers for request in server.requests)


def test_credentials_beside_the_notebook(kaggle, server, data, monkeypatch):
    monkeypatch.delenv("KAGGLE_CONFIG_DIR", raising=False)
    monkeypatch.chdir(data.parent)
    (data.parent / "kaggle.json").write_text('{"username": "somebody", "key": "secret"}')
    fetch("flickr8k", data)
    assert all("authorization" in request.headers for request in kaggle.requests)
    monkeypatch.delenv("KAGGLE_CONFIG_DIR")


def test_a_wrong_checksum(kaggle, server, data):
    server.headers["x-goog-hash"] = goog_hash(b"something else")
    message = refused(data)
    assert message.startswith(
        "flickr8k images: the download of kaggle://adityajn105/flickr8k/versions/1 is damaged"
    )
    assert "it was deleted, run the same call again" in message
    server.headers["x-goog-hash"] = goog_hash(ARCHIVE)
    assert contents(fetch("flickr8k", data)) == FLICKR
    captions = server.files["/captions.zip"]
    server.files["/captions.zip"] = captions + b"more"
    assert "MD5 hash of downloaded file" in refused(data, "coco2014")
    server.files["/captions.zip"] = captions
    del server.headers["x-goog-hash"]
    assert contents(fetch("coco2014", data)) == COCO


@pytest.mark.parametrize("content", [ARCHIVE[: SIZE // 2], b"<!DOCTYPE html><html>log in</html>"])
def test_an_archive_that_cannot_be_opened(kaggle, server, data, content):
    server.files["/flickr.zip"] = content
    assert "is damaged (Unsupported archive type.); it was deleted" in refused(data)
    server.files["/flickr.zip"] = ARCHIVE
    assert contents(fetch("flickr8k", data)) == FLICKR


def test_a_set_with_too_few_files(kaggle, server, data):
    server.files["/flickr.zip"] = zipped({"Images/one.jpg": b"jpeg", "captions.txt": b"image,caption"})
    assert f"has only 1 of {IMAGES} files Images/*.jpg; delete that folder and fetch again" in refused(data)
    assert not (data / "flickr8k").exists()


HOSTILE = {
    "parent": (zipped({"../evil": b"x"}), "only 0 of 1 files good"),
    "absolute": (zipped({"/nowhere/evil": b"x"}), "only 0 of 1 files good"),
    "tar parent": (tarred({"../evil": b"x"}), "outside the destination"),
    "few files": (zipped({"bad": b"x"}), "only 0 of 1 files good"),
    "damaged zip": (zipped({"good": b"good"}).replace(b"goodgood", b"goodevil"), "Bad CRC-32"),
    "cut zip": (zipped({"good": b"good"})[:-30], "file could not be opened successfully"),
    "cut tar": (tarred({"good": noise.randbytes(9000)})[:5000], "end"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(kaggle, server, data, name, monkeypatch):
    server.files["/hostile"], cause = HOSTILE[name]
    part = Part(f"{server.url}/hostile", num_bytes=1e5, expects={"good": 1})
    monkeypatch.setitem(SOURCES, "flickr8k", {"images": part})
    message = refused(data)
    assert "it was deleted, run the same call again" in message
    assert cause in message
    assert not (data / "flickr8k").exists()
    assert all(data / sources_fetch.WORK in path.parents for path in data.parent.rglob("evil"))
    assert not Path("/nowhere").exists()
    server.files["/hostile"] = zipped({"good": b"good"})
    assert contents(fetch("flickr8k", data)) == {"good": b"good"}


# ---- names and disks


def test_wrong_names(data):
    with pytest.raises(LabError, match="did you mean 'flickr8k'"):
        fetch("flicker8k", data)
    with pytest.raises(LabError, match="cifar100 has no Karpathy split"):
        fetch("cifar100", data, karpathy=True)
    data.write_text("a file")
    with pytest.raises(LabError, match=r"cannot be made \(.*data is a file\)"):
        fetch("cifar100", data)


@pytest.mark.parametrize(("key", "setting"), [("captions", "data_dir"), ("images", "KAGGLEHUB_CACHE")])
def test_a_disk_that_is_too_small(kaggle, server, data, monkeypatch, key, setting):
    large = replace(SOURCES["coco2014"][key], num_bytes=4.5e15)
    monkeypatch.setitem(SOURCES["coco2014"], key, large)
    message = refused(data, "coco2014")
    assert "coco2014 needs 9000000.0 GB and" in message
    assert f"free some space, or set {setting} to a folder on a larger disk" in message
    assert kaggle.requests == server.requests == []
    assert not is_interrupted(data / "coco2014")


@pytest.mark.parametrize("name", ["flickr8k", "coco2014"])
def test_the_disk_fills_up(kaggle, server, tmp_path, monkeypatch, name):
    for key, part in SOURCES[name].items():
        monkeypatch.setitem(SOURCES[name], key, replace(part, num_bytes=1))
    with small_disk(tmp_path / "disk", 1_400_000 if name == "flickr8k" else 400_000) as disk:
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(disk / "kagglehub"))
        monkeypatch.setattr(sources_fetch, "_check_space", lambda *_: None)
        message = refused(disk, name)
        assert message.startswith("no space left in")
        resize(disk, 20_000_000)
        assert contents(fetch(name, disk)) == (FLICKR if name == "flickr8k" else COCO)
    assert server.requests[-1 if name == "flickr8k" else 1].range > "bytes=0-"


def test_the_table_of_sets():
    assert set(SOURCES) == {"coco2014", "coco2017", "flickr30k", "flickr8k", "cifar100"}
    urls = {name: parts["images"].url for name, parts in SOURCES.items()}
    assert urls["coco2014"] == "kaggle://jeffaudi/coco-2014-dataset-for-yolov3/versions/4"
    assert urls["coco2017"] == "http://images.cocodataset.org/zips/train2017.zip"
    assert urls["flickr30k"] == "kaggle://hsankesara/flickr-image-dataset/versions/1"
    assert urls["flickr8k"] == "kaggle://adityajn105/flickr8k/versions/1"
    assert sum("karpathy" in parts for parts in SOURCES.values()) == 3
