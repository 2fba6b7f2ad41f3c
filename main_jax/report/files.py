"""What the report reads of a run: its manifests, columns of its tables, single rows, its metrics.

Never a whole table: of half a million pairs the charts need a dozen numbers each, and no text.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from etils import epath

from main_jax.errors import UserError
from main_jax.parts import parts_of, read_parts
from main_jax.run import stage_folder

LINE_POINTS = 100
"""Points of a line at most; means of neighbouring steps where there are more."""


class RunFiles:
    """A run directory as it lies there, also of an unfinished run or of an older version."""

    def __init__(self, path: epath.Path):
        self.path = path
        file = path / "config.yaml"
        if not file.exists():
            raise UserError(f"{path}: no run here (no config.yaml); give a run's output_dir")
        self.config_text = file.read_text(encoding="utf-8")
        self.config: dict[str, Any] = yaml.safe_load(self.config_text) or {}
        self.world = self.config.get("world") is not None

    @cached_property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Of every stage, in order: folder, manifest, state (done, unfinished, outdated, missing).

        What an outdated stage has left beside newer ones before it is not to be mixed with these: it is
        taken as not there. A run that is outdated from its first stage on is shown as it is.
        """
        from main_jax.pipeline import STAGES, WORLD, existing_run

        try:
            run = existing_run(str(self.path))
            current = {name: run.is_current(name) for name in run.stages}
        except UserError:  # a configuration that this version does not read
            current = {}
        found = {}
        for stage in (WORLD, *STAGES) if self.world else STAGES:
            folder = stage_folder(self.path, stage)
            manifest = self.json(folder / "manifest.json")
            state = "done" if manifest.get("status") == "done" else "unfinished"
            if manifest and not current.get(stage.name, True):
                state = "outdated"
                if any(before["state"] == "done" for before in found.values()):
                    folder = folder / "outdated"  # where nothing is
            state = state if manifest else "missing"
            found[stage.name] = {
                "folder": folder, "state": state, "manifest": manifest,
                "counts": manifest.get("counts", {}), "seconds": manifest.get("seconds", 0.0),
            }  # fmt: skip
        return found

    def folder(self, stage: str) -> epath.Path:
        """Where a stage writes."""
        return self.stages[stage]["folder"]

    @staticmethod
    def json(path: epath.Path) -> dict[str, Any]:
        """A JSON file, or nothing."""
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def columns(directory: epath.Path, names: Sequence[str]) -> pa.Table | None:
    """These columns, where they are there, of all parts of a table; None where there is no part."""
    return read_parts(directory, names) if parts_of(directory) else None


def rows_at(directory: epath.Path, wanted: Sequence[int], names: Sequence[str]) -> dict[int, dict]:
    """The rows of these numbers; a part is read a few thousand rows at a time, and only if it has one."""
    found, begin = {}, 0
    for part in parts_of(directory):
        with part.open("rb") as handle:
            file = pq.ParquetFile(handle, buffer_size=1 << 20, pre_buffer=False)
            end = begin + file.metadata.num_rows
            if any(begin <= i < end for i in wanted):
                at = begin
                for batch in file.iter_batches(2048, columns=list(names)):
                    for i in wanted:
                        if at <= i < at + batch.num_rows:
                            found[i] = batch.slice(i - at, 1).to_pylist()[0]
                    at += batch.num_rows
            begin = end
    return found


def metrics(path: epath.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every quantity of a `metrics.jsonl` as (steps, values), thinned to means of neighbours."""
    found: dict[str, tuple[list, list]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        values = json.loads(line) if line.endswith("}") else {}  # else a line that is being written
        for name, value in values.items():
            if name != "step" and value is not None:
                steps, column = found.setdefault(name, ([], []))
                steps.append(values["step"])
                column.append(value)
    return {name: (_thin(steps), _thin(column)) for name, (steps, column) in found.items()}


def _thin(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, float)
    size = max(1, math.ceil(len(array) / LINE_POINTS))
    return np.asarray([array[i : i + size].mean() for i in range(0, len(array), size)])


def drops(directory: epath.Path) -> Counter[str] | None:
    """Rows of a table by drop reason, "" for those without."""
    table = columns(directory, ["drop_reason"])
    if table is None:
        return None
    counts = table["drop_reason"].value_counts().to_pylist()
    return Counter({c["values"] or "": c["counts"] for c in counts})
