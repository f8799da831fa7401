"""Settings files: YAML or JSON, flat or in sections, with the names of this project or of other labs."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from core.errors import LabError, choose, nearest, shown
from core.files import read_bytes

Settings = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, uses in keys.items() if uses > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} is given twice; keep one")
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > 1000:  # merged mappings grow with each level
            raise yaml.YAMLError("a mapping has more than 1,000 fields")


def load_yaml(path: str | Path) -> Any:
    """Content of a YAML file, or of a JSON file, which may have `//` comments.

    Raises: LabError if it is damaged or larger than 256 KiB.
    """
    data = read_bytes(path, 256 * 2**10)
    try:
        text = data.decode("utf-8-sig")
        if Path(path).suffix == ".json":
            text = re.sub(r'("(?:\\.|[^"\\])*")|//[^\n]*', lambda match: match[1] or "", text)
        return yaml.load(text, _Loader)  # YAML reads JSON too
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        cause = f"{error or type(error).__name__}".splitlines()[0][:200]
        raise LabError(f"{path} cannot be read as YAML or JSON: {cause}.") from error


def read_settings(path: str | Path, fields: Collection[str]) -> Settings:
    """The fields that a file sets, without its sections, and the `preset` that its layout implies."""
    path = Path(path)
    if not path.is_file():
        raise LabError(f"configuration file {path} does not exist; give the path of a .yaml or .json file.")
    content = load_yaml(path)
    if not isinstance(content, Mapping):
        raise LabError(f"{path} must contain `field: value` lines, not a {type(content).__name__}.")
    return translate(content, fields, str(path))


@functools.cache
def _aliases() -> dict[str, Any]:
    return load_yaml(Path(__file__).with_name("aliases.yaml"))


def layouts() -> dict[str, Any]:
    """Other labs' names of settings, by lab."""
    return _aliases()["layouts"]


def former() -> dict[str, Any]:
    """Other values of fields, and fields of earlier versions by value: the settings that each stands for."""
    return _aliases()["former"]


def current(values: Settings) -> Settings:
    """Settings without former names. Raises: LabError if one contradicts another setting, or has no effect now."""
    result: Settings = {}
    for name, value in values.items():
        by_value = former().get(name, {})
        if not isinstance(value, str | int) or value not in by_value:
            if by_value and name != "loss":
                always = next(iter(by_value))
                raise LabError(
                    f"configuration field {name!r} no longer exists and is always {always}, not {shown(value)}; "
                    "delete it."
                )
            result[name] = value
            continue
        for field, setting in by_value[value].items():
            if field != name and values.get(field, setting) != setting:
                raise LabError(
                    f"{name} {value!r} stands for {by_value[value]}, and {field} is {values[field]!r}; "
                    f"leave {field} out."
                )
            result[field] = setting
    return result


def translate(
    content: Mapping[Any, Any], fields: Collection[str], where: str, preset: Any = None
) -> Settings:
    """Settings under this project's names.

    Args:
        content: name -> value, or section -> {name -> value}.
        fields: the names of this project.
        where: what the settings come from, for messages.
        preset: that they start from; None: as they say, or as their layout implies.
    Raises: LabError if two names set a field to different values, or a value has no meaning here.
    """
    rows = list(_rows(content))
    signs = {sign for section, name, _ in rows for sign in (section, name, f"{section}.{name}")}
    preset = preset or next((value for _, name, value in rows if name == "preset"), None)
    own = [
        layout
        for layout in layouts().values()
        if (preset in layout["presets"] if preset else signs & set(layout["signs"]))
    ][:1]
    values: Settings = {}
    for section, name, value in rows:
        for field, setting in _translated(own, section, name, value, content, fields).items():
            if values.setdefault(field, setting) != setting:
                raise LabError(f"{where} sets {field!r} twice; keep one.")
    return values if preset or not own else {"preset": own[0]["presets"][0], **values}


def _rows(content: Mapping[Any, Any]) -> Iterator[tuple[str, str, Any]]:
    """(section, name, value) of each setting; the section of a setting outside of sections is empty."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from ((str(name), str(inner), setting) for inner, setting in value.items())
        else:
            yield "", str(name), value


def _translated(
    own: list[Any], section: str, name: str, value: Any, content: Mapping[Any, Any], fields: Collection[str]
) -> Settings:
    """What one setting means: by its own layout, as a field, or by another layout."""
    others = [layout for layout in layouts().values() if layout not in own] * (name not in fields)
    for layout in [*own, *others]:
        target = layout["keys"].get(f"{section}.{name}", layout["keys"].get(name))
        if isinstance(target, str):
            return dict.fromkeys(target.split(), value)
        if target is not None and "function" in target:
            return FUNCTIONS[target["function"]](name, value, content)
        if target is not None:
            texts = {str(key): settings for key, settings in target.items()}
            return choose(texts, str(value), name)
    if name not in fields:
        raise LabError(unknown(name, [*fields, *names_of_flags()]))
    return {name: value}


def unknown(name: str, names: list[str]) -> str:
    """One sentence about a name that no setting has."""
    hint = nearest(name, names) or "; see the fields of config.Config."
    return f"configuration field {name!r} does not exist{hint}"


def names_of_flags() -> set[str]:
    """The names of other labs that may stand on a command line."""
    keys = {key.removeprefix("model.") for layout in layouts().values() for key in layout["keys"]}
    return {key for key in keys if "." not in key}


# --- settings that need more than another name ---


def _embedding_files(name: str, value: Any, content: Mapping[Any, Any]) -> Settings:
    """`train_metadata: train2017_metadata.json` names the split of training, `train2017`."""
    group, _, kind = name.partition("_")
    split, file = str(value).removesuffix(".pt").removesuffix(".json"), f"_{kind}"
    if not split.endswith(file) or "/" in split:
        raise LabError(
            f"{name} {shown(value)} is no name of a file of embeddings here; such files are called "
            f"SPLIT{file}{'.json' if kind == 'metadata' else '.pt'} and stand in data_dir."
        )
    return {f"{group}_splits": [split.removesuffix(file)]}


def _one_learning_rate(name: str, value: Any, content: Mapping[Any, Any]) -> Settings:
    """One rate for towers and projections."""
    return {"learning_rate": value, "image_tower_learning_rate": None, "text_tower_learning_rate": None}


def _negatives_by_type(name: str, value: Any, content: Mapping[Any, Any]) -> Settings:
    """`dataset_type` says which examples a batch contains; the strategy counts for type `hard_negative` alone."""
    settings = {name: value for _, name, value in _rows(content)}
    strategy = settings.get("negative_mining_strategy", "semantic")
    types: dict[str, Settings] = {
        "standard": {"mining": "none"},
        "hard_negative": {"mining": strategy},
        "triplet": {"loss": "triplet"},
    }
    return choose(types, settings.get("dataset_type", "hard_negative"), "dataset_type")


def _accumulated(name: str, value: Any, content: Mapping[Any, Any]) -> Settings:
    """A step on as many images, in pieces as large as the file's batches; every piece sees the negatives of all."""
    settings = {name: value for _, name, value in _rows(content)}
    size, steps = settings.get("batch_size"), settings.get("gradient_accumulation_steps", 1)
    if not isinstance(size, int) or not isinstance(steps, int):
        raise LabError(
            f"{name} {shown(value)}: give batch_size and gradient_accumulation_steps as whole numbers."
        )
    return {"batch_size": size * steps, **({"micro_batch_size": size} if steps > 1 else {})}


FUNCTIONS: dict[str, Callable[[str, Any, Mapping[Any, Any]], Settings]] = {
    "embedding_files": _embedding_files,
    "one_learning_rate": _one_learning_rate,
    "negatives_by_type": _negatives_by_type,
    "accumulated": _accumulated,
}
