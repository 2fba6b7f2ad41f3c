"""One program under any mesh: the rules, and on 8 virtual devices the results of one.

What needs several devices runs in a process of its own (`mesh_worker.py`): their number is set before JAX
starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from tiny_decoder import CONFIG, DECODER

from main_jax.lm.sharding import (
    AXES,
    RULES,
    MeshShape,
    constrain,
    make_mesh,
    param_specs,
    row_shards,
    spec,
)

P = PartitionSpec
WORKER = Path(__file__).with_name("mesh_worker.py")
MESHES = ("8,1,1", "1,8,1", "1,4,2", "2,2,2")


def abstract(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, AXES)


# ---------------------------------------------------------------------------------------- the shape


@pytest.mark.parametrize(
    ("shape", "devices", "expected"),
    [
        (MeshShape(), 8, (1, 8, 1)),
        (MeshShape(2, -1, 2), 8, (2, 2, 2)),
        (MeshShape(-1, 2, 1), 6, (3, 2, 1)),
        (MeshShape(1, 1, -1), 4, (1, 1, 4)),
        (MeshShape(4, 2, 1, slices=2), 8, (4, 2, 1)),
    ],
)
def test_shapes(shape, devices, expected):
    assert shape.resolve(devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices", "part"),
    [
        ((3, -1, 1), 8, "data 3, fsdp -1, tensor 1 does not fit 8 devices"),
        ((2, 2, 1), 8, "does not fit 8"),
        ((1, -1, 1, 2), 8, "multiple of slices 2"),
    ],
)
def test_shapes_that_do_not_fit(sizes, devices, part):
    with pytest.raises(ValueError, match=part):
        MeshShape(*sizes).resolve(devices)


@pytest.mark.parametrize("sizes", [(0, -1, 1), (-1, -1, 1), (1, -2, 1), (1, 1, 1, 0)])
def test_shapes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="at most one of them -1"):
        MeshShape(*sizes)


def test_one_device_is_no_mesh():
    assert make_mesh(MeshShape()).size == 1
    assert row_shards() == 1
    x = jnp.ones((2, 3, 4))
    assert constrain(x, "BTD") is x


# ---------------------------------------------------------------------------------------- the rules


def test_an_axis_without_a_rule_is_refused_on_any_number_of_devices():
    with pytest.raises(KeyError, match="X"):
        constrain(jnp.ones((2, 3)), "BX")
    with pytest.raises(KeyError, match="X"):
        spec("BX", (2, 3), abstract(2, 1, 1))


def test_every_axis_of_the_model_has_a_rule():
    assert set(CONFIG.sizes) <= set(RULES)


def test_specs_by_hand():
    mesh = abstract(2, 4, 2)
    assert spec("BTD", (16, 32, 48), mesh) == P(("data", "fsdp"))
    assert spec("BTNH", (16, 32, 4, 10), mesh) == P(("data", "fsdp"), None, "tensor")
    assert spec("LDNH", (3, 48, 4, 10), mesh, parameter=True) == P(None, "fsdp", "tensor")
    assert spec("LNHD", (3, 4, 10, 48), mesh, parameter=True) == P(None, "tensor", None, "fsdp")
    assert spec("VD", (312, 48), mesh, parameter=True) == P("tensor", "fsdp")
    # What the mesh does not divide stays whole: an odd vocabulary, a single key-value head.
    assert spec("VD", (307, 48), mesh, parameter=True) == P(None, "fsdp")
    assert spec("BTKH", (16, 32, 1, 10), mesh) == P(("data", "fsdp"))


def test_every_parameter_has_a_spec():
    params = jax.eval_shape(DECODER.init, jax.random.key(0))
    specs = param_specs(CONFIG, abstract(1, 2, 2))
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    assert {tuple(key.key for key in path) for path, _ in paths} == set(specs)
    cut = [path for path, s in specs.items() if s != P()]
    assert len(cut) == len(
        specs
    )  # every one has an axis that is cut up: nothing is held twice by fsdp


# ---------------------------------------------------------------------------------------- 8 devices


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every mesh computes from one checkpoint, beside one device."""
    folder = tmp_path_factory.mktemp("mesh")
    process = subprocess.run(
        [sys.executable, WORKER, folder, *MESHES], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert "Involuntary full rematerialization" not in process.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_gives_what_one_device_gives(mesh, results):
    found = results[mesh]
    assert found["nll"] < 1e-5  # nats per token
    assert found["loss"] < 1e-5
    assert found["gradients"] < 1e-5  # of each tensor's norm
    assert found["tokens_compared"] > 200
    assert found["tokens_equal"]
    assert found["resumed_losses"] < 1e-5
    assert found["compiles"] == 1  # three steps, one program


@pytest.mark.parametrize("mesh", MESHES)
def test_outputs_lie_where_the_rules_say(mesh, results):
    found = results[mesh]
    assert found["misplaced"] == []
    assert found["leaves"] > 30  # parameters and both moments
    data, fsdp, tensor = map(int, mesh.split(","))
    # LDF of (2, 48, 88), and what one device holds of it.
    assert found["up_shard"] == [2, 48 // fsdp, 88 // tensor]
    assert found["tokens_shard"][1] * data * fsdp == found["tokens_shape"][1]
    assert found["cache_shard"] == [2, 16 // (data * fsdp), 4 // tensor, 128, 10]


# ------------------------------------------------------------------------------------------ CPU devices


def in_a_process(code, **variables):
    """What a program prints; JAX's settings are those of nobody but `variables`."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_a_cpu_is_one_device_per_core_unless_something_is_said():
    code = """
import jax
from main_jax.lm.runtime import MOST_CPU_DEVICES, cores, initialize
initialize(False)
print(jax.device_count() == min(cores(), MOST_CPU_DEVICES), jax.device_count())
"""
    assert in_a_process(code).startswith("True")
    assert in_a_process(code, JAX_NUM_CPU_DEVICES="3").endswith(" 3")
    assert in_a_process(code, XLA_FLAGS="--xla_force_host_platform_device_count=5").endswith(" 5")
    asked = code.replace("initialize(False)", "initialize(False, cpu_devices=4)")
    assert in_a_process(asked).endswith(" 4")


def test_cpu_devices_of_one_process_train_with_rows_of_their_own():
    """The default mesh, from one copy of the parameters: each device has all, and the same."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from main_jax.lm.batches import UnitStream
from main_jax.lm.runtime import initialize
from main_jax.lm.sharding import MeshShape, one_copy, place_like_params, place_rows, row_shards, use_mesh
from main_jax.lm.step import Optimizer, init_state, train_step
from main_jax.weighting import Weighting
from test_step import drawn_units
from tiny_decoder import CONFIG, DECODER, drawn_params

initialize(False, cpu_devices=3)
static = dict(decoder=DECODER, optimizer=Optimizer(), weighting=Weighting())

def losses(rows_multiple):
    stream = UnitStream(drawn_units(["both"] * 8), units_per_microbatch=8, microbatches=1, steps=3,
                        seed=0, limit=48, rows_multiple=rows_multiple)
    params = one_copy(place_like_params(drawn_params(), CONFIG))
    state = init_state(params, CONFIG, static["optimizer"], static["weighting"])
    found = []
    for step in range(3):
        batch = place_rows(stream.batch(step), rows_axis=1)
        state, metrics = train_step(state, batch, np.float32(0.01), np.float32(0), **static)
        found.append(float(metrics["loss_nats_per_token"]))
    return found, state.params

alone, _ = losses(1)
with use_mesh(MeshShape()):
    assert row_shards() == 3
    together, params = losses(3)
np.testing.assert_allclose(together, alone, rtol=1e-5)
for leaf in jax.tree.leaves(params):
    first, *others = (np.asarray(s.data) for s in leaf.addressable_shards)
    assert len(others) == 2 and first.shape == leaf.shape
    for other in others:
        np.testing.assert_array_equal(first, other)
print("done")
"""
    assert in_a_process(code, PYTHONPATH=str(Path(__file__).parent)) == "done"


def test_cpu_devices_of_one_process_share_one_copy_of_the_parameters():
    """Rows are cut up and parameters are whole; what is donated is copied first."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from main_jax.lm.runtime import initialize
from main_jax.lm.sharding import MeshShape, one_copy, place_like_params, row_shards, use_mesh
from tiny_decoder import CONFIG, drawn_params

initialize(False, cpu_devices=3)
for local in (True, False):  # of a single process, both are over the same devices
    with use_mesh(MeshShape(), local=local):
        assert dict(jax.sharding.get_mesh().shape) == {"data": 3, "fsdp": 1, "tensor": 1}
with use_mesh(MeshShape(), local=True):
    assert row_shards() == 3
    tree = one_copy(place_like_params(drawn_params(), CONFIG))
    for leaf in jax.tree.leaves(tree):
        assert len({s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards}) == 1
        assert len(leaf.sharding.device_set) == 3
    twice = jax.jit(lambda x: jax.tree.map(lambda x: 2 * x, x), donate_argnums=0)
    found = twice(twice(tree))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(drawn_params()), strict=True):
        for shard in a.addressable_shards:
            np.testing.assert_array_equal(shard.data, 4 * b)
with use_mesh(MeshShape(fsdp=3), local=True):
    tree = place_like_params(drawn_params(), CONFIG)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, tree, one_copy(tree)))
print("done")
"""
    assert in_a_process(code, PYTHONPATH=str(Path(__file__).parent)) == "done"
