"""Load a tokenizer from a model folder, and make sure that it is the one the folder describes.

Some releases of Transformers load a byte-level `tokenizer.json` labelled `LlamaTokenizer` as
another tokenizer, without a word; a `tokenizer.model` loses its leading spaces, or the space before
every text. Ids are therefore compared with those of the file itself.
"""

import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from etils import epath

from main_jax.lm.weights import CheckpointError, Path, local_folder, one_line, read_json

# Spaces, line breaks, digits, accents (also decomposed), scripts, symbols beyond the basic plane, code.
PROBE = "Hello  world!\n\n\tIt's 1,234.5 € — naïve cafe\u0301, 中文字, שלום, 🙂👍🏽 def f(x): return x_1"

FAST, SENTENCEPIECE, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
FILES = (
    FAST, SENTENCEPIECE, SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", TEMPLATE, "chat_template.json",
)  # fmt: skip

Encode = Callable[[str], list[int]]


def load_tokenizer(path: Path) -> Any:
    """Load the folder's tokenizer through Transformers: local files only, no remote code.

    Raises `CheckpointError` (one line) if there is none, or if it gives other ids than the folder's
    `tokenizer.json`, or `tokenizer.model` where there is only that.
    """
    folder = os.fspath(local_folder(path))
    if os.path.exists(os.path.join(folder, FAST)):
        return _load_fast(folder)
    if os.path.exists(os.path.join(folder, SENTENCEPIECE)):
        return _load_sentencepiece(folder)
    raise CheckpointError(f"{folder}: no tokenizer ({FAST} or {SENTENCEPIECE})")


@contextmanager
def _refusing(folder: str, hint: str = "") -> Generator[None]:
    """Say in one line that a tokenizer does not load."""
    try:
        yield
    except Exception as error:  # Transformers and tokenizers raise whatever came up
        for name in FILES:
            if name.endswith(".json") and (file := epath.Path(folder) / name).exists():
                read_json(file)  # else it is not said which of the files it was
        reason = f"{type(error).__name__}: {one_line(error)}"[:300]
        raise CheckpointError(f"{folder}: the tokenizer does not load ({reason}){hint}") from None


def _compare(tokenizer: Any, encode: Encode, texts: Sequence[str], message: str) -> None:
    """Refuse a tokenizer that gives other ids than `encode` does."""
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if list(found) != encode(text):
            raise CheckpointError(message)


def _load_fast(folder: str) -> Any:
    from tokenizers import Tokenizer  # these imports cost more than a second
    from transformers import AutoTokenizer

    with _refusing(folder):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        reference = Tokenizer.from_file(os.path.join(folder, FAST))
    eos, settings = tokenizer.eos_token, tokenizer.init_kwargs
    added = map(str, settings.get("added_tokens_decoder", {}).values())
    if eos is not None and reference.token_to_id(eos) is None and eos not in added:
        # Transformers would add it, as a token that the model has never seen.
        raise CheckpointError(f"{folder}/{SETTINGS}: eos_token {eos!r} is no token of {FAST}")
    reference.no_truncation()
    reference.no_padding()
    size = reference.get_vocab_size()
    own_words = reference.decode(list(range(0, size, max(1, size // 256))))
    _compare(
        tokenizer,
        lambda text: reference.encode(text, add_special_tokens=False).ids,
        [PROBE, own_words],
        f"{folder}: Transformers loads {FAST} as another tokenizer ({type(tokenizer).__name__}),"
        f' whose ids differ; set tokenizer_class to "PreTrainedTokenizerFast" in {SETTINGS}, or, where'
        f" that changes nothing, save what Transformers loads as the model's {FAST}",
    )
    return tokenizer


def _load_sentencepiece(folder: str) -> Any:
    """Load `tokenizer.model`, such that a text without special tokens gets SentencePiece's ids.

    (To Transformers, SentencePiece's user-defined symbols are special tokens too.)

    Of the classes of Transformers 5, LlamaTokenizer swallows a text's leading space, and the others
    leave out the space that SentencePiece puts before every text. So the class is
    PreTrainedTokenizerFast, whatever the settings say, and its spaces are set right here.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast

    hint = f"; if {SENTENCEPIECE} is not SentencePiece's, the folder needs a {FAST}"
    with _refusing(folder, hint):
        reference = SentencePieceProcessor(model_file=os.path.join(folder, SENTENCEPIECE))
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        _set_spaces(tokenizer, reference)
    size, special = reference.get_piece_size(), set(tokenizer.all_special_tokens)
    words = range(0, size, max(1, size // 256))
    own_words = reference.decode([i for i in words if reference.id_to_piece(i) not in special])
    message = (
        f"{folder}: Transformers gives other ids than {SENTENCEPIECE}; convert it with the model's"
        f" own (slow) tokenizer and put the {FAST} that this makes into the folder"
    )
    _compare(tokenizer, reference.encode, [PROBE, f"  {PROBE} \n", own_words], message)
    for i, token in tokenizer.init_kwargs["added_tokens_decoder"].items():
        if tokenizer.convert_tokens_to_ids(str(token)) != i:  # Transformers closes gaps
            raise CheckpointError(f"{message} ({str(token)!r} should be {i})")
    return tokenizer


def _set_spaces(tokenizer: Any, reference: Any) -> None:
    """Treat spaces as SentencePiece does; ▁ is how it writes them."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    trims = "▁▁" not in reference.normalize("a  a")
    if trims:  # of several spaces one is left, and none at the ends
        extra = normalizers.Replace(Regex(r"\A▁+|▁+(?=▁)|▁+\z"), "")
        backend.normalizer = normalizers.Sequence([backend.normalizer, extra])
    if not reference.normalize("a").startswith("▁"):
        return
    # Metaspace puts no space before a text that begins with one. The first of these sees none, for
    # they are ▁ by now; the second makes ▁ of the space that the first one put there. `legacy`, in
    # Transformers, is a space after special tokens also. What is trimmed has lost its place in the
    # text, by which "first" goes.
    scheme = "always" if trims or tokenizer.init_kwargs.get("legacy") else "first"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme=scheme, split=False),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )


def copy_tokenizer(source: Path, destination: Path, chat_template: str | None = None) -> None:
    """Copy a folder's tokenizer as it is, in place of one in `destination` (which may be remote).

    Files are copied because Transformers, saving a tokenizer, rewrites its class and leaves files
    out. A `chat_template` takes the place of all the source's templates. A source without a
    tokenizer changes nothing.

    Raises `CheckpointError`: the source is no local folder, or its tokenizer_config.json is no JSON.
    """
    folder, target = local_folder(source), epath.Path(destination)
    copies = {f: (folder / f).read_bytes() for f in FILES if (folder / f).is_file()}
    if not copies:
        return
    if chat_template is None:
        more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
        copies |= {f"{MORE_TEMPLATES}/{file.name}": file.read_bytes() for file in more}
    else:
        # Transformers reads the file first; other programs may read the others first.
        copies[TEMPLATE] = chat_template.encode()
        copies.pop("chat_template.json", None)
        settings = read_json(folder / SETTINGS) if SETTINGS in copies else {}
        if "chat_template" in settings:
            del settings["chat_template"]
            copies[SETTINGS] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    if (target / MORE_TEMPLATES).exists():
        (target / MORE_TEMPLATES).rmtree()
    for name in set(FILES) - copies.keys():
        (target / name).unlink(missing_ok=True)
    for name, data in copies.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
