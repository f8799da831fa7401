"""Notebook controls over plain functions, and the experiment form made from the fields of the configuration."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable
from html import escape
from types import NoneType
from typing import Any, get_args, get_origin

import ipywidgets as widgets
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from config import GROUPS, Config, choices, make_config, run_name
from core.errors import LabError
from core.presets import PRESETS

# --- Controls ---


PAUSE = 0.4  # seconds after the last key press until a control answers
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
HIDDEN, SHOWN = "none", ""


class Control:
    """Inputs above the result of a function of their values, which is computed again when one changes.

    A page without widgets shows the result as an image and a table. In plain Python, `control.function(**values)` is
    the same call and `control.result` its last result.

    Args:
        function: plain function of the inputs' values, by name; returns a figure, a table, or (figure, table).
            The message of its LabError is shown above the last result.
        inputs: widgets by the function's parameters.
    """

    def __init__(self, function: Callable[..., Any], **inputs: Any) -> None:
        self.function, self.inputs = function, inputs
        self.result: Any = None
        self.message = widgets.HTML()
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", display=HIDDEN))
        self.table = widgets.HTML()
        self.table.add_class("jp-RenderedHTMLCommon")  # JupyterLab's own look of tables, dark or light
        row = widgets.HBox(list(inputs.values()), layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox([row, self.message, self.image, self.table])
        self._soon = after_pause(self.refresh)
        for widget in inputs.values():
            widget.observe(lambda change: self._soon(), "value")
        self.refresh()

    @property
    def values(self) -> dict[str, Any]:
        """The inputs' values by name."""
        return {name: widget.value for name, widget in self.inputs.items()}

    def set(self, **values: Any) -> Any:
        """Change inputs as a user does, and return the result. Raises: LabError where the page shows its message."""
        self._soon, soon = _nothing, self._soon  # one result, not one per input
        try:
            for name, value in values.items():
                self.inputs[name].value = value
        finally:
            self._soon = soon
        self.result = self.function(**self.values)
        self._show()
        return self.result

    def refresh(self) -> None:
        """Compute the result again, or show why that is impossible."""
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
        self.image.value = png(figures[0]) if figures else b""
        self.image.layout.width = f"{100 * figures[0].get_figwidth():.0f}px" if figures else None
        self.image.layout.display = SHOWN if figures else HIDDEN
        self.table.value = "".join(table_html(part) for part in parts if isinstance(part, pd.DataFrame))

    def bundle(self) -> dict[str, Any]:
        """What a cell shows, by mime type."""
        return shown_bundle(self.widget, self.image.value, self.message.value + self.table.value)

    def _ipython_display_(self) -> None:
        display(self.bundle(), raw=True)


def _nothing() -> None:
    """Replaces `_soon` while several inputs change."""


def shown_bundle(widget: widgets.Widget, image: bytes = b"", html: str = "") -> dict[str, Any]:
    """What a cell shows: the widget, and for pages without widgets the current image and table.

    Published by `display`, as ipywidgets 7 does, so that Colab's display hook adds its metadata to it.
    """
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    bundle: dict[str, Any] = {WIDGET_VIEW: view, "text/plain": "(a control; run the notebook to use it)"}
    if image:
        bundle["image/png"] = base64.b64encode(image).decode()
    if html:
        bundle["text/html"] = html
    return bundle


def uploaded(value: Any) -> bytes | None:
    """The last file of a `FileUpload.value`: a dict of files in ipywidgets 7, a tuple in 8; None if there is none."""
    files = list(value.values() if isinstance(value, dict) else value)
    return bytes(files[-1]["content"]) if files else None


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    return figure._repr_png_()[0]  # type: ignore[attr-defined]


def table_html(table: pd.DataFrame) -> str:
    """A table as HTML, with space between columns in pages without JupyterLab's styles too."""
    html = table.to_html(border=0, na_rep="").replace("<table", '<table style="margin: 0"', 1)
    return re.sub("<(t[hd])>", r'<\1 style="padding: 2px 8px">', html)


def after_pause(call: Callable[[], None], seconds: float = PAUSE) -> Callable[[], None]:
    """A function that calls `call` `seconds` after it was last called; immediately if no event loop runs."""
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
    """The event loop of a notebook's kernel; None in a plain program."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


# --- The experiment form ---


EVERY = "every group"
CHANGED = "changed from the preset"
KEPT = ("seed", "cache_dir", "runs_dir", "checkpoint_dir", "device")  # stay when another preset is chosen
INPUT_LAYOUT = widgets.Layout(width="260px", flex="0 0 auto")
NAME_LAYOUT = widgets.Layout(width="210px", flex="0 0 auto")
NUMBERS: dict[Any, type[widgets.Widget]] = {int: widgets.IntText, float: widgets.FloatText}


def field_groups() -> dict[str, str]:
    """Every field that a person sets, with the title of its group."""
    groups, group = {}, ""
    for name in Config.model_fields:
        group = GROUPS.get(name, group)
        groups[name] = group
    return {name: group for name, group in groups.items() if name not in ("preset", "settings_file")}


def help_of(name: str) -> str:
    """A field's help in one line."""
    return " ".join((Config.model_fields[name].description or "").split())


def make_input(name: str, value: Any) -> widgets.Widget:
    """The widget that edits a field: a menu, a checkbox, a number, or text."""
    options, annotation = choices(name), Config.model_fields[name].annotation
    if options:
        options = options if value in options else (value, *options)
        return widgets.Dropdown(options=options, value=value, layout=INPUT_LAYOUT)
    if annotation is bool:
        return widgets.Checkbox(value=value, indent=False, layout=INPUT_LAYOUT)
    if annotation in NUMBERS:
        return NUMBERS[annotation](value=value, layout=INPUT_LAYOUT)
    hint = "none" if NoneType in get_args(annotation) else ""
    return widgets.Text(value=as_text(value), placeholder=hint, continuous_update=False, layout=INPUT_LAYOUT)


def as_text(value: Any) -> str:
    """A value as shown in a text box; None is empty."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def parse(name: str, entered: Any) -> Any:
    """The value that was entered for a field, for the configuration to check."""
    if not isinstance(entered, str) or name not in Config.model_fields or choices(name):
        return entered
    annotation = Config.model_fields[name].annotation
    if get_origin(annotation) is tuple:
        return tuple(part.strip() for part in entered.split(",") if part.strip())
    return None if NoneType in get_args(annotation) and not entered.strip() else entered.strip()


class ExperimentForm:
    """Edits a configuration in place; cells below that read it see the change.

    A group, or words of a field's name or help, select the fields shown. A value that the configuration refuses
    leaves it unchanged, and the form shows the reason.

    Args: config: edited by the form.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.groups = config, field_groups()
        self.rows: dict[str, FormRow] = {}
        groups = list(dict.fromkeys(self.groups.values()))
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
        """Enter a value as the form does; returns whether the configuration accepted it."""
        try:
            self.config[name] = parse(name, entered)
        except LabError as error:
            self.message.value = f"<b>{escape(str(error))}</b>"
            return False
        self.message.value = ""
        self._describe()
        return True

    def load(self, preset: str) -> None:
        """Set every field to a preset's value, except those in `KEPT`."""
        fresh = make_config(preset, **{name: self.config[name] for name in KEPT})
        vars(self.config).update(vars(fresh))
        self.rows.clear()
        self._arrange()

    def differences(self) -> pd.DataFrame:
        """What differs from the preset: one row per field, with this run's value and the preset's."""
        changed = self.config.differences(make_config(self.config.preset))
        rows = {name: [str(value) for value in pair] for name, pair in changed.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["this run", "preset"])

    def visible(self) -> list[str]:
        """Names of the fields that are shown."""
        if words := self.find.value.lower().split():
            texts = {name: f"{name} {help_of(name)}".lower() for name in self.groups}
            return [name for name, text in texts.items() if all(word in text for word in words)]
        if self.group.value == CHANGED:
            return [name for name in self.groups if name in self.differences().index]
        return [name for name, group in self.groups.items() if self.group.value in (EVERY, group)]

    def _arrange(self) -> None:
        names = self.visible()
        for name in names:
            if name not in self.rows:
                self.rows[name] = FormRow(self, name)
        self.shown.children = [self.rows[name].widget for name in names]
        self._describe()

    def _describe(self) -> None:
        table = self.differences()
        for name, row in self.rows.items():
            row.mark(table["preset"].get(name))
        name = f"run <b>{escape(run_name(self.config))}</b>"
        self.summary.value = name + (table_html(table) if len(table) else ", as the preset")

    def _ipython_display_(self) -> None:
        display(shown_bundle(self.widget, html=self.summary.value), raw=True)


class FormRow:
    """A field's name, its input and its help; the name is bold if it differs from the preset."""

    def __init__(self, form: ExperimentForm, field: str) -> None:
        self.form, self.field = form, field
        self.name, self.help = widgets.HTML(layout=NAME_LAYOUT), widgets.HTML()
        self.input = make_input(field, form.config[field])
        self.widget = widgets.HBox(
            [self.name, self.input, self.help], layout=widgets.Layout(align_items="center")
        )
        self.input.observe(lambda change: self._entered(change["new"]), "value")

    def _entered(self, value: Any) -> None:
        if not self.form.enter(self.field, value):
            current, message = self.form.config[self.field], self.form.message.value
            self.input.value = as_text(current) if isinstance(self.input, widgets.Text) else current
            self.form.message.value = message  # restoring the old value has cleared it

    def mark(self, preset_value: str | None) -> None:
        """Show whether the field differs from the preset, and the preset's value."""
        text = re.sub("`(.+?)`", r"<code>\1</code>", escape(help_of(self.field)))
        if preset_value is None:
            self.name.value, self.help.value = f"<code>{self.field}</code>", text
        else:
            self.name.value = f"<b><code>● {self.field}</code></b>"
            self.help.value = f"<b>preset: {escape(preset_value) or 'none'}.</b> {text}"
