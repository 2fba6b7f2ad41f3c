"""The ways to compute attention, and their place on a mesh; `lm/attention.py` says which, and when.

Letters as there. In each a query that sees nothing yields zeros and zero gradients. All but `dense`
want packed rows, so T = S.
"""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from main_jax.lm.sharding import current_mesh, spec

LANES = 128  # what T is padded to a multiple of
LARGEST_BLOCK = 512  # queries, and keys, of a tile of splash attention


def dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Compute attention as two matrix products around a float32 softmax, scores held densely.

    The G queries of a key-value head are folded into its query axis, so that both products are
    plain batched ones. On two CPU cores, forward and backward, (B, T, N, K, H) took, in ms, here,
    with jax.nn.dot_product_attention, and with einsums over separate K and G axes:
    (16, 64, 4, 2, 16) 0.7, 0.9, 0.9; (4, 512, 8, 2, 64) 57, 90, 102; (2, 1024, 4, 2, 32) 50, 110,
    130.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("BKQH,BSKH->BKQS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, T, S) * H**-0.5, -jnp.inf)
    # Not jax.nn.softmax: where a query sees nothing, a finite maximum and a positive divisor make
    # its weights zeros, and keep NaN off the way back.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-1e30))
    weights = jnp.exp(scores - top).reshape(B, K, G * T, S)
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum(
        "BKQS,BSKH->BKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    out = (out / total).astype(v.dtype).reshape(B, K, G, T, H)  # dividing late spares a pass over S
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _pad(x: jax.Array, *axes: int) -> jax.Array:
    """Pad axes of T tokens with zeros: segment 0."""
    widths = [(0, -x.shape[i] % LANES if i in axes else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    sliding_window: int | None,
    interpret: bool,
) -> jax.Array:
    """Attend by JAX's own TPU kernel, which skips tiles above the diagonal or out of the window.

    It knows order by slots. `interpret` runs it on a CPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    T, N, H = q.shape[1:]
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)  # it does not scale
    q, k, v = (_pad(x, 1).swapaxes(1, 2) for x in (q, k, v))
    ids = _pad(segment_ids, 1)
    total = ids.shape[1]
    block = max(n for n in range(LANES, LARGEST_BLOCK + 1, LANES) if total % n == 0)
    if sliding_window is None:
        mask = kernels.CausalMask((total, total))
    else:
        mask = kernels.LocalMask((total, total), (sliding_window - 1, 0), offset=0)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * N),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    out = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(ids, ids)).swapaxes(1, 2)[:, :T]
    return jnp.where(segment_ids[:, :, None, None] != 0, out, 0).astype(v.dtype)


def _masked(
    kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """Call a kernel that takes a mask, `[B, T, T]`, in a form that no kernel has trouble with.

    A query that sees nothing is made to see everything, and its result dropped: with all its scores
    masked, cuDNN may give NaN query gradients where T leaves 64 over 128 (pytorch issue 196678).
    """
    T = q.shape[1]
    mask = _pad(mask, 1, 2)
    blind = ~mask.any(-1)
    q, k, v = (_pad(x, 1) for x in (q, k, v))
    out = kernel(q, k, v, mask=(mask | blind[:, :, None])[:, None])
    return jnp.where(blind[:, :, None, None], 0, out)[:, :T].astype(v.dtype)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend by cuDNN's flash attention, to which the mask is a bias, so it may be any."""

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    return _masked(kernel, q, k, v, mask)


def tokamax(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attend by the kernel that Tokamax thinks best for this GPU."""
    return _masked(importlib.import_module("tokamax").dot_product_attention, q, k, v, mask)


def on_mesh(compute: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Call `compute(q, k, v, ...)` on each device's rows and heads: a kernel is not cut up by itself.

    What follows q, k and v has rows and tokens. Rows or heads that the mesh does not divide are
    computed everywhere.
    """
    mesh = current_mesh()
    if mesh is None:
        return compute(*arrays)
    x = spec("BTKH", arrays[1].shape, mesh)  # of q too: N is a multiple of K
    specs = (x, x, x) + (jax.P(*x[:1]),) * (len(arrays) - 3)
    # check_vma: Pallas does not say over which axes its results vary.
    f = jax.shard_map(compute, mesh=mesh, in_specs=specs, out_specs=x, check_vma=False)
    return f(*arrays)
