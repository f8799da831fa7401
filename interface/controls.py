"""Notebook controls over plain functions, and the experiment form, made from the configuration's own fields."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from types import NoneType
from typing import Any, get_args, get_origin

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from config import GROUPS, Config, choices, make_config, run_name
from core.errors import LabError
from core.presets import PRESETS

# --- Controls ---


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


# --- The experiment form ---


EVERY = "every group"
CHANGED = "changed from the preset"
KEPT = ("seed", "cache_dir", "runs_dir", "checkpoint_dir", "device")  # another preset does not move the lab


@dataclass(frozen=True)
class FormField:
    """One field of the configuration as a form needs it.

    Args:
        group: a value of config.GROUPS.
        help: its docstring.
        choices: the values it takes, or () where they cannot be listed.
    """

    name: str
    group: str
    help: str
    annotation: Any
    choices: tuple[Any, ...] = ()

    @property
    def optional(self) -> bool:
        return NoneType in get_args(self.annotation)

    def as_text(self, value: Any) -> str:
        """A value as it stands in a text box; none is empty."""
        if isinstance(value, tuple):
            return ", ".join(map(str, value))
        return "" if value is None else str(value)

    def parse(self, entered: Any) -> Any:
        """What was entered, as the configuration takes it; it checks the rest."""
        if not isinstance(entered, str) or self.choices:
            return entered
        if get_origin(self.annotation) is tuple:
            return tuple(part.strip() for part in entered.split(",") if part.strip())
        return None if self.optional and not entered.strip() else entered.strip()


def config_fields() -> dict[str, FormField]:
    """Every field by name, in the configuration's order."""
    fields, group = {}, ""
    for name, field in Config.model_fields.items():
        group = GROUPS.get(name, group)
        help_text = " ".join((field.description or "").split())
        fields[name] = FormField(name, group, help_text, field.annotation, choices(name))
    return fields


# --- widgets ---

WIDE = widgets.Layout(width="260px", flex="0 0 auto")
NAME = widgets.Layout(width="210px", flex="0 0 auto")


def _dropdown(field: FormField, value: Any) -> widgets.Widget:
    options = field.choices if value in field.choices else (value, *field.choices)
    return widgets.Dropdown(options=options, value=value, tooltip=field.help, layout=WIDE)


def _text(field: FormField, value: Any) -> widgets.Widget:
    return widgets.Text(
        value=field.as_text(value),
        placeholder="none" if field.optional else "",
        continuous_update=False,
        tooltip=field.help,
        layout=WIDE,
    )


INPUTS: Mapping[Any, Callable[[FormField, Any], widgets.Widget]] = {
    bool: lambda field, value: widgets.Checkbox(value=value, indent=False, tooltip=field.help, layout=WIDE),
    int: lambda field, value: widgets.IntText(value=value, tooltip=field.help, layout=WIDE),
    float: lambda field, value: widgets.FloatText(value=value, tooltip=field.help, layout=WIDE),
}
"""The widget of a field's type; what is not here is text, what has choices a menu."""


def make_input(field: FormField, value: Any) -> widgets.Widget:
    """The widget that edits a field."""
    return _dropdown(field, value) if field.choices else INPUTS.get(field.annotation, _text)(field, value)


class ExperimentForm:
    """Edits a configuration in place; cells below that read it see the change.

    A group, or words of a field's name or help, choose what is shown. A value that the configuration
    refuses leaves it as it was and says why.

    Args: config: changed as the form is.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.fields = config, config_fields()
        self.rows: dict[str, FormRow] = {}
        groups = list(dict.fromkeys(field.group for field in self.fields.values()))
        self.preset = widgets.Dropdown(options=list(PRESETS), value=config.preset, description="preset")
        self.group = widgets.Dropdown(options=[EVERY, CHANGED, *groups], value="flags", description="show")
        self.find = widgets.Text(placeholder="words of a name or its help", description="find")
        self.message, self.summary, self.shown = widgets.HTML(), widgets.HTML(), widgets.VBox()
        self.summary.add_class("jp-RenderedHTMLCommon")
        choosers = widgets.HBox([self.preset, self.group, self.find], layout=widgets.Layout(flex_flow="wrap"))
        self.widget = widgets.VBox([choosers, self.message, self.shown, self.summary])
        self.preset.observe(lambda change: self.load(change["new"]), "value")
        self.group.observe(lambda change: self._arrange(), "value")
        self.find.observe(lambda change: self._arrange(), "value")
        self._arrange()

    def enter(self, name: str, entered: Any) -> bool:
        """Enter a value as the form does; whether the configuration took it."""
        field = self.fields.get(name)
        try:
            self.config[name] = field.parse(entered) if field else entered
        except LabError as error:
            self.message.value = f"<b>{escape(str(error))}</b>"
            return False
        self.message.value = ""
        self._describe()
        return True

    def load(self, preset: str) -> None:
        """Put every field to a preset's value, but for those in `KEPT`."""
        fresh = make_config(preset, **{name: self.config[name] for name in KEPT})
        vars(self.config).update(vars(fresh))
        self.rows.clear()
        self._arrange()

    def differences(self) -> pd.DataFrame:
        """What differs from the preset: a row a field, this run's value and the preset's."""
        changed = self.config.differences(make_config(self.config.preset))
        rows = {name: [str(value) for value in pair] for name, pair in changed.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["this run", "preset"])

    def visible(self) -> list[str]:
        """Names of the fields shown now."""
        words = self.find.value.lower().split()
        changed = set(self.differences().index)
        return [
            name
            for name, field in self.fields.items()
            if name != "preset" and self._chosen(field, words, changed)
        ]

    def _chosen(self, field: FormField, words: list[str], changed: set[str]) -> bool:
        if words:
            return all(word in f"{field.name} {field.help}".lower() for word in words)
        known = {EVERY: True, CHANGED: field.name in changed}
        return known.get(self.group.value, field.group == self.group.value)

    def _arrange(self) -> None:
        names = self.visible()
        for name in names:
            if name not in self.rows:
                self.rows[name] = FormRow(self, self.fields[name])
        self.shown.children = [self.rows[name].widget for name in names]
        self._describe()

    def _describe(self) -> None:
        table = self.differences()
        for name, row in self.rows.items():
            row.mark(table["preset"].get(name))
        about = f"run <b>{escape(run_name(self.config))}</b>"
        self.summary.value = about + (table_html(table) if len(table) else ", as the preset is")

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return shown_bundle(self.widget, html=self.summary.value)


class FormRow:
    """A field's name, its input and its help; the name is bold where it differs from the preset."""

    def __init__(self, form: ExperimentForm, field: FormField) -> None:
        self.form, self.field = form, field
        self.name = widgets.HTML(layout=NAME)
        self.input = make_input(field, form.config[field.name])
        self.help = widgets.HTML()
        self.widget = widgets.HBox(
            [self.name, self.input, self.help], layout=widgets.Layout(align_items="center")
        )
        self.input.observe(lambda change: self._entered(change["new"]), "value")

    def _entered(self, value: Any) -> None:
        if not self.form.enter(self.field.name, value):
            now = self.form.config[self.field.name]
            said = self.form.message.value
            self.input.value = self.field.as_text(now) if isinstance(self.input, widgets.Text) else now
            self.form.message.value = said  # putting the old value back is no new entry

    def mark(self, preset_value: str | None) -> None:
        """Show whether the field differs from the preset, and what the preset has."""
        name, text = escape(self.field.name), re.sub("`(.+?)`", r"<code>\1</code>", escape(self.field.help))
        self.name.value = f"<code>{name}</code>" if preset_value is None else f"<b><code>● {name}</code></b>"
        self.help.value = (
            text if preset_value is None else f"<b>preset: {escape(preset_value) or 'none'}.</b> {text}"
        )
