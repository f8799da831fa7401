"""Types of settings: numbers with limits, paths, names of splits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

from core.errors import LabError, shown


def _path(path: Path) -> Path:
    """Expand `~`. Raises: ValueError for a text that cannot be a path or cannot be written to a file."""
    if "\0" in str(path) or any(len(part) > 255 for part in path.parts):
        raise ValueError("a path contains no null byte, and no part of more than 255 characters")
    str(path).encode("utf-8")  # a UnicodeEncodeError is a ValueError
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _name_or_path(text: str) -> str:
    path = str(_path(Path(text)))
    return path if text.startswith("~") else text


def _distinct(names: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a name appears twice")
    return names


def _listed(names: Any) -> Any:
    """Names with commas between them as a list."""
    if not isinstance(names, str):
        return names
    return [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]


Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Probability = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Cosine = Annotated[float, Field(gt=0, le=2)]
"""A difference of two cosines."""
Place = Annotated[Path, AfterValidator(_path)]
NameOrPath = Annotated[str, Field(min_length=1), AfterValidator(_name_or_path)]
Split = Annotated[str, Field(pattern=r"^[^./\\+\x00-\x1f][^/\\+\x00-\x1f]*$", max_length=100)]
"""A split's name is part of file names; several are joined by "+"."""
Splits = Annotated[tuple[Split, ...], AfterValidator(_distinct)]
SomeSplits = Annotated[Splits, Field(min_length=1)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_listed), AfterValidator(_distinct)]


def explain(name: str, error: Mapping[str, Any], field: FieldInfo | None) -> str:
    """One sentence about a value that a field does not take."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, LabError):
        return str(cause)
    annotation = field and field.annotation
    kind = getattr(annotation, "__name__", None)
    kind = kind or re.sub(r"typing\.|Annotated\[(\w+).*?\]", r"\1", str(annotation))
    return f"configuration field {name!r} takes {kind}: {error['msg']}, not {shown(error['input'])}."
