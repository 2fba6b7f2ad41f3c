"""What a user names by a directory: a model with its tokenizer, opened with every check done first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from main_jax.config import Runtime
from main_jax.errors import UserError
from main_jax.lm import hf
from main_jax.lm.model import Decoder
from main_jax.lm.runtime import compute_dtype
from main_jax.lm.tokenizer import load_tokenizer
from main_jax.prompts import Prompt


class LanguageModel(NamedTuple):
    """A decoder and its parameters."""

    decoder: Decoder
    params: Any


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint directory whose names and shapes were checked."""

    path: str
    decoder: Decoder

    def load(self) -> Any:
        """The parameters, in float32."""
        return hf.load_checkpoint(self.path)[1]

    def model(self) -> LanguageModel:
        """The decoder with its parameters."""
        return LanguageModel(self.decoder, self.load())

    def prompt(self, template: str | dict, max_length: int, strategy: str = "drop") -> Prompt:
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
        return Prompt(tokenizer, template, max_length, strategy, hf.stop_ids(self.path))


def open_checkpoint(path: str, runtime: Runtime) -> Checkpoint:
    """Checks a checkpoint directory without reading its weights. Raises CheckpointError."""
    config = hf.check_checkpoint(path)
    decoder = Decoder(
        config,
        dtype=compute_dtype(runtime.compute_dtype),
        remat=runtime.remat,
        attention=runtime.attention,
    )
    return Checkpoint(path, decoder)
