"""What a pool of texts is cleaned of before anything is computed on it; each cut has a `drop_reason`.

    duplicate        the same words as an earlier text
    near_duplicate   nearly: MinHash over word triples, at `clean.near_duplicates` of their Jaccard similarity
    contaminated     shares `clean.decontaminate_ngram` words in a row with one of `clean.decontaminate`
    pattern          one of `clean.drop_patterns` is found in it
    language         another language than `clean.language`

MinHash: Broder 1997; word 13-grams against test sets: Brown et al. 2020 (arXiv 2005.14165, appendix C).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from functools import cache
from typing import Any

from main_jax.errors import UserError

WORD = re.compile(r"\w+")
PERMUTATIONS, BANDS, SHINGLE = 128, 32, 3
"""Of MinHash: two texts of similarity .8 share one of 32 bands of 4 with probability 1 − (1 − .8⁴)³²."""


def words(text: str) -> list[str]:
    """Of a text, without case and punctuation; the characters of a text that has none."""
    return WORD.findall(text.casefold()) or list(text.split())


def digest(said: Sequence[str]) -> bytes:
    """16 bytes that stand for these words."""
    return hashlib.blake2b(" ".join(said).encode("utf-8", "replace"), digest_size=16).digest()


def duplicates(near: float | None = None) -> Callable[[str], str | None]:
    """Asked of one text after another: the drop reason of one that says what an earlier one has said.

    The first of several stays. Memory: a digest per text, and with `near` (a Jaccard similarity of word
    triples, estimated) 512 bytes more. Empty texts are nobody's duplicates.
    """
    from rensa import RMinHash, RMinHashLSH  # ty: ignore[missing-module-member]

    seen: set[bytes] = set()
    kept: list[Any] = []
    index = RMinHashLSH(threshold=near or 1.0, num_perm=PERMUTATIONS, num_bands=BANDS)

    def said_before(text: str) -> str | None:
        said = words(text)
        if not said:
            return None
        if (told := digest(said)) in seen:
            return "duplicate"
        seen.add(told)
        if near is None:
            return None
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(list(ngrams(said, SHINGLE)))
        if any(sketch.jaccard(kept[other]) >= near for other in index.query(sketch)):
            return "near_duplicate"
        index.insert(len(kept), sketch)
        kept.append(sketch)
        return None

    return said_before


def ngrams(said: Sequence[str], n: int) -> Iterator[str]:
    """Every n words in a row; the whole, where there are fewer."""
    for start in range(max(1, len(said) - n + 1)):
        yield " ".join(said[start : start + n])


def fingerprints(texts: Iterable[str], n: int) -> set[int]:
    """A hash of every n words in a row of `texts`; shorter ones among them have none."""
    return {
        _hash(gram) for text in texts if len(said := words(text)) >= n for gram in ngrams(said, n)
    }


def contamination(known: Set[int], n: int) -> Callable[[str], bool]:
    """Whether a text has n words in a row whose hash is among the `known` (`fingerprints`)."""

    def contaminated(text: str) -> bool:
        if not known:
            return False
        said = words(text)
        return len(said) >= n and any(_hash(gram) in known for gram in ngrams(said, n))

    return contaminated


def texts_in(value: Any) -> Iterator[str]:
    """Every text of a row's value, those in lists and mappings too: turns, choices, answers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


def _hash(text: str) -> int:
    """64 bits that are the same everywhere; two texts share them by chance once in 10¹⁹."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def patterns(expressions: Sequence[str], key: str) -> Callable[[str], bool]:
    """Whether one of the regular expressions is found in a text. Raises UserError for one that is none."""
    compiled = []
    for expression in expressions:
        try:
            compiled.append(re.compile(expression))
        except re.error as error:
            raise UserError(f"{key}: {expression!r} is no regular expression ({error})") from None
    return lambda text: any(pattern.search(text) for pattern in compiled)


def other_language(code: str, key: str) -> Callable[[str], bool]:
    """Whether a text is in another language than `code` (ISO 639-1), by lingua.

    Raises UserError where the extra is missing or there is no such language.
    """
    try:
        from lingua import IsoCode639_1
    except ImportError:
        raise UserError(f"{key}: needs an extra: pip install 'main-jax[language]'") from None
    wanted = getattr(IsoCode639_1, code.upper(), None)
    if wanted is None:
        raise UserError(
            f"{key}: {code!r} is no language that lingua knows (ISO 639-1, as en or de)"
        )
    detector = _detector()

    def differs(text: str) -> bool:
        found = detector.detect_language_of(text)
        return found is not None and found.iso_code_639_1 != wanted

    return differs


@cache
def _detector() -> Any:
    from lingua import LanguageDetectorBuilder

    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
