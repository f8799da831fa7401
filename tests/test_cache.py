"""Feature caches: refused where they belong to something else, continued where they were interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_data import ROOT

from config import make_config
from core.errors import LabError
from core.files import StaleCacheError
from sources.embeddings import as_rows
from towers import features as towers_features
from towers import text as towers_text
from towers.features import cached_features, open_features, write_features

HEADER = {"encoder": "tiny", "revision": "1", "captions": "abc"}


class Counting:
    """Features that are their row numbers; remembers what was asked of it."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.fail_at = fail_at

    def __call__(self, rows) -> torch.Tensor:
        if self.fail_at in rows:
            raise KeyboardInterrupt
        self.asked += rows
        return as_rows(rows)[:, None].float().repeat(1, 3)


def filled(path: Path, header: dict[str, str] = HEADER, count: int = 25) -> list[int]:
    """Rows that had to be computed to open the cache; sees that it holds the right ones."""
    compute = Counting()
    features = cached_features(path, header, count, compute, chunk=10)
    assert features.dtype == torch.float16
    assert torch.equal(features[:, 2].long(), torch.arange(count))
    return compute.asked


# ---------------------------------------------------------------- the format


def test_a_cache_is_filled_once(tmp_path):
    assert filled(tmp_path / "a.safetensors") == list(range(25))
    assert filled(tmp_path / "a.safetensors") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "a.safetensors.lock"]


@pytest.mark.parametrize("key", sorted(HEADER))
def test_a_cache_of_another_header_is_refused_and_rebuilt(tmp_path, capsys, key):
    path = tmp_path / "a.safetensors"
    filled(path)
    other = {**HEADER, key: "another"}
    with pytest.raises(StaleCacheError, match=f"belongs to another {key}; delete it"):
        open_features(path, other)
    assert filled(path, other) == list(range(25))
    assert f"belongs to another {key}" in capsys.readouterr().out
    with pytest.raises(StaleCacheError, match="another pooling"):
        open_features(path, {**other, "pooling": "mean"})


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_truncated_cache_is_refused_and_rebuilt(tmp_path, capsys, keep):
    path = tmp_path / "a.safetensors"
    filled(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StaleCacheError, match="is damaged"):
        open_features(path, HEADER)
    assert filled(path) == list(range(25))
    assert "is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 70_000.0]
)  # the last is infinite in half precision
def test_features_that_are_not_finite_are_refused(tmp_path, value):
    features = torch.zeros(4, 3)
    features[2, 1] = value
    with pytest.raises(LabError, match="row 2 of .* is not finite in half precision; nothing was written"):
        write_features(tmp_path / "a.safetensors", features, HEADER)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- interruption


def test_an_interrupted_cache_continues(tmp_path):
    path = tmp_path / "a.safetensors"
    compute = Counting(fail_at=14)
    with pytest.raises(KeyboardInterrupt):
        cached_features(path, HEADER, 25, compute, chunk=10)
    assert compute.asked == list(range(10))
    assert not path.exists()
    assert filled(path) == list(range(10, 25))
    assert not path.with_suffix(".parts").exists()


def test_parts_of_another_encoder_or_damaged_are_computed_again(tmp_path):
    path = tmp_path / "a.safetensors"
    for header in (HEADER, {**HEADER, "revision": "2"}):
        with pytest.raises(KeyboardInterrupt):
            cached_features(path, header, 25, Counting(fail_at=24), chunk=10)
    first, _ = sorted(path.with_suffix(".parts").iterdir())
    first.write_bytes(first.read_bytes()[:-5])
    assert filled(path, {**HEADER, "revision": "2"}) == [*range(10), *range(20, 25)]


SLOW = """
import sys, time
import torch
from core.files import atomic_path, fingerprint
from towers.features import cached_features

def compute(rows):
    print(rows[0], flush=True)
    time.sleep(0.05 if rows[0] < 20 else 60)
    return torch.tensor(list(rows))[:, None].float().repeat(1, 3)

cached_features(sys.argv[1], {header}, 45, compute, chunk=10)
"""


def test_a_killed_process_leaves_what_it_had_finished(tmp_path):
    path = tmp_path / "a.safetensors"
    code = SLOW.replace("{header}", repr(HEADER))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert [process.stdout.readline().strip() for _ in range(3)] == ["0", "10", "20"]
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not path.exists()
    assert filled(path, count=45) == list(range(20, 45))


# ---------------------------------------------------------------- captions

WORDS = "a brown dog and two small children run over the wet grass behind an old house at night".split()
CAPTIONS = [" ".join(WORDS[(7 * row) % 11 :][: 1 + (5 * row) % 17]) + f" {row}" for row in range(60)]


class LetterTower(torch.nn.Module):
    """Encodes a text as its length, its first letter and its number; remembers its batches."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []

    def lengths(self, texts):
        return [len(text.split()) for text in texts]

    def forward(self, texts):
        self.batches.append(texts)
        return torch.tensor([[len(text), ord(text[0]), int(text.split()[-1])] for text in texts]).float()


@pytest.fixture
def letters(monkeypatch):
    tower = LetterTower()
    monkeypatch.setattr(towers_features, "frozen_tower", lambda config, side: tower)
    return tower


def text_config(tmp_path, **settings):
    return make_config("quickstart", cache_dir=tmp_path, device="cpu", **settings)


def test_batches_are_sorted_and_small_and_the_order_is_the_captions(letters, monkeypatch):
    monkeypatch.setattr(towers_features, "TOKENS_PER_BATCH", 64)
    found = towers_features.encode_texts(letters, CAPTIONS)
    assert torch.equal(found, LetterTower()(CAPTIONS))
    longest = [max(letters.lengths(batch)) for batch in letters.batches]
    assert longest == sorted(longest, reverse=True)
    assert all(size * len(batch) <= 64 for size, batch in zip(longest, letters.batches, strict=True))
    padded = sum(size * len(batch) for size, batch in zip(longest, letters.batches, strict=True))
    assert padded < 1.15 * sum(letters.lengths(CAPTIONS))
    assert towers_features.encode_texts(letters, []).shape == (0, 3)


def test_sorted_batches_give_what_batches_padded_to_77_give():
    tower = towers_text.minilm().eval()
    expected = []
    with torch.inference_mode():
        for start in range(0, len(CAPTIONS), 64):
            tokens = tower.tokenizer(
                CAPTIONS[start : start + 64],
                padding="max_length",
                truncation=True,
                max_length=77,
                return_tensors="pt",
            )
            assert tokens["input_ids"].shape[1] == 77
            expected.append(tower({name: tokens[name] for name in ("input_ids", "attention_mask")}))
    assert (towers_features.encode_texts(tower, CAPTIONS) - torch.cat(expected)).abs().max() < 1e-3


def cached(config, captions) -> torch.Tensor:
    return towers_features.cached_text_features(config, captions, progress=False)


def test_a_changed_caption_or_order_is_encoded_again(letters, tmp_path):
    config = text_config(tmp_path)
    first = cached(config, CAPTIONS)
    assert torch.equal(first, LetterTower()(CAPTIONS).half())
    calls = len(letters.batches)
    assert torch.equal(cached(config, CAPTIONS), first)
    assert len(letters.batches) == calls
    changed = [*CAPTIONS[:-1], "another caption 99"]
    for captions in (changed, CAPTIONS[::-1], CAPTIONS[1:]):
        assert torch.equal(cached(config, captions), LetterTower()(captions).half())
    assert len(letters.batches) > calls
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 4


def test_another_encoder_or_revision_has_a_cache_of_its_own(letters, tmp_path, monkeypatch):
    cached(text_config(tmp_path), CAPTIONS)
    cached(text_config(tmp_path, text_tower="sentence", text_model=towers_text.packaged_minilm()), CAPTIONS)
    monkeypatch.setattr(towers_features, "weights_revision", lambda name: "other weights")
    calls = len(letters.batches)
    cached(text_config(tmp_path), CAPTIONS)
    assert len(letters.batches) > calls
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "vocab.txt"])
def test_a_models_revision_knows_weights_and_tokenizer(tmp_path, file):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    before = towers_features.model_revision(str(tmp_path))
    (tmp_path / file).write_bytes(b"something else")
    os.utime(tmp_path / file, ns=(1, 1))
    assert towers_features.model_revision(str(tmp_path)) != before
