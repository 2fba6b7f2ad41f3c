"""Data sets of two catalogues, as rows: Hugging Face's, through `datasets`, and TensorFlow's, through TFDS.

Both are read a row at a time; their libraries' errors become one line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etils import epath

from main_jax.data.files import Missing, Row, brief, digest, files_below, hashed
from main_jax.errors import UserError

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` writes into a folder."""


@dataclass(frozen=True)
class HubOptions:
    """split: of `datasets`, slices and sums included. revision: a branch, tag or commit of the hub's."""

    split: str = "train"
    revision: str | None = None


class Hub:
    """A data set through `datasets`: streamed from the hub or from a folder; code of it is never run."""

    def __init__(self, name: str, options: HubOptions):
        self._config: str | None = None
        if ":" in name and not epath.Path(name).is_dir():
            name, _, self._config = name.rpartition(":")
        self._options, self._folder = options, epath.Path(name).expanduser()
        self._local = self._folder.is_dir()
        self._name = str(self._folder) if self._local else name
        if self._folder.is_file():
            raise UserError(f"hf:{name}: is a file; give its path without hf:")
        if not self._local and not HUB_NAME.fullmatch(name):
            raise Missing(f"hf:{name}: no such directory; expected a folder or a name on the hub such as "
                          "OpenAssistant/oasst1")  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """The rows of the split; numbered as in it."""
        splits = self._splits()
        for split, start, stop in self._slices(splits):
            rows = splits[split].skip(start)
            rows = iter(rows if stop is None else rows.take(stop - start))
            number, file = start, f"hf:{self._name}, split {split}"
            while True:
                number += 1
                try:
                    values = next(rows)
                except StopIteration:
                    break
                except Exception as error:  # of the hub, of a file's format
                    # Of many rows that are read at once, and the library does not say which it was.
                    why = brief(error, 300)
                    raise UserError(
                        f"{file}: cannot be read after row {number - 1} ({why})"
                    ) from None
                yield Row(file, number, values)

    def fingerprint(self) -> str:
        """A folder counts by its files; on the hub the revision is what is named."""
        what = digest(self._folder) if self._local else self._name
        return hashed([what, self._config, self._options.split, self._options.revision])

    def size_bytes(self) -> int | None:
        """Of a folder."""
        return sum(f.stat().length for f in files_below(self._folder)) if self._local else None

    def _splits(self) -> dict[str, Any]:
        """By name, each a data set of `datasets`."""
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our one line says as much
        try:
            if self._local and any((self._folder / f).exists() for f in SAVED):
                found = datasets.load_from_disk(self._name)
                if isinstance(found, datasets.Dataset):
                    return {str(found.split or "train"): found}
            else:
                revision = self._options.revision
                found = datasets.load_dataset(
                    self._name, self._config, revision=revision, streaming=True
                )
            return {str(split): rows for split, rows in found.items()}
        except Exception as error:  # of the hub, of its HTTP client, of a file's format
            fetch = ("" if self._local else f"; with internet access, `hf download {self._name} --repo-type "
                     "dataset --local-dir DIR` fetches it: then say hf:DIR")  # fmt: skip
            empty = isinstance(error, StopIteration)  # no row to see the columns of
            why = "no rows in it" if empty else brief(error, 300)
            raise UserError(f"hf:{self._name}: cannot be opened ({why}){fetch}") from None

    def _slices(self, splits: dict[str, Any]) -> list[tuple[str, int, int | None]]:
        """(split, first row, end); a stream has no slices, and may not know its length."""
        import datasets

        text, unknown, counts = self._options.split, sys.maxsize, {}
        for name, rows in splits.items():
            infos = rows.info.splits or {}
            known = infos[name].num_examples if name in infos else 0
            counts[name] = len(rows) if isinstance(rows, datasets.Dataset) else known or unknown
        try:
            found = datasets.ReadInstruction.from_spec(text).to_absolute(counts)
        except (ValueError, AssertionError) as error:
            raise UserError(f"hf:{self._name}: split {text}: {brief(error, 300)}") from None
        slices = []
        for part in found:
            if counts[part.splitname] == unknown and re.search(r"%|-\d", text):
                raise UserError(
                    f"hf:{self._name}: split {text}: its number of rows is not known before it is read; "
                    f"give rows, such as {part.splitname}[:1000]"
                )
            slices.append((part.splitname, part.from_, None if part.to == unknown else part.to))
        return slices


@dataclass(frozen=True)
class TfdsOptions:
    """split: of TFDS, slices included. data_dir: where it was prepared; by default TFDS's own place."""

    split: str = "train"
    data_dir: str | None = None


class Tfds:
    """A data set that was prepared with TFDS, in array_record, which needs no TensorFlow to be read.

    Other formats are refused: through them rows have been lost silently.
    """

    def __init__(self, name: str, options: TfdsOptions):
        self._name, self._options = name, options

    def rows(self) -> Iterator[Row]:
        """In the order of the files; texts are decoded as UTF-8."""
        builder, split = self._builder, self._options.split
        try:
            rows = builder.as_data_source(split=split)
            promised = builder.info.splits[split].num_examples
        except Exception as error:  # an unknown split; of the file's format
            raise UserError(f"tfds:{self._name}: split {split}: {brief(error, 300)}") from None
        if len(rows) != promised:
            raise UserError(
                f"tfds:{self._name}: split {split}: {len(rows):,} rows are there, but its dataset_info.json "
                f"says {promised:,}; prepare it again"
            )
        file = f"tfds:{self._name}, split {split}"
        for i in range(len(rows)):
            try:
                values = _plain(rows[i])
            except UnicodeDecodeError:
                raise UserError(f"{file}, row {i + 1}: a text in it is not valid UTF-8") from None
            except Exception as error:  # of the file's format
                raise UserError(f"{file}, row {i + 1}: {brief(error, 300)}") from None
            yield Row(file, i + 1, values)

    def fingerprint(self) -> str:
        """Name, version, split, and what its dataset_info.json says."""
        info = epath.Path(self._builder.data_path) / "dataset_info.json"
        return hashed([self._builder.info.full_name, self._options.split, digest(info)])

    def size_bytes(self) -> int:
        """Of all splits."""
        return int(self._builder.info.dataset_size)

    @cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        where = self._options.data_dir or "TFDS's own place"
        try:
            builder = tfds.builder(self._name, data_dir=self._options.data_dir)
            prepared = bool(builder.info.splits)
        except tfds.core.DatasetNotFoundError:  # it lists all that there are
            prepared = False
        except Exception as error:
            raise UserError(f"tfds:{self._name}: {brief(error, 300)}") from None
        if not prepared:
            raise Missing(
                f"tfds:{self._name}: not prepared in {where}; give data_dir=DIR, or prepare it with "
                "`tfds build --file_format=array_record`"
            )
        if (stored := getattr(builder.info.file_format, "value", None)) != "array_record":
            raise UserError(
                f"tfds:{self._name}: stored as {stored} in {where}; prepare it with "
                "`tfds build --file_format=array_record`"
            )
        return builder


def _plain(value: Any) -> Any:
    """Text for bytes, Python's own numbers and lists for NumPy's."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list) else value
