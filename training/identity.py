"""The identity of what a user gives to `fit`: a loss or a data set counts by what it does and what it holds."""

from __future__ import annotations

import functools
import io
import pickle
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.files import fingerprint

LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
PROJECT = str(Path(__file__).parent.parent)
PLAIN = (type(None), bool, int, float, complex, str, bytes, Path, torch.dtype, torch.device, type(...))
NOT_CODE = frozenset(
    "__module__ __doc__ __dict__ __weakref__ __qualname__ __firstlineno__ __static_attributes__ __annotations__ "
    "__annotate__ __annotations_cache__ __abstractmethods__ _abc_impl __parameters__ __orig_bases__".split()
)
MOVING = frozenset({"training", "epoch"})  # attributes that training itself changes


def identity(thing: Any) -> str | None:
    """SHA-256 of what an object does and holds, the same in every process; None where a part cannot be compared.

    Functions and classes count by their compiled code (comments do not), with defaults, closures and the globals
    that they name; those of installed libraries, and what a module imports from this project, by name. Tensors and
    arrays count by their values, trained parameters by their shapes, data sets by their `describe()["sha256"]`.
    """
    try:
        return fingerprint(_tokens(thing, {}))
    except _Incomparable:
        return None


class _Incomparable(Exception):  # noqa: N818  never leaves this module
    """A value without readable content, such as an open file."""


def _tokens(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """A value as texts. Args: seen: values met before, by id."""
    kind = type(value).__name__
    if isinstance(value, PLAIN):
        yield f"{kind} {value!r}"
        return
    if id(value) in seen:
        yield f"again {list(seen).index(id(value))}"
        return
    seen[id(value)] = value  # held, so that no other value gets its id
    if isinstance(value, nn.Parameter) and value.requires_grad:
        yield f"parameter {value.dtype} {tuple(value.shape)}"
    elif isinstance(value, (Tensor, np.ndarray)) and value.dtype != object:
        array = (
            value.detach().cpu().contiguous() if isinstance(value, Tensor) else np.ascontiguousarray(value)
        )
        data = array.reshape(-1).view(torch.uint8).numpy() if isinstance(array, Tensor) else array
        yield f"{kind} {value.dtype} {tuple(value.shape)} {fingerprint([data.tobytes().hex()])}"
    elif isinstance(value, (set, frozenset)):
        yield from [kind, *sorted(fingerprint(_tokens(item, dict(seen))) for item in value)]
    elif isinstance(value, (ModuleType, BuiltinFunctionType)):
        yield f"{getattr(value, '__module__', '')} {value.__name__}"
    elif isinstance(value, (type, FunctionType)) and _file(value).startswith(LIBRARIES):
        yield f"{value.__module__} {value.__qualname__}"
    else:
        yield kind
        for part in _parts(value):
            yield from _tokens(part, seen)


def _file(value: Any) -> str:
    """The file that a function or class comes from; of a built-in one a library's, of a notebook's own none."""
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    return LIBRARIES[0] if value.__module__ == "builtins" else str(file or "")


def _global(value: Any, module: str) -> Any:
    """A global as the functions of a module see it: what they import from this project is only its name."""
    imported = isinstance(value, (type, FunctionType)) and value.__module__ != module
    return (
        f"{value.__module__} {value.__qualname__}" if imported and _file(value).startswith(PROJECT) else value
    )


def _parts(value: Any) -> list[Any]:
    """What a value is made of. Raises: _Incomparable if that cannot be seen."""
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        names = [name for name in _names(value.__code__) if name in value.__globals__]
        named = {name: _global(value.__globals__[name], value.__module__) for name in names}
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__code__, value.__defaults__, value.__kwdefaults__, cells, named]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_consts, value.co_names, value.co_varnames, value.co_freevars]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, type):
        bases = [base for base in value.__bases__ if base is not object]
        own = {name: part for name, part in vars(value).items() if name not in NOT_CODE}
        return [
            value.__name__,
            bases,
            {name: part for name, part in own.items() if name[:10] != "__pydantic"},
        ]
    if hasattr(value, "describe"):
        return [type(value), value.describe()["sha256"], _held(value, plain=True)]
    if isinstance(value, io.IOBase):
        raise _Incomparable
    if isinstance(value, nn.Module) or not _file(type(value)).startswith(LIBRARIES):
        return [type(value), _held(value)]
    try:
        return [pickle.dumps(value)]
    except Exception as error:
        if hasattr(value, "__dict__"):
            return [type(value), _held(value)]
        raise _Incomparable from error


def _names(code: CodeType) -> list[str]:
    """The global names that code and the functions in it use."""
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return sorted({*code.co_names, *inner})


def _held(value: Any, plain: bool = False) -> dict[str, Any]:
    """An object's attributes but for those that training changes; only texts and numbers if `plain`."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name) and name[:2] != "__"}
    held |= getattr(value, "__dict__", {})
    moving = MOVING | set(value.state_dict() if plain and hasattr(value, "state_dict") else ())
    return {
        name: part
        for name, part in held.items()
        if name not in moving and (not plain or isinstance(part, PLAIN))
    }
