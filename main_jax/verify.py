"""`verify`: our logits of a checkpoint beside those of Transformers on PyTorch, both in float32.

    verdict = verify("/models/llama", positions=512)
    print(verdict.show())                       # differences by position; verdict.ok

The tokens are random: a table of names or a mask that is wrong shows with any text, and random ids
reach all of the vocabulary. A mistake in RoPE shows as a difference that grows with the position.
PyTorch is not a dependency, and only one of the two models is in memory at a time.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from main_jax import __version__
from main_jax.errors import UserError
from main_jax.hub import find_model
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.hf import check_checkpoint, load_checkpoint
from main_jax.lm.model import Decoder
from main_jax.lm.progress import say
from main_jax.lm.weights import one_line
from main_jax.models import is_orbax

CHUNK_LOGITS = 1 << 23
"""Logits of ours, and their float64 copies, alive at once (64 MiB each)."""

RANGES = 8
"""Lines of the table, each a range of positions."""

NO_TORCH = (
    "verify compares with transformers on PyTorch, which is not installed: pip install torch (for a"
    " CPU: pip install torch --index-url https://download.pytorch.org/whl/cpu)"
)


class Comparison(NamedTuple):
    """Two models' logits, position by position: arrays `[T]`, float64 unless said otherwise."""

    max_difference: np.ndarray  # largest |theirs - ours| over the vocabulary
    kl: np.ndarray  # KL(theirs || ours) of the next token, in nats
    same_argmax: np.ndarray  # bool: both would say the same token
    std: np.ndarray  # standard deviation of their logits over the vocabulary


@dataclass(frozen=True, eq=False)
class Verdict:
    """What `verify` found. `max_difference` and `kl` (nats) are `[positions]`."""

    path: str
    comparison: Comparison
    tolerance: float
    seed: int
    note: str  # what these positions could not show; may be empty
    versions: dict[str, str]

    @property
    def positions(self) -> int:
        """How many positions were compared."""
        return len(self.comparison.kl)

    @property
    def max_difference(self) -> np.ndarray:
        """The largest difference of logits at each position, `[positions]`."""
        return self.comparison.max_difference

    @property
    def kl(self) -> np.ndarray:
        """KL(theirs || ours) at each position in nats, `[positions]`."""
        return self.comparison.kl

    @property
    def ok(self) -> bool:
        """Whether every logit is finite and no difference is above the tolerance."""
        finite = np.isfinite(self.max_difference).all() and np.isfinite(self.kl).all()
        return bool(finite and self.max_difference.max() <= self.tolerance)

    def show(self) -> str:
        """A table for people, one line for each range of positions; the last line is the verdict."""
        c = self.comparison
        ranges = np.array_split(np.arange(self.positions), min(RANGES, self.positions))
        lines = [
            f"{self.path}: {self.positions} random tokens (seed {self.seed}), float32",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "",
            f"{'positions':>13}  {'max |Δ logit|':>13}  {'mean KL (nats)':>14}"
            f"  {'max KL (nats)':>13}  {'same argmax':>11}  {'std of logits':>13}",
        ]
        for at in ranges:
            lines.append(
                f"{f'{at[0]}-{at[-1]}':>13}  {c.max_difference[at].max():>13.1e}"
                f"  {c.kl[at].mean():>14.1e}  {c.kl[at].max():>13.1e}"
                f"  {c.same_argmax[at].mean():>11.1%}  {c.std[at].mean():>13.3g}"
            )
        return "\n".join([*lines, "", *([self.note] if self.note else []), self._last_line()])

    def _last_line(self) -> str:
        difference = self.max_difference
        if self.ok:
            return f"equal within {self.tolerance:g}"
        broken = ~(np.isfinite(difference) & np.isfinite(self.kl))
        if broken.any():
            first = int(np.argmax(broken))
            whose = "our logits" if np.isfinite(self.comparison.std[first]) else "their logits"
            count = f"{broken.sum()} of {self.positions} positions"
            return f"NOT equal: {whose} are not finite at {count}, first at position {first}"
        above, worst = difference > self.tolerance, int(np.argmax(difference))
        return (
            f"NOT equal: logits differ by more than {self.tolerance:g} at {above.sum()} of"
            f" {self.positions} positions, first at position {np.argmax(above)}; most,"
            f" {difference[worst]:.2g}, at position {worst}"
        )


def verify(path: str, *, positions: int = 512, tolerance: float = 1e-3, seed: int = 0) -> Verdict:
    """Compares the logits of one row of `positions` random tokens.

    `tolerance` is the largest difference of two logits that counts as equal. Raises UserError, one
    line, for an argument, a missing PyTorch, or a folder that Transformers cannot run, and
    CheckpointError for one that we cannot read.
    """
    if positions < 2:
        raise UserError(f"positions: {positions} is too few, expected at least 2")
    if not 0 < tolerance < math.inf:
        raise UserError(f"tolerance: must be a positive number, found {tolerance:g}")
    if seed < 0:
        raise UserError(f"seed: must not be negative, found {seed}")
    try:
        import torch
    except ImportError:
        raise UserError(NO_TORCH) from None
    path = find_model(path, "DIR")
    if is_orbax(path):
        raise UserError(f"{path}: holds Orbax weights; `main-jax convert` it first")
    config = check_checkpoint(path)
    limit = config.max_position_embeddings
    if positions > limit:
        raise UserError(
            f"positions: {positions} is more than max_position_embeddings of {path}, {limit}"
        )
    import transformers

    tokens = np.random.default_rng(seed).integers(config.vocab_size, size=positions)
    say(f"{path}: {positions} positions with transformers on PyTorch, then with main_jax")
    theirs = their_logits(path, tokens)
    gc.collect()  # their weights, before ours are read
    versions = {
        "main_jax": __version__,
        f"jax ({jax.default_backend()})": jax.__version__,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
    }
    return Verdict(
        path, _compare_ours(path, tokens, theirs), tolerance, seed,
        note=window_note(config, positions), versions=versions,
    )  # fmt: skip


def their_logits(path: str, tokens: np.ndarray) -> np.ndarray:
    """Logits `[T, V]` float32 of `tokens` `[T]`, by Transformers on the CPU. Raises UserError."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet(), torch.no_grad():
            model: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="eager",
            )
            row = torch.from_numpy(tokens)[None]
            return model.eval()(input_ids=row, use_cache=False).logits[0].numpy()
    except Exception as error:  # Transformers and PyTorch raise whatever came up
        reason = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise UserError(f"{path}: transformers cannot load or run it ({reason})") from None


@contextmanager
def _quiet() -> Generator[None]:
    """Without the warnings and bars of Transformers, which are as they were afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _compare_ours(path: str, tokens: np.ndarray, theirs: np.ndarray) -> Comparison:
    """Compares `theirs` `[T, V]` with our logits, which exist only a chunk at a time."""
    config, params = load_checkpoint(path)
    decoder = Decoder(config, dtype="float32")
    size = min(len(tokens), max(1, CHUNK_LOGITS // config.vocab_size))
    parts = []
    with jax.default_matmul_precision("highest"):  # accelerators would otherwise round the factors
        hidden = _hidden(decoder, params, jnp.asarray(tokens, jnp.int32))
        hidden = jnp.pad(hidden, ((0, -len(tokens) % size), (0, 0)))  # one shape, one compilation
        for start in range(0, len(tokens), size):
            logits = np.asarray(_logits(decoder, params, hidden[start : start + size]))
            expected = theirs[start : start + size]
            parts.append(compare(expected, logits[: len(expected)]))
    return Comparison(*map(np.concatenate, zip(*parts, strict=True)))


@partial(jax.jit, static_argnums=0)
def _hidden(decoder: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Final hidden states `[T, D]` of one row of tokens `[T]`."""
    row = tokens[None]
    hidden, _ = decoder.apply(params, row, jnp.arange(row.shape[1])[None], jnp.ones_like(row))
    return hidden[0]


@partial(jax.jit, static_argnums=0)
def _logits(decoder: Decoder, params: Any, hidden: jax.Array) -> jax.Array:
    """Logits `[T, V]` of hidden states `[T, D]`."""
    return hidden @ decoder.unembed(params)


def compare(theirs: np.ndarray, ours: np.ndarray) -> Comparison:
    """Compares logits `[T, V]`, in float64. What is not finite makes its position's numbers NaN."""
    p, q = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    with np.errstate(all="ignore"):
        difference = np.abs(p - q).max(axis=-1)
        same, std = p.argmax(axis=-1) == q.argmax(axis=-1), p.std(axis=-1)
        p, q = log_softmax(p, axis=-1), log_softmax(q, axis=-1)
        kl = np.sum(np.exp(p) * (p - q), axis=-1)
    finite = np.isfinite(difference)
    kl = np.maximum(kl, 0.0)  # equal distributions may round to below it
    return Comparison(
        np.where(finite, difference, np.nan), np.where(finite, kl, np.nan), same & finite, std
    )


def window_note(config: DecoderConfig, positions: int) -> str:
    """Say that the sliding window had no effect on so few positions; empty where it had."""
    window = config.sliding_window
    if window is None or positions > window:
        return ""
    if window >= config.max_position_embeddings:
        return (
            f"sliding window {window}: not reached, nor could it be, with"
            f" max_position_embeddings {config.max_position_embeddings}"
        )
    return f"sliding window {window}: not reached; --positions {window + 1} or more reaches it"
