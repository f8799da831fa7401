"""What the pages of other labs print works here as it stands, or is listed with its counterpart."""

import re
import shlex
from pathlib import Path

import coming_from
import pytest
import yaml
from small_data import ROOT

from config import Config, load_config, make_config
from core.errors import LabError
from core.presets import PRESETS
from core.settings_files import layouts
from interface import cli
from labs.scratch import memory_need
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


# --- the tables ---

ROWS = [(lab, row) for lab in coming_from.LABS for row in coming_from.rows_of(lab)]


def test_no_feature_is_left_out():
    """As many rows as features that the other labs' pages describe."""
    counts = {lab: len(coming_from.rows_of(lab)) for lab in coming_from.LABS}
    assert counts == {
        "coco": 43, "projection_heads": 55, "paired_cifar": 75, "retrieval_finetuning": 50, "flickr30k": 42,
    }  # fmt: skip
    for _, row in ROWS:
        assert set(row) == {"feature", "what to type here", "status", "test"}
        assert row["status"] in coming_from.STATUS
        assert (ROOT / "tests" / row["test"]).is_file() or (row["status"], row["test"]) == ("no", "-")


def test_the_pages_are_those_of_the_tables():
    for lab in coming_from.LABS:
        text = (coming_from.PAGES / f"{lab}.md").read_text(encoding="utf-8")
        assert text == coming_from.page(lab), "run `python -m tests.coming_from`"
    assert (coming_from.PAGES / "README.md").read_text(encoding="utf-8") == coming_from.index()


PLACES = {"DIR": "data", "OUT": "out", "FILE": "file", "NAME": "quickstart_s0", "OTHER": "quickstart_s1"}


def commands() -> list[tuple[str, str]]:
    """(script, arguments) of every command and list of flags in the tables."""
    found = []
    for lab, row in ROWS:
        here = row["what to type here"]
        text = row["feature"] + here if here.startswith("the same") else here
        for code in re.findall(r"`([^`]+)`", text):
            code = re.sub(r"\b(DIR|OUT|FILE|NAME|OTHER)\b", lambda match: PLACES[match[1]], code)
            if match := re.match(r"python (train|tune|encode|evaluate|dataset)\.py(?: (.*))?$", code):
                found.append((match[1], (match[2] or "").partition(" 2>&1")[0].replace("...", "").strip()))
            elif code.startswith("--"):
                words = set(re.findall(r"--(\w+)", code))
                script = (
                    "tune"
                    if words & {"timeout", "n_jobs", "num_trials", "space", "tune_split", "folder"}
                    else "train"
                )
                script = "encode" if "test_pairs" in words else script
                if " " in code or code in ("--no_plotting", "--use_augmentation", "--eval_only"):
                    found.append((script, f"--preset {coming_from.LABS[lab][1]} {code}"))
    return [pair for pair in dict.fromkeys(found) if "test_pairs" not in pair[1]]


@pytest.mark.parametrize(("script", "arguments"), commands(), ids=lambda text: str(text)[:80])
def test_every_command_is_understood(script, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_function", lambda name: lambda *config, **options: None)
    monkeypatch.setattr(cli, "require_data", lambda config: None)
    monkeypatch.setattr(cli, "run_file", lambda folder: None)
    load = cli.load_config
    monkeypatch.setattr(
        cli,
        "load_config",
        lambda path, **fields: load(path, **fields) if Path(path).exists() else Config(**fields),
    )
    monkeypatch.setattr("sys.argv", [f"{script}.py", *shlex.split(arguments)])
    getattr(cli, script)()


@pytest.mark.parametrize(
    ("lines", "fields"),
    [
        (
            "config = Config()\nconfig.batch_size = 128\nconfig.learning_rate = 5e-4\nconfig.num_epochs = 30",
            {"batch_size": 128, "learning_rate": 5e-4, "num_epochs": 30},
        ),
        (
            "CONFIG['use_batch_norm'] = False        # Add BatchNorm to projection head\n"
            "CONFIG['use_attention_pooling'] = False  # Use attention pooling instead of avgpool",
            {"use_batch_norm": False, "use_attention_pooling": False},
        ),
    ],
)
def test_lines_that_set_a_configuration(lines, fields):
    config = make_config("quickstart", use_batch_norm=True, use_attention_pooling=True)
    scope = {"Config": Config, "CONFIG": config}
    exec(lines, scope)
    config = scope.get("config", config)
    assert {name: config[name] for name in fields} == fields


def test_files_that_the_tables_name_exist():
    for lab, row in ROWS:
        for name in re.findall(
            r"`((?:configs|docs|towers|labs|sources|plots)/[\w./]+|\w+\.py)`", row["what to type here"]
        ):
            assert (ROOT / name).exists(), (lab, row["feature"])


def test_other_labs_defaults_are_in_the_presets():
    assert {name: PRESETS["clip_from_scratch"][name] for name in ("batch_size", "learning_rate", "num_epochs")} == {
        "batch_size": 64, "learning_rate": 1e-4, "num_epochs": 20,
    }  # fmt: skip
    assert PRESETS["clip_from_scratch"]["weight_decay"] == 1e-4
    assert "MIT License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["license"] == "MIT"


def test_the_table_of_needs_is_computed():
    text = (coming_from.PAGES / "needs.md").read_text(encoding="utf-8")
    towers = dict(text_tower="embeddings", text_width=384)
    for preset, changes in (("clip_from_scratch_small", {}), ("paired_small", towers)):
        config = make_config(preset, **changes)
        plain, checkpointing = memory_need(config).loc["total"].round(1)
        assert f"| `{preset}` | {config.batch_size} | {plain:.1f} | {checkpointing:.1f} |" in text
