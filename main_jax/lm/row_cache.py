"""A KV cache whose rows are at different places: each attends with one new token, which is then written.

Slot s of a row holds the row's token at position s, so that a length says all of a row, and a row that is
done can make place for another while its neighbours go on: `lm/decode.py`.

A CPU follows each row's own length, in blocks of slots; elsewhere all rows are computed together over the
first `width` slots. The softmax is computed online (Milakov and Gimelshein 2018, arXiv 1805.02867) and
begins with the new token, so that the cache is read where it lies.

Letters as in `lm/model.py`: L layers, B rows, S slots, K key-value heads, G queries to each, H features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from main_jax.lm.attention import platform
from main_jax.lm.sharding import constrain, current_mesh, spec

# A step's attention on one core in ms, for 16 rows of 23 to 425 slots, 151 on average, with blocks of 32,
# 64 and 128, and over all rows together up to the longest: 6 layers of 6 heads of 48 features 5.7, 5.3,
# 5.6, 9; 12 layers of 12 heads of 64 30, 25, 24, 57; 6 layers of 8 heads of 64, 2 of keys, 3.6, 3.3, 3.0, 4.
# With slots before heads, [L, B, S, K, H], a CPU is up to 15 % faster, but a TPU copies the cache.
BLOCK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowCache:
    """Keys and values, the slots that each row has written, and how many slots are looked at."""

    keys: Any  # [L, B, K, S, H] in the compute dtype, RoPE applied
    values: Any  # [L, B, K, S, H]
    lengths: Any  # [B] int32; what lies behind them is never seen
    width: int = field(metadata={"static": True})  # at least the longest row's length + 1

    def attend(
        self, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None
    ) -> jax.Array:
        """Attend in a layer with `[B, 1, N, H]` to the slots and to the row's own `[B, 1, K, H]`.

        `window` is the sliding window, see `lm/attention.py`. Returns `[B, 1, N, H]` in the dtype of `v`.
        """
        B, _, K, H = k.shape
        compute = _row_by_row if platform() == "cpu" else partial(_together, width=self.width)
        out = on_rows(
            partial(compute, window=window),
            ("BKTH", "BKH", "BKH", "LBKSH", "LBKSH", "B", ""),
            "BKTH",
        )(q.reshape(B, K, -1, H), k[:, 0], v[:, 0], self.keys, self.values, self.lengths, layer)
        return out.reshape(q.shape).astype(v.dtype)

    def append(self, keys: jax.Array, values: jax.Array, live: jax.Array) -> RowCache:
        """Write a token per row, `[L, B, 1, K, H]`, behind the others; where `[B]` live is 0, as if not."""
        write = on_rows(_write, ("LBKSH", "LBTKH", "B"), "LBKSH")
        return replace(
            self,
            keys=write(self.keys, keys, self.lengths),
            values=write(self.values, values, self.lengths),
            lengths=self.lengths + live,
        )


def empty(decoder: Any, rows: int, slots: int) -> RowCache:
    """The cache of a `Decoder` without a token, of at least so many slots."""
    c = decoder.config
    slots += -slots % BLOCK
    shape = (c.num_layers, rows, c.num_kv_heads, slots, c.head_dim)
    keys, values = (constrain(jnp.zeros(shape, decoder.dtype), "LBKSH") for _ in range(2))
    return RowCache(keys, values, jnp.zeros(rows, jnp.int32), slots)


def on_rows(f: Callable[..., Any], axes: tuple[Any, ...], out: Any) -> Callable[..., Any]:
    """`f`, computed by each device on its own rows and heads: what it indexes is then its own.

    `axes` are the letters of the arguments, and `out` of the result, which some argument has too.
    """
    mesh = current_mesh()
    if mesh is None:
        return f

    def call(*arguments: Any) -> Any:
        specs = jax.tree.map(lambda letters, x: spec(letters, jnp.shape(x), mesh), axes, arguments)
        places = dict(zip(jax.tree.leaves(axes), jax.tree.leaves(specs), strict=True))
        outs = jax.tree.map(places.__getitem__, out)
        run = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False)
        return run(*arguments)

    return call


def _write(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """`[L, B, K, S, H]` with a token of each row, `[L, B, 1, K, H]`, in its slot of `[B]`."""
    new = new.swapaxes(2, 3)
    if platform() == "gpu":  # one kernel
        rows = jnp.arange(len(slots))
        return old.at[:, rows, :, slots].set(jnp.moveaxis(new[:, :, :, 0], 1, 0))

    def put(row: int | jax.Array, old: jax.Array) -> jax.Array:
        token = jax.lax.dynamic_slice_in_dim(new, row, 1, axis=1)
        return jax.lax.dynamic_update_slice(old, token, (0, row, 0, slots[row], 0))

    # For a loop or a scatter a TPU's compiler lays the cache out anew, at each step.
    return jax.lax.fori_loop(0, len(slots), put, old, unroll=platform() == "tpu")


# ------------------------------------------------------------------------------------------- attention


def _start(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """The online softmax after the new token alone: (maximum, sum, sum of values), `[..., K, G, 1 or H]`."""
    top = jnp.einsum("...KGH,...KH->...KG", q, k, preferred_element_type=jnp.float32)
    out = jnp.broadcast_to(v[..., None, :].astype(jnp.float32), q.shape)
    return top[..., None] * q.shape[-1] ** -0.5, jnp.ones_like(top)[..., None], out


def _take(
    state: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array
) -> tuple[jax.Array, ...]:
    """The state after the keys and values `[..., S, K, H]` of the slots that are `[..., S]` seen."""
    top, total, out = state
    scores = jnp.einsum("...KGH,...KSH->...KGS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[..., None, None, :], scores * q.shape[-1] ** -0.5, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
    weights, shrink = jnp.exp(scores - new_top), jnp.exp(top - new_top)
    more = jnp.einsum(
        "...KGS,...KSH->...KGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return new_top, total * shrink + weights.sum(-1, keepdims=True), out * shrink + more


def _row_by_row(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array,
    lengths: jax.Array, layer: jax.Array, *, window: int | None,
) -> jax.Array:  # fmt: skip
    """`[B, K, G, H]`; each row's blocks of slots one after another, as many as it has."""
    size = (1, 1, keys.shape[2], BLOCK, keys.shape[4])

    def attend_row(row: jax.Array, out: jax.Array) -> jax.Array:
        first = 0 if window is None else jnp.maximum(lengths[row] + 1 - window, 0)

        def take(block: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            start = (layer, row, 0, block * BLOCK, 0)
            cut = (jax.lax.dynamic_slice(x, start, size)[0, 0] for x in (keys, values))
            slots = block * BLOCK + jnp.arange(BLOCK)
            return _take(state, q[row], *cut, (slots >= first) & (slots < lengths[row]))

        blocks = first // BLOCK, (lengths[row] + BLOCK - 1) // BLOCK
        _, total, sums = jax.lax.fori_loop(*blocks, take, _start(q[row], k[row], v[row]))
        return out.at[row].set(sums / total)

    return jax.lax.fori_loop(0, len(q), attend_row, jnp.zeros(q.shape, jnp.float32))


def _together(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array,
    lengths: jax.Array, layer: jax.Array, *, window: int | None, width: int,
) -> jax.Array:  # fmt: skip
    """`[B, K, G, H]`; all rows' slots at once."""
    slots = jnp.arange(width)
    seen = slots < lengths[:, None]
    if window is not None:
        seen &= slots > lengths[:, None] - window
    size = (1, *keys.shape[1:3], width, keys.shape[4])
    cut = (jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), size)[0] for x in (keys, values))
    _, total, sums = _take(_start(q, k, v), q, *cut, seen)
    return sums / total
