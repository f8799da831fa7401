"""Small pictures by class: CIFAR's files and class folders, and that splits share none."""

import os
import pickle
from pathlib import Path

import core.devices  # noqa: F401

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from core.errors import LabError
from sources.drawing import PAIR_CLASSES, write_shapes
from sources.side_by_side import open_labeled_images, pair_caption, subset

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
    ours = [open_labeled_images(cifar, split) for split in (("train", "val") if train else ("test",))]
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
    parts = {split: open_labeled_images(cifar, split) for split in ("train", "val", "test")}
    assert {split: np.bincount(part.labels).tolist() for split, part in parts.items()} == {
        "train": [18] * 3, "val": [2] * 3, "test": [6] * 3}  # fmt: skip
    assert len(_rows(torch.cat([part.images for part in parts.values()]))) == 60 + 18
    with pytest.raises(LabError, match="CIFAR has train, val, test"):
        open_labeled_images(cifar, "dev")
    with pytest.raises(LabError, match="set image_size to 32, not 64"):
        open_labeled_images(cifar, "train", size=64)


def test_class_folders_serve_as_well(tmp_path):
    for split, count in (("train", 20), ("test", 3)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for row in range(count):
                tint = (200 * number, 10 * row, 0 if split == "train" else 255)
                Image.new("RGB", (40, 36), tint).save(folder / f"{row}.png")
    (tmp_path / "data" / "test" / "cat" / "9.png").write_bytes(b"no picture")
    parts = {
        split: open_labeled_images(tmp_path / "data", split, cache_dir=tmp_path)
        for split in ("train", "val", "test")
    }
    assert {split: len(part.images) for split, part in parts.items()} == {"train": 36, "val": 4, "test": 6}
    assert list(parts["test"].left_out) == ["test/cat/9.png"]
    assert not parts["train"].left_out
    for part in parts.values():
        assert part.names == ["cat", "dog"]
        assert np.array_equal(part.images[:, 0, 0, 0].numpy() // 200, part.labels)
    assert set(parts["test"].images[:, 2].unique().tolist()) == {255}
    assert open_labeled_images(tmp_path / "data", "test", size=16, cache_dir=tmp_path).images.shape == (
        6,
        3,
        16,
        16,
    )


def test_a_file_that_would_run_code_is_refused_and_not_run(cifar, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    for name in ("test", "meta"):
        (tmp_path / name).write_bytes((cifar / "cifar-100-python" / name).read_bytes())
    _dump(tmp_path / "train", {"data": Trap(), "fine_labels": []})
    with pytest.raises(LabError, match=r"not one of CIFAR's files \(it asks for .*mkdir"):
        open_labeled_images(tmp_path, "train")
    assert not (tmp_path / "trapped").exists()
    (tmp_path / "train").write_bytes((cifar / "cifar-100-python" / "train").read_bytes()[:500])
    with pytest.raises(LabError, match="download the set again"):
        open_labeled_images(tmp_path, "train")
    _dump(tmp_path / "train", {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 3]})
    with pytest.raises(LabError, match="labels without images or names"):
        open_labeled_images(tmp_path, "train")


@pytest.mark.parametrize(
    ("count", "sizes"), [(6, [2, 2, 2]), (5, [2, 2, 0]), (8, [4, 2, 2]), (99, [18, 18, 18])]
)
def test_few_pictures_still_make_pairs_of_every_class_they_have(cifar, count, sizes):
    pictures = open_labeled_images(cifar)
    some = subset(pictures, count)
    assert np.bincount(some.labels, minlength=3).tolist() == sizes
    assert _rows(some.images) <= _rows(pictures.images)
    assert len(_rows(some.images)) == sum(sizes)


def test_articles_follow_the_names():
    assert pair_caption("apple", "bee") == "a photo of an apple and a bee"
    assert pair_caption("bee", "owl", "left a {left}, right the {right}") == "left a bee, right the owl"


def test_drawn_shapes_are_class_folders_the_same_every_time(tmp_path):
    first, second = (
        write_shapes(tmp_path / name / "shapes", num_train=10, num_test=3) for name in ("one", "two")
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*.png"))
    assert len(files) == len(PAIR_CLASSES) * 13
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    parts = {
        split: open_labeled_images(first, split, cache_dir=tmp_path) for split in ("train", "val", "test")
    }
    assert {split: len(part.labels) for split, part in parts.items()} == {"train": 90, "val": 10, "test": 30}
    assert len(_rows(torch.cat([part.images for part in parts.values()]))) == 130
    reds = [name.startswith("red") for name in parts["train"].names]
    red = parts["train"].images.float().mean(dim=(2, 3))  # (N, 3)
    is_red = np.array(reds)[parts["train"].labels]
    assert (red[:, 0] - red[:, 2])[is_red].min() > (red[:, 0] - red[:, 2])[~is_red].mean()
    assert write_shapes(first, num_train=10, num_test=3) == first


def test_shapes_are_not_drawn_over_something_else(tmp_path):
    write_shapes(tmp_path / "shapes", num_train=2, num_test=1)
    with pytest.raises(LabError, match="holds shapes of other settings"):
        write_shapes(tmp_path / "shapes", num_train=3, num_test=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(LabError, match="was not made by write_shapes"):
        write_shapes(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
