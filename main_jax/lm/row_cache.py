"""A KV cache whose rows are at different places: one new token per row attends to it and is written to it.

Slot s of a row holds the row's token at position s, so that a length says all of a row, and a row that is
done can make place for another while its neighbours go on: `lm/refill.py`.

A CPU follows each row's own length, in blocks of `BLOCK` slots; elsewhere all rows are computed together,
over the `width` first slots. With the softmax computed online (Milakov and Gimelshein 2018, arXiv
1805.02867) the new token is one more block, and the cache is read where it lies, never put together.

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

# A step's attention in ms on one core, 16 rows of 23 to 425 slots, 151 on average, with blocks of 32, 64
# and 128, and over all rows together up to the longest: 6 layers of 6 heads of 48 features 4.1, 4.2,
# 4.5, 11; 12 of 12 of 64 20, 26, 52, 100; 6 of 8 heads of 64 on 2 of keys 1.8, 1.8, 2.2, 6.
BLOCK = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowCache:
    """Keys and values, the slots that each row has written, and how many slots are looked at."""

    keys: Any  # [L, B, S, K, H] in the compute dtype, RoPE applied
    values: Any  # [L, B, S, K, H]
    lengths: Any  # [B] int32; what lies behind them is never seen
    width: int = field(metadata={"static": True})  # no row is longer, except on a CPU

    def append(self, keys: jax.Array, values: jax.Array, live: jax.Array) -> RowCache:
        """Write a token per row, `[L, B, 1, K, H]`, behind the others; rows not `live` keep their length."""

        def write(old: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
            return old.at[:, jnp.arange(len(slots)), slots].set(new[:, :, 0])

        at = ("LBSKH", "LBTKH", "B")
        keys, values = (
            on_rows(write, at, "LBSKH")(old, new, self.lengths)
            for old, new in ((self.keys, keys), (self.values, values))
        )
        return replace(self, keys=keys, values=values, lengths=self.lengths + live)


def empty(decoder: Any, rows: int, slots: int) -> RowCache:
    """A cache of a `Decoder` without a token, of at least so many slots."""
    c = decoder.config
    slots += -slots % BLOCK
    shape = (c.num_layers, rows, slots, c.num_kv_heads, c.head_dim)
    keys, values = (constrain(jnp.zeros(shape, decoder.dtype), "LBSKH") for _ in range(2))
    return RowCache(keys, values, jnp.zeros(rows, jnp.int32), slots)


def on_rows(f: Callable[..., Any], axes: Any, out: Any) -> Callable[..., Any]:
    """`f` on each device's rows and heads; `axes` has the letters of each argument, `out` of the result."""
    mesh = current_mesh()
    if mesh is None:
        return f

    def place(letters: str, x: Any) -> jax.P:
        return spec(letters, x.shape, mesh)

    def call(*arguments: Any) -> Any:
        specs = jax.tree.map(place, tuple(axes), arguments)
        # The result is placed as the first argument with its letters is.
        places = dict(zip(jax.tree.leaves(tuple(axes)), jax.tree.leaves(specs), strict=True))
        outs = jax.tree.map(places.__getitem__, out)
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False)(
            *arguments
        )

    return call
