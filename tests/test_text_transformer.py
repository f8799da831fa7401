"""CLIP's text transformer against transformers', its tokenizer against open_clip's, and the tower of both."""

import core.devices  # noqa: F401

import numpy as np
import pytest
import torch
import transformers
from open_clip import SimpleTokenizer
from small_data import SHARED, write_coco

from config import make_config
from core.errors import LabError
from dataset import check_data
from reports.export import text_config
from towers import text as towers_text
from towers.text import clean, clip_tokenizer
from towers.transformer import TextTransformer

CAPTIONS = [
    "a dog runs through the snow",
    "",
    "  Two   CIRCLES,\tone &amp; a half... don't WE'LL I'M 'LL  ",
    "price: 3.14 for 1234567890½² a_b-c!?",
    "naïve café İstanbul ÅÉ ﬁ ΑΒΓΣ",
    "日本語 😀 🏳️‍🌈 e\u0301 \u212b",
    "itâ€™s broken â€œtextâ€\x9d \x07",
    "word " * 120,
    "<|startoftext|> marks written out <|endoftext|>",
]


def theirs(tokenizer: SimpleTokenizer, text: str) -> list[int]:
    return [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]


def tiny(**options) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(24, 2, 4, **options).eval()


# ---------------------------------------------------------------- the tokenizer


def test_ids_equal_open_clips():
    other = SimpleTokenizer()
    assert clip_tokenizer()(CAPTIONS)["input_ids"] == [theirs(other, text) for text in CAPTIONS]
    assert len(clip_tokenizer()) == other.vocab_size == 49408


def test_cut_ids_equal_open_clips():
    other = SimpleTokenizer()(CAPTIONS)
    ours = towers_text.transformer(text_width=8, text_num_layers=1, text_num_heads=1).tokenize(CAPTIONS)
    for row, mask, expected in zip(ours["input_ids"], ours["attention_mask"], other, strict=True):
        assert row[mask.bool()].tolist() == expected[: mask.sum()].tolist()
        assert not expected[mask.sum() :].any()


@pytest.mark.skipif(
    not (SHARED / "flickr8k").is_dir(), reason="needs Flickr8k's captions beside the repository"
)
def test_ids_of_flickr8k_equal_open_clips():
    lines = (SHARED / "flickr8k" / "captions.txt").read_text(encoding="utf-8").splitlines()[1::20]
    captions = [line.split(",", 1)[1] for line in lines]
    other = SimpleTokenizer()
    assert len(captions) > 2000
    assert clip_tokenizer()(captions)["input_ids"] == [theirs(other, text) for text in captions]


def test_cleaning():
    assert clean("  It&#39;s\tA\nâ€œDOGâ€\x9d ") == 'it\'s a "dog"'


def test_the_data_check_counts_captions_that_are_cut(tmp_path):
    root = write_coco(tmp_path / "coco", {"train": 2, "val": 1}, captions=1)
    path = root / "annotations" / "captions_val2014.json"
    path.write_text(path.read_text().replace("told 0 times", "word " * 90))
    config = make_config("clip_from_scratch_small", data_dir=root, cache_dir=tmp_path / "cache", source=None)
    table = check_data(config, tmp_path)
    row = table.loc["captions over 77 tokens"]
    assert row["count"] == 1
    length = len(theirs(SimpleTokenizer(), "a picture number 3 of tint [0, 0, 0], " + "word " * 90))
    longest = int(row["detail"].split()[-1])
    assert abs(longest - length) <= 6  # the tint's digits differ
    assert row["detail"].startswith(f"{longest - 77} tokens cut")


# ---------------------------------------------------------------- the transformer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_it_equals_transformers_clip(activation):
    ours = tiny(activation=activation)
    other = transformers.CLIPTextModel(text_config(ours)).eval()
    other.load_state_dict(ours.state_dict())
    tokens = clip_tokenizer()(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = other(**tokens).pooler_output
        torch.testing.assert_close(ours(**tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("float64")
def test_padding_and_what_stands_behind_the_end_change_nothing():
    ours = tiny()
    ids = torch.tensor([[49406, 320, 1929, 49407]])
    longer = torch.tensor([[49406, 320, 1929, 49407, 49407, 5, 0]])
    torch.testing.assert_close(ours(ids), ours(longer))
    other = torch.tensor([[49406, 320, 1930, 49407]])
    assert not torch.allclose(ours(ids), ours(other), atol=1e-3)


def test_texts_over_the_context_are_refused():
    with pytest.raises(LabError, match="a text of 78 tokens is too long; the maximum is 77"):
        tiny()(torch.ones(1, 78, dtype=torch.long))


@pytest.mark.usefixtures("float64")
def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = tiny(gradient_checkpointing=checkpointing).train()
        model(clip_tokenizer()(CAPTIONS[:3], padding=True, return_tensors="pt")["input_ids"]).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, again = gradients
    assert max((plain[name] - again[name]).abs().max() for name in plain) < 1e-12


# ---------------------------------------------------------------- the tower


def test_the_tower_takes_captions_or_tokens_and_learns():
    tower = towers_text.transformer(text_width=16, text_num_layers=1, text_num_heads=2)
    assert (tower.width, tower.max_length) == (16, towers_text.TEXT_SETTINGS["transformer"][1])
    assert tower.lengths(CAPTIONS)[:2] == [8, 2]
    assert max(tower.lengths(CAPTIONS)) == 77
    features = tower(CAPTIONS)
    torch.testing.assert_close(features, tower(tower.tokenize(CAPTIONS)))
    features[:, 0].sum().backward()
    rows = tower.encoder.embeddings.token_embedding.weight.grad.abs().sum(dim=1).nonzero().flatten()
    used = np.unique(np.concatenate(tower.tokenizer(CAPTIONS, truncation=True, max_length=77)["input_ids"]))
    assert rows.tolist() == used.tolist()


def test_it_has_nothing_to_cache():
    with pytest.raises(LabError, match="set text_tower_mode to 'trainable'"):
        towers_text.text_width("transformer")
    with pytest.raises(LabError, match="leave text_model empty"):
        towers_text.transformer("some/model")
