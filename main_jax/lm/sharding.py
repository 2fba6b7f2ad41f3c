"""Where arrays live: the mesh, the one table of rules, and the placement of parameters and batches.

    with use_mesh(MeshShape(fsdp=4, tensor=2)):
        params = hf.load_checkpoint(path)[1]                # each device gets its part
        batch = place_rows(batch)                           # rows over data and fsdp

A mesh has the axes `data` (copies of the model, each with rows of its own), `fsdp` (rows too, and every
parameter cut up: gathered where it is used) and `tensor` (heads, the MLP's features and the vocabulary cut
up). Without a mesh, or with one device, all of this is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from main_jax.lm.arch import DecoderConfig
from main_jax.lm.hf_table import nest, weights

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# An array's axes by letter (see `lm/model.py`) -> the mesh axes that cut it up: in parameters, and in what
# is computed from rows, where fsdp has the rows.
RULES: dict[str, tuple[Any, Any]] = {
    #     parameters, activations
    "B": (None, ROWS),  # rows of a batch
    "T": (None, None),  # tokens of a row
    "S": (None, None),  # slots of the cache
    "L": (None, None),  # layers
    "D": ("fsdp", None),  # hidden features
    "F": ("tensor", "tensor"),  # features of the MLP
    "V": ("tensor", "tensor"),  # vocabulary
    "N": ("tensor", "tensor"),  # query heads
    "K": ("tensor", "tensor"),  # key-value heads
    "H": (None, None),  # features of a head
    "E": (None, None),  # examples of a batch: their sums are wanted everywhere
}


@dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; one axis may be -1: whatever is left.

    slices: TPU slices, which `data` spans; the other axes stay within one.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self):
        sizes = astuple(self)
        if any(n < 1 and n != -1 for n in sizes[:3]) or self.slices < 1 or sizes.count(-1) > 1:
            raise ValueError("expected positive numbers of devices, at most one of them -1")

    def resolve(self, devices: int) -> tuple[int, int, int]:
        """The sizes for so many devices. Raises ValueError where they do not fit."""
        *sizes, slices = astuple(self)
        known = math.prod(n for n in sizes if n != -1)
        sizes = [devices // known if n == -1 else n for n in sizes]
        shape = ", ".join(f"{axis} {n}" for axis, n in zip(AXES, astuple(self), strict=False))
        if math.prod(sizes) != devices:
            raise ValueError(f"{shape} does not fit {devices} devices")
        if sizes[0] % slices:
            raise ValueError(f"data {sizes[0]} must be a multiple of slices {slices}")
        return sizes[0], sizes[1], sizes[2]


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, by default all; of a fully given shape over the first that it needs.

    Of the devices of several processes none can be left out. Raises ValueError where the shape does
    not fit them.
    """
    from jax.experimental import mesh_utils

    some = devices is not None or jax.process_count() == 1
    devices = list(jax.devices() if devices is None else devices)
    wanted = math.prod(astuple(shape)[:3])
    if some and 0 < wanted < len(devices):
        devices = devices[:wanted]
    sizes = shape.resolve(len(devices))
    if shape.slices > 1:
        inner = (sizes[0] // shape.slices, *sizes[1:])
        outer = (shape.slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextmanager
def use_mesh(shape: MeshShape, *, local: bool = False) -> Generator[None]:
    """What runs inside is sharded over a mesh of this shape. Raises ValueError where it does not fit.

    A `local` mesh is over this process's own devices: what runs inside needs no other process. Over the CPU
    devices of one process, whose memory is one, the default shape means `data` instead of `fsdp`: faster, and
    for inference they share one copy of the parameters (`one_copy`).
    """
    devices = jax.local_devices() if local or jax.process_count() == 1 else None
    if devices and devices[0].platform == "cpu" and shape == MeshShape():
        shape = MeshShape(data=-1, fsdp=1)
    mesh = make_mesh(shape, devices)
    if mesh.size == 1 and current_mesh() is None:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


# ------------------------------------------------------------------------------------------- specs


def current_mesh() -> Any:
    """The mesh that `jax.set_mesh` has set, also while tracing; None for none or a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def row_shards() -> int:
    """Into how many parts the rows of a batch are cut; batches have a multiple of it."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def spec(axes: str, shape: Sequence[int], mesh: Any, parameter: bool = False) -> PartitionSpec:
    """How an array with these axes is cut up; one that the mesh does not divide stays whole there.

    Raises KeyError for an axis without a rule.
    """
    entries: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        names = RULES[axis][0 if parameter else 1]
        parts = math.prod(
            mesh.shape[n] for n in ([names] if isinstance(names, str) else names or [])
        )
        entries.append(names if parts > 1 and size % parts == 0 else None)
    while entries and entries[-1] is None:  # as XLA writes it: equal places must also look equal
        entries.pop()
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: str, parameter: bool = False) -> jax.Array:
    """Pin an activation, or a parameter, to its place, inside a jitted function: `constrain(x, "BTD")`.

    Raises KeyError for an axis without a rule, on any number of devices.
    """
    mesh = current_mesh()
    for axis in axes:
        _ = RULES[axis]
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh, parameter))


def param_specs(config: DecoderConfig, mesh: Any) -> dict[tuple[str, ...], PartitionSpec]:
    """How every parameter is cut up, by its path."""
    found = {}
    for row in weights(config):
        shape = row.our_shape(config)
        axes = "L" * (len(shape) - len(row.ours)) + row.ours
        found[row.path] = spec(axes, shape, mesh, parameter=True)
    return found


def _specs_like(tree: Any, config: DecoderConfig, mesh: Any) -> Any:
    """A spec for each leaf: that of the parameter whose path its own ends with; else whole.

    So it serves parameters, gradients and an optimiser's moments alike.
    """
    specs = param_specs(config, mesh)

    def of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = tuple(str(getattr(key, "key", "")) for key in path)
        ends = (names[start:] for start in range(len(names)))
        return next((specs[end] for end in ends if end in specs), PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)


def constrain_like_params(tree: Any, config: DecoderConfig) -> Any:
    """Pin parameters, gradients or an optimiser's state to their places, inside a jitted function."""
    mesh = current_mesh()
    if mesh is None:
        return tree
    specs = _specs_like(tree, config, mesh)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def shardings_like_params(tree: Any, config: DecoderConfig) -> Any:
    """A sharding for each leaf, for arrays that are made outside of jitted functions."""
    mesh = current_mesh()
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: here, tree)
    concrete = jax.sharding.get_mesh()
    specs = _specs_like(tree, config, mesh)
    return jax.tree.map(lambda _, s: NamedSharding(concrete, s), tree, specs)


# ------------------------------------------------------------------------------------------- placement


def _place(x: Any, sharding: Any) -> jax.Array:
    """Put an array that every process has whole on the devices, each process its part."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def place_rows(tree: Any, rows_axis: int = 0) -> Any:
    """Put host arrays on the devices: those of two or more axes with their rows cut up, others whole.

    `rows_axis` is 1 where microbatches are stacked. Every process gives the whole arrays and keeps its
    part; nothing is sent between them.
    """
    if current_mesh() is None:
        return jax.device_put(tree)
    return jax.tree.map(lambda x: _place(x, _row_sharding(np.ndim(x), rows_axis)), tree)


def abstract_rows(tree: Any, rows_axis: int = 0) -> Any:
    """Shapes, dtypes and places of what `place_rows` makes of host arrays, under a mesh."""

    def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=_row_sharding(x.ndim, rows_axis))

    return jax.tree.map(abstract, tree)


def abstract_like(tree: Any, axes: Any) -> Any:
    """Shapes, dtypes and places of arrays whose axes are these letters, under a mesh."""
    mesh = jax.sharding.get_mesh()

    def abstract(x: Any, letters: str) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, spec(letters, x.shape, mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(abstract, tree, axes)


def _row_sharding(axes: int, rows_axis: int) -> NamedSharding:
    rows = PartitionSpec(*[None] * rows_axis, ROWS) if axes > rows_axis + 1 else PartitionSpec()
    return NamedSharding(jax.sharding.get_mesh(), rows)


def place_like_params(tree: Any, config: DecoderConfig) -> Any:
    """Put parameters or an optimiser's state in their places, wherever they are now."""
    places = shardings_like_params(tree, config)
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def place(x: Any, sharding: Any) -> jax.Array:
        shared = isinstance(x, jax.Array) and not x.is_fully_addressable
        return jax.device_put(x, sharding) if shared else _place(x, sharding)

    return jax.tree.map(place, tree, places)


def one_copy(tree: Any) -> Any:
    """The same arrays, those that are whole on several CPU devices in one piece of memory for all of them.

    Donating one makes a copy first, so that the others keep what they have.
    """

    def share(x: jax.Array) -> jax.Array:
        shards = x.addressable_shards
        whole = x.is_fully_replicated and x.is_fully_addressable
        if len(shards) == 1 or not whole or shards[0].device.platform != "cpu":
            return x
        host = np.asarray(shards[0].data)  # a view
        pieces = [shards[0].data, *(jax.device_put(host, s.device) for s in shards[1:])]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)

    return jax.tree.map(share, tree)


def abstract_like_params(tree: Any, config: DecoderConfig) -> Any:
    """Shapes and dtypes of `tree` with the places of its leaves, without any array."""
    places = shardings_like_params(tree, config)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def param_shardings(config: DecoderConfig) -> Mapping[str, Any]:
    """The sharding of every parameter, as a tree like params."""
    return shardings_like_params(nest({row.path: 0 for row in weights(config)}), config)
