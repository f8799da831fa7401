"""Class names become a classifier: compared with written-out loops, on every kind of labelled images."""

from __future__ import annotations

import io
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluated import config_of, made_gallery, write_home, write_run
from PIL import Image

import evaluate
from core.errors import LabError
from evaluate import open_gallery
from reports import zero_shot
from reports.zero_shot import Labelled, known_labels, labelled_images, open_labelled
from sources import cifar
from sources.decode import UndecodableImage
from sources.drawing import load_scenes

LABELS = ["red circle", "blue star", "green heart"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def run(home):
    return write_run(config_of(home))


@pytest.fixture(scope="module")
def gallery(run):
    return open_gallery(run, "test", show=False)


# --- the classifier ---


def probabilities(gallery, items, labels):
    classes = zero_shot.class_features(gallery.run, labels)
    return zero_shot.probabilities(gallery.run, gallery.image_features[items], classes)


def test_probabilities_follow_the_labels(gallery):
    first = probabilities(gallery, [0, 5], LABELS)
    assert torch.allclose(first.sum(dim=1), torch.ones(2))
    swapped = probabilities(gallery, [5, 0], [LABELS[1], LABELS[0], LABELS[2]])
    assert torch.allclose(swapped, first[[1, 0]][:, [1, 0, 2]], atol=1e-5)


def test_an_ensemble_is_the_normalised_mean_of_its_prompts(run):
    parts = [zero_shot.class_features(run, LABELS, [template]) for template in ("a {}", "the {}.")]
    mean = torch.nn.functional.normalize(parts[0] + parts[1], dim=1)
    assert torch.allclose(zero_shot.class_features(run, LABELS, ("a {}", "the {}.")), mean, atol=1e-5)


def test_any_image_is_classified(run, gallery):
    path = gallery.dataset.image_files([3])[0]
    found = zero_shot.classify(run, path, LABELS)
    assert found["probability"].is_monotonic_decreasing
    assert found["probability"].sum() == pytest.approx(1, abs=1e-5)
    own = probabilities(gallery, [3], LABELS)[0].tolist()
    assert found.loc[LABELS, "probability"].tolist() == pytest.approx(own, abs=1e-3)
    for same in (str(path), path.read_bytes(), Image.open(path)):
        again = zero_shot.classify(run, same, LABELS)
        assert again.loc[LABELS, "similarity"].tolist() == pytest.approx(
            found.loc[LABELS, "similarity"].tolist()
        )


def test_an_image_that_cannot_be_read_says_why(run, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"<html>not found</html>")
    with pytest.raises(UndecodableImage, match="broken.jpg cannot be decoded: a web page or XML"):
        zero_shot.classify(run, broken, LABELS)
    with pytest.raises(UndecodableImage, match="no such file"):
        zero_shot.classify(run, tmp_path / "none.jpg", LABELS)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        (["cat", "cat "], ["a {}"], "none given twice"),
        (["cat", ""], ["a {}"], "none empty"),
        (["cat"], ["a {}"], "at least two"),
        (["cat", "dog"], [], "needs {}"),
        (["cat", "dog"], "a {}", "are a list"),
        (["cat", "dog"], ["a cat"], "needs {}"),
    ],
)
def test_bad_labels_and_templates_are_named(run, labels, templates, message):
    with pytest.raises(LabError, match=message):
        zero_shot.class_features(run, labels, templates)


def test_nan_features_are_an_error(run):
    features = torch.full((2, 32), float("nan"))
    with pytest.raises(LabError, match="image's feature holds NaN"):
        zero_shot.probabilities(run, features, torch.eye(32)[:3])


# --- measuring ---


def made_labelled(several: bool) -> Labelled:
    rng = np.random.default_rng(0)
    truth = np.eye(3, dtype=bool)[rng.integers(0, 3, 60)]
    if several:
        truth |= rng.random((60, 3)) < 0.3
    return Labelled("made", LABELS, truth, torch.nn.functional.normalize(torch.randn(60, 32), dim=1))


@pytest.mark.parametrize("several", [False, True])
def test_measuring_is_what_written_out_loops_say(run, several):
    torch.manual_seed(0)
    made = made_labelled(several)
    found = zero_shot.measure(run, made)
    likely = zero_shot.probabilities(run, made.features, zero_shot.class_features(run, LABELS)).numpy()
    correct, hits, shown = [], np.zeros(3), np.zeros(3)
    confusion = np.zeros((3, 3))
    for scores, true in zip(likely, made.truth, strict=True):
        order = sorted(range(3), key=lambda label: -scores[label])
        correct.append(bool(true[order[0]]))
        for label in np.flatnonzero(true):
            shown[label] += 1
            hits[label] += label in order[: true.sum()]
        if true.sum() == 1:
            confusion[true.argmax(), order[0]] += 1
    assert found.summary["top1"] == pytest.approx(np.mean(correct))
    assert found.summary["top5"] == 1.0  # of three labels
    assert found.summary["chance"] == pytest.approx(made.truth.sum(axis=1).mean() / 3)
    assert found.per_class["accuracy"].tolist() == pytest.approx((hits / shown).tolist())
    np.testing.assert_array_equal(found.confusion, confusion)
    gap = 0.0
    for low in np.arange(10) / 10:
        inside = (found.confidence > low) & (found.confidence <= low + 0.1)
        gap += abs(np.array(correct)[inside].sum() - found.confidence[inside].sum()) / 60
    assert found.summary["calibration_error"] == pytest.approx(gap, abs=1e-6)
    assert found.summary["rule"] == (zero_shot.MANY_LABELS if several else zero_shot.ONE_LABEL)


# --- labelled images ---


def test_scenes_know_shapes_colours_and_single_objects(home, gallery):
    scenes = load_scenes(home / "scenes", "test")
    sets = {made.name: made for made in labelled_images(gallery)}
    assert set(sets) == {"single objects", "shapes", "colours"}
    ids = gallery.image_id.tolist()
    shapes = sets["shapes"]
    for truth, ident in zip(shapes.truth, ids, strict=True):
        assert set(np.array(shapes.labels)[truth]) == {thing.shape for thing in scenes[ident].objects}
    alone = [item for item, ident in enumerate(ids) if len(scenes[ident].objects) == 1]
    assert sorted(known_labels(gallery)) == alone
    assert sets["single objects"].left_out == 20 - len(alone)
    assert torch.equal(sets["single objects"].features, gallery.image_features[alone])
    accuracy = evaluate.zero_shot_accuracy(gallery)
    assert accuracy["images"] == len(alone)
    assert 0 <= accuracy["top1"] <= accuracy["top5"] <= 1


def test_coco_categories_count_once_for_each_present(tmp_path):
    ids = [100, 101, 102]
    (tmp_path / "annotations").mkdir()
    objects = [(100, 1), (100, 1), (100, 2), (101, 2), (999, 1)]
    annotations = [
        {"image_id": i, "category_id": c, "segmentation": [[1]], "id": n} for n, (i, c) in enumerate(objects)
    ]
    content = {"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}], "annotations": annotations}
    file = tmp_path / "annotations" / "instances_val2014.json"
    file.write_text(json.dumps(content))
    table = SimpleNamespace(root=tmp_path, categories=None, paths=[f"val2014/{i}.jpg" for i in ids])
    gallery = made_gallery(3, table=table, rows=np.arange(3))
    (made,) = labelled_images(gallery)
    assert (made.labels, made.truth.tolist()) == (["cat", "dog"], [[True, True], [True, False]])
    assert made.left_out == 1  # image 102 shows nothing
    assert known_labels(gallery) == {1: "cat"}
    content["categories"][1]["name"] = "lynx"  # corrected while the process runs
    file.write_text(json.dumps(content))
    assert known_labels(gallery) == {1: "lynx"}
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(LabError, match="not a COCO instances file"):
        zero_shot.read_instances(other)


def test_class_folders_leave_out_what_cannot_be_decoded(run, tmp_path):
    for name, colour in (("red_car", (200, 0, 0)), ("blue_boat", (0, 0, 200))):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 30), colour).save(tmp_path / "test" / name / f"{number}.png")
    (tmp_path / "test" / "red_car" / "3.jpg").write_bytes(b"no picture")
    made = open_labelled(run, tmp_path, show=False)
    assert (made.labels, made.left_out) == (["blue boat", "red car"], 1)
    assert made.truth.tolist() == [[True, False]] * 3 + [[False, True]] * 3
    assert made.features.shape == (6, 32)
    expected = zero_shot.classify(run, tmp_path / "test" / "red_car" / "1.png", made.labels)
    found = zero_shot.probabilities(run, made.features[4:5], zero_shot.class_features(run, made.labels))
    assert found[0].tolist() == pytest.approx(expected.loc[made.labels, "probability"].tolist(), abs=1e-4)


def write_cifar(folder, name):
    """Files of CIFAR's form: six images of two classes in each."""
    layout = cifar.LAYOUTS[name]
    (folder / layout.folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file in [file for files in layout.files.values() for file in files]:
        content = {
            "data": rng.integers(0, 256, (6, 3072), dtype=np.uint8),
            layout.labels_key: [0, 1, 1, 0, 1, 0],
        }
        (folder / layout.folder / file).write_bytes(pickle.dumps(content))
    meta = {layout.names_key: ["maple_tree", "cat"]}
    (folder / layout.folder / layout.meta).write_bytes(pickle.dumps(meta))
    return folder


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_as_torchvision_reads_it(name, tmp_path):
    from torchvision import datasets

    pictures = cifar.read_cifar(write_cifar(tmp_path, name))
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    unchecked = type(
        "Unchecked", (kind,), {"_check_integrity": lambda self: True, "_load_meta": lambda self: None}
    )
    theirs = unchecked(tmp_path, train=False)
    np.testing.assert_array_equal(pictures.images.permute(0, 2, 3, 1).numpy(), theirs.data)
    assert pictures.labels.tolist() == theirs.targets
    assert pictures.names == ["maple tree", "cat"]
    count = len(cifar.read_cifar(tmp_path, "train").labels)
    assert count == 6 * len(cifar.LAYOUTS[name].files["train"])


def test_cifar_is_classified(run, tmp_path):
    made = open_labelled(run, write_cifar(tmp_path, "cifar10"), show=False)
    assert made.truth.tolist() == np.eye(2, dtype=bool)[[0, 1, 1, 0, 1, 0]].tolist()
    pixels = cifar.read_cifar(tmp_path).images[2].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    alone = zero_shot.classify(run, file.getvalue(), made.labels)
    found = zero_shot.measure(run, made)
    assert found.confidence[2] == pytest.approx(alone["probability"].iloc[0], abs=0.02)  # PIL scales it there


class Harm:
    def __reduce__(self):
        return print, ("harm",)


class Numpy:
    """Pickles as a call of one of NumPy's own names, with a state."""

    def __init__(self, function, args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def made_by_numpy(kind, shape, data):
    """An array as NumPy pickles it, of a type, shape and bytes that need not agree."""
    reconstruct = np.zeros(1).__reduce__()[0]
    return Numpy(reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(kind), False, data))


def shared(kind, depth):
    """A small file that describes 2^depth values."""
    value = kind([1])
    for _ in range(depth):
        value = kind([value, value])
    return value


HOSTILE = {
    "an array's constructor": (Numpy(np.ndarray, ((10**13,), np.dtype("O"))), "not enough values"),
    "objects from bytes": (made_by_numpy("O", (3072,), b"\1" * 8 * 3072), "type 'O8', not u1"),
    "a shape without bytes": (made_by_numpy("u1", (10**13, 3072), b"\1" * 3071), "cannot reshape"),
    "numbers beyond 64 bits": ([2**4000] * 2, "state"),
    "lists in lists": (shared(list, 60), "state"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_cifar_file_harms_the_process(name, tmp_path):
    folder = write_cifar(tmp_path, "cifar10") / "cifar-10-batches-py"
    data, cause = HOSTILE[name]
    (folder / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": [0, 1]}))
    with pytest.raises(
        LabError, match=f"test_batch is not one of CIFAR's files .*({cause}).*; download the set"
    ):
        cifar.read_cifar(tmp_path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (pickle.dumps({"data": 1})[:-4], "pickle data was truncated"),
        (b".", "unpickling stack underflow"),
    ],
)
def test_a_damaged_pickle_of_cifar_is_refused(content, cause, tmp_path):
    folder = write_cifar(tmp_path, "cifar10") / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(LabError, match=f"test_batch is not one of CIFAR's files .*{cause}"):
        cifar.read_cifar(tmp_path)


def test_labels_and_names_of_other_kinds_are_refused(tmp_path):
    folder = write_cifar(tmp_path, "cifar10") / "cifar-10-batches-py"
    pixels = np.zeros((1, 3072), "u1")
    for labels in (shared(list, 60), [2**70], [True], [0.0], {"a": 1}):
        (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
        with pytest.raises(LabError, match="labels without images or names|asks for the operation"):
            cifar.read_cifar(tmp_path)
    with open(folder / "batches.meta", "wb") as file:
        file.write(pickle.dumps({"label_names": shared(list, 60)}))
    with pytest.raises(LabError, match=r"batches.meta is not one of CIFAR's files \(its class names"):
        cifar.read_cifar(tmp_path)
    os.truncate(folder / "test_batch", 0)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a"]}))
    os.truncate(folder / "test_batch", 60 * 10**9)  # sparse: no byte of it is on the disk
    with pytest.raises(
        LabError, match=r"test_batch has 60,000,000,000 bytes; such a file has at most 1,073,741,824"
    ):
        cifar.read_cifar(tmp_path)


def test_cifar_files_run_no_code_and_damage_is_named(tmp_path, capsys):
    folder = write_cifar(tmp_path, "cifar10") / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(LabError, match="it asks for builtins.print"):
        cifar.read_cifar(tmp_path)
    assert capsys.readouterr().out == ""
    (folder / "test_batch").write_bytes(pickle.dumps({"data": np.zeros((2, 3072), "u1"), "labels": [0, 7]}))
    with pytest.raises(LabError, match="labels without images or names"):
        cifar.read_cifar(tmp_path)
    with pytest.raises(LabError, match="split 'val' does not exist"):
        cifar.read_cifar(tmp_path, "val")
    with pytest.raises(LabError, match="has no cifar-10-batches-py or cifar-100-python"):
        cifar.read_cifar(folder / "nowhere")


def test_the_summary_of_nothing_has_its_columns():
    table = zero_shot.summary_table([])
    assert (len(table), table.index.name) == (0, "set")
    assert list(table) == [
        "top1 (%)", "top5 (%)", "chance (%)", "calibration_error (%)", "images", "labels", "left_out", "rule",
    ]  # fmt: skip
