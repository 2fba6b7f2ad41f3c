"""Attention for packed rows on CPUs: block-sparse over segments, with its gradient.

The rows of a batch are laid end to end and cut into tiles of `TILE` slots. A tile of queries visits
the tiles of keys from the one where the segment of its first query begins, or the sliding window
does, to its own: the cost follows the lengths of the segments, not those of the rows. The softmax
is computed online over the tiles, in float32 (Milakov and Gimelshein 2018, arXiv 1805.02867); the
gradient computes each tile's weights again from the saved output and log-sum-exp, and never holds
`[T, T]` (Dao et al. 2022, arXiv 2205.14135).

Letters as in `lm/attention.py`; X tiles, Q queries of a tile (TILE for each of the G heads that share
keys, one after another), S keys of a tile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# On one core, (B, T, N, K, H) forward and backward, in ms, with tiles of 32, 64 and 128 slots and
# the dense backend: (4, 1024, 6, 6, 48) 55, 42, 46, 231 for segments of about 190 tokens and 129,
# 85, 79, 223 for one segment; (2, 1024, 8, 2, 64) 31, 32, 41, 175 and 73, 63, 66, 177. A loop over
# tiles that is mapped over rows runs as long as the longest of them; backward in two passes, one
# for dq and one for dk and dv, takes 1.4 times as long.
TILE = 64


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    sliding_window: int | None = None,
) -> jax.Array:
    """Attend with packed queries `[B, T, N, H]` to keys and values `[B, T, K, H]`.

    A segment lies in adjacent slots of a row, and slots are the order of its tokens. `segment_ids`
    are `[B, T]`, 0 is padding, which yields zeros. Returns `[B, T, N, H]` in the dtype of `v`;
    whatever that is, the computation is in float32, as it is on a CPU in any case.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    segments = _flat_segments(segment_ids)
    tiles = segments.shape[0]

    def cut(x: jax.Array) -> jax.Array:  # [B, T, K * G, H] -> [X, K, G * TILE, H]
        x = x.astype(jnp.float32).reshape(B * T, -1, H)
        x = jnp.pad(x, ((0, tiles * TILE - B * T), (0, 0), (0, 0)))
        x = x.reshape(tiles, TILE, K, -1, H).transpose(0, 2, 3, 1, 4)
        return x.reshape(tiles, K, -1, H)

    out = _attend(cut(q) * H**-0.5, cut(k), cut(v), segments, sliding_window)
    out = out.reshape(tiles, K, -1, TILE, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(-1, N, H)[: B * T].reshape(B, T, N, H).astype(v.dtype)


def _flat_segments(segment_ids: jax.Array) -> jax.Array:
    """Number the segments of all rows from 1, and cut them up: `[B, T]` -> `[X, TILE]`."""
    starts = jnp.diff(segment_ids, axis=1, prepend=-1) != 0  # a row's first slot among them
    flat = jnp.where(segment_ids.reshape(-1) != 0, jnp.cumsum(starts), 0)
    return jnp.pad(flat, (0, -flat.size % TILE)).reshape(-1, TILE)


def key_tiles(segments: jax.Array, sliding_window: int | None) -> tuple[jax.Array, jax.Array]:
    """Give the first tile of keys that each tile of queries visits, and the end: `[X]` each.

    Of `segments` as `_flat_segments` numbers them. Tiles of nothing but padding visit none.
    """
    flat = segments.reshape(-1)
    slots, own = jnp.arange(flat.size), jnp.arange(segments.shape[0])
    starts = jax.lax.cummax(jnp.where(jnp.diff(flat, prepend=-1) != 0, slots, 0))[::TILE]
    if sliding_window is not None:
        starts = jnp.maximum(starts, own * TILE - sliding_window + 1)
    first = jnp.where(segments[:, 0] != 0, starts // TILE, own)
    return first, jnp.where((segments != 0).any(1), own + 1, first)


class _Pairs(NamedTuple):
    """Pairs of a tile of queries and one of keys: which there are, and what is seen in each."""

    segments: jax.Array  # [X, TILE]
    first: jax.Array  # [X]
    end: jax.Array
    window: int | None
    heads: int  # G

    @classmethod
    def of(cls, q: jax.Array, segments: jax.Array, window: int | None) -> "_Pairs":
        return cls(segments, *key_tiles(segments, window), window, q.shape[2] // TILE)

    def fold(self, i: Any, body: Any, start: Any) -> Any:
        """Call `body(j, carry)` for each tile of keys of tile i."""
        return jax.lax.fori_loop(self.first[i], self.end[i], body, start)

    def visible(self, i: Any, j: Any) -> jax.Array:
        """Say which keys of tile j the queries of tile i see: `[Q, S]`."""
        slots = jnp.arange(TILE)
        distance = (i - j) * TILE + slots[:, None] - slots
        queries = self.segments[i][:, None]
        mask = (queries == self.segments[j]) & (queries != 0) & (distance >= 0)
        if self.window is not None:
            mask &= distance < self.window
        return jnp.tile(mask, (self.heads, 1))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Any, k: Any, v: Any, segments: Any, window: int | None) -> jax.Array:
    """Attend with scaled queries `[X, K, Q, H]` to `[X, K, S, H]`, float32."""
    return _forward(q, k, v, segments, window)[0]


def _forward(q: Any, k: Any, v: Any, segments: Any, window: int | None) -> tuple[Any, Any]:
    pairs = _Pairs.of(q, segments, window)

    def tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(j: jax.Array, carry: Any) -> Any:
            top, total, out = carry
            scores = jnp.einsum("KQH,KSH->KQS", q[i], k[j])
            scores = jnp.where(pairs.visible(i, j), scores, -jnp.inf)
            higher = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
            out = out * shrink + jnp.einsum("KQS,KSH->KQH", weights, v[j])
            return higher, total * shrink + weights.sum(-1, keepdims=True), out

        # Finite, and the divisor positive: what sees nothing has zero weights, and not NaN.
        lowest = jnp.full((*q.shape[1:-1], 1), -1e30)
        start = lowest, jnp.zeros_like(lowest), jnp.zeros_like(q[i])
        top, total, out = pairs.fold(i, body, start)
        total = jnp.maximum(total, 1e-30)
        return out / total, top + jnp.log(total)

    out, logsumexp = jax.lax.map(tile, jnp.arange(len(q)))
    return out, (q, k, v, segments, out, logsumexp)


def _backward(window: int | None, saved: Any, d_out: jax.Array) -> Any:
    q, k, v, segments, out, logsumexp = saved
    pairs = _Pairs.of(q, segments, window)
    along = (d_out * out).sum(-1, keepdims=True)

    def tile(i: jax.Array, carry: Any) -> Any:
        def body(j: jax.Array, carry: Any) -> Any:
            dq_i, dk, dv = carry
            scores = jnp.einsum("KQH,KSH->KQS", q[i], k[j])
            weights = jnp.where(pairs.visible(i, j), jnp.exp(scores - logsumexp[i]), 0)
            d_scores = weights * (jnp.einsum("KQH,KSH->KQS", d_out[i], v[j]) - along[i])
            dq_i += jnp.einsum("KQS,KSH->KQH", d_scores, k[j])
            dk = dk.at[j].add(jnp.einsum("KQS,KQH->KSH", d_scores, q[i]))
            dv = dv.at[j].add(jnp.einsum("KQS,KQH->KSH", weights, d_out[i]))
            return dq_i, dk, dv

        dq, dk, dv = carry
        dq_i, dk, dv = pairs.fold(i, body, (jnp.zeros_like(q[i]), dk, dv))
        return dq.at[i].set(dq_i), dk, dv

    start = tuple(jnp.zeros_like(x) for x in (q, k, v))
    return *jax.lax.fori_loop(0, len(q), tile, start), None


_attend.defvjp(_forward, _backward)
