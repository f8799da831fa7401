"""Search spaces: which fields of the configuration a study tries, over which values, and when.

A space is a YAML file, a field a line:

    learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
    image_head: {type: categorical, choices: [mlp, attention], also: [text_head]}
    head_num_layers: {type: int, low: 1, high: 3, when: {image_head: attention}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from config import Config
from errors import LabError, nearest


class Dimension(BaseModel):
    """The values of one field.

    Args:
        type: how values are drawn.
        low, high: both ends, included; of `float` and `int`.
        log: draw evenly over the logarithm.
        choices: of `categorical`.
        when: other fields and the value, or list of values, that each must have; else the field stays as
            the configuration has it.
        also: further fields that get the same value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["float", "int", "categorical"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: dict[str, Any] = {}
    also: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> Dimension:
        if self.type == "categorical":
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError("type categorical takes choices, and no low or high")
            return self
        if self.low is None or self.high is None or self.choices:
            raise ValueError(f"type {self.type} takes low and high, and no choices")
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be less than high, and more than 0 where log is true")
        return self

    def ends(self) -> tuple[Any, ...]:
        """The choices, or low and high in the field's own type."""
        if self.type == "categorical":
            return self.choices
        make = float if self.type == "float" else int
        return tuple(make(end) for end in (self.low, self.high) if end is not None)

    def draw(self, trial: Any, field: str) -> Any:
        """A value, from an Optuna trial."""
        if self.type == "categorical":
            return trial.suggest_categorical(field, self.choices)
        suggest = trial.suggest_float if self.type == "float" else trial.suggest_int
        return suggest(field, *self.ends(), log=self.log)

    def applies(self, values: dict[str, Any]) -> bool:
        """Whether every field of `when` has one of its values."""
        return all(
            values[field] in (wanted if isinstance(wanted, list) else [wanted])
            for field, wanted in self.when.items()
        )


Space = dict[str, Dimension]
"""Field -> its values; a field stands after those that its `when` names."""


def read_space(path: str | Path) -> Space:
    """A space from its file.

    Raises: LabError naming the line that is wrong: an unknown field, ends that are none, a `when` that names
        a later field, a value that the configuration does not take.
    """
    space: Space = {}
    for field, given in _load(Path(path)).items():
        where = f"{path}: {field}"
        try:
            space[field] = Dimension.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = "".join(f"{part}: " for part in first["loc"])
            raise LabError(f"{where}: {name}{first['msg'].removeprefix('Value error, ')}.") from None
        for other in (field, *space[field].also):
            _check_field(where, other)
            for end in space[field].ends():
                Config(**{other: end})  # raises the one explanation
        for other in space[field].when:
            _check_field(where, other)
            if other not in space and other in _load(Path(path)):
                raise LabError(f"{where}: when names {other!r}, which must stand above it.")
    return space


def _check_field(where: str, field: str) -> None:
    if field not in Config.model_fields:
        hint = nearest(field, list(Config.model_fields)) or "."
        raise LabError(f"{where}: {field!r} is no field of the configuration{hint}")


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise LabError(f"search space {path} does not exist; give the path of a .yaml file.")
    try:
        lines = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LabError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(lines, dict) or not lines:
        raise LabError(f"{path} must hold `field: {{type: ..., ...}}` lines.")
    return lines


def draw(space: Space, trial: Any, config: Config) -> dict[str, Any]:
    """A trial's value of every field that applies; the others keep the configuration's."""
    values: dict[str, Any] = {}
    for field, dimension in space.items():
        if dimension.applies({**dict(config), **values}):
            values.update(dict.fromkeys((field, *dimension.also), dimension.draw(trial, field)))
    return values


def expand(space: Space, params: dict[str, Any]) -> dict[str, Any]:
    """A finished trial's values of all fields, from the drawn ones."""
    return {name: value for field, value in params.items() for name in (field, *space[field].also)}


def describe(space: Space) -> dict[str, str]:
    """Each field's values in one line; equal for equal spaces."""
    return {field: dimension.model_dump_json(exclude_defaults=True) for field, dimension in space.items()}
