"""What a source's rows mean: pairs, unlabelled responses or instructions, recognised by their columns.

Alpaca, ShareGPT, `messages`, `prompt`/`completion` and plain `text` are known; others are named by a mapping
(`data.seed_columns: {instruction: question, response: answer}`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from main_jax.data.files import Row
from main_jax.data.sources import Source, open_source
from main_jax.errors import UserError
from main_jax.pairs import assign_ids
from main_jax.parts import Rows, stage_rows, staged_facts

PAIR_COLUMNS = (
    ("instruction", "response"),
    ("instruction", "output"),  # Alpaca
    ("prompt", "completion"),
    ("prompt", "response"),
    ("messages",),
    ("conversations",),  # ShareGPT
)
RESPONSE_COLUMNS = (("response",), ("text",), ("content",), ("output",), ("completion",))
PROMPT_COLUMNS = (("instruction",), ("prompt",))


def read_pairs(source: str | Source) -> Iterator[dict]:
    """Rows with id, instruction, input, response; formats are recognised by their column names."""
    return _read(source, PAIR_COLUMNS, _pair)


def read_responses(source: str | Source) -> Iterator[dict]:
    """Rows with id and response, from a column named response, text, content, output or completion."""
    return _read(source, RESPONSE_COLUMNS, lambda row, names: {"response": row[names[0]]})


def read_instructions(source: str | Source) -> Iterator[dict]:
    """Rows with id, instruction and input."""
    return _read(
        source,
        PROMPT_COLUMNS,
        lambda row, names: {"instruction": row[names[0]], "input": row.get("input")},
    )


def staged(
    source: Source, rows: Iterable[dict], directory: epath.Path, chunk_rows: int
) -> tuple[Rows, dict[str, int]]:
    """(the rows of a source, read once and committed in parts; how many its rules left out, by reason)."""
    found = stage_rows(rows, directory, chunk_rows, facts=source.skipped)
    return found, dict(sorted(staged_facts(directory).items()))


def _pair(row: dict, names: tuple[str, ...]) -> dict:
    if names[0] in ("messages", "conversations"):
        return _conversation(row[names[0]])
    return {"instruction": row[names[0]], "input": row.get("input"), "response": row[names[1]]}


def _conversation(turns: Any) -> dict:
    """The last assistant turn is the response, everything before it the instruction."""
    turns = _by_turn(turns)
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise ValueError("expected a list of turns")
    texts = []
    for turn in turns:
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError("every turn needs a role and a text")
        texts.append((role, text))
    answers = [i for i, (role, _) in enumerate(texts) if role in ("assistant", "gpt", "model")]
    if not answers:
        raise ValueError("no assistant turn")
    before = [text for _, text in texts[: answers[-1]]]
    return {"instruction": "\n\n".join(before), "input": None, "response": texts[answers[-1]][1]}


def _by_turn(turns: Any) -> Any:
    """A list of turns that comes as lists of their parts, as TFDS and `datasets` of old keep it, as turns."""
    parts = list(turns.values()) if isinstance(turns, dict) else []
    if not parts or not all(isinstance(p, list) and len(p) == len(parts[0]) for p in parts):
        return turns
    return [dict(zip(turns, turn, strict=True)) for turn in zip(*parts, strict=True)]


def _read(
    source: str | Source, formats: Sequence[tuple[str, ...]], convert: Callable
) -> Iterator[dict]:
    """The rows as they come. Raises UserError, one line, at the row that is wrong."""
    source = open_source(source) if isinstance(source, str) else source
    empty = True
    for row in assign_ids(_rows(source, formats, convert)):
        empty = False
        yield row
    if empty:
        left_out = ", ".join(f"{reason} {n:,}" for reason, n in sorted(source.skipped.items()))
        raise UserError(
            f"{source}: "
            + (f"no row passes the rules ({left_out})" if left_out else "no rows in it")
        )


def _rows(source: Source, formats: Sequence[tuple[str, ...]], convert: Callable) -> Iterator[dict]:
    names: tuple[str, ...] = ()
    file = None
    for raw in source:
        if raw.file != file:
            names, file = _recognised(raw, formats), raw.file
        yield _row(raw, names, convert)


def _recognised(raw: Row, formats: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The columns of the first format that a file's first row has all of."""
    names = next((f for f in formats if all(name in raw.values for name in f)), None)
    if names is None:
        wanted = " or ".join("+".join(f) for f in formats)
        raise UserError(f"{raw}: missing column: expected {wanted}; "
                        f"found {', '.join(map(str, raw.values)) or 'none'}")  # fmt: skip
    return names


def _row(raw: Row, names: tuple[str, ...], convert: Callable) -> dict:
    missing = [name for name in names if name not in raw.values]
    if missing:
        raise UserError(f"{raw}: missing column {missing[0]!r}")
    try:
        row = convert(raw.values, names)
    except ValueError as error:
        raise UserError(f"{raw}, {names[0]}: {error}") from None
    for name, value in row.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"{raw}, {name}: expected text, found {type(value).__name__}")
        _check_text(value or "", raw, name)
    given = raw.values.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int))):
        raise UserError(f"{raw}, id: expected text or a whole number")
    row["id"] = None if given in (None, "") else str(given)
    _check_text(row["id"] or "", raw, "id")
    return row | {"weight": _weight(raw), "source": raw.file, "row_number": raw.number}


def _check_text(text: str, raw: Row, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{raw}, {name}: half a surrogate pair, not text") from None


def _weight(raw: Row) -> float:
    value = raw.values.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise UserError(f"{raw}, weight: expected a number >= 0, found {value!r:.60}")
    return float(value)
