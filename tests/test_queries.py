"""Texts, images and combinations find what a written-out product says; mistakes get one sentence."""

import io
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import save_file
from small_data import write_coco

from config import make_config
from core.errors import LabError
from evaluate import open_gallery, open_search, search_command
from models import build_model
from reports import search as reports_search
from reports.gallery import encode_split, open_split
from reports.search import GallerySearch, image_file
from sources.decode import UndecodableImage, decode_rgb
from towers.features import image_features, text_features
from utils import load_run

IMAGES, CAPTIONS = 12, 3


def write_run(home, name, seed=0):
    """A run's folder with the weights of an untrained model, over small images in COCO's layout."""
    places = {"data_dir": home / "coco", "cache_dir": home / "cache", "runs_dir": home / "runs"}
    config = make_config("quickstart", **places, test_splits=("val",), image_size=32, device="cpu", seed=seed)
    folder = home / "runs" / name
    config.save(folder / "config.yaml")
    save_file(build_model(config).state_dict(), folder / "best.safetensors")
    return load_run(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    write_coco(home / "coco", {"train": 2, "val": IMAGES}, captions=CAPTIONS)
    return home


@pytest.fixture(scope="module")
def run(home):
    return write_run(home, "first_s0")


@pytest.fixture(scope="module")
def gallery(run):
    return open_gallery(run, "val", show=False)


@pytest.fixture(scope="module")
def search(gallery):
    return GallerySearch(gallery)


def assert_nearest(result, gallery, features, without=()):
    """The result is the nearest images, in order, by a full sort."""
    scores = (gallery.image_features @ features).numpy()
    order = [item for item in np.argsort(-scores) if item not in without][: len(result.images)]
    assert result.images == gallery.dataset.image_files(order)
    assert result.scores == pytest.approx(scores[order].tolist(), abs=1e-5)


# --- what is found ---


def test_texts_find_what_the_product_says(gallery, search, run):
    texts = ["a red picture", "something quite dark", "a blue one"]
    results = search.by_text(texts, k=4)
    for text, features, result in zip(
        texts, text_features(run.model, run.config, texts), results, strict=True
    ):
        assert_nearest(result, gallery, features)
        assert (result.query, result.correct, len(result.images)) == (text, None, 4)


def test_the_image_of_a_known_caption_is_marked(gallery, search):
    table = gallery.dataset.table
    (result,) = search.by_text([table.captions_of(5)[1]], k=IMAGES)
    assert result.correct.count(True) == 1
    assert result.images[result.correct.index(True)] == table.path_of(5)


def test_an_image_of_the_gallery_finds_the_others(gallery, search):
    file = str(gallery.dataset.image_files([4])[0])
    by_number, by_file = search.by_image([4, file], k=IMAGES - 1)
    assert_nearest(by_number, gallery, gallery.image_features[4], without=[4])
    assert by_number.images == by_file.images
    assert (by_number.query, by_file.query) == ("image 4", by_file.query_images[0].name)
    assert by_number.query_images == by_file.query_images


def test_another_image_is_encoded_whatever_its_form(gallery, search, run, tmp_path):
    pixels = np.random.default_rng(5).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    content = (tmp_path / "mine.png").read_bytes()
    forms = [tmp_path / "mine.png", content, Image.fromarray(pixels), pixels]
    square = torch.from_numpy(decode_rgb(content, 32)).permute(2, 0, 1)[None]
    features = image_features(run.model, run.config, square)[0]
    for result, name in zip(search.by_image(forms, k=3), ["mine.png", *["an image"] * 3], strict=True):
        assert_nearest(result, gallery, features)
        assert result.query == name
    (copy,) = search.by_image([gallery.dataset.image_files([7])[0].read_bytes()], k=1)
    assert copy.images == gallery.dataset.image_files([7])
    assert copy.scores == pytest.approx([1], abs=1e-4)


def test_a_turned_phone_image_is_the_upright_one():
    pixels = np.random.default_rng(5).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    file = io.BytesIO()
    Image.fromarray(np.rot90(pixels)).save(file, "PNG", exif=exif)
    upright = decode_rgb(image_file(pixels), 24)
    assert np.array_equal(decode_rgb(file.getvalue(), 24), upright)
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        assert np.array_equal(decode_rgb(image_file(opened), 24), upright)


def test_a_combination_is_the_weighted_sum_without_its_own_images(gallery, search, run):
    texts = text_features(run.model, run.config, ["a red picture", "grass"])
    query = F.normalize(texts[0] + 2 * gallery.image_features[4] - 0.5 * texts[1], dim=0)
    result = search.combined([("a red picture", 1), (4, 2), ("grass", -0.5)], k=IMAGES - 1)
    assert_nearest(result, gallery, query, without=[4])
    assert result.query == "a red picture + 2 × image 4 − 0.5 × grass"
    assert result.query_images == gallery.dataset.image_files([4])


# --- the run's folder ---


def test_a_split_is_encoded_once_and_then_opened(run, gallery, monkeypatch):
    first = open_search(run, show=False)
    monkeypatch.setattr("reports.gallery.encode_loader", lambda *_, **__: pytest.fail("encoded again"))
    second = open_search(run, "val", show=False)
    for name, features in gallery.features.items():
        assert torch.equal(getattr(second.gallery, name), features)
    assert second.by_text(["a dog"], 3) == first.by_text(["a dog"], 3)


def test_features_of_other_weights_are_encoded_again(home):
    def saved_and_encoded(run):
        searches = open_search(run, show=False), GallerySearch(encode_split(run, open_split(run, "val")))
        return [search.by_text(["a dog"], 3) for search in searches]

    open_search(write_run(home, "second_s0"), show=False)
    run = write_run(home, "second_s0", seed=1)
    saved, encoded = saved_and_encoded(run)
    assert saved == encoded
    other = write_run(home, "third_s0", seed=2)
    shutil.copy(run.folder / "features_val.safetensors", other.folder)
    saved, encoded = saved_and_encoded(other)
    assert saved == encoded


def test_the_command_writes_a_grid_and_a_table(run, search, tmp_path):
    path = search_command(run.folder, "a red picture", k=4, folder=tmp_path)
    assert path == tmp_path / "a-red-picture.png"
    with Image.open(path) as grid:
        assert grid.width > 800
    table = pd.read_csv(path.with_suffix(".csv"))
    (result,) = search.by_text(["a red picture"], 4)
    assert table["rank"].tolist() == [1, 2, 3, 4]
    assert table["image"].tolist() == list(map(str, result.images))
    assert table["score"].tolist() == pytest.approx(result.scores, abs=1e-6)


def test_the_command_adds_and_subtracts(run, search, gallery, tmp_path):
    (file,) = gallery.dataset.image_files([2])
    path = search_command(run, "red", image=str(file), minus="grass", k=3, folder=tmp_path)
    table = pd.read_csv(path.with_suffix(".csv"))
    result = search.combined([("red", 1), (2, 1), ("grass", -1)], 3)
    assert table["image"].tolist() == list(map(str, result.images))
    assert table["query"][0] == f"red + {file.name} − grass"
    alone = search_command(run, image=file, k=3)
    assert alone.parent == run.folder / "search"
    assert pd.read_csv(alone.with_suffix(".csv"))["query"][0] == file.name


def test_the_command_shows_all_images_of_a_small_gallery(run, tmp_path):
    small = load_run(run.folder, max_samples=4)
    (image,) = open_search(small).gallery.dataset.image_files([0])
    by_text = search_command(small, "red", folder=tmp_path)
    by_image = search_command(small, image=image, folder=tmp_path)
    assert [len(pd.read_csv(path.with_suffix(".csv"))) for path in (by_text, by_image)] == [4, 3]
    with pytest.raises(
        LabError, match="k is 10 but 4 images of the gallery can be found; choose k from 1 to 4"
    ):
        search_command(small, "red", k=10, folder=tmp_path)


def test_a_grid_shows_the_images_of_the_query_first(search):
    figure = reports_search.search_grid([search.combined([("red", 1), (4, 1)], 7)])
    captions = [axes.get_xlabel() for axes in figure.axes if axes.images]
    assert len(captions) == 8
    assert captions[0] == "query"
    assert captions[1].startswith("1 · ")
    assert "red + image 4" in [text.get_text() for text in figure.findobj(Text)]


def test_long_queries_get_file_names_of_their_own():
    names = {reports_search.file_name("a" * 80 + end) for end in "bc"}
    assert len(names) == 2
    assert max(map(len, names)) <= 67
    assert reports_search.file_name("a dog − grass") == "a-dog-minus-grass"
    assert reports_search.file_name("???") == "query"
    assert reports_search.file_name("un café") == "un-café"


# --- mistakes ---

NO_CAPTIONS = SimpleNamespace(dataset=SimpleNamespace(split="test", table=None))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.by_text(["a dog", " "]), "text is empty; write what"),
        (lambda s: s.by_text(["x"], k=0), "k is 0 but 12 images"),
        (
            lambda s: s.by_text(["x"], k=13),
            "k is 13 but 12 images of the gallery can be found; choose k from 1 to 12",
        ),
        (lambda s: s.by_image([1], k=12), "k is 12 but 11 images"),
        (lambda s: s.by_image([12]), "image 12 does not exist; the gallery's are 0 to 11"),
        (lambda s: s.by_image([-1]), "image -1 does not exist"),
        (lambda s: s.by_image([None]), "an image is .* not NoneType"),
        (lambda s: s.by_image([np.zeros((4, 4, 3))]), r"not ndarray \(4, 4, 3\) of float64"),
        (lambda s: s.by_image([np.zeros((4, 4, 2), np.uint8)]), r"not ndarray \(4, 4, 2\) of uint8"),
        (lambda s: s.by_text("a dog"), r"as a list; write \['a dog'\]"),
        (lambda s: s.combined([]), "at least one text or image"),
        (lambda s: s.combined([("a", 1), ("a", -1)]), "cancel out"),
        (lambda s: s.combined([(1, 1), (2, 1)], k=11), "k is 11 but 10 images"),
        (lambda s: s.by_text(["a \udcff dog"]), r"the text 'a \\udcff dog' is not valid Unicode; correct it"),
        (lambda s: search_command(s.gallery.run, minus="grass"), "nothing to search for; give a text"),
        (lambda s: GallerySearch(NO_CAPTIONS), "'test' has no captioned"),
    ],
)
def test_mistakes_are_named(search, call, message):
    with pytest.raises(LabError, match=message):
        call(search)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xe0 cut"])
def test_an_image_that_cannot_be_read_is_named(search, tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UndecodableImage, match="broken.jpg cannot be decoded"):
        search.by_image([path])


def test_a_missing_and_a_truncated_image_are_named(search, gallery, tmp_path):
    with pytest.raises(UndecodableImage, match="none.jpg cannot be decoded: no such file"):
        search.combined([("a dog", 1), (tmp_path / "none.jpg", 1)])
    content = gallery.dataset.image_files([0])[0].read_bytes()
    with pytest.raises(UndecodableImage, match="cannot be read"):
        search.by_image([Image.open(io.BytesIO(content[:-200]))])


def test_a_run_without_weights_is_named(home, run):
    folder = home / "runs" / "untrained_s0"
    run.config.save(folder / "config.yaml")
    with pytest.raises(LabError, match="holds no best.safetensors: the run has not finished an epoch"):
        open_search(load_run(folder), show=False)
