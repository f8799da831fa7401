"""The figures' style, their measured text, and the forms of data they take."""

from __future__ import annotations

import time

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from figures import RUNS
from matplotlib.colors import to_rgb
from PIL import Image

from core.errors import LabError
from plots import figures, style

# --- style and saving ---


def test_a_figure_is_saved_at_150_dpi_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "recall.png"
    figure = figures.recall_bars(RUNS, path)
    width, height = figure.get_size_inches()
    with Image.open(path) as saved:
        assert saved.size == (int(150 * width), int(150 * height))
        assert saved.width == 1350
        assert saved.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_session_s_own_style_changes_no_pixel(tmp_path):
    figures.recall_bars(RUNS, tmp_path / "plain.png")
    with matplotlib.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        figures.recall_bars(RUNS, tmp_path / "dark.png")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "dark.png").read_bytes()


def test_pyplot_knows_no_figure_and_a_notebook_shows_one():
    figure = figures.recall_bars(RUNS)
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
    data, size = figure._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert size["width"] == 900


@pytest.mark.parametrize("first", range(len(style.COLOURS)))
def test_palette_is_distinct_for_the_colour_blind(first):
    """Simulated deuteranopia and protanopia (Vienot et al. 1999) keep the colours apart in linear RGB."""
    simulations = {
        "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    }
    linear = np.array([to_rgb(colour) for colour in style.COLOURS]) ** 2.2
    for matrix in simulations.values():
        seen = linear @ np.array(matrix).T
        distances = np.linalg.norm(seen - seen[first], axis=1)
        assert np.delete(distances, first).min() > 0.06


# --- text ---


def test_wrapped_text_keeps_every_word_and_fits():
    text = "two children on a green field " * 3 + "https://example.org/" + "long" * 20
    lines = style.wrap(text, 2.0).split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert max(style.text_width(line, 9) for line in lines) <= 2.0
    assert style.wrap("quickstart_bn_attn_s0", 1.1).split("\n") == ["quickstart_bn_", "attn_s0"]
    assert style.wrap("a\nb", 9.0) == "a\nb"


def test_a_cut_text_says_how_much_is_missing():
    text = " ".join(f"word{number:03d}" for number in range(200))
    lines = style.wrap(text, 2.0).split("\n")
    assert len(lines) == style.MAX_LINES
    shown = " ".join(lines[:-1])
    assert text.startswith(shown)
    assert lines[-1] == f"… (+{len(text) - len(shown) - 1} characters)"


@pytest.mark.parametrize("text", ["a" * 5000, "i" * 10**6, "\u0301" * 5000], ids=["a", "i", "accents"])
def test_a_word_of_any_length_is_cut_in_no_time(text):
    started = time.process_time()
    lines = style.wrap(text, 1.9).split("\n")
    assert time.process_time() - started < 2  # each length of the whole word measured: minutes
    assert len(lines) <= style.MAX_LINES
    left_out = int(lines[-1].removeprefix("… (+").removesuffix(" characters)"))
    assert 0 <= left_out - (len(text) - len("".join(lines[:-1]))) < 20  # spaces are counted between pieces
    assert all(style.text_width(line, 9) <= 1.9 for line in lines[:-1])


def test_measured_width_covers_the_drawn_width():
    figure = style.new_figure(1.0)
    for text in ("A dog in the snow", "WWWW", "iiii", "ÄÖÜ → ✓"):
        drawn = figure.text(0, 0, text, size=9).get_window_extent().width / figure.dpi
        assert drawn <= style.text_width(text, 9) + 0.02


# --- pictures and tables ---


def test_every_form_of_a_picture_gives_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [Image.fromarray(pixels), pixels, tensor, tensor.float() / 255, tmp_path / "picture.png"]
    forms += [str(tmp_path / "picture.png"), pixels.transpose(2, 0, 1), pixels / 255]
    for form in forms:
        np.testing.assert_array_equal(style.as_picture(form), pixels)
    grey = style.as_picture(pixels[..., 0])
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, axis=-1))
    assert style.as_picture(Image.new("RGB", (2000, 1000))).shape == (240, 480, 3)


def test_a_bad_picture_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(LabError, match=r"broken\.jpg cannot be read; replace it or leave it out"):
        style.as_picture(tmp_path / "broken.jpg")
    with pytest.raises(LabError, match="undo its normalisation"):
        style.as_picture(torch.randn(3, 8, 8))
    with pytest.raises(LabError, match=r"\(2, 8, 8\) is no picture"):
        style.as_picture(np.zeros((2, 8, 8)))


def test_tables_are_read_from_every_plain_form():
    indexed = pd.DataFrame(RUNS).set_index("run")
    forms = [RUNS, pd.DataFrame(RUNS), indexed, {run["run"]: {**run} for run in RUNS}]
    for form in forms:
        pd.testing.assert_frame_equal(style.as_table(form)[indexed.columns], indexed, check_names=False)
    assert style.as_table({"i2t_recall@1": 0.5}).index.tolist() == [""]
    with pytest.raises(LabError, match="no run to draw"):
        style.as_table([])
    with pytest.raises(LabError, match="no column such as 'i2t_recall@1'"):
        figures.recall_bars({"loss": 1.0})
