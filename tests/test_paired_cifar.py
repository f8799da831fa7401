"""Pairs of pictures: what they show, what they are called, and that splits share none."""

import os
import pickle
from pathlib import Path

import compat  # noqa: F401

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from dataset import make_loader
from errors import LabError
from paired_cifar import PairedPictures, Pictures, open_pictures

NAMES = ["apple", "aquarium_fish", "bee"]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """CIFAR-100's own files, small: 20 training and 6 test pictures of each of three classes."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 6)):
        labels = rng.permutation(np.repeat(np.arange(3), count)).tolist()
        data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        _dump(folder / name, {"data": data, "fine_labels": labels, "coarse_labels": labels})
    _dump(folder / "meta", {"fine_label_names": NAMES, "coarse_label_names": NAMES})
    return root


def _dump(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


class _UncheckedCIFAR100(CIFAR100):
    """torchvision's reader without its MD5 sums, to read files made here."""

    def _check_integrity(self) -> bool:
        return True

    def _load_meta(self) -> None:
        content = pickle.loads(Path(self.root, self.base_folder, "meta").read_bytes())
        self.classes = content["fine_label_names"]


def _rows(images: torch.Tensor) -> set[bytes]:
    return {image.contiguous().numpy().tobytes() for image in images}


@pytest.mark.parametrize("train", [True, False])
def test_pictures_are_those_of_torchvision(cifar, train):
    oracle = _UncheckedCIFAR100(str(cifar), train=train)
    ours = [open_pictures(cifar, split) for split in (("train", "val") if train else ("test",))]
    images = torch.cat([part.images for part in ours])
    assert _rows(images) == _rows(torch.from_numpy(oracle.data).permute(0, 3, 1, 2))
    assert len(images) == len(oracle.data)
    labels = {
        image.numpy().tobytes(): label
        for part in ours
        for image, label in zip(part.images, part.labels, strict=True)
    }
    for image, label in zip(oracle.data, oracle.targets, strict=True):
        assert labels[np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes()] == label


def test_no_picture_is_in_two_splits_and_val_is_a_tenth_of_each_class(cifar):
    parts = {split: open_pictures(cifar, split) for split in ("train", "val", "test")}
    assert {split: np.bincount(part.labels).tolist() for split, part in parts.items()} == {
        "train": [18] * 3, "val": [2] * 3, "test": [6] * 3}  # fmt: skip
    assert len(_rows(torch.cat([part.images for part in parts.values()]))) == 60 + 18
    with pytest.raises(LabError, match="CIFAR-100 has train, val, test"):
        open_pictures(cifar, "dev")


def test_a_pair_shows_what_its_caption_says(cifar):
    pictures = open_pictures(cifar)
    pairs = PairedPictures(pictures, seed=3)
    batch = next(iter(make_loader(pairs, len(pairs))))
    assert batch["image"].shape == (54, 3, 32, 64)
    assert batch["image"].dtype == torch.uint8
    for item in range(len(pairs)):
        left, right = pairs.pair(item)
        assert torch.equal(batch["image"][item, :, :, :32], pictures.images[left])
        assert torch.equal(batch["image"][item, :, :, 32:], pictures.images[right])
        names = [NAMES[pictures.labels[row]].replace("_", " ") for row in (left, right)]
        articles = ["a" if name == "bee" else "an" for name in names]
        assert batch["text"][item] == f"a photo of {articles[0]} {names[0]} and {articles[1]} {names[1]}"
    assert torch.equal(batch["image_id"], batch["text_id"])
    texts, ids = pairs.captions()
    assert [texts[ident] for ident in batch["image_id"].tolist()] == batch["text"]
    assert len(set(texts)) == len(ids) == 9
    assert torch.equal(pairs[5]["image"], batch["image"][5])


def test_every_picture_stands_left_once_and_never_beside_itself(cifar):
    pairs = PairedPictures(open_pictures(cifar), different_class_prob=0.3)
    drawn = [pairs.pair(item) for item in range(len(pairs))]
    assert sorted(left for left, _ in drawn) == list(range(54))
    assert all(left != right for left, right in drawn)


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_the_share_of_different_classes_is_the_probability(cifar, prob):
    pictures = open_pictures(cifar)
    pairs = PairedPictures(pictures, num_pairs=4000, different_class_prob=prob)
    drawn = np.array([pairs.pair(item) for item in range(4000)])
    labels = pictures.labels[drawn]
    assert (labels[:, 0] != labels[:, 1]).mean() == pytest.approx(
        prob, abs=3.5 * (prob * (1 - prob) / 4000) ** 0.5
    )
    seen = np.bincount(drawn[:, 1], minlength=54)  # each picture is as likely on the right as any other
    assert seen.min() > 4000 / 54 * 0.55
    assert seen.max() < 4000 / 54 * 1.45


def test_pairs_are_drawn_anew_each_epoch_by_the_seed_unless_fixed(cifar):
    def drawn(epoch, **settings):
        pairs = PairedPictures(open_pictures(cifar), **settings)
        pairs.set_epoch(epoch)
        return [pairs.pair(item) for item in range(len(pairs))]

    assert drawn(2, seed=1) == drawn(2, seed=1)
    assert drawn(2, seed=1) != drawn(3, seed=1)
    assert drawn(2, seed=1) != drawn(2, seed=2)
    assert drawn(2, fixed=True) == drawn(3, fixed=True) == drawn(0)


def test_class_folders_serve_as_well(tmp_path):
    for split, count in (("train", 20), ("test", 3)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for row in range(count):
                tint = (200 * number, 10 * row, 0 if split == "train" else 255)
                Image.new("RGB", (40, 36), tint).save(folder / f"{row}.png")
    parts = {
        split: open_pictures(tmp_path / "data", split, cache_dir=tmp_path)
        for split in ("train", "val", "test")
    }
    assert {split: len(part.images) for split, part in parts.items()} == {"train": 36, "val": 4, "test": 6}
    for part in parts.values():
        assert part.names == ["cat", "dog"]
        assert np.array_equal(part.images[:, 0, 0, 0].numpy() // 200, part.labels)
    assert set(parts["test"].images[:, 2].unique().tolist()) == {255}
    assert PairedPictures(parts["test"]).caption(0, 1) == "a photo of a cat and a dog"


def test_a_file_that_would_run_code_is_refused_and_not_run(cifar, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    for name in ("test", "meta"):
        (tmp_path / name).write_bytes((cifar / "cifar-100-python" / name).read_bytes())
    _dump(tmp_path / "train", {"data": Trap(), "fine_labels": []})
    with pytest.raises(LabError, match=r"none of CIFAR-100's files \(it asks for .*mkdir"):
        open_pictures(tmp_path, "train")
    assert not (tmp_path / "trapped").exists()
    (tmp_path / "train").write_bytes((cifar / "cifar-100-python" / "train").read_bytes()[:500])
    with pytest.raises(LabError, match="fetch cifar100 again"):
        open_pictures(tmp_path, "train")
    _dump(tmp_path / "train", {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 3]})
    with pytest.raises(LabError, match="labels without pictures or names"):
        open_pictures(tmp_path, "train")


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([0, 0, 1], {}, "set different_class_prob to 1"),
        ([0, 0, 0], {}, "set different_class_prob to 0"),
        ([0, 0, 1, 1], {"different_class_prob": 1.5}, "is a probability, not 1.5"),
        ([0, 0, 1, 1], {"template": "two pictures"}, "must name {left} and {right}"),
    ],
)
def test_what_makes_no_pairs_is_one_sentence(labels, settings, message):
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(LabError, match=message):
        PairedPictures(Pictures(images, np.array(labels), ["cat", "dog"]), **settings)
