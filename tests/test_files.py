"""Files are whole or absent, a full disk is one sentence, and leftovers of dead processes disappear."""

import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_data import ROOT
from small_disk import resize, small_disk

from core.errors import LabError
from core.files import (
    DiskFullError,
    atomic_path,
    file_digest,
    fingerprint,
    locked,
    make_folder,
    read_json,
    sweep,
    write_json,
    write_text,
)

NOISE = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)  # 0.8 MB, incompressible


def save_npz(path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=NOISE)


def save_figure(path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((6, 6))
    figure.figimage(NOISE)
    figure.savefig(path, format="png")


def save_faiss(path) -> None:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(512)
    index.add(NOISE.reshape(-1, 512).astype(np.float32))
    faiss.write_index(index, str(path))


WRITERS = {
    "text": lambda path: path.write_text("x" * 800_000),
    "torch.save": lambda path: torch.save({"a": torch.from_numpy(NOISE)}, path),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(NOISE)}, path),
    "numpy.tofile": NOISE.tofile,
    "numpy.savez": save_npz,
    "pandas": lambda path: pd.DataFrame(NOISE.reshape(-1, 64)).to_csv(path),
    "pillow": lambda path: Image.fromarray(NOISE).save(path, "PNG"),
    "matplotlib": save_figure,
    "faiss": save_faiss,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_sentence_whichever_library_meets_it(tmp_path, name):
    def write() -> None:
        with atomic_path(path) as beside:
            WRITERS[name](beside)

    with small_disk(tmp_path / "disk", 300_000) as disk:
        path = disk / "folder" / "file"
        write_text(path, "before")
        with pytest.raises(
            DiskFullError, match=r"no space left in .*disk/folder: file needs more than the 0\.\d MB"
        ):
            write()
        assert path.read_text() == "before"
        assert [entry.name for entry in path.parent.iterdir()] == ["file"]
        resize(disk, 8_000_000)
        write()
        assert path.stat().st_size > 300_000


def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path):
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from core.files import write_text
write_text({str(tmp_path / "a")!r}, "x" * 200_000)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "DiskFullError: no space left" in done.stderr
    assert not list(tmp_path.iterdir())


def test_errors_of_the_code_that_writes_pass_unchanged(tmp_path):
    def fail() -> None:
        with atomic_path(tmp_path / "a") as beside:
            beside.write_text("half")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    for write in (
        lambda: make_folder(tmp_path / "runs" / "a"),
        lambda: write_text(tmp_path / "runs" / "a" / "b", ""),
    ):
        with pytest.raises(LabError, match=r"runs is a file\); choose another folder"):
            write()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with small_disk(tmp_path / "disk", 100_000) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(LabError, match=r"the folder .*disk/a cannot be made \(Read-only"):
            write_text(disk / "a" / "file", "")
        with pytest.raises(LabError, match=r"disk/file could not be written \(Read-only"):
            write_text(disk / "file", "")
        with pytest.raises(LabError, match=r"disk cannot hold a lock file .*; choose"), locked(disk / "l", 1):
            pass


def test_leftovers_of_dead_processes_are_swept_and_those_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = tmp_path / f".a.pt.{os.getpid()}.tmp"
    old = tmp_path / f".b.pt.{os.getpid()}.tmp"
    gone = tmp_path / "checkpoints" / f".step_000000001.pt.{dead.pid}.tmp"
    other = tmp_path / ".note.tmp"
    gone.parent.mkdir()
    for path in (alive, old, gone, other):
        path.write_text("half")
    os.utime(old, (0, time.time() - 7200))
    sweep(tmp_path)
    assert alive.exists()
    assert other.exists()
    assert not old.exists()
    assert not gone.exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"a"', "[" * 100_000, b"\xff\xfe{}", b"\x00"])
def test_a_damaged_json_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LabError, match=r"metrics\.json .*delete it and run again"):
        read_json(path)


def test_json_is_read_as_it_was_written(tmp_path):
    assert read_json(tmp_path / "a.json") == {}
    write_json(tmp_path / "a.json", {"b": [1, 2.5, "é"]})
    assert read_json(tmp_path / "a.json") == {"b": [1, 2.5, "é"]}


def test_different_lists_have_different_fingerprints():
    lists = [["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""], ["c", "ab"], []]
    assert len({fingerprint(items) for items in lists}) == len(lists)
    assert fingerprint(["ab", "c"]) == fingerprint(iter(("ab", "c")))


def test_a_files_digest_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"c")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_digest(tmp_path / "a", tmp_path / "b") == abc
