"""The command lines of train.py, tune.py, encode.py, evaluate.py and dataset.py.

Flags are read here, before the modules that do the work are imported, which takes seconds: help is printed and a
mistake is reported at once.
"""

from __future__ import annotations

import argparse
import io
import math
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import yaml
from pydantic import create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from config import GROUPS, Config, load_config, make_config, run_file, run_name
from core.errors import LabError, nearest
from core.presets import NAMES, START
from core.settings_files import names_of_flags, translate


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the nearest flag where one is unknown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(
                stream, io.TextIOWrapper
            ):  # redirected on Windows, say to cp1252: "?", not an error
                stream.reconfigure(errors="replace")

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: --"):
            flag = message.split("--")[1].split("=")[0].split()[0]
            hint = nearest(f"--{flag}", [name for name in self._option_string_actions if name[:2] == "--"])
        self.exit(2, f"{self.prog}: {message}{hint or '; see --help.'}\n")


class one_sentence:  # noqa: N801  reads as a statement
    """Within, a LabError ends the program with its sentence instead of a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, LabError):
            sys.exit(f"error: {error}")
        if isinstance(error, KeyboardInterrupt):
            print(f"\n{error or 'interrupted: run the same command again to continue.'}", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


def run_command(
    command: Callable[..., Any] | str,
    description: str,
    options: dict[str, tuple[Any, str]] | None = None,
    arguments: list[str] | None = None,
) -> None:
    """Call `command(config, **options)` with the values of the command line; bad input ends in one sentence.

    Every field of Config is a flag, and so are other labs' names of fields. Settings start from `--preset NAME`
    (`quickstart`), then a file, given by `--config` or as the first word, and the flags last.

    Args:
        command: a function, or its `module.name`, imported only when the flags are read.
        options: further flags: name -> (default, help).
    """
    parser = Parser(
        description=description,
        usage="%(prog)s [SETTINGS.yaml] [--FLAG VALUE ...]",
        epilog="Names that other labs give to settings are flags too, such as --epochs: see docs/coming_from.",
    )
    own = parser.add_argument_group("this command")
    for name, (default, text) in (options or {}).items():
        kind: dict[str, Any] = {"action": "store_true"} if default is False else {"type": type(default)}
        own.add_argument(f"--{name}", default=default, help=text, **kind)
    with one_sentence():
        config, given = parse_config(parser, sys.argv[1:] if arguments is None else arguments)
        values = {name: given[name] for name in options or {}}
        if not values.get("eval_only"):  # a finished run may know another folder
            require_data(config)
        _function(command)(config, **values)


def parse_config(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[Config, dict[str, Any]]:
    """The configuration that preset, file and flags make together, and the parser's other values."""
    parser.add_argument(
        "config_file", nargs="?", metavar="SETTINGS.yaml", help="YAML or JSON file of settings"
    )
    parser.add_argument("--config", dest="config_flag", metavar="FILE", help="the same, as a flag")
    parser.add_argument(
        "--base_data_dir", help="folder that data_dir, cache_dir, runs_dir and image_root are relative to"
    )
    arguments, other_names = _take_other_names(parser, arguments)
    fields: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in Config.model_fields.items()
        if name != "settings_file"
    }
    try:
        source: Any = CliSettingsSource(
            create_model("Flags", __base__=BaseSettings, **fields),
            root_parser=parser,
            cli_parse_args=arguments,
            add_argument_method=_grouped(parser, _defaults(arguments)),
        )
    except SettingsError as error:
        raise LabError(f"the command line cannot be read: {str(error)[:200]}.") from error
    given = vars(parser.parse_args(arguments))
    file = given["config_flag"] or given["config_file"]
    flags = {**source(), **other_names}
    preset = flags.get("preset", load_config(file).preset if file else START)
    values = translate({"model": flags}, Config.model_fields, "the command line", preset)
    if values.get("preset", preset) != preset:
        values = translate({"model": flags}, Config.model_fields, "the command line", values["preset"])
    if "image_width" in values and "embed_dim" in flags:
        print(
            f"--embed_dim {flags['embed_dim']} is the width of the image tower; the joint space is --output_dim."
        )
    if given["base_data_dir"]:
        values["base_data_dir"] = given["base_data_dir"]
    config = load_config(file, **values) if file else make_config(**values)
    if config.data_dir.suffix == ".json" and config.reader != "json":
        config = config.updated(reader="json")
    return config, given


def _take_other_names(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[list[str], dict[str, Any]]:
    """The arguments without flags that are other labs' names of settings, and these by name."""
    taken = {flag.removeprefix("--") for flag in parser._option_string_actions} | Config.model_fields.keys()
    others = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names_of_flags() - taken:
        others.add_argument(
            f"--{name}", nargs="?", const=True, default=argparse.SUPPRESS, type=yaml.safe_load
        )
    values, rest = others.parse_known_args(arguments)
    return rest, vars(values)


def _defaults(arguments: list[str]) -> Config:
    """The preset that the flags start from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=START)
    return make_config(parser.parse_known_args(arguments)[0].preset)


def _grouped(parser: argparse.ArgumentParser, defaults: Config) -> Callable[..., Any]:
    """Adds the flag of a field to the group of its topic, with help that ends in its default."""
    groups: dict[str, Any] = {}
    for field in Config.model_fields:
        if field in GROUPS:
            group = parser.add_argument_group(GROUPS[field])
        groups[field] = group

    def add(_: Any, flag: str, **options: Any) -> Any:
        field = flag.removeprefix("--")
        default = defaults.model_dump(mode="json")[field]
        default = ",".join(map(str, default)) if isinstance(default, list) else default
        text = f"{Config.model_fields[field].description} (default: {default})"
        return groups[field].add_argument(flag, **{**options, "help": text.replace("%", "%%")})

    return add


def require_data(config: Config) -> None:
    """Refuse a missing data folder that nothing fetches or generates, before anything slow is imported."""
    if not config.data_dir.exists() and config.data_dir.name != config.source:
        advice = "give the folder of a captioned image set"
        if config.reader == "pairs":
            advice = f"make embeddings of generated scenes with `python encode.py --folder {config.data_dir}`"
        raise LabError(f"data_dir {config.data_dir} does not exist or is empty; {advice}.")


def _function(command: Callable[..., Any] | str) -> Callable[..., Any]:
    if callable(command):
        return command
    module, _, name = command.rpartition(".")
    return getattr(import_module(module), name)


# --- the scripts ---


def train() -> None:
    """`python train.py`"""
    run_command(
        "train.main",
        "Train a model, evaluate it once on the test splits, and print the output paths.",
        {
            "resume": ("auto", "auto (continue), never (start over), or the path of a checkpoint"),
            "overfit": (0, "train on that many images only and report whether the model memorizes them"),
            "eval_only": (False, "report on the finished run, without training"),
            "comprehensive": (False, "write every table and figure"),
            "output_file": ("", "a further copy of the report, metrics or results: .html, .json, .csv, .md"),
            "no_plotting": (False, "draw no learning curves while training"),
        },
    )


def tune() -> None:
    """`python tune.py`"""
    if sys.argv[1:2] != ["compare"]:
        run_command(
            "tune.main",
            "Search for the best settings, draw the study's figures, and print the output paths. "
            "`tune.py compare FILE ... [--FLAG VALUE ...]` trains the settings of each file and prints one table.",
            {
                "space": ("configs/tuning/default.yaml", "the search space"),
                "num_trials": (60, "trials of the study, earlier ones included"),
                "folder": ("", "the study's folder (default: by preset and search space, in runs_dir)"),
                "tune_split": ("", "the split that trials are trained on (default: train_splits)"),
                "timeout": (math.inf, "seconds after which no further trial starts"),
                "n_jobs": (1, "processes that search together; several machines may share a folder too"),
            },
        )
        return
    files = [word for word in sys.argv[2:] if word.endswith((".yaml", ".yml", ".json"))]
    flags = [word for word in sys.argv[2:] if word not in files]
    with one_sentence():
        if not files:
            raise LabError("give the files to compare, such as `python tune.py compare configs/*.yaml`.")
        configs = [parse_config(Parser(), [file, *flags])[0] for file in files]
        _function("tune.compare")(configs)


def encode() -> None:
    """`python encode.py` and `python encode.py split DIR`"""
    if sys.argv[1:2] != ["split"]:
        run_command(
            "encode.main",
            "Run both encoders once over a data set and print the output paths. "
            "`encode.py split DIR` divides a folder of embeddings into splits.",
            {"folder": ("outputs/embeddings", "output folder")},
        )
        return
    parser = Parser()
    split = _verb(parser.add_subparsers(), "split", "encode.split_command", "divide a folder by image, once")
    split.add_argument("folder", metavar="DIR")
    for name in ("train", "tune", "val", "test"):
        split.add_argument(f"--{name}_pairs", type=int, default=argparse.SUPPRESS, help="pairs of this split")
    split.add_argument("--seed", type=int, default=0)
    _call(parser.parse_args())


def dataset(arguments: list[str] | None = None) -> None:
    """`python dataset.py fetch NAME` and `python dataset.py check DIR`"""
    parser = Parser(description="Download a data set, or check the images and captions of a folder.")
    verbs = parser.add_subparsers(required=True)
    fetch = _verb(verbs, "fetch", "dataset.fetch_command", "download a data set to data/NAME")
    fetch.add_argument("name", help=", ".join(NAMES["source"][1]))
    fetch.add_argument("--data_dir", default="data", help="folder of the data sets' folders (default: data)")
    fetch.add_argument("--karpathy", action="store_true", help="Karpathy's split file too")
    check = _verb(verbs, "check", "dataset.check_command", "report what is wrong with images and captions")
    check.add_argument("data_dir", metavar="DIR")
    check.add_argument("--reader", default="auto", help=", ".join(NAMES["reader"][1]))
    columns = ("image_column", "caption_column", "split_column")
    for name in ("karpathy_file", "annotation_file", "image_root", *columns):
        check.add_argument(f"--{name}", help=Config.model_fields[name].description)
    check.add_argument("--split_seed", type=int, default=0)
    check.add_argument("--text_tower", default="minilm", help="its tokenizer measures the captions")
    check.add_argument("--folder", default="outputs/data_check", help="output folder of report and figure")
    _call(parser.parse_args(arguments))


def evaluate(arguments: list[str] | None = None) -> None:
    """`python evaluate.py`; `evaluate.py RUN ...` is `evaluate.py run RUN ...`"""
    parser = Parser(description="Evaluate, compare, search or export finished runs.")
    verbs = parser.add_subparsers(required=True)
    run = _verb(verbs, "run", "evaluate.evaluate_command", "evaluate a run; the word may be left out")
    compare = _verb(verbs, "compare", "evaluate.compare_command", "compare finished runs")
    search = _verb(verbs, "search", "evaluate.search_run", "find a run's test images by text or image")
    export = _verb(verbs, "export", "evaluate.export_command", "write a run's model for other libraries")
    weights = _verb(verbs, "weights", "evaluate.evaluate_weights", "evaluate a file of weights alone")
    weights.add_argument("--model_path", required=True, metavar="FILE", help="weights, .safetensors or .pth")
    weights.add_argument(
        "--config_path", metavar="FILE", help="their settings (default: config.yaml beside them)"
    )
    weights.add_argument("--batch_size", type=int, help="images per batch (default: as trained)")
    compare.add_argument("folders", metavar="RUN", nargs="+", help="folders of runs, such as runs/*")
    for verb in (run, search, export):
        verb.add_argument("folder", metavar="RUN", help="folder of a run, such as runs/quickstart_s0")
    places = ("data_dir", "cache_dir", "device")
    for verb in verbs.choices.values():
        for place in places:
            verb.add_argument(
                f"--{place}", help=f"{Config.model_fields[place].description} (default: as trained)"
            )
    for verb in (run, weights):
        verb.add_argument("--comprehensive", action="store_true", help="write every table and figure")
        verb.add_argument(
            "--output_file", help="a further copy of the report, metrics or results: .html, .json, .csv, .md"
        )
    run.add_argument("--labelled", action="append", default=[], metavar="DIR",
                     help="class folders or CIFAR files to classify; may be given again")  # fmt: skip
    run.add_argument("--again", action="store_true", help="measure again what metrics.json holds")
    compare.add_argument(
        "--folder", default="outputs/comparison", help="output folder (default: %(default)s)"
    )
    compare.add_argument("--baseline", help="setting or run to compare against (default: the first)")
    search.add_argument("text", nargs="?", default="", help="what the images should show")
    search.add_argument("--image", help="an image that they should be similar to")
    search.add_argument("--minus", default="", help="what they should not show")
    search.add_argument("--k", type=int, help="number of images (default: 10, or all if there are fewer)")
    search.add_argument("--scoring", default="cosine", choices=("cosine", "nnn", "qb_norm"),
                        help="how images are ordered; nnn and qb_norm correct hubs (default: %(default)s)")  # fmt: skip
    export.add_argument("--folder", dest="output", help="output folder (default: RUN/export)")
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] not in (*verbs.choices, "-h", "--help"):
        words = ["weights" if "--model_path" in words else "run", *words]
    given = parser.parse_args(words)
    values = {place: vars(given).pop(place, None) for place in (*places, "batch_size")}
    given.places = {place: value for place, value in values.items() if value is not None}
    with one_sentence():
        if "folders" in given:
            given.folders = [_run_folder(folder) for folder in given.folders]
        elif "folder" in given:
            given.folder = _run_folder(given.folder)
            run_file(given.folder)
    _call(given)


def _run_folder(word: str) -> str:
    """A run's folder; a settings file stands for the run that train.py makes of it."""
    if not word.endswith((".yaml", ".yml", ".json")):
        return word
    config = load_config(word)
    return str(config.runs_dir / run_name(config))


def _verb(verbs: Any, name: str, function: str, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    verb.set_defaults(function=function)
    return verb


def _call(given: argparse.Namespace) -> None:
    """Call the verb's function with its flags."""
    values = vars(given)
    with one_sentence():
        _function(values.pop("function"))(**values)
