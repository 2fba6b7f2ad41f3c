"""Load a tokenizer from a model folder, and make sure that it is the one the folder describes.

Some releases of Transformers load a byte-level `tokenizer.json` labelled `LlamaTokenizer` as
another tokenizer, without a word. Ids are therefore compared with those of the file itself.
"""

import os
from typing import Any

from main_jax.lm.weights import CheckpointError, Path, local_folder, one_line

# Spaces, line breaks, digits, accents, several scripts, symbols beyond the basic plane, code.
PROBE = "Hello  world!\n\n\tIt's 1,234.5 € — naïve Übung, 中文字, שלום, 🙂👍🏽 def f(x): return x_1"


def load_tokenizer(path: Path) -> Any:
    """Load the folder's tokenizer through Transformers: local files only, no remote code.

    Raises `CheckpointError` (one line) if there is none, or if it gives other ids than the folder's
    `tokenizer.json`.
    """
    from tokenizers import Tokenizer  # these imports cost more than a second
    from transformers import AutoTokenizer

    folder = os.fspath(local_folder(path))
    raw = os.path.join(folder, "tokenizer.json")
    if not any(
        os.path.exists(os.path.join(folder, f)) for f in ("tokenizer.json", "tokenizer.model")
    ):
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        reference = Tokenizer.from_file(raw) if os.path.exists(raw) else None
    except Exception as error:  # Transformers and tokenizers raise whatever came up
        reason = one_line(error)[:300]
        raise CheckpointError(f"{folder}: the tokenizer does not load ({reason})") from None
    if reference is not None:
        _compare(folder, tokenizer, reference)
    return tokenizer


def _compare(folder: str, tokenizer: Any, reference: Any) -> None:
    """Refuse a tokenizer that gives other ids than its file, for the probe and its own words."""
    reference.no_truncation()
    reference.no_padding()
    size = reference.get_vocab_size()
    own_words = reference.decode(list(range(0, size, max(1, size // 256))))
    for text in (PROBE, own_words):
        found = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if found != reference.encode(text, add_special_tokens=False).ids:
            raise CheckpointError(
                f"{folder}: Transformers loads tokenizer.json as another tokenizer"
                f" ({type(tokenizer).__name__}), whose ids differ; set tokenizer_class to"
                ' "PreTrainedTokenizerFast" in tokenizer_config.json'
            )
