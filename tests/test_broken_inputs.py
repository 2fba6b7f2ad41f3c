"""Broken inputs, kind by kind: each gives the right result, or one line that names the file and the row.

`KINDS` is the whole list. What is put through a verb goes through the console entry point: exit code 2,
one line, no traceback. A line is given as it begins, with FILE and FOLDER for the broken file and its folder.
"""

import datetime
import gzip
import io
import json
import shutil
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_llama import make_tiny_llama

from main_jax.cli import main
from main_jax.data.reading import read_pairs, read_responses
from main_jax.data.sources import open_source
from main_jax.errors import UserError

# ------------------------------------------------------------------------------------------ entry points


def call(capsys, *arguments) -> str | None:
    """None where `main-jax ARGUMENTS` succeeds; the one line of a user's mistake where it does not."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if code == 0:
        return None
    lines = err.splitlines()
    assert (code, out) == (2, ""), err
    assert [line for line in lines if line.startswith("main-jax: ")] == lines[-1:], err
    return lines[-1].removeprefix("main-jax: ")


def texts(rows) -> list:
    """(instruction, response) of every row; of one that was dropped its reason."""
    return [row.get("drop_reason") or (row.get("instruction"), row.get("response")) for row in rows]


def score(path, model, capsys, *options) -> list | str:
    """The rows that `score` writes."""
    output = path.parent / "scored.jsonl"
    line = call(
        capsys, "score", "--forward-model", model, "--data", path, "--output", output, *options
    )
    if line is not None:
        assert not output.exists()
        return line
    return texts(map(json.loads, output.read_text().splitlines()))


def generate(path, model, capsys, *options) -> str | None:
    """The line that `generate` refuses a file of prompts with."""
    output = path.parent / "made.jsonl"
    words = ("--prompts", path, "--output", output, "--max-new-tokens", 8, *options)
    return call(capsys, "generate", "--model", model, *words)


def with_file(path, model, capsys, *options) -> list | str:
    """A good pair, scored by a model of whose folder one file is the broken one."""
    for file in model.iterdir():
        if file.name != path.name:
            shutil.copy(file, path.parent)
    data = path.parent / "good.jsonl"
    data.write_bytes(GOOD)
    return score(data, path.parent, capsys, *options)


def with_template(path, model, capsys) -> list | str:
    """A good pair, scored by a template of one's own."""
    return with_file(path, model, capsys, "--template", path)


def prepare(path, model, capsys, name, *options) -> dict | str:
    """What `prepare` counts of the seed pairs or responses."""
    good = {"seed": GOOD, "responses": b'{"text": "t"}\n'}
    data = {f"{other}_path": path.parent / f"{other}.jsonl" for other in good}
    for other, content in good.items():
        data[f"{other}_path"].write_bytes(content)
    data[f"{name}_path"] = path
    config = path.parent / "config.yaml"
    values = {
        "output_dir": "run", "model_name_or_path": str(model),
        "data": {key: str(value) for key, value in data.items()},
        "prompt": {"max_length": 64, "template": "none"},
        "align": {"sampling": {"max_new_tokens": 8}}, "augment": {"sampling": {"max_new_tokens": 8}},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values | {"output_dir": str(path.parent / "run")}))
    line = call(capsys, "prepare", config, *options)
    if line is not None:
        return line
    manifest = json.loads((path.parent / "run/stages/01-prepare/manifest.json").read_text())
    return {key: n for key, n in manifest["counts"].items() if key.startswith(name)}


def filtered(path, model, capsys, *options) -> list | str:
    """The ids that `filter` keeps of a scored file: the half of the lowest loss given the instruction."""
    output = path.parent / "kept.jsonl"
    words = ("--by", "forward_ce", "--keep", 0.5, "--output", output, *options)
    line = call(capsys, "filter", path, *words)
    return line or [json.loads(row)["id"] for row in output.read_text().splitlines()]


def read(path, model, capsys, source="FILE", reader=read_pairs) -> list | str:
    """The rows of a source."""
    source = source.replace("FILE", str(path)).replace("FOLDER", str(path.parent))
    try:
        return texts(reader(open_source(source)))
    except UserError as error:
        assert capsys.readouterr() == ("", "")  # what a library says is said once
        return str(error)


# ------------------------------------------------------------------------------------------ contents


class Kind(NamedTuple):
    """A way to be broken, the file, and what must come out: rows (or counts), or the line's beginning."""

    what: str
    file: str
    content: bytes
    expected: list | dict | str
    through: Callable = score
    options: tuple = ()


NAMES = ("instruction", "response")


def jsonl(*rows, **how) -> bytes:
    return "".join(json.dumps(row, **how) + "\n" for row in rows).encode()


def parquet(*columns, names=NAMES, **how) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], names=names), buffer, **how)
    return buffer.getvalue()


def pair(**more) -> dict:
    return {"instruction": "q", "response": "a"} | more


def turns(*contents) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}


def measured(number, **changes) -> dict:
    """A row of a scored file; the lower the number, the lower its loss."""
    sums = dict.fromkeys(("reverse_nll_sum", "response_nll_sum", "instruction_nll_sum"), 3.0)
    counts = {"forward_tokens": 2, "reverse_tokens": 2}
    row = {"id": f"r{number}", "forward_nll_sum": 1.0 + number, "drop_reason": None}
    return row | sums | counts | changes


def scored_rows(**changes) -> bytes:
    """Four, the third one changed."""
    return jsonl(*(measured(i, **(changes if i == 2 else {})) for i in range(4)))


def damaged() -> bytes:
    """Two groups of rows; the texts of the second one are overwritten."""
    content = parquet(
        ["q"] * 2048, [f"{i:08}" for i in range(2048)],
        row_group_size=1024, compression="none", use_dictionary=False, write_statistics=False,
    )  # fmt: skip
    at = content.index(b"00001030")
    return content[:at] + b"\xff" * 200 + content[at + 200 :]


def bad_text() -> pa.Array:
    """Three texts, of which the last is Latin-1; nothing has checked the bytes."""
    raw = pa.array([b"fine", b"fine", b"caf\xe9"])
    return pa.Array.from_buffers(pa.string(), 3, raw.buffers())


GOOD = b'{"instruction": "q", "response": "a"}\n'
HEADER = b"instruction,response\n"
FINE = [("q", "a")]
RIGHT_TO_LEFT = ("שלום \u202e עולם, مرحبا", "cafe\u0301 n\u0303 \u1100\u1161 👩‍👩‍👧 \u200d")
LONG = jsonl(pair(), {"instruction": "why " * 50, "response": "word " * 3})
SHORT = ("--template", "none", "--max-length", 64, "--excess-length-strategy")
PROMPT = {
    "message_id": "m",
    "text": "six words are just enough here",
    "role": "prompter",
    "lang": "en",
}
REPLY = PROMPT | {"message_id": "r", "role": "assistant", "rank": 0}
SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}

KINDS = [
    # bytes
    Kind("byte order mark", "d.jsonl", b"\xef\xbb\xbf" + GOOD, FINE),
    Kind("windows line ends", "d.jsonl", b"\r\n" + GOOD.replace(b"\n", b"\r\n") * 2, FINE * 2),
    Kind("old macintosh line ends", "d.jsonl", GOOD.replace(b"\n", b"\r") * 2,
         "FILE, row 1: not valid JSON (Extra data: column 39); expected one object {...} a line"),
    Kind("NUL byte", "d.jsonl", GOOD + GOOD.replace(b"q", b"q\0"),
         "FILE, row 2: not valid JSON (Invalid control character at: column 19)"),
    Kind("NUL bytes at the end", "d.jsonl", GOOD + bytes(64), "FILE, row 2: not valid JSON"),
    Kind("NUL, escaped", "d.jsonl", jsonl(pair(response="a\0b")), [("q", "a\0b")]),
    Kind("latin-1", "d.jsonl", GOOD + b'{"instruction": "caf\xe9", "response": "a"}\n',
         "FILE, row 2: not valid UTF-8 (byte 0xe9 in place 21)"),
    Kind("UTF-16", "d.jsonl", GOOD.decode().encode("utf-16"),
         "FILE, row 1: not valid UTF-8 but UTF-16; save it as UTF-8"),
    Kind("no line end at the end", "d.jsonl", GOOD + GOOD.strip(), FINE * 2),
    Kind("half a line at the end", "d.jsonl", GOOD + GOOD[:30],
         "FILE, row 2: not valid JSON (Unterminated string starting at: column 22)"),
    Kind("empty", "d.jsonl", b"", "FILE: no rows in it"),
    Kind("blank", "d.jsonl", b"\xef\xbb\xbf\n \r\n", "FILE: no rows in it"),
    # compression and other kinds of files
    Kind("gzip", "d.JSONL.gz", gzip.compress(GOOD) * 2, FINE * 2),
    Kind("gzip, cut", "d.jsonl.gz", gzip.compress(GOOD)[:-9], "FILE: cannot be read after row 0 (Trunc"),
    Kind("gzip without its name", "d.jsonl", gzip.compress(GOOD),
         "FILE, row 1: not valid UTF-8 but gzip; its name must end in .gz"),
    Kind("gzip by its name only", "d.jsonl.gz", GOOD, "FILE: cannot be read after row 0 (zlib"),
    Kind("zip", "d.jsonl", b"PK\x03\x04\x14\0", "FILE, row 1: not valid UTF-8 but a zip archive"),
    Kind("parquet without its name", "d.jsonl", parquet(["q"], ["a"]),
         "FILE, row 1: not valid UTF-8 but Parquet; its name must end in .parquet"),
    Kind("plain text", "d.txt", b"Once upon a time\n", "FILE, row 1: not valid JSON (Expecting value"),
    # JSON
    Kind("an array on one line", "d.json", json.dumps([pair(), pair()]).encode(),
         "FILE, row 1: expected an object like {...} a line, found list"),
    Kind("an array on several lines", "d.json", json.dumps([pair()], indent=2).encode(),
         "FILE, row 1: not valid JSON (Expecting value: column 3); expected one object {...} a line"),
    Kind("an array that never ends", "d.jsonl", b"[" * 100_000, "FILE, row 1: not valid JSON"),
    Kind("a number of 5,000 digits", "d.jsonl", GOOD + b'{"n": ' + b"9" * 5000 + b"}",
         "FILE, row 2: not valid JSON (Exceeds the limit"),
    Kind("key twice", "d.jsonl", b'{"instruction": "p", "instruction": "q", "response": "a"}',
         "FILE, row 1: not valid JSON (two keys are called 'instruction')"),
    Kind("key twice, deep", "d.jsonl", b'{"meta": {"k": 1, "k": 2}, "instruction": "q", "response": "a"}',
         "FILE, row 1: not valid JSON (two keys are called 'k')"),
    # columns and types
    Kind("number for text", "d.jsonl", GOOD + jsonl(pair(instruction=3)),
         "FILE, row 2, instruction: expected text, found int"),
    Kind("nested lists", "d.jsonl", jsonl(pair(response=[["a"], []])),
         "FILE, row 1, response: expected text, found list"),
    Kind("object for text", "d.jsonl", jsonl(pair(input={"x": 1})),
         "FILE, row 1, input: expected text, found dict"),
    Kind("mixed formats", "d.jsonl", GOOD + jsonl({"prompt": "q", "completion": "a"}),
         "FILE, row 2: missing column 'instruction'"),
    Kind("mixed types in other columns", "d.jsonl", jsonl(pair(x=1), pair(x="one"), pair(x=[{}])), FINE * 3),
    Kind("columns nobody knows", "d.jsonl", jsonl({"frage": "q"}),
         "FILE, row 1: missing column: expected instr"),
    Kind("prompts of another kind", "d.jsonl", jsonl({"text": "q"}),
         "FILE, row 1: missing column: expected instruction or prompt; found text", generate),
    Kind("turn without text", "d.jsonl", jsonl(turns("q", "a"), turns("q", [{"type": "text", "text": "a"}])),
         "FILE, row 2, messages: every turn needs a role and a text"),
    Kind("turns without an answer", "d.jsonl", jsonl({"messages": turns("q", "a")["messages"][:1]}),
         "FILE, row 1, messages: no assistant turn"),
    Kind("turns as text", "d.jsonl", jsonl({"messages": "q"}),
         "FILE, row 1, messages: expected a list of turns"),
    Kind("negative weight", "d.jsonl", jsonl(pair(weight=-1)),
         "FILE, row 1, weight: expected a number >= 0, found -1"),
    Kind("NaN weight", "d.jsonl", GOOD + jsonl(pair(weight=float("nan"))),
         "FILE, row 2, weight: expected a number >= 0, found nan"),
    Kind("weight in words", "d.jsonl", jsonl(pair(weight="2")),
         "FILE, row 1, weight: expected a number >= 0, found '2'"),
    Kind("id with a fraction", "d.jsonl", jsonl(pair(id=1.5)),
         "FILE, row 1, id: expected text or a whole number"),
    Kind("duplicate ids", "d.jsonl", jsonl(pair(id="x"), pair(id=1), pair(id="1")),
         "FILE, row 3, id: '1' was already given in row 2"),
    # texts
    Kind("right to left, combining characters", "d.jsonl",
         jsonl(dict(zip(NAMES, RIGHT_TO_LEFT, strict=True)), ensure_ascii=False), [RIGHT_TO_LEFT]),
    Kind("surrogate pair, escaped", "d.jsonl", jsonl(pair(response="🙂")), [("q", "🙂")]),
    Kind("half a surrogate pair", "d.jsonl", jsonl(pair(response="\ud83d")),
         "FILE, row 1, response: half a surrogate pair, not text"),
    Kind("half a surrogate pair elsewhere", "d.jsonl", jsonl(pair(x="\ud83d", **{"\udc00": 1})), FINE),
    Kind("white space alone", "d.jsonl", jsonl(pair(), pair(instruction=" \n"), pair(response="\t\u3000")),
         ["empty_instruction", "empty_response"], lambda *a: score(*a)[1:]),
    Kind("white space alone, counted", "d.jsonl", jsonl(pair(), pair(instruction=" \n"), pair(response=None)),
         {"seed": 1, "seed_empty_instruction": 1, "seed_empty_response": 1}, prepare,
         ("seed", "--data.max_drop_share", "0.7")),
    Kind("white space everywhere", "d.jsonl", jsonl({"text": " "}, {"text": None}),
         "FILE: no usable row is left of 2 (empty_response 2)", prepare, ("responses",)),
    Kind("5 MB of text", "d.jsonl", jsonl({"text": "🙂" * 1_250_000}, {"text": "b"}, ensure_ascii=False),
         {"responses": 1, "responses_too_long": 1}, prepare, ("responses",)),
    Kind("too long: drop", "d.jsonl", LONG, [*FINE, "too_long"], score, (*SHORT, "drop")),
    Kind("too long: truncate", "d.jsonl", LONG,
         [*FINE, ("why " * 50, "word " * 3)], score, (*SHORT, "truncate")),
    Kind("too long: raise", "d.jsonl", LONG, "FILE, row 2: a pair has ", score, (*SHORT, "raise")),
    Kind("too long: raise, in a run", "d.jsonl", LONG, "FILE, row 2: a pair has ", prepare,
         ("seed", "--prompt.excess_length_strategy", "raise")),
    # CSV
    Kind("csv: mark, line ends, quotes", "d.CSV", b"\xef\xbb\xbf" + HEADER + b'"q ""x"",\r\ny",a\r\n\r\np,b',
         [('q "x",\r\ny', "a"), ("p", "b")]),
    Kind("csv: a field too few", "d.csv", HEADER + b"q,a\nq\n",
         "FILE, row 3: 1 fields, but the header names 2 columns"),
    Kind("csv: a field too many", "d.csv", HEADER + b'"q\n",a\nq,a,b\n', "FILE, row 4: 3 fields, but"),
    Kind("csv: quote never closed", "d.csv", HEADER + b'q,a\nq,"a\nq,a\n',
         "FILE, row 3: not valid CSV (unexpected end of data)"),
    Kind("csv: text after a quote", "d.csv", HEADER + b'q,"a" b\n',
         "FILE, row 2: not valid CSV (',' expected after"),
    Kind("csv: old macintosh line ends", "d.csv", b"instruction,response\rq,a\r",
         "FILE, row 1: not valid CSV (new-line character seen in unquoted field)"),
    Kind("csv: semicolons", "d.csv", b"instruction;response\nq;a\n", "FILE, row 2: missing column: expected"),
    Kind("csv: column twice", "d.csv", b"response,instruction,response\n1,2,3\n",
         "FILE, row 1: two columns are called 'response'"),
    Kind("csv: header alone", "d.csv", HEADER, "FILE: no rows in it"),
    Kind("csv: NUL byte", "d.csv", HEADER + b"q,a\nq\0,a\n", "FILE, row 3: a NUL character in it"),
    Kind("csv: latin-1", "d.csv", HEADER + b"q,caf\xe9\n",
         "FILE, row 2: not valid UTF-8 (byte 0xe9 in place 6)"),
    Kind("csv: NaN weight", "d.csv", b"weight,instruction,response\nnan,q,a\n",
         "FILE, row 2, weight: expected a number"),
    # Parquet
    Kind("parquet: no rows", "d.parquet", parquet(pa.array([], pa.string()), pa.array([], pa.string())),
         "FILE: no rows in it"),
    Kind("parquet: no bytes", "d.parquet", b"",
         "FILE: not a readable Parquet file (Parquet file size is 0 bytes"),
    Kind("parquet: cut", "d.parquet", parquet(["q"], ["a"])[:-20], "FILE: not a readable Parquet file ("),
    Kind("parquet: damaged", "d.parquet", damaged(), "FILE: not a readable Parquet file after row 1024 ("),
    Kind("parquet: JSON inside", "d.parquet", GOOD, "FILE: not a readable Parquet file ("),
    Kind("parquet: invalid UTF-8", "d.parquet", parquet(["q"] * 3, bad_text()),
         "FILE, row 3: a text in it is not valid UTF-8"),
    Kind("parquet: bytes for text", "d.parquet", parquet([b"q"], ["a"]),
         "FILE, row 1, instruction: expected text, found bytes"),
    Kind("parquet: numbers for text", "d.parquet", parquet(["q"], [1]),
         "FILE, row 1, response: expected text, found int"),
    Kind("parquet: lists for text", "d.parquet", parquet([["q"]], ["a"]),
         "FILE, row 1, instruction: expected text, found list"),
    Kind("parquet: nulls", "d.parquet", parquet(["q", None], ["a", "a"]), [*FINE, "empty_instruction"]),
    Kind("parquet: column twice", "d.parquet", parquet(["q"], ["a"], ["b"], names=[*NAMES, "response"]),
         "FILE: two columns are called 'response'"),
    Kind("parquet: a date that Python lacks", "d.parquet",
         parquet(["q"] * 2, ["a"] * 2, pa.array([0, 2**30], pa.date32()), names=[*NAMES, "day"]),
         "FILE, row 2: a value in it cannot be read (days=1073741824"),
    Kind("parquet: dates", "d.parquet",
         parquet(["q"], ["a"], [datetime.date(1, 1, 1)], names=[*NAMES, "day"]), FINE),
    # other sources
    Kind("folder: broken JSON", "d.jsonl", GOOD * 2 + b"{oops\n",
         "hf:FOLDER, split train: cannot be read after row 0 (JSON parse error: ", read, ("hf:FOLDER",)),
    Kind("folder: latin-1", "d.jsonl", GOOD * 2 + b'{"instruction": "caf\xe9", "response": "a"}\n',
         "hf:FOLDER, split train: cannot be read after row 2 ('utf-8'", read, ("hf:FOLDER",)),
    Kind("folder: empty file", "d.jsonl", b"", "hf:FOLDER: cannot be opened (no rows in it)",
         read, ("hf:FOLDER",)),
    Kind("folder: gzip, cut", "d.jsonl.gz", gzip.compress(GOOD)[:-9],
         "hf:FOLDER: cannot be opened (Compressed file ended before", read, ("hf:FOLDER",)),
    Kind("tree: no tree", "d.jsonl", GOOD, "FILE, row 1: missing column 'message_id'; expected OASST1's",
         read, ("oasst1:FILE",)),
    Kind("tree: replies of another type", "d.jsonl", jsonl({"prompt": PROMPT | {"replies": 5}}),
         "FILE, row 1, replies: expected messages, found 5", read, ("oasst1:FILE",)),
    Kind("tree: labels of another type", "d.jsonl",
         jsonl({"prompt": PROMPT | {"labels": {"name": [["x"]], "value": [1]}, "replies": [REPLY]}}),
         "oasst1:FILE: no row passes the rules (quality 1)", read, ("oasst1:FILE",)),
    Kind("web text: a number", "d.jsonl", jsonl({"content": 3}),
         "FILE, row 1, content: expected text, found int",
         read, ("refinedweb:FILE", read_responses)),
    # models
    Kind("chat template: syntax error", "chat_template.jinja",
         b"{% for m in messages %}\n{{ m.content }\n{% endfor %}",
         "FOLDER: the tokenizer's chat template fails in line 2: unexpected '}'", with_file),
    Kind("chat template: never closed", "tokenizer_config.json",
         jsonl(SETTINGS | {"chat_template": "{% for m in messages %}{{ m.content }}"}),
         "FOLDER: the tokenizer's chat template fails in line 1: ", with_file),
    Kind("chat template: not used", "chat_template.jinja", b"{% for %}", FINE,
         with_file, ("--template", "plain")),
    Kind("chat template: refuses", "chat_template.jinja", b"{{ raise_exception('not today') }}",
         "FOLDER: the tokenizer's chat template fails: not today", with_file),
    Kind("chat template: leaves the text out", "chat_template.jinja", b"{{ bos_token }}Hello",
         "FOLDER: the tokenizer's chat template does not show the user's text just once", with_file),
    Kind("chat template: half a surrogate pair", "tokenizer_config.json",
         jsonl(SETTINGS | {"chat_template": "\ud83d{{ messages[0].content }}"}),
         "FOLDER: the tokenizer's chat template fails: 'utf-8' codec can't encode", with_file),
    Kind("tokenizer: no eos", "tokenizer_config.json", jsonl(SETTINGS | {"eos_token": None}),
         "FOLDER: the tokenizer has no eos token; set eos_token in tokenizer_config.json", with_file),
    Kind("tokenizer: eos that is no token", "tokenizer_config.json",
         jsonl(SETTINGS | {"eos_token": "<|nope|>"}),
         "FILE: eos_token '<|nope|>' is no token of tokenizer.json", with_file),
    Kind("tokenizer: half a file", "tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vo',
         "FILE: cannot be read as JSON (Unterminated string", with_file),
    Kind("tokenizer: settings of another type", "tokenizer_config.json", b"[]",
         "FILE: must hold one JSON object", with_file),
    Kind("tokenizer: invalid UTF-8", "special_tokens_map.json", b"\xff{}",
         "FILE: cannot be read as JSON ('utf-8'", with_file),
    Kind("template of one's own: YAML", "own.yaml", b"forward: {before: [}\n",
         "FILE: not valid YAML: ", with_template),
    Kind("template of one's own: a text lacks", "own.yaml", b"forward: {before: 3, after: ''}\n",
         "FILE: a template needs the text forward.before", with_template),
    Kind("template of one's own: half a surrogate pair", "own.yaml",
         b'forward: {before: "\\ud83d", after: ""}\n',
         "FILE: forward.before: half a surrogate pair, not text", with_template),
    # scored files
    Kind("scored: as it should be", "s.jsonl", scored_rows(mine=[1]), ["r0", "r1"], filtered),
    Kind("scored: a row without scores", "s.jsonl",
         scored_rows(drop_reason="too_long", forward_nll_sum=None, id="x"),
         ["r0", "r1"], filtered),
    Kind("scored: text in a number's column", "s.jsonl", scored_rows(forward_nll_sum="much"),
         "FILE, row 3, forward_nll_sum: expected ", filtered),
    Kind("scored: a list in a number's column", "s.jsonl", scored_rows(reverse_nll_sum=[1]),
         "FILE, row 3, reverse_nll_sum: expected ", filtered),
    Kind("scored: a fraction of a token", "s.jsonl", scored_rows(forward_tokens=1.5),
         "FILE, row 3, forward_tokens: expected ", filtered),
    Kind("scored: a number for a reason", "s.jsonl", scored_rows(drop_reason=3),
         "FILE, row 3, drop_reason: expected ", filtered),
    Kind("scored: NaN on one side", "s.jsonl", scored_rows(reverse_nll_sum=float("nan")),
         "FILE, row 3, reverse_nll_sum: expected a number, as forward_nll_sum is one", filtered),
    Kind("scored: no token count", "s.jsonl", scored_rows(reverse_tokens=None),
         "FILE, row 3, reverse_tokens: expected a number, as forward_nll_sum is one", filtered),
    Kind("scored: no token", "s.jsonl", scored_rows(forward_tokens=0),
         "FILE, row 3, forward_tokens: expected a whole number >= 1, found '0'", filtered),
    Kind("scored: infinite", "s.jsonl", scored_rows(response_nll_sum=float("inf")),
         "FILE, row 3, response_nll_sum: expected a number >= 0, found 'inf'", filtered),
    Kind("scored: below nothing", "s.jsonl", scored_rows(forward_nll_sum=-0.5),
         "FILE, row 3, forward_nll_sum: expected a number >= 0, found '-0.5'", filtered),
    Kind("scored: no id", "s.jsonl", scored_rows(id=None),
         "FILE, row 3, id: expected text, found NoneType", filtered),
    Kind("scored: a number for an id", "s.jsonl", scored_rows(id=7), ["r0", "r1"], filtered),
    Kind("scored: whole numbers as pandas writes them", "s.jsonl", scored_rows(forward_tokens=2.0),
         ["r0", "r1"], filtered),
    Kind("scored: text column in Parquet", "s.parquet",
         parquet(*([v] for v in measured(0, forward_nll_sum="much").values()), names=list(measured(0))),
         "FILE, row 1, forward_nll_sum: expected ", filtered),
    Kind("scored: not at all", "s.jsonl", jsonl({"id": "a"}),
         "FILE: no column forward_nll_sum; `main-jax score` writes it", filtered),
    Kind("scored: half a line at the end", "s.jsonl", scored_rows() + b'{"id": "r5", ',
         "FILE, row 5: not valid JSON", filtered),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=1, num_hidden_layers=1)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.what for kind in KINDS])
def test_a_broken_input_gives_the_right_result_or_one_line(kind, model, tmp_path, capsys):
    path = tmp_path / "in" / kind.file
    path.parent.mkdir()
    path.write_bytes(kind.content)
    found = kind.through(path, model, capsys, *kind.options)
    if not isinstance(kind.expected, str):
        assert found == kind.expected
        return
    assert isinstance(found, str), found
    expected = kind.expected.replace("FILE", str(path)).replace("FOLDER", str(path.parent))
    assert found.startswith(expected)
    assert "\n" not in found and len(found) < len(expected) + 400
