"""The configuration: flips, errors, files, names."""

import ast
import importlib
import json
import math
import re
from pathlib import Path

import pytest

import dataset
import models
from config import DEFAULT_CONFIG, FLAGS, NOT_IN_NAME, Config, choices, load_config, make_config, run_name
from core.errors import LabError
from core.presets import NAMES, PRESETS

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
        (lambda c: setattr(c, "loss", "infonse"), "loss 'infonse' does not exist; did you mean 'infonce'"),
        (lambda c: setattr(c, "image_head", "MPL"), "did you mean 'mlp'"),
        (lambda c: setattr(c, "best_metric", "i2t_recal@1"), "did you mean 'i2t_recall@1'"),
        (lambda c: setattr(c, "device", "CUDA"), "did you mean 'cuda'"),
        (lambda c: setattr(c, "reader", "cocos"), "did you mean 'coco'"),
        (lambda c: setattr(c, "preset", "flickr8k"), "preset cannot be changed .* make_config"),
        (lambda c: c.updated(preset="flickr8k"), "preset cannot be changed .* make_config"),
        (lambda c: setattr(c, "base_data_dir", "d"), "base_data_dir cannot be changed .* make_config"),
        (lambda c: make_config(["a"]), "preset .* does not exist"),
        (lambda c: make_config(loss="queue_infonce", negatives="batch"), "leave negatives out"),
        (lambda c: setattr(c, "train_splits", ()), "'train_splits' takes tuple"),
        (lambda c: setattr(c, "val_splits", ("a", "a")), "appears twice"),
        (lambda c: setattr(c, "test_splits", ("../x",)), "'test_splits' takes tuple"),
        (lambda c: setattr(c, "runs_dir", "~nobody_of_this_name/x"), "home"),
        (lambda c: setattr(c, "seed", 1 << 32), "less than 4294967296"),
        (lambda c: setattr(c, "text_model", 10**5000), "too long to show"),
        (lambda c: setattr(c, "image_weights", "~nobody_of_this_name/x"), "home"),
        (lambda c: setattr(c, "runs_dir", "x" * 300), "255 characters"),
        (lambda c: setattr(c, "text_model", "\udcff"), "'text_model' takes"),
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
    expected = make_config("flickr8k", batch_size=64, use_batch_norm=True)
    assert load_config(flat).changes() == load_config(sections).changes() == expected.changes()
    assert load_config(flat).preset == load_config(sections).preset == "flickr8k"
    saved = make_config("quickstart", seed=3).save(tmp_path / "saved.yaml")
    assert load_config(saved) == make_config("quickstart", seed=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must contain `field: value` lines"),
        ("a: [", "cannot be read as YAML or JSON"),
        ("x: {seed: 1}\ny: {seed: 2}", "twice"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ('{"model": {"seed": 1, "seed": 1}}', "'seed' is given twice"),
        ("preset: [a]", "preset .* does not exist"),
        ("seed: 2020-13-45", "cannot be read as YAML or JSON"),
        ("seed: !!timestamp x", "cannot be read as YAML or JSON"),
        ("seed: !!int ''", "cannot be read as YAML or JSON"),
        ("seed: !!bool x", "cannot be read as YAML or JSON"),
        (
            "m0: &m0 {k: 1}\n"
            + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
            "a mapping has more than 1,000 fields",
        ),
        ("# " + "x" * 2**18, "such a file has at most 262,144"),
        ("[" * 1000 + "]" * 1000, "cannot be read as YAML or JSON"),
        (
            "train_splits: [&a [x,x,x,x,x,x,x,x,x], "
            + ", ".join(
                f"&{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a}]"
                for a, b in zip("abcdefgh", "bcdefghi", strict=True)
            )
            + "]",
            "'train_splits' takes tuple",
        ),
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


def test_a_file_without_preset_means_the_same_everywhere(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("num_epochs: 3\n")
    assert load_config(path) == make_config(num_epochs=3) == make_config("quickstart", num_epochs=3)
    assert load_config(path, preset="flickr8k") == make_config("flickr8k", num_epochs=3)


def test_places_begin_at_home_or_at_the_base(monkeypatch):
    monkeypatch.setenv("HOME", "/home/student")
    config = make_config("flickr8k", runs_dir="~/runs", base_data_dir="~/lab")
    config["start_from"] = "~/runs/first"
    assert config.runs_dir == Path("/home/student/runs")
    assert config.data_dir == Path("/home/student/lab/data/flickr8k")
    assert config.start_from == Path("/home/student/runs/first")


def test_the_documented_names_of_losses_are_the_same_runs():
    queue = make_config("flickr8k", loss="queue_infonce")
    assert (queue.loss, queue.negatives) == ("infonce", "queue")
    config = make_config("flickr8k")
    config["loss"] = "queue_infonce"
    assert config == queue == make_config("flickr8k").updated(loss="queue_infonce")
    assert run_name(make_config("flickr8k", loss="InfoNCELoss")) == "flickr8k_s0"
    assert make_config("flickr8k", loss="sigmoid_infonce").loss == "sigmoid"


def test_a_recognized_reader_changes_no_name():
    start = make_config("quickstart", data_dir="my/images")
    names = {run_name(start.updated(reader=reader)) for reader in ("auto", "auto:sidecar", "coco")}
    assert names == {"quickstart_s0"}
    assert run_name(start.updated(reader="sidecar")) == "quickstart_8d6069_s0"
    assert start.updated(reader="auto:sidecar").changes() == {"data_dir": "my/images"}
    other = make_config("flickr8k")
    assert run_name(other.updated(reader="auto:json")) == run_name(other.updated(reader="auto"))
    assert run_name(other.updated(reader="coco")) == "flickr8k_a9a046_s0"
    with pytest.raises(LabError, match="reader 'auto:sidecars' does not exist; did you mean 'auto:sidecar'"):
        start.reader = "auto:sidecars"


@pytest.mark.parametrize(
    ("field", "names"),
    [(field, names) for field, (table, names) in NAMES.items() if table],
)
def test_names_are_those_of_the_tables(field, names):
    module, _, table = NAMES[field][0].rpartition(".")
    expected = set(getattr(importlib.import_module(module), table))
    expected |= {"source": set(dataset.DRAWN), "reader": set(dataset.OPENERS)}.get(field, set())
    assert set(names) == expected


def test_a_name_added_to_a_table_counts(monkeypatch):
    monkeypatch.setitem(models.HEADS, "deep", models.mlp_head)
    assert make_config("quickstart", image_head="deep").image_head == "deep"
    assert "deep" in choices("image_head")


NUMBERS = (
    math.inf,
    -math.inf,
    math.nan,
    1e308,
    -1e308,
    1e-320,
    -1,
    0,
    1,
    2**32 - 1,
    2**32,
    10**30,
    0.5,
    True,
)
OTHERS = (
    "",
    "x" * 10**5,
    "CPU",
    "None",
    "\0",
    "\udcff",
    [],
    (),
    ["a", "a"],
    [None],
    {},
    {"a": 1},
    b"x",
    object(),
)


def test_no_value_ends_in_a_traceback_or_is_taken_that_makes_no_sense():
    """Every field with every value: refused in a sentence, or taken and finite, and then saved and loaded alike."""
    messages, taken = [], []
    config = make_config("quickstart")
    for field in Config.model_fields:
        before = config[field]
        for value in (*NUMBERS, *OTHERS):
            try:
                config[field] = value
            except LabError as error:
                messages.append(str(error))
                assert config[field] == before
                continue
            taken.append(field)
            assert not isinstance(config[field], float) or 0 <= abs(config[field]) <= 1e9, (field, value)
            assert not isinstance(config[field], int) or config[field] < 1 << 32, (field, value)
            assert Config(**json.loads(json.dumps(config.model_dump(mode="json")))) == config
            run_name(config).encode()
            config[field] = before
    assert max(map(len, messages)) < 700
    tried = len(Config.model_fields) * (len(NUMBERS) + len(OTHERS))
    assert len(messages) + len(taken) == tried
    assert 0.9 < len(messages) / tried < 0.93


def test_tables_name_only_fields():
    fields = set(Config.model_fields)
    assert set(FLAGS) <= fields
    assert set(NOT_IN_NAME) <= fields
    for preset in PRESETS.values():
        assert set(preset) <= fields


def test_every_field_has_help_and_is_read_somewhere():
    read: set[str] = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]:
        if path.name != "config.py" and "tests" not in path.parts:
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            read |= {
                node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)
            }  # builders pass by name
    assert not [name for name in Config.model_fields if name not in read]
    assert not [name for name, field in Config.model_fields.items() if not field.description]


def test_other_names_of_fields_in_files(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("hidden_dim: 64\nfreeze_image_encoder: true\nfreeze_text_encoder: false\nnum_layers: 1\n")
    config = load_config(path)
    assert (config.head_hidden_dim, config.head_num_layers) == (64, 1)
    assert (config.image_tower_mode, config.text_tower_mode) == ("frozen", "trainable")


def test_a_run_of_a_settings_file_is_named_after_it(tmp_path):
    path = tmp_path / "my heads.yaml"
    path.write_text("preset: flickr8k\nimage_head: clip\ntext_head: clip\n")
    config = load_config(path)
    assert run_name(config) == "my_heads_s0"
    assert run_name(load_config(path, seed=2, data_dir="elsewhere", use_batch_norm=True)) == "my_heads_bn_s2"
    changed = run_name(config.updated(num_epochs=3))
    assert changed == run_name(load_config(path, num_epochs=3))
    assert re.fullmatch(r"my_heads_[0-9a-f]{6}_s0", changed)
    saved = config.save(tmp_path / "config.yaml")
    assert load_config(saved) == config
    plain = tmp_path / "best_config.yaml"
    plain.write_text("preset: flickr8k\n")
    assert run_name(load_config(plain)) == "flickr8k_s0"
    assert run_name(load_config(path, preset="quickstart")) != "my_heads_s0"
