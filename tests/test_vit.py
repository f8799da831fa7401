"""Vision towers against transformers' own: the built-in transformer, and pretrained CLIPs."""

import math
from pathlib import Path

import core.devices  # noqa: F401

import pytest
import torch
import transformers
from torch.nn import functional as F

from config import make_config
from core.errors import LabError
from labs.scratch import CAPTION, memory_need
from losses import build_loss
from models import build_model
from towers import image as towers_image
from towers import text as towers_text
from towers import transformer
from towers.image import build_image_tower
from towers.transformer import Encoder, VisionTransformer, initialise
from training.optim import build_optimizer

TINY = dict(hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)


def tiny(shape=32, patch=8, **options) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(shape, patch, 24, 3, 4, **options).eval()


def pictures(height=32, width=32, count=3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def reference(tower: VisionTransformer, activation: str) -> transformers.CLIPVisionModel:
    """transformers' CLIP with the same weights."""
    config = transformers.CLIPVisionConfig(
        **TINY, image_size=32, patch_size=8, hidden_act=activation, attn_implementation="eager"
    )
    model = transformers.CLIPVisionModel(config)
    model.load_state_dict(tower.state_dict())
    return model.eval()


# ---------------------------------------------------------------- the built-in transformer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_it_equals_transformers_clip(activation):
    tower = tiny(activation=activation)
    pixels = tower.normalise(pictures())
    with torch.no_grad():
        theirs = reference(tower, activation)(pixel_values=pixels)
        torch.testing.assert_close(tower(pictures()), theirs.pooler_output, atol=1e-5, rtol=0)
        torch.testing.assert_close(tower.tokens(pixels), theirs.last_hidden_state, atol=1e-5, rtol=0)


def test_activations_differ():
    assert not torch.allclose(tiny()(pictures()), tiny(activation="quick_gelu")(pictures()), atol=1e-3)


@pytest.mark.usefixtures("float64")
def test_attention_maps_are_the_rollout_of_transformers_attentions():
    tower = tiny()
    theirs = reference(tower, "gelu")(pixel_values=tower.normalise(pictures()), output_attentions=True)
    rollout = torch.eye(17).expand(3, 17, 17)
    for layer in theirs.attentions:  # (B, heads, N, N)
        mixed = layer.mean(dim=1) + torch.eye(17)
        rollout = mixed / mixed.sum(dim=2, keepdim=True) @ rollout
    expected = rollout[:, 0, 1:] / rollout[:, 0, 1:].sum(dim=1, keepdim=True)
    maps = tower.attention_maps(pictures())
    assert maps.shape == (3, 4, 4)
    torch.testing.assert_close(maps.flatten(1), expected, atol=1e-6, rtol=0)  # their softmax is float32


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_wide_pictures(pooling):
    tower = tiny((32, 64), pooling=pooling, initialisation="xavier")
    assert tower.grid == (4, 8)
    assert tower.embeddings.position_embedding.weight.shape == (33, 24)
    assert tower(pictures(32, 64)).shape == (3, 24)
    feature_map = tower.feature_map(pictures(32, 64))
    assert feature_map.shape == (3, 24, 4, 8)
    if pooling == "mean":
        torch.testing.assert_close(feature_map.mean(dim=(2, 3)), tower(pictures(32, 64)))
    maps = tower.attention_maps(pictures(32, 64))
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(3))


@pytest.mark.usefixtures("float64")
def test_the_feature_map_keeps_places():
    tower = tiny((8, 16), patch=8)
    with torch.no_grad():
        tokens = tower.post_layernorm(tower.tokens(pictures(8, 16)))
    torch.testing.assert_close(tower.feature_map(pictures(8, 16))[:, :, 0, 1], tokens[:, 2])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tiny(30), "patches of 8 pixels do not divide images of 30 x 30"),
        (lambda: VisionTransformer(32, 8, 24, 1, 5), "width 24 cannot have 5 heads"),
        (lambda: tiny(pooling="max"), "choose one of class, mean"),
        (lambda: tiny(activation="relu"), "Choose one of: gelu, quick_gelu"),
        (lambda: tiny(initialisation="zeros"), "choose one of clip, xavier"),
        (lambda: tiny()(pictures(64, 64)), "takes 32 x 32 images, not 64 x 64"),
        (lambda: towers_image.vit("pretrained"), "set image_weights to 'random'"),
        (lambda: towers_image.image_width("vit"), "no pretrained weights"),
    ],
)
def test_what_cannot_be_built_is_said(make, words):
    with pytest.raises(LabError, match=words):
        make()


def test_xavier_and_clip_deviations():
    torch.manual_seed(0)
    encoder = Encoder(4, 64, 4)
    bounds = {"q_proj": math.sqrt(6 / 128), "fc1": math.sqrt(6 / 320)}
    initialise(encoder, "xavier")
    weights = {name.split(".")[-2]: value for name, value in encoder.named_parameters() if value.ndim == 2}
    for name, bound in bounds.items():
        assert 0.95 * bound < weights[name].abs().max() <= bound
    initialise(encoder, "clip")
    deviations = {"q_proj": 64**-0.5, "out_proj": 512**-0.5, "fc1": 128**-0.5, "fc2": 512**-0.5}
    for name, deviation in deviations.items():
        assert weights[name].std().item() == pytest.approx(deviation, rel=0.05)


# ---------------------------------------------------------------- memory


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(dropout):
    gradients = []
    for checkpointing in (False, True):
        tower = tiny(gradient_checkpointing=checkpointing, dropout=dropout).train()
        torch.manual_seed(5)
        tower(pictures()).square().sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
    plain, again = gradients
    assert max((plain[name] - again[name]).abs().max() for name in plain) < 1e-12


def test_gradient_checkpointing_keeps_less():
    kept = {}
    for checkpointing in (False, True):
        tower = tiny(gradient_checkpointing=checkpointing).train()
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tower(pictures())
        kept[checkpointing] = sum(sizes.values())
    assert kept[True] < kept[False] / 3


def test_two_steps_at_full_size():
    config = make_config("clip_from_scratch", batch_size=2)
    model = build_model(config)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    assert sizes["image tower"] == 85_799_424  # ViT-B/16 without its projection
    assert sizes["text tower"] == (49408 + 77) * 512 + 8 * 3_152_384 + 1024
    assert sizes["image head"] + sizes["text head"] == 768 * 512 + 512 * 512
    optimizer, criterion = build_optimizer(model, config), build_loss(config)
    before = {name: p.sum().item() for name, p in model.named_parameters()}
    losses = []
    for _ in range(2):
        loss = criterion(**model(pictures(224, 224, count=2), ["a dog in the snow", "two red circles"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)  # an untrained model knows nothing of two pairs
    assert math.isfinite(losses[1])
    still = [name for name, p in model.named_parameters() if p.sum().item() == before[name]]
    assert [name for name in still if not name.endswith("k_proj.bias")] == []  # softmax ignores that bias


def test_the_memory_a_step_needs():
    config = make_config("clip_from_scratch_small", captions_per_image=1)
    need, twice = memory_need(config, 10), memory_need(config, 20)
    weights = 4 * sum(p.numel() for p in build_model(config).parameters())
    assert need.loc[["weights", "gradients", "AdamW"], "plain"].tolist() == pytest.approx(
        [weights / 1e9, weights / 1e9, 2 * weights / 1e9]
    )
    words = len(towers_text.text_tokenizer("transformer")([CAPTION])["input_ids"][0])
    numbers = 16 * (65 * 128 * 4 + words * 128 * 2)  # a block keeps 16 numbers a token and channel
    assert need.loc["activations", "plain"] == pytest.approx(10 * 4 * numbers / 1e9, rel=0.15)
    assert twice.loc["activations", "plain"] == pytest.approx(2 * need.loc["activations", "plain"])
    assert need.loc["activations", "checkpointing"] < need.loc["activations", "plain"] / 3


# ---------------------------------------------------------------- pretrained CLIPs


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP of pictures and texts, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=dict(**TINY, image_size=32, patch_size=8),
        text_config=dict(**TINY, vocab_size=49408, eos_token_id=49407),
        projection_dim=20,
        logit_scale_init_value=3.0,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        folder
    )
    towers_text.text_tokenizer("transformer").save_pretrained(folder)
    return folder


def clip_config(folder, **changes):
    settings = dict(
        image_tower="clip",
        image_weights=str(folder),
        text_tower="clip",
        text_model=str(folder),
        text_tower_mode="trainable",
        image_head="identity",
        text_head="identity",
        embed_dim=20,
        image_size=32,
        learn_temperature=True,
    )
    return make_config(**{**settings, **changes})


def test_a_pretrained_clip_keeps_its_space_and_its_temperature(clip_folder):
    model = build_model(clip_config(clip_folder)).eval()
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    pixels = (pictures().float() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.4, 0.5, 0.6]
    ).view(3, 1, 1)
    tokens = transformers.AutoTokenizer.from_pretrained(clip_folder)(
        ["a dog", "two red circles"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        image = F.normalize(whole.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        text = F.normalize(whole.get_text_features(**tokens).pooler_output, dim=-1)
        ours = model(pictures(), ["a dog", "two red circles"])
    torch.testing.assert_close(ours["image_features"], image, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["text_features"], text, atol=1e-5, rtol=0)
    assert ours["logit_scale"].item() == pytest.approx(math.exp(3), rel=1e-5)
    assert towers_image.image_width("clip", str(clip_folder)) == model.image_encoder.width == 20
    assert towers_image.image_size("clip", str(clip_folder)) == 32


def test_other_heads_start_from_the_configured_temperature(clip_folder):
    config = clip_config(clip_folder, image_head="linear", temperature=0.05)
    assert build_model(config).temperature == pytest.approx(0.05)


def test_the_projected_map_averages_nothing_away(clip_folder):
    tower = towers_image.clip_vision(str(clip_folder)).eval()
    body = tower.body
    with torch.no_grad():
        hidden = body(pixel_values=tower.normalise(pictures())).last_hidden_state
        expected = body.visual_projection(body.vision_model.post_layernorm(hidden[:, 1 + 4 * 2 + 3]))
        torch.testing.assert_close(tower.feature_map(pictures())[:, :, 2, 3], expected)


@pytest.mark.usefixtures("float64")
def test_both_clip_towers_learn_and_checkpointing_changes_nothing(clip_folder):
    gradients = []
    for checkpointing in (False, True):
        model = build_model(clip_config(clip_folder, gradient_checkpointing=checkpointing))
        build_loss(make_config())(**model(pictures(), ["a dog", "a cat", "a red circle"])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, again = gradients
    assert [name for name, gradient in plain.items() if gradient is None] == []
    assert max((plain[name] - again[name]).abs().max() for name in plain) < 1e-12


def test_freezing_layers_and_projections(clip_folder):
    model = build_model(
        clip_config(clip_folder, image_freeze_layers=2, text_freeze_layers=3, freeze_projections=True)
    )
    learn = [name for name, p in model.image_encoder.named_parameters() if p.requires_grad]
    assert all("layers.2." in name or "post_layernorm" in name for name in learn)
    assert any("layers.2." in name for name in learn)
    learn = [name for name, p in model.text_encoder.named_parameters() if p.requires_grad]
    assert len(learn) == 2
    assert all("final_layer_norm" in name for name in learn)
    with pytest.raises(LabError, match="image_freeze_layers is 4 but this tower has 3 blocks"):
        build_model(clip_config(clip_folder, image_freeze_layers=4))


def test_freezing_the_transformers_built_here():
    tower = transformer.freeze_parts(tiny(), 1, False, "image")
    frozen = {name for name, p in tower.named_parameters() if not p.requires_grad}
    assert {"embeddings.class_embedding", "pre_layrnorm.weight", "encoder.layers.0.mlp.fc2.bias"} <= frozen
    assert not any("layers.1." in name or "layers.2." in name or "post" in name for name in frozen)


def test_what_is_no_clip_is_refused(tmp_path, clip_folder):
    transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=30)).save_pretrained(tmp_path)
    with pytest.raises(LabError, match="is not a CLIP model: it has no joint"):
        towers_image.clip_vision(str(tmp_path))
    with pytest.raises(LabError, match="there is no such folder, and the hub does not"):
        towers_image.clip_vision("/nowhere/at/all")
    with pytest.raises(LabError, match="takes 32 x 32 images"):
        towers_image.clip_vision(str(clip_folder))(pictures(64, 64))


def test_the_first_blocks_of_an_efficientnet_are_frozen():
    config = make_config("flickr8k_tuned", image_weights="random")
    body = build_image_tower(config).body
    frozen = [
        not any(p.requires_grad for p in block.parameters()) for stage in body.blocks for block in stage
    ]
    assert frozen == [True] * config.image_freeze_layers + [False] * (16 - config.image_freeze_layers)
    assert not body.conv_stem.weight.requires_grad
    assert body.conv_head.weight.requires_grad
