"""Heads: what each computes, its shape, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from config import make_config
from core.errors import LabError
from models import HEADS, HeadOptions, build_model

pytestmark = pytest.mark.usefixtures("float64")  # sums of fewer than 100 terms: right to 100 * 2.2e-16
SMALL = HeadOptions(hidden_dim=24, dropout=0.3, num_heads=2, num_layers=2, num_tokens=3)


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"identity"}))
def test_every_head_maps_widths_and_drops_out_only_in_training(name):
    torch.manual_seed(0)
    head = HEADS[name](10, 6, SMALL)
    rows = torch.randn(4, 10)
    assert head(rows).shape == (4, 6)
    assert not torch.equal(head(rows), head(rows))
    head.eval()
    assert torch.equal(head(rows), head(rows))
    assert torch.allclose(head(rows[1:2]), head(rows)[1:2], atol=1e-12)  # a row does not see the others
    head(rows).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_siglip_is_layer_norm_and_a_matrix():
    head = HEADS["siglip"](10, 6, SMALL).eval()
    rows = torch.randn(4, 10)
    centred = rows - rows.mean(dim=1, keepdim=True)
    normed = centred / (centred.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(head(rows), normed @ head[2].weight.T, atol=1e-12)
    assert head[2].bias is None
    assert torch.allclose(head(3 * rows + 1), head(rows), atol=1e-4)  # its epsilon


def test_clip_is_an_mlp_over_normed_features_without_a_last_bias():
    head = HEADS["clip"](10, 6, SMALL).eval()
    rows = torch.randn(4, 10)
    hidden = F.gelu(F.layer_norm(rows, (10,)) @ head[1].weight.T + head[1].bias)
    assert torch.allclose(head(rows), hidden @ head[4].weight.T, atol=1e-12)


def test_mlp_has_the_documented_shape_with_and_without_layer_norm():
    plain = HEADS["mlp"](10, 6, SMALL).eval()
    assert [type(layer).__name__ for layer in plain] == ["Linear", "GELU", "Dropout", "Linear"]
    normed = HEADS["mlp"](10, 6, HeadOptions(hidden_dim=24, layer_norm=True)).eval()
    assert type(normed[-1]).__name__ == "LayerNorm"
    outputs = normed(torch.randn(4, 10))
    assert torch.allclose(outputs.mean(dim=1), torch.zeros(4), atol=1e-12)
    assert torch.allclose(outputs.var(dim=1, unbiased=False), torch.ones(4), atol=1e-2)


def _attended(head, rows):
    """Attention head by hand: scaled dot products over each row's own tokens."""
    tokens = head.split(rows).view(len(rows), SMALL.num_tokens, -1) + head.positions
    for layer in head.layers:
        normed = layer.norm1(tokens)
        query, key, value = (
            normed @ w.T + b
            for w, b in zip(
                layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3), strict=True
            )
        )
        heads = [part.unflatten(2, (SMALL.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        scores = heads[0] @ heads[1].transpose(2, 3) / heads[0].shape[-1] ** 0.5  # (B, heads, N, N)
        mixed = (scores.softmax(dim=-1) @ heads[2]).transpose(1, 2).flatten(2)
        tokens = tokens + layer.self_attn.out_proj(mixed)
        tokens = tokens + layer.linear2(F.gelu(layer.linear1(layer.norm2(tokens))))
    return head.project(head.norm(tokens.flatten(1))), scores.softmax(dim=-1)


def test_attention_looks_over_several_tokens():
    torch.manual_seed(0)
    head = HEADS["attention"](10, 6, SMALL).eval()
    rows = torch.randn(4, 10)
    expected, weights = _attended(head, rows)
    with torch.inference_mode():
        assert torch.allclose(head(rows), expected, atol=1e-12)
    assert weights.shape == (4, 2, 3, 3)
    assert weights.std() > 0.01  # over one token every weight would be 1
    first, second = head.layers[0].linear1.weight, head.layers[1].linear1.weight
    assert not torch.equal(first, second)


def test_attention_names_the_multiple_it_needs():
    with pytest.raises(
        LabError, match=r"head_hidden_dim 20 into 3 tokens of 2 heads; make it a multiple of 6"
    ):
        HEADS["attention"](10, 6, HeadOptions(hidden_dim=20, num_tokens=3, num_heads=2))


@pytest.mark.parametrize("name", ["siglip", "clip", "attention"])
def test_batch_norm_is_refused_where_there_is_none(name):
    config = make_config("projection_heads", image_head=name, text_head="mlp", use_batch_norm=True)
    with pytest.raises(LabError, match=f"head '{name}' has LayerNorm and takes no BatchNorm"):
        build_model(config)


def test_the_configuration_reaches_both_heads():
    config = make_config(
        "projection_heads",
        image_head="attention",
        text_head="clip",
        head_hidden_dim=32,
        head_num_heads=2,
        head_num_tokens=4,
        head_num_layers=3,
        head_dropout=0.25,
        embed_dim=16,
    )
    model = build_model(config)
    assert model.image_head.split.weight.shape == (32, 1280)
    assert (len(model.image_head.layers), model.image_head.positions.shape) == (3, (4, 8))
    assert model.image_head.layers[0].dropout.p == 0.25
    assert model.text_head[1].weight.shape == (32, 384)
    features = model(torch.randn(2, 1280), torch.randn(3, 384))
    assert features["image_features"].shape == (2, 16)
    assert torch.allclose(features["text_features"].norm(dim=1), torch.ones(3))
