"""Command lines: fields are flags, files and presets come first, mistakes end in one sentence."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from config import GROUPS, Config, load_config, make_config
from interface.cli import evaluate, run_command

ROOT = Path(__file__).resolve().parent.parent


def called(*words: str) -> tuple[Config, str]:
    calls = []

    def command(config: Config, resume: str) -> None:
        calls.append((config, resume))

    run_command(command, "a command", {"resume": ("auto", "where to start")}, list(words))
    return calls[0]


def test_it_starts_from_quickstart():
    assert called() == (make_config("quickstart"), "auto")


def test_flags_are_fields(tmp_path):
    config, resume = called(
        "--preset", "flickr8k", "--data_dir", str(tmp_path), "--num_epochs", "20", "--use_batch_norm", "true",
        "--test_splits", "a,b", "--resume", "never",
    )  # fmt: skip
    expected = make_config(
        "flickr8k", data_dir=tmp_path, num_epochs=20, use_batch_norm=True, test_splits=("a", "b")
    )
    assert (config, resume) == (expected, "never")


def test_all_places_move_together():
    assert called("--base_data_dir", "d")[0] == make_config(base_data_dir="d")


@pytest.mark.parametrize("words", [("{}",), ("--config", "{}")])
def test_a_file_comes_before_flags(tmp_path, words):
    path = tmp_path / "config.yaml"
    path.write_text("preset: flickr8k\nbatch_size: 32\nseed: 5\n")
    config, _ = called(*(word.format(path) for word in words), "--seed", "6")
    assert config == make_config("flickr8k", batch_size=32, seed=6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bach_size", "3"], "unrecognized arguments: --bach_size; did you mean '--batch_size'?"),
        (["--num_epoch", "3"], "did you mean '--num_epochs'?"),
        (["--preset", "quick"], "error: preset 'quick' does not exist; did you mean 'quickstart'?"),
        (["--batch_size", "many"], "error: configuration field 'batch_size' takes int"),
        (["none.yaml"], "error: configuration file none.yaml does not exist"),
        (["--image_tower_mode", "thawed"], "takes"),
        (["--resum", "never"], "unrecognized arguments: --resum; did you mean '--resume'?"),
        (["--train_splits", "["], "error: the command line cannot be read: "),
        (["--device", "gpu"], "error: device 'gpu' does not exist"),
        (["--data_dir", "nowhere"], "error: data_dir nowhere does not exist or is empty"),
        (
            ["--preset", "projection_heads", "--data_dir", "nowhere"],
            "make embeddings of generated scenes with `python encode.py --folder nowhere`",
        ),
    ],
)
def test_mistakes_end_in_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        called(*words)
    said = f"{stop.value.code}" + capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert stop.value.code != 0


@pytest.mark.parametrize(
    ("words", "preset", "fields"),
    [
        (
            "--config_type enhanced --embed_dim 512 --num_layers 4 --num_heads 8",
            "paired_cifar",
            {"image_width": 512, "image_num_layers": 4, "image_num_heads": 8, "embed_dim": 512},
        ),
        (
            "--preset paired_small --embed_dim 64 --output_dim 32",
            "paired_small",
            {"image_width": 64, "embed_dim": 32},
        ),
        (
            "--preset projection_heads --embed_dim 64 --num_heads=2",
            "projection_heads",
            {"embed_dim": 64, "head_num_heads": 2},
        ),
        (
            "--preset paired_small --use_augmentation --different_class_prob 0.7",
            "paired_small",
            {"augment_flip": 0.5, "different_class_prob": 0.7},
        ),
        (
            "--preset retrieval_finetune --epochs 3 --output_dir my_models --freeze_text_encoder true",
            "retrieval_finetune",
            {"num_epochs": 3, "runs_dir": Path("my_models"), "text_tower_mode": "frozen"},
        ),
        (
            "--preset clip_from_scratch --text_depth 6 --depth 10 --mlp_ratio 2.0",
            "clip_from_scratch",
            {"text_num_layers": 6, "image_num_layers": 10, "image_mlp_ratio": 2, "text_mlp_ratio": 2},
        ),
    ],
)
def test_names_of_other_labs_are_flags(words, preset, fields, tmp_path):
    config, _ = called(*words.split(), "--data_dir", str(tmp_path))
    assert config.preset == preset
    assert {name: config[name] for name in fields} == fields


def test_a_file_of_annotations_is_data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("{}")
    config, _ = called("--preset", "retrieval_finetune", "--data_dir", str(path))
    assert (config.data_dir, config.reader) == (path, "json")


def test_a_settings_file_stands_for_its_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("interface.cli._function", lambda name: lambda **given: calls.append(given))
    path = tmp_path / "my.yaml"
    path.write_text(f"preset: flickr8k\nruns_dir: {tmp_path}\n")
    with pytest.raises(SystemExit, match="my_s0 is not a run's folder"):
        evaluate([str(path)])
    load_config(path).save(tmp_path / "my_s0" / "config.yaml")
    evaluate([str(path), "--comprehensive"])
    evaluate(["compare", str(path), "runs/other_s0"])
    assert calls[0]["folder"] == str(tmp_path / "my_s0")
    assert calls[1]["folders"] == [str(tmp_path / "my_s0"), "runs/other_s0"]


def test_a_redirected_stdout_of_another_encoding_stops_nothing(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    run_command(lambda config: print("写真.jpg → 1 Ä \udcff"), "a command", {}, [])
    sys.stdout.flush()
    assert written.getvalue().decode("cp1252").strip() == "??.jpg ? 1 Ä ?"


def test_help_is_grouped_and_shows_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        called("--preset", "flickr8k", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {group}:" in text for group in GROUPS.values())
    for name, default in (("num_epochs", make_config("flickr8k").num_epochs), ("train_splits", "train")):
        assert f"{' '.join(str(Config.model_fields[name].description).split())} (default: {default})" in text
    assert "--no-" not in text


@pytest.mark.parametrize("script", ["train", "tune", "encode", "evaluate", "dataset"])
def test_help_is_printed_without_torch(script):
    code = f"import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_path('{script}.py', run_name='__main__')"
    code += "\nexcept SystemExit as ended: sys.exit(ended.code or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
