"""Texts, pictures and combinations find what a written-out product says; files and mistakes are told."""

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
from reports.search import GallerySearch, search_text
from sources.decode import UndecodableImage, decode_rgb
from towers.features import image_features, text_features
from utils import load_run

PICTURES, CAPTIONS = 12, 3


def write_run(home, name, seed=0):
    """A run's folder with the weights of an untrained model, over small pictures in COCO's layout."""
    config = make_config(
        "quickstart",
        data_dir=home / "coco",
        cache_dir=home / "cache",
        runs_dir=home / "runs",
        test_splits=("val",),
        image_size=32,
        device="cpu",
        seed=seed,
    )
    folder = home / "runs" / name
    config.save(folder / "config.yaml")
    save_file(build_model(config).state_dict(), folder / "best.safetensors")
    return load_run(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    write_coco(home / "coco", {"train": 2, "val": PICTURES}, captions=CAPTIONS)
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


def files_of(gallery, items):
    return gallery.dataset.image_files(list(items))


def nearest(gallery, features, without=()):
    """Items and scores, nearest first, by a full sort."""
    scores = (gallery.image_features @ features).numpy()
    order = [item for item in np.argsort(-scores) if item not in without]
    return order, scores[order]


# ---- what is found ---------------------------------------------------------------------------------


def test_texts_find_what_the_product_says(gallery, run):
    texts = ["a red picture", "something quite dark", "a blue one"]
    found = search_text(gallery, texts, k=4)
    for text, features, one in zip(texts, text_features(run.model, run.config, texts), found, strict=True):
        order, scores = nearest(gallery, features)
        assert one.query == text
        assert one.pictures == files_of(gallery, order[:4])
        assert one.scores == pytest.approx(scores[:4].tolist(), abs=1e-5)
        assert one.correct is None
        assert one.marks == [None] * 4


def test_the_pictures_of_a_known_caption_are_marked(gallery):
    table = gallery.dataset.table
    (found,) = search_text(gallery, [table.captions_of(5)[1]], k=PICTURES)
    assert found.correct.count(True) == 1
    assert found.pictures[found.correct.index(True)] == table.path_of(5)


def test_a_picture_of_the_gallery_finds_the_others(gallery, search):
    by_number, by_file = search.by_picture([4, files_of(gallery, [4])[0]], k=PICTURES - 1)
    order, scores = nearest(gallery, gallery.image_features[4], without=[4])
    assert by_number.pictures == by_file.pictures == files_of(gallery, order)
    assert by_number.scores == pytest.approx(scores.tolist(), abs=1e-5)
    assert (by_number.query, by_file.query) == ("picture 4", by_file.asked[0].name)
    assert by_number.asked == by_file.asked


def test_another_picture_is_encoded_whatever_its_form(gallery, search, run, tmp_path):
    pixels = np.random.default_rng(5).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    content = (tmp_path / "mine.png").read_bytes()
    forms = [tmp_path / "mine.png", content, Image.fromarray(pixels), pixels]
    square = torch.from_numpy(decode_rgb(content, 32)).permute(2, 0, 1)[None]
    order, scores = nearest(gallery, image_features(run.model, run.config, square)[0])
    for found, name in zip(search.by_picture(forms, k=3), ["mine.png", *["a picture"] * 3], strict=True):
        assert found.pictures == files_of(gallery, order[:3])
        assert found.scores == pytest.approx(scores[:3].tolist(), abs=1e-5)
        assert found.query == name


def test_a_copy_of_a_picture_finds_the_original_first(gallery, search):
    (found,) = search.by_picture([files_of(gallery, [7])[0].read_bytes()], k=1)
    assert found.pictures == files_of(gallery, [7])
    assert found.scores == pytest.approx([1], abs=1e-4)


def test_a_turned_phone_picture_is_the_upright_one():
    pixels = np.random.default_rng(5).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    turned = Image.fromarray(np.rot90(pixels))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        assert np.array_equal(decode_rgb(reports_search.encoded(opened), 24), decode_rgb(file.getvalue(), 24))
    assert np.array_equal(decode_rgb(file.getvalue(), 24), decode_rgb(reports_search.encoded(pixels), 24))


def test_a_picture_finds_captions_and_its_own_are_marked(gallery, search):
    (found,) = search.captions_of([3], k=PICTURES * CAPTIONS)
    scores = (gallery.text_features @ gallery.image_features[3]).numpy()
    order = np.argsort(-scores)
    table = gallery.dataset.table
    assert found.captions == [table.captions[row] for row in order]
    assert found.scores == pytest.approx(scores[order].tolist(), abs=1e-5)
    assert found.correct.count(True) == CAPTIONS
    own = [caption for caption, mark in zip(found.captions, found.correct, strict=True) if mark]
    assert set(own) == set(table.captions_of(3))
    assert search.captions_of([np.zeros((9, 9, 3), np.uint8)], k=1)[0].correct is None


def test_a_combination_is_the_weighted_sum_without_its_own_pictures(gallery, search, run):
    texts = text_features(run.model, run.config, ["a red picture", "grass"])
    wanted = F.normalize(texts[0] + 2 * gallery.image_features[4] - 0.5 * texts[1], dim=0)
    found = search.combined([("a red picture", 1), (4, 2), ("grass", -0.5)], k=PICTURES - 1)
    order, scores = nearest(gallery, wanted, without=[4])
    assert found.pictures == files_of(gallery, order)
    assert found.scores == pytest.approx(scores.tolist(), abs=1e-5)
    assert found.query == "a red picture + 2 × picture 4 − 0.5 × grass"
    assert found.asked == files_of(gallery, [4])


# ---- the run's folder ------------------------------------------------------------------------------


def test_a_split_is_encoded_once_and_then_opened(run, gallery, monkeypatch):
    first = open_search(run, show=False)
    monkeypatch.setattr("reports.gallery.encode_loader", lambda *_, **__: pytest.fail("encoded again"))
    second = open_search(run, "val", show=False)
    for name, features in gallery.features.items():
        assert torch.equal(getattr(second.gallery, name), features)
    assert second.by_text(["a dog"], 3) == first.by_text(["a dog"], 3)
    assert second.captions_of([0], 2) == first.captions_of([0], 2)


def test_features_of_other_weights_are_encoded_again(home):
    open_search(write_run(home, "second_s0"), show=False)
    run = write_run(home, "second_s0", seed=1)
    (found,) = open_search(run, show=False).by_text(["a dog"], 3)
    (encoded,) = search_text(encode_split(run, open_split(run, "val")), ["a dog"], 3)
    assert found == encoded
    other = write_run(home, "third_s0", seed=2)
    shutil.copy(run.folder / "features_val.safetensors", other.folder)
    (found,) = open_search(other, show=False).by_text(["a dog"], 3)
    assert found == search_text(encode_split(other, open_split(other, "val")), ["a dog"], 3)[0]


def test_the_command_writes_a_grid_and_a_table(run, gallery, tmp_path):
    path = search_command(run.folder, "a red picture", k=4, folder=tmp_path)
    assert path == tmp_path / "a-red-picture.png"
    with Image.open(path) as grid:
        assert grid.width > 800
    table = pd.read_csv(path.with_suffix(".csv"))
    (found,) = search_text(gallery, ["a red picture"], 4)
    assert table["rank"].tolist() == [1, 2, 3, 4]
    assert table["picture"].tolist() == [str(picture) for picture in found.pictures]
    assert table["score"].tolist() == pytest.approx(found.scores, abs=1e-6)


def test_the_command_adds_and_subtracts(run, search, gallery, tmp_path):
    (file,) = files_of(gallery, [2])
    path = search_command(run, "red", image=str(file), minus="grass", k=3, folder=tmp_path)
    table = pd.read_csv(path.with_suffix(".csv"))
    found = search.combined([("red", 1), (2, 1), ("grass", -1)], 3)
    assert table["picture"].tolist() == [str(picture) for picture in found.pictures]
    assert table["query"][0] == f"red + {file.name} − grass"
    alone = search_command(run, image=file, k=3)
    assert alone.parent == run.folder / "search"
    assert pd.read_csv(alone.with_suffix(".csv"))["query"][0] == file.name


def test_the_command_shows_all_images_of_a_small_gallery(run, gallery, tmp_path):
    small = load_run(run.folder, max_samples=4)
    by_text = search_command(small, "red", folder=tmp_path)
    by_image = search_command(
        small, image=open_search(small).gallery.dataset.image_files([0])[0], folder=tmp_path
    )
    assert [len(pd.read_csv(path.with_suffix(".csv"))) for path in (by_text, by_image)] == [4, 3]
    with pytest.raises(LabError, match="k is 10 but the gallery has 4 rows; choose k from 1 to 4"):
        search_command(small, "red", k=10, folder=tmp_path)


def test_a_grid_shows_the_queries_pictures_first(search):
    figure = reports_search.search_grid([search.combined([("red", 1), (4, 1)], 7)])
    captions = [axes.get_xlabel() for axes in figure.axes if axes.images]
    assert len(captions) == 8
    assert captions[0] == "query"
    assert captions[1].startswith("1 · ")
    assert "red + picture 4" in [text.get_text() for text in figure.findobj(Text)]


def test_long_queries_get_file_names_of_their_own():
    names = {reports_search.file_name("a" * 80 + end) for end in "bc"}
    assert len(names) == 2
    assert max(map(len, names)) <= 67
    assert reports_search.file_name("a dog − grass") == "a-dog-minus-grass"
    assert reports_search.file_name("???") == "query"
    assert reports_search.file_name("un café") == "un-café"


# ---- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.by_text(["a dog", " "]), "text is empty; write what"),
        (lambda s: s.by_text([]), "text is empty"),
        (lambda s: s.by_text(["x"], k=0), "k is 0 but the gallery has 12"),
        (lambda s: s.by_text(["x"], k=13), "k is 13 but the gallery has 12"),
        (lambda s: s.by_picture([1], k=12), "only 11 rows have another id"),
        (lambda s: s.by_picture([]), "no picture to search by"),
        (lambda s: s.by_picture([12]), "picture 12 does not exist; the gallery's are 0 to 11"),
        (lambda s: s.by_picture([-1]), "picture -1 does not exist"),
        (lambda s: s.by_picture(["dog.jpg"]), "a picture is .* not str"),
        (lambda s: s.by_picture([np.zeros((4, 4, 3))]), r"not ndarray \(4, 4, 3\) of float64"),
        (lambda s: s.by_picture([np.zeros((4, 4, 2), np.uint8)]), r"not ndarray \(4, 4, 2\) of uint8"),
        (lambda s: s.by_text("a dog"), r"as a list; write \['a dog'\]"),
        (lambda s: s.captions_of([0], k=37), "k is 37 but the gallery has 36"),
        (lambda s: s.combined([]), "at least one text or picture"),
        (lambda s: s.combined([("a", 1), ("a", -1)]), "cancel out"),
        (lambda s: s.combined([(1, 1), (2, 1)], k=11), "k is 11 but the gallery holds 10 pictures that can"),
        (lambda s: s.combined([(1, 1)], k=0), "k is 0"),
        (lambda s: s.by_text(["a \udcff dog"]), r"the text 'a \\udcff dog' is not valid Unicode; correct it"),
        (lambda s: search_command(s.gallery.run, minus="grass"), "nothing to search for; give a text"),
    ],
)
def test_mistakes_are_named(search, call, message):
    with pytest.raises(LabError, match=message):
        call(search)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\xff\xd8\xff\xe0 cut"])
def test_a_picture_that_cannot_be_read_is_named(search, tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UndecodableImage, match="broken.jpg cannot be decoded"):
        search.by_picture([path])


def test_a_missing_and_a_cut_off_picture_are_named(search, gallery, tmp_path):
    with pytest.raises(UndecodableImage, match="none.jpg cannot be decoded: no such file"):
        search.combined([("a dog", 1), (tmp_path / "none.jpg", 1)])
    whole = files_of(gallery, [0])[0].read_bytes()
    with pytest.raises(UndecodableImage, match="cannot be read"):
        search.by_picture([Image.open(io.BytesIO(whole[:-200]))])


def test_what_is_no_gallery_of_captioned_pictures_is_named(gallery):
    other = SimpleNamespace(dataset=SimpleNamespace(split="test", table=None))
    with pytest.raises(LabError, match="'test' holds no captioned pictures"):
        GallerySearch(other)


def test_a_run_without_weights_is_named(home, run):
    folder = home / "runs" / "untrained_s0"
    run.config.save(folder / "config.yaml")
    with pytest.raises(LabError, match="holds no best.safetensors: the run has not finished an epoch"):
        open_search(load_run(folder), show=False)
