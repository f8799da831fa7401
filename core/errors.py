"""Bad input: the one exception type, and choices by name that list what exists."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from typing import TypeVar

Choice = TypeVar("Choice")


class LabError(ValueError):
    """Bad input: one sentence that says what is wrong and what to do.

    Command lines and notebooks print it without a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # IPython asks for this instead of its own


def shown(value: object) -> str:
    """A value for a message, in at most 200 characters."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 2, 150
    try:
        return short.repr(value)[:200]
    except ValueError:  # an integer with thousands of digits
        return f"a {type(value).__name__} too long to show"


class StoppedAtOnceError(KeyboardInterrupt):
    """Ctrl-C ended the work in the middle; the message says what is saved, and is printed without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def nearest(name: str, names: list[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `names`, or an empty string."""
    by_case = {known.lower(): known for known in names}
    close = difflib.get_close_matches(shown(name).lower(), list(by_case), n=1, cutoff=0.5)
    return f"; did you mean {by_case[close[0]]!r}?" if close else ""


def choose(table: Mapping[str, Choice], name: str, what: str) -> Choice:
    """`table[name]`, or an error that lists the valid names.

    Args:
        table: the choices by name.
        name: the choice.
        what: the configuration field or kind of thing, for the message.
    Raises: LabError if `name` is not in `table`.
    """
    names = sorted(table)
    if name in names:  # a list, because `name` may be unhashable
        return table[name]
    hint = nearest(name, names) or "."
    raise LabError(f"{what} {shown(name)} does not exist{hint} Choose one of: {', '.join(names)}.")
