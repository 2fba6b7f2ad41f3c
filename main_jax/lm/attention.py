"""Scaled dot-product attention behind one signature, `attention(...)`, with the backend as a name.

Rows are packed: a segment is the tokens of adjacent slots, in their order (numbers from 1; 0 is
padding). A query sees a key iff both lie in the same segment, the key's slot is not after the query's,
and, with a sliding window w, it is among the w latest. A query that sees nothing yields zeros, and
zero gradients. A step of decoding has its own attention, over the cache: `row_cache.py`.

    backend  runs on          auto on  what it is
    splash   tpu, cpu (slow)  tpu      JAX's Pallas kernel; float32, bfloat16
    cudnn    gpu              gpu      cuDNN's flash attention; bfloat16, float16; heads up to 128
    tokamax  gpu                       Tokamax's kernels, where it is installed
    blocks   cpu              cpu      ours: the tiles that segments reach, `attention_blocks.py`
    xla      everywhere       rest     matrix products around a softmax, the scores held densely

Kernels that are not ours are compared with xla, on the device, before they are trusted:
`check_backend`.

Letters: B rows, T tokens, N query heads, K key-value heads, G = N / K queries to one key-value head,
H head dimension.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from main_jax.lm import attention_blocks
from main_jax.lm import attention_kernels as kernels
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.progress import say


def visible(segment_ids: jax.Array, sliding_window: int | None = None) -> jax.Array:
    """Say which keys each query sees: `[B, T]` integers -> `[B, T, T]` booleans, queries first."""
    slots = jnp.arange(segment_ids.shape[1])
    distance = slots[:, None] - slots
    queries = segment_ids[:, :, None]
    mask = (queries == segment_ids[:, None, :]) & (queries != 0) & (distance >= 0)
    return mask if sliding_window is None else mask & (distance < sliding_window)


# ---------------------------------------------------------------------------------------- backends

# The platform that functions are traced for where it is not the default backend:
# `with target_platform("tpu"): jax.jit(step).lower(...)` on a host without one. JAX's caches heed it.
target_platform = jax.make_user_context(default_value=None)


def platform() -> str:
    """cpu, gpu or tpu: what attention is traced for."""
    name = target_platform.value or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@dataclass(frozen=True)
class Backend:
    """A way to compute attention and where it applies.

    compute: from q, k, v, the segment ids and the sliding window, in this order. refuses: why it
    does not take a dtype and a head dimension, or None. auto_from: slots of a row from which `auto`
    takes it. foreign: compared with xla before it is trusted. by_hand: cut up by hand on a mesh.
    """

    compute: Callable[..., jax.Array]
    platforms: tuple[str, ...]
    auto_on: tuple[str, ...]
    refuses: Callable[[str, int], str | None]
    auto_from: int = 0
    foreign: bool = True
    by_hand: bool = True


def _with_mask(compute: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def f(q: Any, k: Any, v: Any, segment_ids: Any, sliding_window: int | None) -> jax.Array:
        return compute(q, k, v, visible(segment_ids, sliding_window))

    return f


def _splash(q: Any, k: Any, v: Any, segment_ids: Any, sliding_window: int | None) -> jax.Array:
    return kernels.splash(q, k, v, segment_ids, sliding_window, interpret=platform() == "cpu")


def _splash_refuses(dtype: str, head_dim: int) -> str | None:
    return None if dtype in ("float32", "bfloat16") else f"it computes no {dtype}"


def _cudnn_refuses(dtype: str, head_dim: int) -> str | None:
    if dtype not in ("bfloat16", "float16"):
        return f"it computes bfloat16 and float16, not {dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"heads have multiples of 8 features up to 128, not {head_dim}"
    return None


def _tokamax_refuses(dtype: str, head_dim: int) -> str | None:
    found = importlib.util.find_spec("tokamax")
    return None if found else "it is not installed: pip install 'main-jax[kernels]'"


BACKENDS: dict[str, Backend] = {
    "splash": Backend(_splash, ("tpu", "cpu"), ("tpu",), _splash_refuses),
    "cudnn": Backend(_with_mask(kernels.cudnn), ("gpu",), ("gpu",), _cudnn_refuses),
    "tokamax": Backend(_with_mask(kernels.tokamax), ("gpu",), (), _tokamax_refuses),
    "blocks": Backend(
        attention_blocks.attend,
        ("cpu",),
        ("cpu",),
        lambda *_: None,
        auto_from=3 * attention_blocks.TILE,  # of fewer tiles hardly one is left out
        foreign=False,
    ),
    "xla": Backend(
        _with_mask(kernels.dense),
        ("cpu", "gpu", "tpu"),
        ("cpu", "gpu", "tpu"),
        lambda *_: None,
        foreign=False,
        by_hand=False,
    ),
}


def choose(
    backend: str, *, platform: str, dtype: str, head_dim: int, length: int | None = None
) -> str:
    """Name the backend that computes: decided by what is known without looking at numbers.

    `auto` is the first of `BACKENDS` that it takes on the platform, for rows of `length` slots (None:
    long ones), and that accepts dtype and heads.
    `ValueError` for an unknown backend, naming those there are, and for one that does not apply,
    saying why.
    """
    if backend == "auto":
        fits = (
            name
            for name, b in BACKENDS.items()
            if platform in b.auto_on
            and (length is None or length >= b.auto_from)
            and not b.refuses(dtype, head_dim)
        )
        return next(fits, "xla")
    if backend not in BACKENDS:
        raise ValueError(f"attention: no backend {backend!r}, only auto, {', '.join(BACKENDS)}")
    b = BACKENDS[backend]
    reason = b.refuses(dtype, head_dim)
    if platform not in b.platforms:
        reason = f"it runs on {' and '.join(b.platforms)}, not on {platform}"
    if reason:
        raise ValueError(f"attention: {backend} does not apply: {reason}")
    return backend


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    sliding_window: int | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Attend with queries `[B, T, N, H]` to keys and values `[B, T, K, H]`; N a multiple of K.

    `segment_ids` are `[B, T]` integers. `backend` is `auto` or one of `BACKENDS`, see `choose`.
    Returns `[B, T, N, H]` in the dtype of `v`; the softmax is float32 throughout.
    """
    length, _, head_dim = q.shape[1:]
    name = choose(
        backend, platform=platform(), dtype=q.dtype.name, head_dim=head_dim, length=length
    )
    compute = partial(BACKENDS[name].compute, sliding_window=sliding_window)
    if BACKENDS[name].by_hand:
        return kernels.on_mesh(compute, q, k, v, segment_ids)
    return compute(q, k, v, segment_ids)


# -------------------------------------------------------------------------------------- comparison

TOLERANCE = 0.03  # of a row's length plus the mean one; bfloat16 stays within a third of it
_verdicts: dict[Any, str | None] = {}


def check_backend(backend: str, dtype: str, config: DecoderConfig) -> str:
    """Compare the kernel that `backend` means here with xla; return the name to use in its place.

    Called where a model is opened, before anything is traced. Once for each dtype, kind of heads and
    window, outputs and gradients on random packed rows are computed both ways on one device. Where
    they differ, or the kernel does not run, `auto` becomes xla, said in one line, and a backend
    asked for by name is a `ValueError`; as is one that `choose` refuses.
    """
    here = platform()
    name = choose(backend, platform=here, dtype=dtype, head_dim=config.head_dim)
    if not BACKENDS[name].foreign or target_platform.value:
        return backend
    c = config
    key = (name, dtype, c.num_heads // c.num_kv_heads, c.num_kv_heads, c.head_dim, c.sliding_window)
    new = key not in _verdicts
    if new:
        # A mesh of its own: the program's may be set, and is not for this.
        mesh = Mesh(np.array(jax.local_devices()[:1]), ("one",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            _verdicts[key] = _fault(BACKENDS[name], dtype, config)
    if (fault := _verdicts[key]) is None:
        return backend
    if backend != "auto":
        raise ValueError(f"attention: {name} {fault}; choose another backend, or auto")
    if new:
        say(f"attention: {name} {fault}; xla takes its place")
    return "xla"


def _fault(backend: Backend, dtype: str, config: DecoderConfig) -> str | None:
    """Say what is wrong with a backend, or None."""
    # Two rows of segments and (negative) padding, over several tiles and no multiple of one.
    ids = np.stack([_segments(317, 130, -64, 400, 89), _segments(-5, 1, 255, 516, -223)])
    B, T = ids.shape
    segment_ids = jnp.asarray(ids, jnp.int32)
    K = min(config.num_kv_heads, 2)
    N = config.num_heads // config.num_kv_heads * K
    rng = np.random.default_rng(0)

    def draw(heads: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(B, T, heads, config.head_dim)), dtype)

    q, k, v, tilt = draw(N), draw(K), draw(K), draw(N)
    window = config.sliding_window and min(config.sliding_window, 100)

    def run(backend: Backend, dtype: str) -> list[np.ndarray]:
        def f(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = backend.compute(q, k, v, segment_ids, sliding_window=window)
            out = out.astype(jnp.float32)
            return (out * tilt.astype(jnp.float32)).sum(), out

        grads_and_out = jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))
        grads, out = grads_and_out(*(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float32).reshape(B, T, -1) for x in (out, *grads)]

    try:
        found = run(backend, dtype)
    except Exception as error:  # whatever a kernel, its compiler or its library may raise
        lines = str(error).splitlines() or [""]
        return f"does not run here ({type(error).__name__}: {lines[0]})"
    with jax.default_matmul_precision("highest"):
        expected = run(BACKENDS["xla"], "float32")
    for what, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        length = np.linalg.norm(b, axis=-1)
        error = np.linalg.norm(a - b, axis=-1) / (length + length.mean())
        if not error.max() <= TOLERANCE:  # or NaN
            return f"differs from xla in {what}, by up to {error.max():.2g} of a row"
        if np.any(a[ids == 0]):
            return f"has {what} other than zero at padding"
    return None


def _segments(*lengths: int) -> np.ndarray:
    """Number the segments of a row from 1, negative lengths being padding."""
    ids = [i + 1 if n > 0 else 0 for i, n in enumerate(lengths)]
    return np.repeat(ids, np.abs(lengths))
