"""The world's word-level tokenizer: one token per word, nothing out of vocabulary, lossless.

Ids 0 to 6 are the special tokens in the order of `SPECIAL_TOKENS`, then come the words of the
grammar, sorted; the vocabulary is the same for every world. <instruction>, <response> and <reverse>
are for the template that marks which of the two directions is wanted.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from main_jax.world.grammar import words

SPECIAL_TOKENS: tuple[str, ...] = (
    "<unk>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<instruction>",
    "<response>",
    "<reverse>",
)


def build_tokenizer() -> Tokenizer:
    """WordLevel over whitespace; encoding adds no token and decoding joins with single spaces."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # No decoder and no post-processor on purpose: without a decoder tokens are joined by " ".
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def save_tokenizer(directory: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them.

    AutoTokenizer also wants a config.json in the directory, which is the model's to write.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        # Otherwise decoding would draw "millet ." together to "millet.".
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
