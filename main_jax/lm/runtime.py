"""Start of a program: quiet logs, the compile cache, and the precision policy."""

from __future__ import annotations

import logging
import os
from pathlib import Path


def initialize(compile_cache: bool = True) -> None:
    """Call once, before the first JAX computation.

    compile_cache: keep compiled programs in `$XDG_CACHE_HOME/main_jax/xla` (default `~/.cache`); a
    `JAX_COMPILATION_CACHE_DIR` that the user has set wins.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import jax

    if compile_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "main_jax" / "xla"))
    logging.getLogger("absl").setLevel(logging.ERROR)


def compute_dtype(setting: str = "auto") -> str:
    """The precision policy: float32 parameters and optimiser everywhere; this for the computation.

    `auto` is bfloat16 on accelerators and float32 on CPU, where bfloat16 gains nothing. Log-softmax
    and reductions are float32 in either case.
    """
    import jax

    if setting != "auto":
        return setting
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
