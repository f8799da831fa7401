"""What every notebook control is: widgets over the result of a plain function, and nothing lost without widgets."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from errors import LabError

PAUSE = 0.4  # seconds without a key press after which a control answers
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
HIDDEN, SHOWN = "none", ""


class Control:
    """Inputs over what a function makes of their values, made anew when one changes.

    In a page without widgets the result stands there as a picture or table; without a page,
    `control.function(**values)` is the same call and `control.result` its last answer.

    Args:
        function: plain function of the inputs' values, by name; gives a figure, a table, or (figure, table).
            Its LabError is shown as a sentence, and the last result stays.
        inputs: widgets by the function's parameters.
    """

    def __init__(self, function: Callable[..., Any], **inputs: Any) -> None:
        self.function, self.inputs = function, inputs
        self.result: Any = None
        self.message = widgets.HTML()
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", display=HIDDEN))
        self.table = widgets.HTML()
        self.table.add_class("jp-RenderedHTMLCommon")  # JupyterLab's own look of tables, dark or light
        row = widgets.HBox(list(inputs.values()), layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox([row, self.message, self.picture, self.table])
        self._soon = after_pause(self.refresh)
        for widget in inputs.values():
            widget.observe(lambda change: self._soon(), "value")
        self.refresh()

    @property
    def values(self) -> dict[str, Any]:
        """The inputs' values by name."""
        return {name: widget.value for name, widget in self.inputs.items()}

    def set(self, **values: Any) -> Any:
        """Change inputs as a hand would, and return the result. Raises: LabError where the page shows one."""
        self._soon, soon = _nothing, self._soon  # one answer, not one for each input
        try:
            for name, value in values.items():
                self.inputs[name].value = value
        finally:
            self._soon = soon
        self.result = self.function(**self.values)
        self._show()
        return self.result

    def refresh(self) -> None:
        """Make the result anew, or say why there is none."""
        try:
            self.result = self.function(**self.values)
        except LabError as error:
            self.message.value = f"<b>{escape(str(error))}</b>"
            return
        self._show()

    def _show(self) -> None:
        parts = self.result if isinstance(self.result, tuple) else (self.result,)
        figures = [part for part in parts if isinstance(part, Figure)]
        self.message.value = ""
        self.picture.value = png(figures[0]) if figures else b""
        self.picture.layout.width = f"{100 * figures[0].get_figwidth():.0f}px" if figures else None
        self.picture.layout.display = SHOWN if figures else HIDDEN
        self.table.value = "".join(table_html(part) for part in parts if isinstance(part, pd.DataFrame))

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return shown_bundle(self.widget, self.picture.value, self.message.value + self.table.value)


def _nothing() -> None:
    """Called in place of an answer that is not wanted."""


def shown_bundle(widget: widgets.Widget, picture: bytes = b"", html: str = "") -> dict[str, Any]:
    """What a cell shows: the widget, and for pages without widgets the picture or table of this moment."""
    bundle: dict[str, Any] = dict(widget._repr_mimebundle_() or {})
    bundle["text/plain"] = "(a control; run the notebook to use it)"
    if picture:
        bundle["image/png"] = base64.b64encode(picture).decode()
    elif html:
        bundle["text/html"] = html
    return bundle


def png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes, as a notebook shows it."""
    return figure._repr_png_()[0]  # type: ignore[attr-defined]


def table_html(table: pd.DataFrame) -> str:
    """A table as a page shows it."""
    return table.to_html(border=0, na_rep="").replace("<table", '<table style="margin: 0"', 1)


def after_pause(call: Callable[[], None], seconds: float = PAUSE) -> Callable[[], None]:
    """A function that calls `call` once nothing has asked for `seconds`; at once where no event loop runs."""
    waiting: list[asyncio.TimerHandle] = []

    def ask() -> None:
        while waiting:
            waiting.pop().cancel()
        loop = running_loop()
        if loop is None:
            call()
        else:
            waiting.append(loop.call_later(seconds, call))

    return ask


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that a notebook's kernel runs; none in a plain program."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
