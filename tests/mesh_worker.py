"""mesh_worker.py FOLDER MESH...: compute on 8 virtual devices, compare with one, write results.json."""

import json
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402

from main_jax.lm.arch import DecoderConfig  # noqa: E402
from main_jax.lm.batches import Example, Unit, UnitStream, pack_table  # noqa: E402
from main_jax.lm.checkpoint import Checkpoints  # noqa: E402
from main_jax.lm.decode import empty_state  # noqa: E402
from main_jax.lm.generate import Sampling, generate  # noqa: E402
from main_jax.lm.hf import load_checkpoint, save_checkpoint  # noqa: E402
from main_jax.lm.loss import CHUNK_LOGITS, example_nlls  # noqa: E402
from main_jax.lm.model import Decoder  # noqa: E402
from main_jax.lm.sharding import (  # noqa: E402
    MeshShape,
    param_specs,
    place_rows,
    row_shards,
    use_mesh,
)
from main_jax.lm.step import (  # noqa: E402
    Optimizer,
    abstract_state,
    accumulate,
    init_state,
    train_step,
)
from main_jax.weighting import Weighting  # noqa: E402

CONFIG = DecoderConfig(312, 48, 88, 2, 8, 4, 10, max_position_embeddings=128)
DECODER = Decoder(CONFIG)
OPTIMIZER, WEIGHTING = Optimizer(weight_decay=0.1), Weighting()
STATIC = dict(decoder=DECODER, optimizer=OPTIMIZER, weighting=WEIGHTING)
accumulate = jax.jit(accumulate, static_argnames=tuple(STATIC))


def drawn_units() -> list[Unit]:
    """16 pairs of twins."""
    rng = np.random.default_rng(0)
    units = []
    for i in range(16):
        tokens = [rng.integers(1, 312, rng.integers(5, 32)).astype(np.int32) for _ in range(2)]
        examples = tuple(Example(t, np.arange(len(t)) > 2 + i % 2) for t in tokens)
        units.append(
            Unit(
                examples,
                ({"weight": 1.0 + i, "aligned": False}, {"weight": 1.0 + i, "aligned": True}),
            )
        )
    return units


UNITS = drawn_units()
CHUNK_LOGITS["cpu"] = 16 * 312  # several chunks of every batch
EXAMPLES = [e for unit in UNITS for e in unit.examples]


def compute(model: Path, checkpoints: Path) -> dict:
    """Everything once, from one checkpoint, on the mesh in use."""
    params = load_checkpoint(model)[1]
    stream = UnitStream(
        UNITS, units_per_microbatch=8, microbatches=2, steps=4, seed=0, limit=64,
        rows_multiple=row_shards(),
    )  # fmt: skip
    nll = np.zeros(len(EXAMPLES))
    for indices, batch in pack_table(EXAMPLES, 256, 64, row_shards()):
        ((sums, counts),) = example_nlls((DECODER,), (params,), (place_rows(batch),))
        nll[indices] = (np.asarray(sums) / np.asarray(counts))[: len(indices)]
    prompts = [e.tokens for e in EXAMPLES]
    names = [str(i) for i in range(len(EXAMPLES))]
    texts = generate(
        DECODER, params, prompts, names, Sampling(8), stop_ids=(), seed=0, batch_size=16
    )
    batch = place_rows(stream.batch(0), rows_axis=1)
    loss, gradients, _ = accumulate(params, batch, WEIGHTING.init(), 0.0, **STATIC)
    gradients = jax.device_get(gradients)

    state = init_state(params, CONFIG, OPTIMIZER, WEIGHTING)
    before = train_step._cache_size()
    for step in range(3):
        batch = place_rows(stream.batch(step), rows_axis=1)
        state, metrics = train_step(state, batch, np.float32(1e-3), np.float32(0), **STATIC)
    compiles = train_step._cache_size() - before
    with Checkpoints(checkpoints) as saved:
        saved.save(3, state)
    return dict(
        nll=nll, tokens=[t.tokens for t in texts], loss=float(loss), gradients=gradients,
        state=state, batch=batch, compiles=compiles, stream=stream, metrics=metrics,
        next_loss=resumed_loss(checkpoints, stream),
    )  # fmt: skip


def resumed_loss(checkpoints: Path, stream: UnitStream) -> float:
    """The loss of step 3, from the checkpoint that was written before it."""
    with Checkpoints(checkpoints) as saved:
        state = saved.restore(3, abstract_state(DECODER, OPTIMIZER, WEIGHTING))
    batch = place_rows(stream.batch(3), rows_axis=1)
    _, metrics = train_step(state, batch, np.float32(1e-3), np.float32(0), **STATIC)
    return float(metrics["loss_nats_per_token"])


def misplaced(state, mesh) -> list[str]:
    """Leaves of a state that do not lie where their parameter should."""
    specs, wrong = param_specs(CONFIG, mesh), []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = tuple(str(getattr(key, "key", key)) for key in path)
        expected = next((s for p, s in specs.items() if names[-len(p) :] == p), jax.P())
        if not leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, expected), leaf.ndim):
            wrong.append(f"{'.'.join(names)}: {leaf.sharding.spec}, expected {expected}")
    return wrong


def cache_shard() -> list[int]:
    """What one device holds of the keys in a cache of 16 rows and 128 slots."""
    cache = empty_state(DECODER, 16, 96, 32).cache
    return list(cache.keys.addressable_shards[0].data.shape)


def main(folder: Path, meshes: list[str]) -> None:
    """Compare every mesh with one device."""
    params = jax.device_get(DECODER.init(jax.random.key(1)))
    save_checkpoint(folder / "model", CONFIG, params, max_shard_bytes=100_000)
    one = compute(folder / "model", folder / "one")
    results = {}
    for name in meshes:
        data, fsdp, tensor = map(int, name.split(","))
        with use_mesh(MeshShape(data, fsdp, tensor)):
            found = compute(folder / "model", folder / name)
            mesh = jax.sharding.get_mesh()
            # Both ways across meshes: what one device wrote continues here, what was written here there.
            here = resumed_loss(folder / "one", found["stream"])
            shard = cache_shard()
        there = resumed_loss(folder / name, one["stream"])
        up = found["state"].params["layers"]["mlp"]["up"]["kernel"]
        pairs = zip(
            jax.tree.leaves(found["gradients"]), jax.tree.leaves(one["gradients"]), strict=True
        )
        texts = list(zip(found["tokens"], one["tokens"], strict=True))
        losses = [found["next_loss"], here, there]
        results[name] = {
            "nll": float(np.abs(found["nll"] - one["nll"]).max()),
            "loss": abs(found["loss"] - one["loss"]),
            "gradients": max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs),
            "tokens_compared": sum(len(b) for _, b in texts),
            "tokens_equal": all(np.array_equal(a, b) for a, b in texts),
            "resumed_losses": max(abs(loss - one["next_loss"]) for loss in losses),
            "compiles": found["compiles"],
            "misplaced": misplaced(found["state"], mesh),
            "leaves": len(jax.tree.leaves(found["state"])),
            "up_shard": list(up.addressable_shards[0].data.shape),
            "tokens_shard": list(found["batch"].tokens.addressable_shards[0].data.shape),
            "tokens_shape": list(found["batch"].tokens.shape),
            "cache_shard": shard,
        }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
