"""Command lines whose flags are the configuration's own fields."""

from __future__ import annotations

import argparse
import inspect
import io
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from pydantic import create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from config import Config, make_config, read_overrides
from core.errors import LabError, nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest flag where one is unknown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for stream in (
            sys.stdout,
            sys.stderr,
        ):  # redirected on Windows, say to cp1252: "?" rather than a traceback
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: --"):
            flag = message.split("--")[1].split("=")[0].split()[0]
            hint = nearest(
                f"--{flag}", [name for name in self._option_string_actions if name.startswith("--")]
            )
        self.exit(2, f"{self.prog}: {message}{hint or '; see --help.'}\n")


def run_command(
    command: Callable[..., Any], description: str | None, arguments: list[str] | None = None
) -> None:
    """Call `command(config, **options)` with what the shell says; bad input ends in one sentence.

    Every field of Config is a flag. `--preset NAME` is where the settings start (`quickstart`), a file given
    by `--config` or as the first word comes next, flags last. The command's other parameters are flags too (a last
    underscore, which keeps a name apart from a function's, is no part of the flag).
    """
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("config_file", nargs="?", help="YAML or JSON file of settings")
    parser.add_argument("--config", dest="config_flag", help="the same, as a flag")
    options = [p for p in inspect.signature(command).parameters.values() if p.name != "config"]
    for option in options:
        _add_flag(parser, option.name.rstrip("_"), option.default)
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_sentence():
        config = parse_config(parser, arguments)
        given, _ = parser.parse_known_args(arguments)
        command(config, **{option.name: getattr(given, option.name.rstrip("_")) for option in options})


def _add_flag(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    if isinstance(default, bool):
        parser.add_argument(f"--{name}", default=default, action=argparse.BooleanOptionalAction)
    else:
        parser.add_argument(f"--{name}", default=default, type=type(default))


def parse_config(parser: argparse.ArgumentParser, arguments: list[str]) -> Config:
    """The configuration that preset, file and flags make together."""
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in Config.model_fields.items()}
    parser.add_argument(
        "--base_data_dir", help="folder that data_dir, cache_dir and runs_dir are relative to"
    )
    flags = create_model("Flags", __base__=BaseSettings, **fields)
    try:
        source: Any = CliSettingsSource(flags, root_parser=parser, cli_parse_args=arguments)
    except SettingsError as error:
        raise LabError(f"the command line cannot be read: {str(error)[:200]}.") from error
    given, _ = parser.parse_known_args(arguments)
    file = given.config_flag or given.config_file
    base = {"base_data_dir": given.base_data_dir} if given.base_data_dir else {}
    values = {**(read_overrides(file) if file else {}), **source(), **base}
    return make_config(**values)


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
