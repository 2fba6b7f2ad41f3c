"""What a user names by a directory: a model with its tokenizer, opened with every check done first.

A model folder holds config.json, generation_config.json, the tokenizer's files, and the weights either as
safetensors (Hugging Face's form) or under `checkpoints/` (Orbax, ours; see `convert.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from main_jax.config import Runtime
from main_jax.errors import UserError
from main_jax.lm import hf
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.attention import check_backend
from main_jax.lm.checkpoint import load_params, stored_params
from main_jax.lm.model import Decoder
from main_jax.lm.runtime import compute_dtype
from main_jax.lm.tokenizer import load_tokenizer
from main_jax.lm.weights import INDEX, SINGLE, read_json
from main_jax.prompts import Prompt


class LanguageModel(NamedTuple):
    """A decoder and its parameters, for inference."""

    decoder: Decoder
    params: Any


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose names and shapes were checked."""

    path: str
    decoder: Decoder

    def load(self, *, inference: bool = False) -> Any:
        """The parameters, in float32, or as `Decoder.inference_dtype` says."""
        if is_orbax(self.path):
            folder = epath.Path(self.path) / ORBAX
            return load_params(folder, self.decoder, inference=inference)
        dtype = self.decoder.inference_dtype if inference else "float32"
        return hf.load_checkpoint(self.path, dtype)[1]

    def model(self) -> LanguageModel:
        """The decoder with its parameters, for inference."""
        return LanguageModel(self.decoder, self.load(inference=True))

    def prompt(
        self,
        template: str | dict,
        max_length: int,
        strategy: str = "drop",
        system: str | None = None,
    ) -> Prompt:
        """The template bound to this checkpoint's tokenizer. Raises UserError."""
        limit = self.decoder.config.max_position_embeddings
        if max_length > limit:
            raise UserError(
                f"max_length {max_length} is more than the model's max_position_embeddings {limit}; "
                f"set prompt.max_length (--max-length) to at most {limit}"
            )
        tokenizer = load_tokenizer(self.path)
        if len(tokenizer) > self.decoder.config.vocab_size:
            raise UserError(
                f"{self.path}: the tokenizer has {len(tokenizer)} tokens, the model only "
                f"{self.decoder.config.vocab_size}"
            )
        return Prompt(tokenizer, template, max_length, strategy, hf.stop_ids(self.path), system)


ORBAX = "checkpoints"


def is_orbax(path: str) -> bool:
    """Whether a model folder holds its weights in Orbax's form."""
    folder = epath.Path(path)
    return (folder / ORBAX).is_dir() and not any((folder / f).exists() for f in (SINGLE, INDEX))


def stored(path: str, config: DecoderConfig) -> dict[str, Any]:
    """The parameters of an Orbax model folder, none of them read yet. Raises CheckpointError."""
    params = stored_params(epath.Path(path) / ORBAX)
    try:
        hf.flat_params(config, params)
    except hf.CheckpointError as error:
        reason = f"{ORBAX}/ does not belong to config.json ({error})"
        raise hf.CheckpointError(f"{path}: {reason}") from None
    return params


def stored_dtype(path: str) -> str:
    """What config.json says of the weights' dtype; float32 where it says nothing."""
    fields = read_json(epath.Path(path) / "config.json")
    name = str(fields.get("dtype") or fields.get("torch_dtype")).removeprefix("torch.")
    return name if name in ("bfloat16", "float16") else "float32"


def open_checkpoint(path: str, runtime: Runtime) -> Checkpoint:
    """Checks a model folder without loading its weights. Raises CheckpointError."""
    if is_orbax(path):
        config = hf.load_config(path)
        stored(path, config)
    else:
        config = hf.check_checkpoint(path)
    dtype = compute_dtype(runtime.compute_dtype)
    try:
        backend = check_backend(runtime.attention, dtype, config)
    except ValueError as error:
        raise UserError(f"runtime.{error}") from None
    decoder = Decoder(config, dtype=dtype, remat=runtime.remat, attention=backend)
    return Checkpoint(path, decoder)
