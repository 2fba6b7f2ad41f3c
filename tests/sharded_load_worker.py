"""One process of test_sharded_load.py: python sharded_load_worker.py TASK FOLDER [OUT PROCESS PORT].

Device counts are set before JAX starts, so every test has processes of its own. Sizes, names and
layouts are written out here once more, on purpose: nothing of main_jax but what is tested is used.
"""

import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from main_jax.lm.hf import load_checkpoint, save_checkpoint
from main_jax.lm.weights import Tensor

# All different, and divided by every mesh axis that is laid over them.
SIZES = {"V": 312, "D": 48, "F": 88, "L": 6, "N": 12, "K": 4, "H": 10}
LAYER = "model.layers.*."
LEAVES = {
    "embed.embedding": ("VD", "model.embed_tokens.weight"),
    "layers.input_norm.scale": ("LD", LAYER + "input_layernorm.weight"),
    "layers.attention.q.kernel": ("LDNH", LAYER + "self_attn.q_proj.weight"),
    "layers.attention.k.kernel": ("LDKH", LAYER + "self_attn.k_proj.weight"),
    "layers.attention.v.kernel": ("LDKH", LAYER + "self_attn.v_proj.weight"),
    "layers.attention.o.kernel": ("LNHD", LAYER + "self_attn.o_proj.weight"),
    "layers.post_attention_norm.scale": ("LD", LAYER + "post_attention_layernorm.weight"),
    "layers.mlp.gate.kernel": ("LDF", LAYER + "mlp.gate_proj.weight"),
    "layers.mlp.up.kernel": ("LDF", LAYER + "mlp.up_proj.weight"),
    "layers.mlp.down.kernel": ("LFD", LAYER + "mlp.down_proj.weight"),
    "norm.scale": ("D", "model.norm.weight"),
    "head.kernel": ("DV", "lm_head.weight"),
}
AXES = ("data", "fsdp", "tensor")


class Case(NamedTuple):
    """A mesh, which of its axes lie over which of ours, and the dtype to load."""

    mesh: tuple[int, int, int]
    layout: dict[str, Any]
    dtype: str = "float32"

    def axes(self, path: str) -> list[tuple[str, ...]]:
        """The mesh axes over each dimension of a leaf; the features of norms are on every device."""
        letters = LEAVES[path][0]
        layout = self.layout | ({"D": ()} if path.endswith("scale") else {})
        axes = [layout.get(letter, ()) for letter in letters]
        return [(a,) if isinstance(a, str) else a for a in axes]

    def shard(self, path: str) -> dict[str, int]:
        """The sizes of what one device holds of a leaf, by letter."""
        cuts = [math.prod(self.mesh[AXES.index(a)] for a in axes) for axes in self.axes(path)]
        return {a: SIZES[a] // cut for a, cut in zip(LEAVES[path][0], cuts, strict=True)}

    def shardings(self) -> Any:
        """What load_checkpoint is asked for."""
        mesh = jax.make_mesh(self.mesh, AXES, axis_types=(AxisType.Auto,) * 3)
        if not self.layout:
            return NamedSharding(mesh, P())  # one for all
        return nested(
            {p: NamedSharding(mesh, P(*(a or None for a in self.axes(p)))) for p in LEAVES}
        )


USUAL = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
# Heads cut inside: H is not contiguous in the file. And two mesh axes over one, in either order.
INSIDE = {"H": "fsdp", "N": "tensor", "F": ("fsdp", "tensor"), "V": ("tensor", "fsdp")}
CASES = {
    "fsdp": Case((1, 8, 1), USUAL),
    "all three": Case((2, 2, 2), USUAL),
    "tensor": Case((1, 2, 4), USUAL),
    "layers": Case((2, 2, 2), USUAL | {"L": "data"}),
    "inside": Case((1, 2, 4), INSIDE),
    "replicated": Case((2, 2, 2), {}),
    "bfloat16": Case((1, 8, 1), USUAL, "bfloat16"),
    "bfloat16 layers": Case((2, 2, 2), USUAL | {"L": "data"}, "bfloat16"),
}
UNEVEN = [
    Case((1, 2, 4), {"L": "tensor"}),  # 6 over 4
    Case((1, 2, 4), {"H": "tensor"}),  # 10 over 4
    Case((1, 8, 1), {"N": "fsdp"}),  # 12 over 8
    Case((1, 8, 1), {"K": "fsdp"}),  # 4 over 8: some devices would hold nothing
]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        *keys, last = path.split(".")
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flattened(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def read_files(folder) -> dict[str, np.ndarray]:
    """Every tensor of a folder, by name."""
    return {
        n: t for f in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(f).items()
    }


def reference(folder) -> dict[str, np.ndarray]:
    """Every leaf, whole, from the files: theirs are [out, in] where ours are [in, out]."""
    tensors = read_files(folder)

    def ours(path, name):
        shape = [SIZES[a] for a in LEAVES[path][0].removeprefix("L")]
        return (tensors[name] if path == "embed.embedding" else tensors[name].T).reshape(shape)

    leaves = {}
    for path, (letters, name) in LEAVES.items():
        layers = [name.replace("*", str(i)) for i in range(SIZES["L"])]
        stacked = letters.startswith("L")
        leaves[path] = np.stack([ours(path, n) for n in layers]) if stacked else ours(path, name)
    return leaves


def same_bits(found, expected) -> bool:
    found, expected = np.asarray(found), np.asarray(expected)
    kind = (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return kind and found.tobytes() == expected.tobytes()


class Log:
    """What was read and which buffers were made, by leaf, while loading."""

    def __init__(self):
        self.buffers: dict[str, list[tuple[int, ...]]] = {path: [] for path in LEAVES}
        self.reads: dict[str, list[int]] = {path: [] for path in LEAVES}
        self._made: list[tuple[int, ...]] = []  # not known yet of which leaf

    def buffer(self, shape, dtype):
        # Aligned, so that on a CPU the devices use this very memory if they ever do.
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.empty(size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self._made.append(tuple(shape))
        return memory[start : start + size].view(dtype).reshape(shape)

    def read(self, tensor, ranges=()):
        data = self._read(tensor, ranges)
        name = ".".join("*" if part.isdigit() else part for part in tensor.name.split("."))
        path = next(p for p, (_, n) in LEAVES.items() if n == name)
        self.buffers[path] += self._made
        self._made = []
        self.reads[path].append(data.size)
        return data

    def __enter__(self):
        self._read = Tensor.read
        Tensor.read = lambda tensor, ranges=(): self.read(tensor, ranges)
        return self

    def __exit__(self, *exc):
        Tensor.read = self._read


def check_case(folder, case: Case, expected) -> tuple[Any, Log]:
    """Load and check what this process holds, what it read, and in what pieces."""
    shardings = case.shardings()
    with Log() as log:
        _, params = load_checkpoint(folder, case.dtype, shardings=shardings, buffer=log.buffer)
    found = flattened(params)
    assert set(found) == set(LEAVES)
    asked = flattened(shardings) if isinstance(shardings, dict) else dict.fromkeys(found, shardings)
    for path, leaf in found.items():
        letters, whole = LEAVES[path][0], expected[path].astype(case.dtype)
        assert (leaf.shape, leaf.dtype) == (whole.shape, whole.dtype), path
        assert leaf.sharding == asked[path], path
        sizes = case.shard(path)
        held = leaf.addressable_shards
        assert len(held) == len(jax.local_devices())
        for shard in held:
            assert shard.data.shape == tuple(sizes.values()), (path, shard.device)
            assert same_bits(shard.data, whole[shard.index]), (path, shard.device)
        # One buffer, of a shard's size, to each distinct part, and each read once, layer by layer.
        parts = len(
            {tuple(i.indices(n) for i, n in zip(s.index, leaf.shape, strict=True)) for s in held}
        )
        assert log.buffers[path] == [tuple(sizes.values())] * parts, path
        layers = sizes.get("L", 1)
        piece = math.prod(sizes.values()) // layers
        if "H" in letters:
            piece = piece // sizes["H"] * SIZES["H"]  # cut after reading
        assert log.reads[path] == [piece] * layers * parts, path
    return params, log


def load(folder) -> None:
    """Every case on 8 devices of one process."""
    expected = reference(folder)
    for dtype in ("float32", "bfloat16"):
        _, params = load_checkpoint(folder, dtype)
        for path, leaf in flattened(params).items():
            assert len(leaf.addressable_shards) == 1
            assert same_bits(leaf, expected[path].astype(dtype)), path
    for name, case in CASES.items():
        print(name, file=sys.stderr)
        params, log = check_case(folder, case, expected)
        total = sum(math.prod(shape) for shapes in log.buffers.values() for shape in shapes)
        assert total == sum(leaf.size for leaf in expected.values())
        if name in ("replicated", "layers"):
            # Devices that share a host buffer must not write into each other's when it is donated.
            twice = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
            for path, leaf in flattened(twice(params)).items():
                for shard in leaf.addressable_shards:
                    assert same_bits(shard.data, 2 * expected[path][shard.index]), path


def load_distributed(folder, out) -> None:
    """Every case as one of two processes; what it holds is left in `out`."""
    expected = reference(folder)
    results = {}
    for name, case in CASES.items():
        print(name, file=sys.stderr)
        params, log = check_case(folder, case, expected)
        found = flattened(params)
        results[name] = {
            "parts": {
                path: [(s.index, np.asarray(s.data)) for s in leaf.addressable_shards]
                for path, leaf in found.items()
            },
            "read": {path: sum(sizes) for path, sizes in log.reads.items()},
        }
        if name in ("fsdp", "layers"):
            # Gathered over both processes: they agree on who holds which part.
            leaf = found["layers.attention.o.kernel"]
            everywhere = NamedSharding(leaf.sharding.mesh, P())
            whole = jax.jit(lambda x: x, out_shardings=everywhere)(leaf)
            for shard in whole.addressable_shards:
                assert same_bits(shard.data, expected["layers.attention.o.kernel"])
    Path(out).write_bytes(pickle.dumps(results))


def uneven(folder) -> None:
    """Axes that the mesh does not divide: refused, not filled with something."""
    for case in UNEVEN:
        try:
            load_checkpoint(folder, shardings=case.shardings())
        except ValueError as error:
            assert "divi" in str(error), error  # "evenly divide", "divisible"
        else:
            raise AssertionError(f"{case} was loaded")


def export(folder, out) -> None:
    """Sharded parameters give the files they came from."""
    source = read_files(folder)
    fields = json.loads((Path(folder) / "config.json").read_text())
    for name in ("fsdp", "all three", "layers", "inside"):
        print(name, file=sys.stderr)
        config, params = load_checkpoint(folder, shardings=CASES[name].shardings())
        target = Path(out) / name
        save_checkpoint(target, config, params, fields=fields, max_shard_bytes=200_000)
        written = read_files(target)
        assert set(written) == set(source)
        for tensor, data in source.items():
            assert same_bits(written[tensor], data), (name, tensor)


def main(task, folder, out=None, process=None, port=None) -> None:
    if process is None:
        jax.config.update("jax_num_cpu_devices", 8)
    else:
        jax.config.update("jax_num_cpu_devices", 4)
        jax.distributed.initialize(f"localhost:{port}", 2, int(process), initialization_timeout=60)
        assert jax.process_count() == 2
    assert len(jax.devices()) == 8
    if task == "load":
        load(folder)
    elif task == "load_distributed":
        load_distributed(folder, out)
    elif task == "uneven":
        uneven(folder)
    elif task == "export":
        export(folder, out)
    else:
        raise ValueError(task)


if __name__ == "__main__":
    main(*sys.argv[1:])
