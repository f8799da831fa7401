"""Bad input: the one exception type, and choices by name that list what exists."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Choice = TypeVar("Choice")


class LabError(ValueError):
    """Bad input, told in one sentence that says what to do.

    Command lines print it without a traceback, and so do notebooks.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # IPython asks for this instead of its own


def nearest(name: str, names: list[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, or an empty string."""
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def choose(table: Mapping[str, Choice], name: str, what: str) -> Choice:
    """`table[name]`, or an error that lists the valid names.

    Args:
        table: the choices by name, as they stand at the foot of a module.
        name: what was asked for.
        what: the configuration field or kind of thing, for the message.
    Raises: LabError if `name` is not in `table`.
    """
    if name in table:
        return table[name]
    names = sorted(table)
    hint = nearest(name, names) or "."
    raise LabError(f"{what} {name!r} does not exist{hint} Choose one of: {', '.join(names)}.")
