"""A folder of safetensors: opened strictly, written whole. Knows files and tensors, no model.

Weights are one `model.safetensors`, or shards with a `model.safetensors.index.json`. Reading checks
that index and shards agree and that no tensor is given twice; data is read tensor by tensor.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from main_jax.lm.multihost import first

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, Any] = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16}
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

    @property
    def dtype(self) -> np.dtype:
        """The dtype it is stored in, once it is checked."""
        return np.dtype(DTYPES[self.handle.get_slice(self.name).get_dtype()])

    def read(self, ranges: Sequence[tuple[int, int]] = ()) -> np.ndarray:
        """Read it, or only `ranges` (start, stop) of its axes, once it is checked."""
        if not ranges:
            return self.handle.get_tensor(self.name)
        return self.handle.get_slice(self.name)[tuple(slice(*r) for r in ranges)]


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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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


class Planned(NamedTuple):
    """A tensor to be written, whose data is made only when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: epath.Path,
    tensors: Iterable[Planned],
    max_shard_bytes: int,
    on_written: Callable[[int], None] = lambda elements: None,
) -> None:
    """Write safetensors of at most `max_shard_bytes` (or one tensor), in place of what was there.

    One tensor is in memory at a time: the library could only write a file of tensors that are all
    there. Several files get an index. Files get their names only once all are written. Of several
    processes the first one writes; the others make the same tensors, parts of which they may hold.
    """
    if not first():
        for tensor in tensors:
            tensor.read()
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("tmp-*.safetensors"):
        stale.unlink()
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    files = [folder / f"tmp-{i}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write_shard(file, shard, on_written)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for i, (file, shard) in enumerate(zip(files, shards, strict=True), start=1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        file.replace(folder / name)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(
    file: epath.Path, tensors: Sequence[Planned], on_written: Callable[[int], None]
) -> None:
    """Write one file: the header's length in 8 bytes, the header in JSON, the data in its order."""
    codes = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
    # The label tells Transformers that matrices are [out, in], as PyTorch has them.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": codes[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.read())
            if (data.dtype, data.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(f"{file}: tensor {tensor.name} is not what was planned")
            out.write(data.reshape(-1).view(np.uint8).data)
            on_written(math.prod(tensor.shape))
