"""What the pages of other labs print works here as it stands, or is listed with its counterpart."""

from pathlib import Path

import pytest
import yaml
from small_data import ROOT

from config import Config, load_config
from core.errors import LabError
from core.settings_files import layouts
from training.effects import check

SNIPPETS = yaml.safe_load((ROOT / "tests" / "other_labs.yaml").read_text(encoding="utf-8"))


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet["name"])
def test_settings_load_as_they_stand(snippet, tmp_path):
    config = load_config(written(tmp_path, snippet["name"], snippet["text"]))
    fields = config.model_dump(mode="json")
    assert {name: fields[name] for name in snippet["fields"]} == snippet["fields"]
    check(config)


def test_the_sections_of_a_file_may_stand_together(tmp_path):
    config = load_config(
        written(
            tmp_path,
            "all.json",
            '{"training_config": {"epochs": 3, "batch_size": 8}, "hardware_config": {"mixed_precision": false},'
            '"dataset_config": {"dataset_type": "standard", "negative_mining_strategy": "random"}}',
        )
    )
    assert (config.num_epochs, config.batch_size, config.precision, config.mining) == (3, 8, "fp32", "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {type: resnet}",
            "type 'resnet' does not exist.* Choose one of: attention, clip, mlp, siglip",
        ),
        ("model: {type: mlp, output_dims: 3}", "'output_dims' does not exist; did you mean 'output_dim'"),
        ("training_config: {epoch: 3}", "'epoch' does not exist; did you mean 'epochs'"),
        ("model: {type: mlp}\nimage_head: clip", "sets 'image_head' twice"),
        ("data: {train_metadata: a/b.json}", "train_metadata 'a/b.json' is no name of a file of embeddings"),
        ("data: {train_metadata: a_metadata.json, train_text_embeddings: b_text_embeddings.pt}", "twice"),
        ("hardware_config: {gradient_accumulation_steps: 2}", "give batch_size"),
        ("model_config: {model_name: RN50}", "model_name 'RN50' does not exist"),
        ("dataset_config: {dataset_type: pairs}", "dataset_type 'pairs' does not exist"),
        ("dataset_config: {dataset_type: triplet}\nloss: infonce", "sets 'loss' twice"),
    ],
)
def test_a_name_without_a_meaning_is_refused(text, message, tmp_path):
    with pytest.raises(LabError, match=message):
        load_config(written(tmp_path, "other.yaml", text))


def test_the_table_leads_to_fields():
    """Every target is a field, and every value of it is taken by some preset."""
    for layout in layouts().values():
        Config(preset=layout["presets"][0])
        for target in layout["keys"].values():
            if isinstance(target, str):
                assert set(target.split()) <= set(Config.model_fields)
            elif "function" not in target:
                for settings in target.values():
                    Config(**settings)


def test_names_mean_the_vision_transformer_where_a_preset_trains_one(tmp_path):
    text = "preset: {}\nmodel: {{embed_dim: 96, num_layers: 3, num_heads: 2}}"
    small = load_config(written(tmp_path, "a.yaml", text.format("paired_small")))
    assert (small.image_width, small.image_num_layers, small.image_num_heads) == (96, 3, 2)
    assert small.embed_dim == 256
    heads = load_config(written(tmp_path, "b.yaml", text.format("projection_heads")))
    assert (heads.embed_dim, heads.head_num_layers, heads.head_num_heads) == (96, 3, 2)
    flat = load_config(written(tmp_path, "c.yaml", "preset: paired_small\nembed_dim: 96"))
    assert (flat.embed_dim, flat.image_width) == (96, 128)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.*")), ids=lambda path: path.name)
def test_the_settings_that_those_pages_name_are_shipped_and_take_effect(path):
    check(load_config(path))


def test_the_heads_files_are_what_they_say():
    heads = {
        name: load_config(ROOT / "configs" / f"{name}.yaml") for name in "siglip clip attention mlp".split()
    }
    assert {name: config.image_head for name, config in heads.items()} == {name: name for name in heads}
    assert [config.loss for config in heads.values()] == ["sigmoid", "infonce", "infonce", "infonce"]
    assert heads["attention"].negatives == "queue"
    assert heads["clip"].learn_temperature
