"""YAML and dotted overrides -> nested dataclasses, strictly.

    config = load_config(Config, "configs/own_data.yaml", ["--align.rounds", "2"])

A file may say `extends: other.yaml` and then only what differs. An unknown key names its nearest match,
a wrong type says what was expected, both with the dotted key.
Other tools' spellings (`ALIASES`) are mapped.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from main_jax.errors import UserError

T = TypeVar("T")

ALIASES = {
    "base_model": "model_name_or_path",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "dataset": "seed_path",
}

PER_DEVICE = (
    "say train_batch_size, the pairs of a step over all devices, and gradient_accumulation_steps: "
    "results then do not depend on how many devices there are"
)
EXPLAINED = {"per_device_train_batch_size": PER_DEVICE, "micro_batch_size": PER_DEVICE}
"""Keys that users bring and that mean something else here."""


def load_config(cls: type[T], path: str | None, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls` from a YAML file and `--a.b value` overrides.

    Raises UserError, one line.
    """
    values = {} if path is None else _read(Path(path))
    for key, value in parse_overrides(overrides):
        _set(values, key, value)
    return from_mapping(cls, values, path or "command line")


def from_mapping(cls: type[T], values: dict, source: str) -> T:
    """An instance of the dataclass `cls`; an error begins with `source`. Raises UserError, one line."""
    try:
        return _build(cls, values, "")
    except ValueError as error:
        raise UserError(f"{source}: {_one_line(error)}") from None


def _read(path: Path, extended_by: tuple[Path, ...] = ()) -> dict:
    """The keys of a file, over those of the file that it `extends`. Raises UserError."""
    if not path.is_file():
        by = f" (which {extended_by[-1]} extends)" if extended_by else ""
        raise UserError(f"{path}: no such config file{by}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    if "extends" not in values:
        return values
    name = values.pop("extends")
    if not isinstance(name, str):
        raise UserError(f"{path}: extends: expected a file, relative to this one, found {name!r}")
    if path.resolve() in extended_by:
        raise UserError(f"{path}: extends itself")
    return _over(_read(path.parent / name, (*extended_by, path.resolve())), values)


def _over(base: dict, values: dict) -> dict:
    """`values` over `base`, section by section."""
    both = {k for k in values if isinstance(values[k], dict) and isinstance(base.get(k), dict)}
    return base | {k: _over(base[k], v) if k in both else v for k, v in values.items()}


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """`["--a.b", "1", "--c=x"]` -> `[("a.b", 1), ("c", "x")]`; values are read as YAML."""
    pairs, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"unexpected argument {word!r}; overrides look like --align.rounds 2")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} needs a value, as in --{key} VALUE")
            text = rest.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text)))
        except (yaml.YAMLError, ValueError):  # 2024-13-45 is a date to YAML, and no date
            raise UserError(f"--{key}: cannot read the value {text!r}") from None
    return pairs


def _set(values: dict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    at = values
    for section in sections:
        if at.get(section) is None:
            at[section] = {}
        at = at[section]
        if not isinstance(at, dict):
            raise UserError(f"--{key}: {section} is not a section")
    at[last] = value


def _build(cls: Any, values: Any, path: str, base: Any = None) -> Any:
    """An instance of the dataclass `cls` from a mapping; raises ValueError naming the dotted key.

    `base` gives the keys that are not in the mapping: a section's defaults may differ from its class's.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path.rstrip('.')}: expected a section with keys, found {values!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    base = cls() if base is None else base
    arguments = {}
    for key, value in values.items():
        name = key if key in names else ALIASES.get(key, key)
        if name not in names:
            if name in EXPLAINED:
                raise ValueError(f"{path}{key}: {EXPLAINED[name]}")
            raise ValueError(f"unknown key {path}{key}{nearest(str(key), names, path)}")
        if name in arguments:
            raise ValueError(f"{path}{key} is given twice (also as {path}{name})")
        arguments[name] = _convert(value, hints[name], f"{path}{name}", getattr(base, name))
    try:
        return dataclasses.replace(base, **arguments)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if not path else f"{path.rstrip('.')}: {text}") from None


def _convert(value: Any, hint: Any, key: str, default: Any = None) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, f"{key}.", default)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [a for a in arguments if a is not type(None)]
        for choice in choices[:-1]:
            if isinstance(choice, type) and isinstance(value, choice):
                return value
        fallback = choices[0] if isinstance(value, str) else choices[-1]
        return _convert(value, fallback, key)
    if origin is Literal:
        if value not in arguments:
            near = nearest(str(value), [str(a) for a in arguments])
            options = ", ".join(map(str, arguments))
            raise ValueError(f"{key}: expected one of {options}; found {value!r}{near}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: expected a list, found {value!r}")
        return tuple(_convert(v, arguments[0], f"{key}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5, without a dot, as text
        except ValueError:
            pass
    elif (hint is dict and isinstance(value, dict)) or (
        isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    ):
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ValueError(f"{key}: expected {expected.get(hint, hint.__name__)}, found {value!r}")


def nearest(word: str, options: Sequence[str], path: str = "") -> str:
    """What a wrong word may have meant, as the end of an error message."""
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {path}{close[0]}?"
    return f"; known: {', '.join(options)}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
