"""Side-by-side images: small labeled images, their pairs, ranks against plain loops, and a run."""

import pickle
from pathlib import Path

import core.devices  # noqa: F401

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import bootstrap
from torch import nn

from config import load_config, make_config
from core.errors import LabError
from core.files import read_json
from dataset import make_loader, open_dataset
from evaluate import evaluate_run
from labs.side_by_side import evaluate_pairs, guesses, report_pairs
from losses import InfoNCELoss, SwapMarginLoss, build_loss
from metrics import metrics_table
from models import HEADS, HeadOptions, build_model
from sources.cifar import LabeledImages, open_labeled_images, subset
from sources.drawing import PAIR_CLASSES, write_shapes
from sources.side_by_side import PairedImages, PairRanks, pair_caption, rank_pairs, swapped
from train import fit
from training.augment import augment
from utils import augmented, encode_loader, load_run, split_metrics

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["apple", "aquarium fish", "bee"]
C = 4

# --- small labeled images ---


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """CIFAR-100's own files, small: 20 training and 6 test images of each of three classes."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 6)):
        labels = rng.permutation(np.repeat(np.arange(3), count)).tolist()
        data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        _dump(folder / name, {"data": data, "fine_labels": labels, "coarse_labels": labels})
    _dump(
        folder / "meta",
        {
            "fine_label_names": [name.replace(" ", "_") for name in NAMES],
            "coarse_label_names": [name.replace(" ", "_") for name in NAMES],
        },
    )
    return root


def _dump(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def _rows(images: torch.Tensor) -> set[bytes]:
    return {image.contiguous().numpy().tobytes() for image in images}


def test_no_image_is_in_two_splits_and_val_is_a_tenth_of_each_class(cifar):
    parts = {split: open_labeled_images(cifar, split) for split in ("train", "val", "test")}
    assert {split: np.bincount(part.labels).tolist() for split, part in parts.items()} == {
        "train": [18] * 3, "val": [2] * 3, "test": [6] * 3}  # fmt: skip
    assert len(_rows(torch.cat([part.images for part in parts.values()]))) == 60 + 18
    with pytest.raises(LabError, match="CIFAR has train, val, test"):
        open_labeled_images(cifar, "dev")
    with pytest.raises(LabError, match="set image_size to 32, not 64"):
        open_labeled_images(cifar, "train", size=64)


def test_class_folders_serve_as_well(tmp_path):
    for split, number, row in [("train", n, row) for n in (0, 1) for row in range(20)] + [
        ("test", 0, 0),
        ("test", 1, 0),
    ]:
        folder = tmp_path / "data" / split / ("cat", "dog")[number]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (200 * number, 10 * row, 0)).save(folder / f"{row}.png")
    (tmp_path / "data" / "test" / "cat" / "9.png").write_bytes(b"no image")
    settings = {"cache_dir": tmp_path, "size": 16}
    parts = {
        split: open_labeled_images(tmp_path / "data", split, **settings) for split in ("train", "val", "test")
    }
    assert {split: len(part.images) for split, part in parts.items()} == {"train": 36, "val": 4, "test": 2}
    assert [list(part.left_out) for part in parts.values()] == [[], [], ["test/cat/9.png"]]
    for part in parts.values():
        assert part.names == ["cat", "dog"]
        assert part.images.shape[1:] == (3, 16, 16)
        assert np.array_equal(part.images[:, 0, 0, 0].numpy() // 200, part.labels)


@pytest.mark.parametrize(
    ("count", "sizes"), [(6, [2, 2, 2]), (5, [2, 2, 0]), (8, [4, 2, 2]), (99, [18, 18, 18])]
)
def test_few_images_still_make_pairs_of_every_class_they_have(cifar, count, sizes):
    singles = open_labeled_images(cifar)
    some = subset(singles, count)
    assert np.bincount(some.labels, minlength=3).tolist() == sizes
    assert _rows(some.images) <= _rows(singles.images)
    assert len(_rows(some.images)) == sum(sizes)


def test_drawn_shapes_are_class_folders_the_same_every_time(tmp_path):
    counts = {"num_train": 10, "num_test": 3}
    first, second = (write_shapes(tmp_path / name / "shapes", **counts) for name in ("one", "two"))
    files = sorted(path.relative_to(first) for path in first.rglob("*.png"))
    assert len(files) == len(PAIR_CLASSES) * 13
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    parts = [open_labeled_images(first, split, cache_dir=tmp_path) for split in ("train", "val", "test")]
    assert [len(part.labels) for part in parts] == [90, 10, 30]
    assert len(_rows(torch.cat([part.images for part in parts]))) == 130
    is_red = np.array([name.startswith("red") for name in parts[0].names])[parts[0].labels]
    red, _, blue = parts[0].images.float().mean(dim=(2, 3)).T  # (N,)
    assert (red - blue)[is_red].min() > (red - blue)[~is_red].mean()
    assert write_shapes(first, **counts) == first
    with pytest.raises(LabError, match="holds shapes of other settings"):
        write_shapes(first, num_train=3, num_test=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(LabError, match="was not made by write_shapes"):
        write_shapes(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


# --- pairs ---


@pytest.fixture(scope="module")
def singles() -> LabeledImages:
    """18 random images of each of three classes, in mixed order."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (54, 3, 32, 32), dtype=np.uint8))
    return LabeledImages(images, rng.permutation(np.repeat(np.arange(3), 18)), NAMES)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A configuration of drawn shapes with captions as texts, so that no tower is needed."""
    root = tmp_path_factory.mktemp("shapes")
    places = {f"{name}_dir": root / name for name in ("cache", "runs")}
    write_shapes(root / "shapes", num_train=20, num_test=4)
    return make_config("paired_small", data_dir=root / "shapes", text_tower_mode="frozen", **places)


def test_a_pair_shows_what_its_caption_says(singles):
    pairs = PairedImages(singles, seed=3)
    batch = next(iter(make_loader(pairs, len(pairs))))
    assert batch["image"].shape == (54, 3, 32, 64)
    assert batch["image"].dtype == torch.uint8
    for item in range(len(pairs)):
        left, right = pairs.pair(item)
        assert torch.equal(batch["image"][item, :, :, :32], singles.images[left])
        assert torch.equal(batch["image"][item, :, :, 32:], singles.images[right])
        names = [NAMES[singles.labels[row]] for row in (left, right)]
        articles = ["a" if name == "bee" else "an" for name in names]
        assert batch["text"][item] == f"a photo of {articles[0]} {names[0]} and {articles[1]} {names[1]}"
    assert torch.equal(batch["image_id"], batch["text_id"])
    assert [pairs.captions[ident] for ident in batch["image_id"].tolist()] == batch["text"]
    assert len(set(pairs.captions)) == len(pairs.caption_match_ids) == 9
    assert torch.equal(pairs[5]["image"], batch["image"][5])


@pytest.mark.parametrize("num_pairs", [54, 18])  # in one epoch, in three
def test_every_image_stands_left_once_and_never_beside_itself(singles, num_pairs):
    pairs = PairedImages(singles, different_class_prob=0.3, num_pairs=num_pairs)
    drawn = []
    for epoch in range(54 // num_pairs):
        pairs.set_epoch(epoch)
        drawn += [pairs.pair(item) for item in range(num_pairs)]
    assert sorted(left for left, _ in drawn) == list(range(54))
    assert all(left != right for left, right in drawn)


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_the_share_of_different_classes_is_the_probability(singles, prob):
    pairs = PairedImages(singles, num_pairs=4000, different_class_prob=prob)
    drawn = np.array([pairs.pair(item) for item in range(4000)])
    labels = singles.labels[drawn]
    assert (labels[:, 0] != labels[:, 1]).mean() == pytest.approx(
        prob, abs=3.5 * (prob * (1 - prob) / 4000) ** 0.5
    )
    seen = np.bincount(drawn[:, 1], minlength=54)  # each image is as likely on the right as any other
    assert seen.min() > 4000 / 54 * 0.55
    assert seen.max() < 4000 / 54 * 1.45


def test_pairs_are_drawn_again_each_epoch_by_the_seed_unless_fixed(singles):
    def drawn(epoch, **settings):
        pairs = PairedImages(singles, **settings)
        pairs.set_epoch(epoch)
        return [pairs.pair(item) for item in range(len(pairs))]

    assert drawn(2, seed=1) == drawn(2, seed=1)
    assert drawn(2, seed=1) != drawn(3, seed=1)
    assert drawn(2, seed=1) != drawn(2, seed=2)
    assert drawn(2, fixed=True) == drawn(3, fixed=True) == drawn(0)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([0, 0, 1], {}, "set different_class_prob to 1"),
        ([0, 0, 0], {}, "set different_class_prob to 0"),
        ([0, 0, 1, 1], {"different_class_prob": 1.5}, "must be between 0 and 1, not 1.5"),
    ],
)
def test_what_makes_no_pairs_is_one_sentence(labels, settings, message):
    images = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(LabError, match=message):
        PairedImages(LabeledImages(images, np.array(labels), ["cat", "dog"]), **settings)


def test_cached_captions_are_the_rows_of_their_ids(singles):
    table = torch.arange(9.0)[:, None].repeat(1, 4)
    batch = PairedImages(singles, text_features=table).__getitems__([0, 1, 2])
    assert torch.equal(batch["text"][:, 0].long(), batch["text_id"])


def test_swapped_captions_come_last_under_ids_of_their_own(singles):
    pairs = PairedImages(singles, swapped_captions=True, seed=1)
    batch = pairs.__getitems__(list(range(12)))
    ids, extra = batch["image_id"].tolist(), batch["text_id"].tolist()[12:]
    different = [ident for ident in ids if ident // 3 != ident % 3]
    assert batch["text_id"].tolist()[:12] == ids
    assert extra == [-(ident + 2) for ident in different]
    expected = [pair_caption(NAMES[ident % 3], NAMES[ident // 3]) for ident in different]
    assert batch["text"][12:] == expected
    assert 0 < len(different) < 12


def test_each_half_is_augmented_as_an_image_of_its_own(singles):
    pairs = PairedImages(singles)
    batch = pairs.__getitems__([3, 7])
    config = make_config("paired_small", augment_rotation=0, augment_flip=1.0, augment_jitter=0)
    flipped = augmented(batch, config, 0)
    left, right = batch["image"].chunk(2, dim=3)
    assert torch.equal(flipped, torch.cat([left.flip(3), right.flip(3)], dim=3))
    config = make_config("paired_small")
    views = augmented(batch, config, 5)
    alone = augment(right[1:], [15], seed=0, epoch=5, flip=0.5, jitter=0.2, rotation=10)
    assert torch.equal(views[1:, :, :, 32:], alone)
    assert not torch.equal(views, augmented(batch, config, 6))
    whole = make_loader(pairs, 54)
    assert len(next(iter(whole))["view_id"].unique()) == 108


def test_splits_open_from_the_configuration_and_share_no_image(shapes):
    parts = {split: open_dataset(shapes, (split,)) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 180, "val": 20, "test": 40}
    assert [part.fixed for part in parts.values()] == [False, True, True]
    pixels = [{image.numpy().tobytes() for image in part.singles.images} for part in parts.values()]
    assert sum(map(len, pixels)) == len(set.union(*pixels)) == 240
    other = open_dataset(shapes.updated(seed=3), ("test",))
    assert [other.pair(item) for item in range(40)] == [parts["test"].pair(item) for item in range(40)]
    assert len({part.describe()["sha256"] for part in parts.values()}) == 3
    assert parts["train"].describe() == open_dataset(shapes, ("train",)).describe()


def test_settings_reach_the_pairs(shapes):
    config = shapes.updated(pairs_per_epoch=7, max_samples=40, different_class_prob=1.0, swap_weight=0.5)
    pairs = open_dataset(config, ("train",))
    assert (len(pairs), len(pairs.singles.images), pairs.swapped_captions) == (7, 40, True)
    ids = pairs.__getitems__(list(range(7)))["image_id"]
    assert (ids // 10 != ids % 10).all()
    assert len(open_dataset(config, ("val",))) == 20
    again = open_dataset(config, ("train",), evaluation=True)
    assert (len(again), again.fixed) == (40, True)
    with pytest.raises(LabError, match="one split at a time"):
        open_dataset(config, ("train", "val"))


class Oracle(nn.Module):
    """Knows the left class and, of the right one, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.table = nn.functional.normalize(torch.eye(3).repeat_interleave(3, 0) + 0.1 * torch.eye(9)[:, :3])

    def encode_text(self, texts):
        captions = [pair_caption(left, right) for left in NAMES for right in NAMES]
        return torch.stack([self.table[captions.index(text)] for text in texts])

    def forward(self, image, text):
        features = nn.functional.one_hot(image[:, 0, 0, 0].long(), 3).float()
        return {"image_features": features, "text_features": self.encode_text(text)}


def test_validation_measures_against_all_captions(singles):
    pixels = torch.from_numpy(singles.labels)[:, None, None, None].expand(-1, 3, 32, 32).byte()
    pairs = PairedImages(singles._replace(images=pixels.contiguous()), fixed=True, split="val")
    config, model = make_config("paired_small", device="cpu"), Oracle()
    features, _ = encode_loader(model, make_loader(pairs, 16), config, show=False)
    figures = split_metrics(model, pairs, features, config)
    left, right = singles.labels[np.array([pairs.pair(item) for item in range(54)])].T
    scores = model.table.numpy()[:, left].T  # (54, 9)
    own = scores[np.arange(54), left * 3 + right]
    assert figures["top1"] == pytest.approx(((scores >= own[:, None]).sum(1) == 1).mean())
    assert set(figures) == {"top1", "top1_same", "top1_different", "swapped", "order"}  # top10 would be all


# --- the margin between a caption and the same caption swapped ---


@pytest.mark.usefixtures("float64")
def test_the_swap_term_is_the_hinge_of_each_ordered_pair():
    torch.manual_seed(0)
    images, texts = (nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (4, 7))
    image_id = torch.tensor([1, 4, 5, 1])  # of three classes: 4 is one class twice
    text_id = torch.tensor([1, 4, 5, 1, -3, -7, -3])
    plain = InfoNCELoss(temperature=0.1)
    loss = SwapMarginLoss(plain, swap_weight=2.0, swap_margin=0.3)
    ids = {"image_id": image_id, "text_id": text_id}
    hinges = [max(0.0, 0.3 - (images[i] @ (texts[own] - texts[other])).item()) for i, own, other in
              ((0, 0, 4), (2, 2, 5), (3, 0, 4))]  # fmt: skip
    expected = plain(images, texts[:4], image_id=image_id, text_id=text_id[:4]) + 2 * np.mean(hinges)
    assert loss(images, texts, **ids).item() == pytest.approx(expected.item(), rel=1e-12)
    few = {"image_id": image_id, "text_id": text_id[:4]}
    assert torch.equal(loss(images, texts[:4], **few), plain(images, texts[:4], **few))
    assert torch.equal(loss(images, texts[:4]), plain(images, texts[:4]))


def test_the_loss_has_a_margin_where_the_configuration_asks_for_it():
    assert isinstance(build_loss(make_config("paired_small", swap_weight=0)), InfoNCELoss)
    loss = build_loss(make_config("paired_small", swap_weight=0.7, swap_margin=0.4))
    assert (loss.weight, loss.margin) == (0.7, 0.4)
    assert isinstance(loss.loss, InfoNCELoss)


def test_the_standardised_head_sees_what_tells_captions_apart():
    torch.manual_seed(0)
    head = HEADS["standardised"](6, 4, HeadOptions())
    texts = 5 + 0.01 * torch.randn(200, 6)
    spread = (texts - texts.mean(dim=0)) / (texts.var(dim=0, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(head(texts), head[-1](spread), atol=1e-4)
    for _ in range(200):
        head(texts)
    assert torch.allclose(head.eval()(texts), head[-1](spread), atol=0.02)


# --- ranks ---


@pytest.fixture(scope="module")
def scored():
    """300 images of ordered pairs of four classes, near their own caption, and the scores."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.nn.functional.normalize(torch.randn(C * C, 12, generator=generator), dim=1)
    truth = torch.randint(0, C * C, (300,), generator=generator)
    images = captions[truth] + 0.35 * torch.randn(300, 12, generator=generator)
    images = torch.nn.functional.normalize(images, dim=1)
    return images, captions, truth


def test_ranks_and_figures_equal_a_plain_loop(scored):
    images, captions, truth = scored
    ranks = rank_pairs(images, captions, truth)
    scores = (images.double() @ captions.double().T).numpy()
    swaps, hits = [], []
    for item, own in enumerate(truth.tolist()):
        left, right = divmod(own, C)
        other = right * C + left
        best = scores[item].argmax()
        assert ranks.rank[item] == 1 + sum(scores[item] > scores[item, own])
        assert ranks.first[item] == best
        assert ranks.in_order[item] == (scores[item, own] > scores[item, other])
        swaps += [best == other] if left != right else []
        hits += [best == own] if left != right else []
    figures = ranks.figures()
    assert figures["top1"] == pytest.approx((scores.argmax(axis=1) == truth.numpy()).mean())
    assert figures["swapped"] == pytest.approx(np.mean(swaps))
    assert figures["top1_different"] == pytest.approx(np.mean(hits))
    assert figures["top10"] == pytest.approx((ranks.rank <= 10).mean())
    assert "top100" not in figures
    assert 0 < figures["swapped"] < figures["top1"] < figures["order"] < 1


def test_equal_scores_count_against_the_model():
    captions = torch.ones(9, 4) / 2
    found = rank_pairs(captions[:3], captions, torch.tensor([1, 4, 8]))
    assert found.rank.tolist() == [9, 9, 9]
    assert found.figures()["top1"] == found.figures()["order"] == 0.0
    assert (found.first != found.truth).all()


def test_figures_of_nothing_are_left_out():
    ranks = PairRanks(np.array([0, 4, 8]), np.array([1, 2, 1]), np.array([0, 1, 8]), np.zeros(3, bool), 3)
    assert ranks.figures() == {"top1": pytest.approx(2 / 3), "top1_same": pytest.approx(2 / 3)}


def test_intervals_equal_those_of_scipy(scored):
    ranks = rank_pairs(*scored)
    swaps = (ranks.first == swapped(ranks.truth, C))[ranks.different]
    for name, hits in (("top1", ranks.rank == 1), ("swapped", swaps)):
        theirs = bootstrap((hits.astype(float),), np.mean, n_resamples=3000, method="percentile", rng=0)
        assert ranks.intervals(samples=3000)[name] == pytest.approx(
            tuple(theirs.confidence_interval), abs=0.012
        )


def test_classes_are_counted_where_they_stand(scored):
    found = rank_pairs(*scored)
    table = found.by_class(list("abcd"))
    left, right = np.divmod(found.truth, C)
    for label, name in enumerate("abcd"):
        shown = (left == label) | (right == label)
        assert table.loc[name, "images"] == shown.sum()
        assert table.loc[name, "top1"] == pytest.approx((found.rank[shown] == 1).mean())
        assert table.loc[name, "named on the right"] == pytest.approx(
            (found.first[right == label] % C == label).mean()
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, captions: (images, captions[:15]), "15 captions are not those of all ordered pairs"),
        (lambda images, captions: (images * float("nan"), captions), "features are not finite"),
    ],
)
def test_what_cannot_be_ranked_is_one_sentence(scored, change, message):
    images, captions, truth = scored
    with pytest.raises(LabError, match=message):
        rank_pairs(*change(images, captions), truth)


# --- runs ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs with a tiny tower and captions encoded as they are needed."""
    root = tmp_path_factory.mktemp("pairs")
    write_shapes(root / "shapes", num_train=20, num_test=2)
    config = make_config(
        "paired_small", data_dir=root / "shapes", cache_dir=root / "cache", runs_dir=root / "runs", device="cpu",
        image_width=16, image_num_layers=1, image_num_heads=2, num_epochs=2, batch_size=60, swap_weight=0.5,
        precision="fp32",
    )  # fmt: skip
    return fit(config, show=False)


def test_a_run_learns_from_pairs_and_chooses_its_epoch_by_top1(run):
    assert run.finished
    assert run.best_epoch == run.history["top1"].argmax() + 1
    assert {"swapped", "order", "top10"} <= set(run.history)
    assert run.history["train_loss"].iloc[1] < run.history["train_loss"].iloc[0]


def test_the_same_seed_gives_the_same_bits(run, tmp_path):
    again = fit(run.config.updated(runs_dir=tmp_path, deterministic=True), show=False)
    ours, theirs = (load_file(of.folder / "best.safetensors") for of in (run, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_report_writes_what_was_measured(run):
    results = report_pairs(run, show=False)
    kept = read_json(run.folder / "metrics.json")
    assert {split: kept[split]["num_images"] for split in kept} == {"train": 180, "val": 20, "test": 20}
    for split, metrics in kept.items():
        assert metrics == results[split].metrics
        assert metrics["top1_low"] <= metrics["top1"] <= metrics["top1_high"]
        assert (metrics["num_texts"], metrics["top1_chance"]) == (100, 0.01)
    assert kept["val"]["top1"] == pytest.approx(run.history["top1"].max())
    table = metrics_table(load_run(run.folder).metrics).reset_index()
    assert table["split"].unique().tolist() == ["train", "val", "test"]
    assert table["top10"].tolist()[1::2] == ["10.0"] * 3  # by chance
    for name in ("tables/results.md", "tables/pairs_by_class.csv", "figures/pair_examples.png",
                 "figures/learning_curves.png", "report.html"):  # fmt: skip
        assert (run.folder / name).stat().st_size > 0
    words = guesses(results["test"], range(20))
    hits = results["test"].ranks.rank == 1
    assert [text.startswith("✓ a photo of") for text in words] == hits.tolist()


def test_the_common_evaluation_measures_side_by_side_images(run):
    pairs = evaluate_pairs(run, ["test"], show=False)["test"].metrics
    assert evaluate_run(load_run(run.folder), again=True, show=False)["test"] == pairs
    low, top1, high = (f"{100 * pairs[name]:.1f}" for name in ("top1_low", "top1", "top1_high"))
    assert metrics_table({"test": pairs})["top1"].tolist() == [f"{top1} [{low}, {high}]", "1.0"]


def test_mistakes_are_one_sentence(run):
    run.config.reader = "coco"
    with pytest.raises(LabError, match="was trained on reader 'coco'"):
        evaluate_pairs(run, show=False)
    run.config.reader = "paired_cifar"


# --- settings ---


def test_the_json_file_is_the_preset_with_its_documented_values():
    config = load_config(ROOT / "configs" / "paired_cifar.json")
    documented = dict(
        batch_size=32, learning_rate=1e-4, num_epochs=20, warmup_epochs=2, weight_decay=0.01, max_grad_norm=1.0,
        temperature=0.07, image_patch_size=8, image_width=768, image_num_layers=6, image_num_heads=12,
    )  # fmt: skip
    assert {name: config[name] for name in documented} == documented
    baseline = make_config("paired_cifar_baseline")
    assert {name: baseline[name] for name in documented} == documented
    assert config.image_head == baseline.image_head == make_config("paired_cifar").image_head == "mlp"


def test_the_documented_tower_reads_two_images_side_by_side():
    config = make_config("paired_cifar_baseline", text_tower="minilm")
    with torch.device("meta"):
        tower = build_model(config).image_encoder
    assert tower.image_shape == (32, 64)
    assert tower.grid == (4, 8)
    assert 42e6 < sum(p.numel() for p in tower.parameters()) < 43e6  # 6 * 12 * 768^2 + patches
