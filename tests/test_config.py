"""The configuration: flips, errors, files, names."""

import ast
import json
from pathlib import Path

import pytest

from config import DEFAULT_CONFIG, FLAGS, NOT_IN_NAME, PRESETS, Config, load_config, make_config, run_name
from errors import LabError

ROOT = Path(__file__).resolve().parent.parent


def test_flips_like_a_dictionary_and_like_an_object():
    config = make_config("quickstart")
    config["use_batch_norm"] = True
    config.batch_size = 32
    assert config.use_batch_norm is True
    assert config["batch_size"] == 32
    assert dict(**config)["batch_size"] == 32


def test_defaults_are_the_documented_lab():
    documented = dict(
        image_tower="resnet50", text_tower="clip", head_hidden_dim=1024, embed_dim=512, loss="infonce",
        temperature=0.07, batch_size=128, num_epochs=10, learning_rate=1e-4, weight_decay=0.01,
        warmup_steps=500, schedule="cosine", max_grad_norm=1.0, image_size=224,
    )  # fmt: skip
    assert {name: DEFAULT_CONFIG[name] for name in documented} == documented


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.__setitem__("use_bach_norm", True), "did you mean 'use_batch_norm'"),
        (lambda c: setattr(c, "batch_sise", 3), "did you mean 'batch_size'"),
        (lambda c: c["learnig_rate"], "did you mean 'learning_rate'"),
        (lambda c: setattr(c, "batch_size", "many"), "'batch_size' takes int"),
        (lambda c: setattr(c, "image_tower_mode", "frosen"), "'trainable', 'frozen' or 'cached'"),
        (lambda c: setattr(c, "head_dropout", 1.5), "'head_dropout' takes float"),
        (lambda c: make_config("quickstrt"), "did you mean 'quickstart'"),
        (lambda c: make_config(nonsense=1), "field 'nonsense' does not exist"),
    ],
)
def test_a_mistake_names_the_field(change, message):
    config = make_config("quickstart")
    before = config.model_dump()
    with pytest.raises(LabError, match=message):
        change(config)
    assert config.model_dump() == before


def test_files_flat_and_sectioned_load_alike(tmp_path):
    flat, sections = tmp_path / "flat.yaml", tmp_path / "sections.json"
    flat.write_text("preset: flickr8k\nbatch_size: 64\nuse_batch_norm: true\n")
    sections.write_text(
        json.dumps({"preset": "flickr8k", "model": {"use_batch_norm": True}, "fit": {"batch_size": 64}})
    )
    assert (
        load_config(flat)
        == load_config(sections)
        == make_config("flickr8k", batch_size=64, use_batch_norm=True)
    )
    saved = make_config("quickstart", seed=3).save(tmp_path / "saved.yaml")
    assert load_config(saved) == make_config("quickstart", seed=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold `field: value` lines"),
        ("a: [", "neither YAML nor JSON"),
        ("x: {seed: 1}\ny: {seed: 2}", "twice"),
    ],
)
def test_a_bad_file_says_so(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(LabError, match=message):
        load_config(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(LabError, match="does not exist; give the path"):
        load_config(tmp_path / "none.yaml")


def test_run_names_tell_settings_and_seeds_apart():
    assert run_name(make_config("quickstart")) == "quickstart_s0"
    both = make_config("quickstart", use_batch_norm=True, use_attention_pooling=True, seed=2)
    assert run_name(both) == "quickstart_bn_attn_s2"
    moved = make_config("quickstart", data_dir="/elsewhere", num_workers=3, runs_dir="/r")
    assert run_name(moved) == "quickstart_s0"
    names = {run_name(make_config("quickstart", learning_rate=rate)) for rate in (1e-3, 2e-3, 3e-3)}
    assert len(names) == 3


def test_tables_name_only_fields():
    fields = set(Config.model_fields)
    assert set(FLAGS) <= fields
    assert set(NOT_IN_NAME) <= fields
    for preset in PRESETS.values():
        assert set(preset) <= fields


def test_every_field_has_help_and_is_read_somewhere():
    read: set[str] = set()
    for path in ROOT.glob("*.py"):
        if path.name != "config.py":
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            read |= {
                node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)
            }  # builders pass by name
    at_once = {"base_data_dir"}  # make_config turns it into the other places
    assert not [name for name in Config.model_fields if name not in read | at_once]
    assert not [name for name, field in Config.model_fields.items() if not field.description]
