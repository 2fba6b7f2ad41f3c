"""Where rows come from, behind one string: for seed pairs, unlabelled texts and questions alike.

    for row in open_source("oasst1:data/trees.jsonl.gz?turns=every&limit=500"): ...

| string | rows of |
|---|---|
| `PATH` or a glob, local or `gs://` | JSONL, Parquet, CSV (`main_jax/data/files.py`) |
| `hf:NAME[:config]?split=train[:10%]&revision=...` | a data set on the Hugging Face hub, streamed |
| `hf:DIR[:config]?split=...` | a folder of data files, or one that `datasets` has saved |
| `tfds:NAME[:version]?split=...&data_dir=...` | a prepared TFDS data set in array_record; no TensorFlow |
| `oasst1:SOURCE?...`, `refinedweb:SOURCE?...` | what `data/extraction.py` takes out of any of these |

Options follow the last `?`, joined by `&`, as they are (nothing is decoded). SOURCE may leave out `hf:` for
a name on the hub; its options and those of the extraction stand together.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import yaml
from etils import epath

from main_jax.data.catalogues import HUB_NAME, Hub, HubOptions, Tfds, TfdsOptions
from main_jax.data.extraction import RULES, Oasst1, RefinedWeb
from main_jax.data.files import Files, Row, hashed
from main_jax.errors import UserError
from main_jax.strict_yaml import from_mapping, nearest

SCHEME = re.compile(r"(hf|tfds|oasst1|refinedweb):(?!//)(.*)", re.DOTALL)
FILE_NAME = re.compile(r"\.(jsonl?|parquet|csv)(\.\w+)?$")
OPTIONAL = ("id", "weight", "input")
"""Columns of ours that a mapped row may lack."""


@dataclass(frozen=True)
class NoOptions:
    """A file has none."""


OPTIONS = {"": NoOptions, "hf": HubOptions, "tfds": TfdsOptions}


class Reader(Protocol):
    """What is behind a source without rules."""

    def rows(self) -> Iterator[Row]:
        """All rows, from the beginning."""
        ...

    def fingerprint(self) -> str:
        """Changes when the rows may have changed."""
        ...

    def size_bytes(self) -> int | None:
        """On the disk; None where it is not known."""
        ...


@dataclass
class Source:
    """Rows that can be read again and again, one at a time.

    name: as errors say it. columns: ours -> theirs, applied to the raw rows. rules: an extraction.
    skipped: the rows that the last reading left out, by reason.
    """

    name: str
    reader: Reader
    columns: Mapping[str, str]
    rules: Oasst1 | RefinedWeb | None = None
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        return self.name

    def __iter__(self) -> Iterator[Row]:
        self.skipped.clear()
        rows = self._renamed() if self.columns else self.reader.rows()
        return self.rules.extract(rows, self.skipped) if self.rules else rows

    def fingerprint(self) -> str:
        """A digest: of local files by their content, else of what names the data; and of the rules."""
        of_data = self.reader.fingerprint()
        if self.rules is None:
            return of_data
        return hashed([of_data, type(self.rules).__name__, dataclasses.asdict(self.rules)])

    def size_bytes(self) -> int | None:
        """Of what is read, at most; None where it is not known."""
        sizes = [self.reader.size_bytes()]
        if isinstance(self.rules, RefinedWeb) and self.rules.limit is not None:
            sizes.append(self.rules.limit * self.rules.max_characters)
        return min((size for size in sizes if size is not None), default=None)

    def _renamed(self) -> Iterator[Row]:
        named = {*self.columns, *self.columns.values()}
        for row in self.reader.rows():
            for ours, theirs in self.columns.items():
                if theirs not in row.values and ours not in OPTIONAL:
                    raise UserError(f"{row}: missing column {theirs!r} (columns: {{{ours}: {theirs}}}); "
                                    f"found {', '.join(map(str, row.values)) or 'none'}")  # fmt: skip
            others = {k: v for k, v in row.values.items() if k not in named}
            ours = {o: row.values[t] for o, t in self.columns.items() if t in row.values}
            yield row._replace(values=others | ours)


def open_source(text: str, key: str = "", columns: Mapping[str, str] | None = None) -> Source:
    """The source that a string names; nothing but the presence of files is looked at yet.

    Args:
        text: see the module.
        key: the argument or config key it was given as, for error lines.
        columns: ours -> theirs, where they are not recognised by themselves.

    Raises:
        UserError: no such file (then it is Missing), or an unknown option (with its nearest match); one line.
    """
    try:
        return _open(str(text), dict(columns or {}))
    except UserError as error:
        raise type(error)(f"{key}: {error}" if key else str(error)) from None


def _open(text: str, columns: dict[str, str]) -> Source:
    match, weight = SCHEME.fullmatch(text), columns.get("weight", "weight")
    if not match:
        return Source(str(epath.Path(text).expanduser()), Files(text, weight), columns)
    scheme, (rest, given) = match[1], _options(match[2])
    rules, kind = RULES.get(scheme), scheme
    if rules is not None:
        kind, rest = _inner(rest)
    if not rest:
        raise UserError(f"{text}: expected a name or a path")
    options = OPTIONS[kind]
    names = [f.name for of in (options, rules) if of for f in dataclasses.fields(of)]
    for name in given:
        if name not in names:
            raise UserError(f"{text}: unknown option {name}{nearest(name, names)}")
    chosen = _typed(options, given, text)
    reader: Reader
    if isinstance(chosen, HubOptions):
        reader = Hub(rest, chosen)
    elif isinstance(chosen, TfdsOptions):
        reader = Tfds(rest, chosen)
    else:
        reader = Files(rest, weight)
    return Source(text, reader, columns, _typed(rules, given, text) if rules else None)


def _options(rest: str) -> tuple[str, dict[str, str]]:
    """What stands before the last `?`, and the options after it (a glob's `?` is followed by no `=`)."""
    head, mark, tail = rest.rpartition("?")
    if not mark or "=" not in tail:
        return rest, {}
    options: dict[str, str] = {}
    for option in tail.split("&"):
        name, equals, value = option.partition("=")
        if not equals or name in options:
            raise UserError(f"{rest}: option {option!r}: expected each once, as name=value")
        options[name] = value
    return head, options


def _inner(rest: str) -> tuple[str, str]:
    """What an extraction reads: the kind of the reader, and what it is given."""
    if match := re.fullmatch(r"(hf|tfds):(.*)", rest, re.DOTALL):
        return match[1], match[2]
    path = epath.Path(rest).expanduser()
    on_hub = HUB_NAME.fullmatch(rest) and "/" in rest and not FILE_NAME.search(rest)
    return ("hf" if path.is_dir() or (on_hub and not path.exists()) else ""), rest


def _typed(cls: Any, options: Mapping[str, str], text: str) -> Any:
    """An instance of an options' dataclass from those options that are its own."""
    values = {}
    for f in dataclasses.fields(cls):
        if (value := options.get(f.name)) is not None:
            text_field = str(f.type).startswith("str") and value != "null"
            try:  # but `no`, Norwegian, is a text
                values[f.name] = value if text_field else yaml.safe_load(value)
            except (yaml.YAMLError, ValueError):
                values[f.name] = value  # refused for its type
    return from_mapping(cls, values, text)
