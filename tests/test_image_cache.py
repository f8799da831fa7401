"""The image cache: its content, when it is refused, and that a killed build is continued."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import DAMAGES, damage
from small_disk import resize, small_disk

from core import processes
from core.errors import LabError
from sources import image_cache
from sources.decode import UndecodableImage
from sources.image_cache import ImageCache

SIZE = 16
ROOT = Path(__file__).resolve().parent.parent
DiskUsage = namedtuple("DiskUsage", "total used free")


def make_images(folder: Path, count: int) -> tuple[list[str], np.ndarray]:
    """Files of the cache's own size, which decoding leaves as they are, and their pixels."""
    ramp = np.linspace(0, 200, SIZE)
    pixels = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for row in range(count):  # smooth, so that a JPEG of it is close, and different from row to row
        pixels[row] = np.stack(
            [ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], np.full((SIZE, SIZE), row)], 2
        )
    names = [f"train/{row:03d}.png" for row in range(count)]
    (folder / "train").mkdir(parents=True)
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(folder / name)
    return names, pixels


def as_batch(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.fixture
def data(tmp_path):
    names, pixels = make_images(tmp_path / "data", 40)
    return tmp_path / "data", names, pixels


@pytest.fixture
def build(data, tmp_path):
    """Opens or builds the cache of `data`, in this process and without output, unless `changes` say otherwise."""

    def call(**changes):
        settings = dict(root=data[0], paths=data[1], size=SIZE, folder=tmp_path / "cache")
        return ImageCache.open_or_build(**{**settings, "num_workers": 1, "progress": False, **changes})

    return call


@pytest.fixture
def decoded(monkeypatch):
    """Paths decoded in this process, in order."""
    calls: list[str] = []

    def decode(path, size, resize="crop", original=image_cache.decode_rgb):
        calls.append(Path(path).name)
        return original(path, size, resize)

    monkeypatch.setattr(image_cache, "decode_rgb", decode)
    return calls


def store_file(cache: ImageCache) -> Path:
    return cache.folder / {"raw": "pictures.u8", "jpeg": "pictures.jpegs"}[cache.form]


# --- what it holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_gathers_the_exact_pixels_in_the_order_asked(build, data, num_workers):
    cache = build(num_workers=num_workers)
    rows = np.random.default_rng(0).integers(0, 40, 64)
    for asked in (rows, rows.tolist(), torch.from_numpy(rows)):
        batch = cache.gather(asked)
        assert batch.dtype == torch.uint8
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch, as_batch(data[2][rows]))
    assert len(cache) == 40
    assert cache.bad == {}


def test_gathers_nothing_for_no_rows(build):
    assert build().gather([]).shape == (0, 3, SIZE, SIZE)


def test_a_gathered_batch_is_a_copy(build, data):
    cache = build()
    cache.gather([3]).zero_()
    assert torch.equal(cache.gather([3]), as_batch(data[2][3:4]))


@pytest.mark.parametrize("row", [-1, 40])
def test_a_row_that_does_not_exist_is_an_error(build, row):
    with pytest.raises(IndexError, match="40 rows"):
        build().gather([0, row])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_jpeg_form_is_close_and_small(build, data, num_workers):
    cache = build(jpeg=True, num_workers=num_workers)
    rows = [39, 0, 7, 7]
    batch = cache.gather(rows)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    difference = batch.int() - as_batch(data[2][rows]).int()
    assert difference.abs().max() <= 12
    assert difference.float().mean().abs() < 1
    assert cache.form == "jpeg"


def test_photographs_take_an_eighth_as_jpegs(build, tmp_path):
    folder = ROOT.parent / "shared" / "flickr8k" / "Images"
    if not folder.is_dir():
        pytest.skip("no Flickr8k beside the repository")
    names = sorted(os.listdir(folder))[:40]
    cache = build(root=folder, paths=names, size=224, jpeg=True)
    share = store_file(cache).stat().st_size / (40 * 224 * 224 * 3)
    assert 1 / 12 < share < 1 / 6
    assert share <= image_cache.FORMS["jpeg"].bytes_per_image(224) / (224 * 224 * 3)


def test_other_processes_get_the_cache_by_its_folder(build, data):
    cache = build()
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).gather([5]), as_batch(data[2][5:6]))
    with pytest.raises(LabError, match="has no finished image cache"):
        ImageCache(cache.folder.parent)


def test_spawned_processes_build_it_too(build, data, monkeypatch):
    spawn = multiprocessing.get_context("spawn")  # as on macOS and Windows
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: spawn)
    monkeypatch.setattr(image_cache, "ROWS_PER_TASK", 4)
    assert torch.equal(build(num_workers=2).gather(range(40)), as_batch(data[2]))


# --- undecodable images ----------------------------------------------------------------------------


@pytest.mark.parametrize("jpeg", [False, True])
def test_bad_images_are_named_and_have_no_pixels(build, data, jpeg, capsys):
    root, names, pixels = data
    (root / names[3]).write_text("<html>not found</html>")
    (root / names[17]).unlink()
    for _ in ("built", "opened"):
        cache = build(jpeg=jpeg, progress=True)
        assert sorted(cache.bad) == [3, 17]
        assert all(cache.bad.values())
        assert len(cache) == 40
        with pytest.raises(LabError, match="row 17 has no image"):
            cache.gather([0, 17])
        assert (cache.gather([16, 18]).int() - as_batch(pixels[[16, 18]]).int()).abs().max() <= 12 * jpeg
        assert "2 of 40 images cannot be decoded and are left out" in capsys.readouterr().out


def test_a_bad_image_that_is_repaired_is_read(build, data):
    root, names, pixels = data
    whole = (root / names[3]).read_bytes()
    (root / names[3]).write_bytes(whole[:40])
    assert list(build().bad) == [3]
    (root / names[3]).write_bytes(whole)
    assert torch.equal(build().gather([3]), as_batch(pixels[3:4]))


def test_no_images_at_all_is_an_error(build, data, tmp_path):
    with pytest.raises(LabError, match="at least one image"):
        build(paths=[])
    with pytest.raises(LabError, match="no image can be decoded"):
        build(paths=["train/none.png", "train/neither.png"])
    assert not list((tmp_path / "cache").glob("*/header.json"))


# --- when a cache is used, and when it is not ------------------------------------------------------


def test_a_finished_cache_is_opened_without_decoding(build, decoded):
    build()
    assert len(decoded) == 40
    build()
    build(jpeg=False)
    assert len(decoded) == 40


def test_a_moved_data_folder_keeps_its_cache(build, data, decoded, tmp_path):
    build()
    shutil.move(data[0], tmp_path / "elsewhere")
    build(root=tmp_path / "elsewhere")
    assert len(decoded) == 40


def test_a_cache_of_other_files_or_settings_is_not_used(build, data, decoded, monkeypatch):
    root, names, pixels = data
    build()
    changes = [
        lambda: build(paths=names[::-1]),
        lambda: build(resize="squash"),
        lambda: build(size=SIZE // 2),
    ]
    for number, change in enumerate(changes, start=2):
        change()
        assert len(decoded) == 40 * number
    decoded.clear()
    os.utime(root / names[0], (1, 1))
    build()
    monkeypatch.setitem(image_cache.VERSIONS, "pillow", "0")
    build()
    assert len(decoded) == 80
    Image.fromarray(255 - pixels[1]).save(root / names[1])
    assert torch.equal(build().gather([1]), as_batch(255 - pixels[1:2]))


def cut_pixels(cache):
    with open(store_file(cache), "r+b") as file:
        file.truncate(store_file(cache).stat().st_size * 3 // 4)


def clear_a_bit(cache):
    bits = bytearray((cache.folder / "finished.bits").read_bytes())
    bits[0] &= 0x7F
    (cache.folder / "finished.bits").write_bytes(bits)


def claim_a_bad_row(cache):
    header = json.loads((cache.folder / "header.json").read_text())
    (cache.folder / "header.json").write_text(json.dumps({**header, "bad": {"1": "truncated"}}))


DAMAGE = {  # what happened to the folder, and how many images are then decoded again
    "no header": (lambda cache: (cache.folder / "header.json").unlink(), 0),
    "half a header": (lambda cache: (cache.folder / "header.json").write_text('{"count": 40'), 0),
    "a list for a header": (lambda cache: (cache.folder / "header.json").write_text("[]"), 0),
    "another header": (claim_a_bad_row, 0),
    "no pixels": (lambda cache: store_file(cache).unlink(), 40),
    "three quarters of the pixels": (cut_pixels, 10),
    "no bitmap": (lambda cache: (cache.folder / "finished.bits").unlink(), 40),
    "a short bitmap": (lambda cache: (cache.folder / "finished.bits").write_bytes(b"\xff"), 40),
    "a bit less": (clear_a_bit, 1),
}


@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_repaired_before_it_is_used(build, decoded, damage, jpeg):
    before = build(jpeg=jpeg).gather(range(40))
    decoded.clear()
    harm, again = DAMAGE[damage]
    harm(build(jpeg=jpeg))
    assert torch.equal(build(jpeg=jpeg).gather(range(40)), before)
    assert abs(len(decoded) - again) <= jpeg  # a JPEG may straddle the cut
    decoded.clear()
    build(jpeg=jpeg)
    assert decoded == []


def test_damage_inside_the_jpegs_is_an_error(build):
    cache = build(jpeg=True)
    store_file(cache).write_bytes(b"\0" * store_file(cache).stat().st_size)
    with pytest.raises(LabError, match="damaged"):
        ImageCache(cache.folder).gather([0])


# --- interruptions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("jpeg", [False, True])
def test_an_interrupted_build_continues(build, data, monkeypatch, decoded, jpeg):
    decode = image_cache.decode_rgb

    def interrupted(path, size, resize):
        if Path(path).name == "021.png":
            raise KeyboardInterrupt
        return decode(path, size, resize)

    monkeypatch.setattr(image_cache, "decode_rgb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(jpeg=jpeg)
    monkeypatch.setattr(image_cache, "decode_rgb", decode)
    decoded.clear()
    cache = build(jpeg=jpeg)
    assert decoded == [f"{row:03d}.png" for row in range(21, 40)]
    assert (cache.gather(range(40)).int() - as_batch(data[2]).int()).abs().max() <= 12 * jpeg


SLOW_BUILD = """
import os, sys, time
sys.path.insert(0, {root!r})
from sources import image_cache

fast, image_cache.CHECKPOINT_SECONDS, image_cache.ROWS_PER_TASK = image_cache.decode_rgb, 0.02, 1

main, rows = os.getpid(), 0

def slow(*arguments):
    global rows
    rows += 1
    time.sleep(0.05)
    while rows > {most} and os.getppid() == main:  # waits to be killed
        time.sleep(0.01)
    return fast(*arguments)

image_cache.decode_rgb = slow
names = ["train/%03d.png" % row for row in range(40)]
image_cache.ImageCache.open_or_build(
    {data!r}, names, size={size}, folder={folder!r}, jpeg={jpeg}, num_workers=2, progress=False
)
"""


def start_slow_build(data: Path, folder: Path, jpeg: bool, most: int = 40) -> subprocess.Popen:
    """A build by two workers, neither of which finishes more than `most` rows."""
    script = SLOW_BUILD.format(
        root=str(ROOT), data=str(data), size=SIZE, folder=str(folder), jpeg=jpeg, most=most
    )
    return subprocess.Popen([sys.executable, "-c", script])


def finished_rows(folder: Path) -> int:
    bits = next(folder.glob("*/finished.bits"), None)
    return int(np.unpackbits(np.fromfile(bits, dtype=np.uint8)).sum()) if bits else 0


def wait_until(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not reached"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for orphans in /proc")
@pytest.mark.parametrize("jpeg", [False, True])
def test_a_killed_build_continues(build, data, decoded, tmp_path, jpeg):
    process = start_slow_build(data[0], tmp_path / "cache", jpeg, most=10)
    wait_until(lambda: finished_rows(tmp_path / "cache") >= 6)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = finished_rows(tmp_path / "cache")
    assert 6 <= finished < 40
    assert len(workers) == 2
    assert not list((tmp_path / "cache").glob("*/header.json"))
    cache = build(jpeg=jpeg)
    assert len(decoded) == 40 - finished
    assert (cache.gather(range(40)).int() - as_batch(data[2]).int()).abs().max() <= 12 * jpeg
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_a_second_process_waits_for_the_first(build, data, decoded, tmp_path, capsys):
    process = start_slow_build(data[0], tmp_path / "cache", jpeg=False)
    wait_until(lambda: finished_rows(tmp_path / "cache") >= 1)
    cache = build(progress=True)
    assert "Another process is building" in capsys.readouterr().out
    assert decoded == []
    assert torch.equal(cache.gather(range(40)), as_batch(data[2]))
    assert process.wait() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux only")
def test_a_killed_worker_is_an_error_and_the_build_continues(build, data, monkeypatch):
    def killed(path, size, resize, original=image_cache.decode_rgb):
        if Path(path).name == "039.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, size, resize)

    with monkeypatch.context() as patched:
        patched.setattr(image_cache, "decode_rgb", killed)
        with pytest.raises(LabError, match="a worker process was killed"):
            build(num_workers=2)
    assert torch.equal(build().gather(range(40)), as_batch(data[2]))


# --- the disk --------------------------------------------------------------------------------------


def set_free(monkeypatch, free: int) -> None:
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, free))


def test_a_short_disk_gets_the_jpeg_form(build, monkeypatch, capsys):
    set_free(monkeypatch, 40 * image_cache.FORMS["raw"].bytes_per_image(224))  # no margin
    cache = build(size=224, progress=True)
    assert cache.form == "jpeg"
    assert "0.00 GB as jpeg; 0.0 GB are free, too little for 0.01 GB as raw" in capsys.readouterr().out
    assert build(size=224).form == "jpeg"


def test_jpegs_of_a_short_disk_are_replaced_when_raw_pixels_fit(build, data, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        set_free(patched, 40 * SIZE * SIZE * 3)
        patched.setattr(image_cache.FORMS["jpeg"], "bytes_per_image", staticmethod(lambda size: 100))
        short = build()
    raw = build()
    assert (short.form, raw.form) == ("jpeg", "raw")
    assert short.identity != raw.identity
    assert torch.equal(raw.gather(range(40)), as_batch(data[2]))
    assert not short.folder.exists()
    set_free(monkeypatch, 0)
    assert build().form == "raw"


@pytest.mark.parametrize("pages", [8, 9, 10])
def test_a_disk_that_fills_up_beside_the_images_is_one_sentence(build, data, tmp_path, pages):
    """The images take eight pages; digests, bitmap and header take one each."""
    with small_disk(tmp_path / "disk", 4096 * pages) as disk:
        for full in (
            r"no space left in|cannot be written \(No space left",
            r"GB free; free some space|no space left in",
        ):
            with pytest.raises(LabError, match=full):
                build(folder=disk, jpeg=False)
        resize(disk, 8_000_000)
        assert torch.equal(build(folder=disk, jpeg=False).gather(range(40)), as_batch(data[2]))
        assert not list(disk.rglob("*.tmp"))


JPEG_FILES = ("pictures.jpegs", "table.i64", "rows.u64", "finished.bits", "header.json")


@pytest.mark.parametrize("number", range(DAMAGES))
@pytest.mark.parametrize("name", JPEG_FILES)
def test_a_flipped_bit_or_a_cut_in_the_jpeg_form_gives_no_other_pixels(build, name, number):
    before = build(jpeg=True).gather(range(40))
    damage(build(jpeg=True).folder / name, number)
    assert torch.equal(build(jpeg=True).gather(range(40)), before)


def test_a_full_disk_is_an_error_before_the_first_image(build, decoded, monkeypatch):
    set_free(monkeypatch, 1000)
    with pytest.raises(LabError, match=r"needs 0.00 GB as raw or 0.00 GB as jpeg, and .* 0.00 GB free"):
        build()
    with pytest.raises(LabError, match="GB as raw, and"):
        build(jpeg=False)
    assert decoded == []


def test_what_is_written_already_counts(build, data, decoded, monkeypatch):
    """A build that stopped on a full disk needs room for the missing images only."""
    write = image_cache.RawStore.write

    def full(self, start, data):
        if start >= 30 * SIZE * SIZE * 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, start, data)

    monkeypatch.setattr(image_cache, "ROWS_PER_TASK", 1)
    with monkeypatch.context() as patched:
        patched.setattr(image_cache.RawStore, "write", full)
        with pytest.raises(LabError, match=r"cannot be written \(No space left"):
            build()
    decoded.clear()
    with monkeypatch.context() as patched:
        set_free(patched, 100)
        with pytest.raises(LabError, match="GB as raw, and"):
            build(jpeg=False)
        set_free(patched, 11 * SIZE * SIZE * 3)
        assert torch.equal(build().gather(range(40)), as_batch(data[2]))
    assert len(decoded) == 10


def test_a_folder_that_cannot_be_made_is_an_error(build, data):
    with pytest.raises(LabError, match="cannot be made .*; choose another folder"):
        build(folder=data[0] / data[1][0])


def test_an_unfinished_raw_build_is_replaced_by_jpegs(build, monkeypatch, tmp_path):
    def undecodable_then_interrupt(path, size, resize, original=image_cache.decode_rgb):
        if Path(path).name == "020.png":
            raise KeyboardInterrupt
        if Path(path).name == "000.png":
            raise UndecodableImage("truncated")
        return original(path, size, resize)

    monkeypatch.setattr(image_cache, "ROWS_PER_TASK", 1)
    with monkeypatch.context() as patched:
        patched.setattr(image_cache, "decode_rgb", undecodable_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(size=64)
    assert [path.name[-3:] for path in (tmp_path / "cache").glob("images_*/")] == ["raw"]
    set_free(monkeypatch, 1000)  # 19 images of raw pixels give their room to 40 JPEGs
    cache = build(size=64)
    assert cache.form == "jpeg"
    assert cache.bad == {}
    assert [path.name[-4:] for path in (tmp_path / "cache").glob("images_*/")] == ["jpeg"]
