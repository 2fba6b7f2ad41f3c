"""A folder of safetensors: opened strictly, written whole. Knows files and tensors, no model.

Weights are one `model.safetensors`, or shards with a `model.safetensors.index.json`. Reading checks
that index and shards agree and that no tensor is given twice; data is read tensor by tensor.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")
PICKLED = ("*.bin", "*.pt", "*.pth")

Path = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that names the file, and the tensor or field."""


class Tensor(NamedTuple):
    """A tensor in an open file."""

    name: str
    file: epath.Path
    handle: Any

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `CheckpointError` where its shape or dtype are others; no data is read."""
        header = self.handle.get_slice(self.name)
        found, dtype = header.get_shape(), header.get_dtype()
        where = f"{self.file}: tensor {self.name}"
        if tuple(found) != shape:
            raise CheckpointError(f"{where} has shape {list(found)}, expected {list(shape)}")
        if dtype not in DTYPES:
            raise CheckpointError(f"{where} has dtype {dtype}, not one of {', '.join(DTYPES)}")

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """Read it, once it is checked."""
        self.check(shape)
        return self.handle.get_tensor(self.name)


def local_folder(path: Path) -> epath.Path:
    """Return `path` as a folder that is there."""
    if "://" in os.fspath(path):
        raise CheckpointError(f"{path}: models are read from local folders; copy it here first")
    folder = epath.Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; download the model first (`hf download`)")
    return folder


def read_json(file: epath.Path) -> dict[str, Any]:
    """Read a file that holds one JSON object without repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise CheckpointError(f"{file}: {key} is given twice")
            table[key] = value
        return table

    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not found; is this a Hugging Face model folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold one JSON object")
    return value


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())


def open_tensors(folder: epath.Path, stack: ExitStack) -> dict[str, Tensor]:
    """Open the folder's weights, closed with `stack`: tensors by name, index and files agreeing."""
    wanted = _weight_map(folder)
    tensors: dict[str, Tensor] = {}
    for name in [SINGLE] if wanted is None else sorted(set(wanted.values())):
        file = folder / name
        if not file.exists():
            raise CheckpointError(f"{file}: listed in {INDEX} but not there; download it again")
        try:
            handle = stack.enter_context(safe_open(os.fspath(file), framework="numpy"))
            found = handle.keys()
        except (SafetensorError, OSError) as error:
            reason = f"damaged or not safetensors ({one_line(error)})"
            raise CheckpointError(f"{file}: {reason}; download it again") from None
        for tensor in found:
            where = f"{file}: tensor {tensor}"
            if tensor in tensors:
                raise CheckpointError(f"{where} is given twice, also in {tensors[tensor].file}")
            if wanted is not None and wanted.get(tensor, name) != name:
                raise CheckpointError(f"{where} belongs in {wanted[tensor]} according to {INDEX}")
            tensors[tensor] = Tensor(tensor, file, handle)
    for tensor, name in (wanted or {}).items():
        if tensor not in tensors:
            raise CheckpointError(f"{folder / name}: tensor {tensor} is missing, but in {INDEX}")
    return tensors


def _weight_map(folder: epath.Path) -> dict[str, str] | None:
    """Read the index: tensor name -> file name; None where there is a single file instead."""
    single, index = folder / SINGLE, folder / INDEX
    if index.exists():
        wanted = read_json(index).get("weight_map")
        if not isinstance(wanted, dict) or not all(isinstance(f, str) for f in wanted.values()):
            raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
        for name in wanted.values():
            if os.path.basename(name) != name or name in ("", ".", ".."):
                raise CheckpointError(f"{index}: {name!r} is outside the folder")
        if single.exists() and SINGLE not in wanted.values():
            raise CheckpointError(f"{folder}: both {SINGLE} and {INDEX}; remove the stale one")
        return wanted
    if single.exists():
        return None
    if any(True for pattern in PICKLED for _ in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder}: only pickled PyTorch weights; write them as safetensors first, with torch:"
            " AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if any(True for _ in folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; download the index too")
    raise CheckpointError(f"{folder}: no weights ({SINGLE} or {INDEX})")


def write_tensors(folder: epath.Path, shards: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write each shard to a file, with an index if there are several, in place of what was there.

    Arrays must be contiguous. Files get their names only once all are written.
    """
    for stale in folder.glob("tmp-*.safetensors"):
        stale.unlink()
    written: list[tuple[epath.Path, list[str]]] = []
    total = 0
    for shard in shards:
        file = folder / f"tmp-{len(written)}.safetensors"
        # The label tells Transformers that matrices are [out, in], as PyTorch has them.
        file.write_bytes(save(dict(shard), metadata={"format": "pt"}))
        total += sum(tensor.nbytes for tensor in shard.values())
        written.append((file, list(shard)))
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for i, (file, tensors) in enumerate(written, start=1):
        name = SINGLE if len(written) == 1 else f"model-{i:05d}-of-{len(written):05d}.safetensors"
        file.replace(folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
