"""Every kind of source on small files in the real schemas, made here; nothing is fetched."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import yaml
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from bucket import use_bucket
from tiny_llama import make_tiny_llama

from main_jax.cli import main
from main_jax.config import Config
from main_jax.data import reading
from main_jax.data.sources import open_source
from main_jax.errors import UserError
from main_jax.plan import work_of
from main_jax.strict_yaml import load_config


def read_pairs(source) -> list[dict]:
    return list(reading.read_pairs(source))


def read_responses(source) -> list[dict]:
    return list(reading.read_responses(source))


def read_instructions(source) -> list[dict]:
    return list(reading.read_instructions(source))


def jsonl(path, rows) -> str:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def parquet(path, rows) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def pair(i) -> dict:
    return {"instruction": f"q{i}", "response": f"a{i}"}


def refusal(source: str, read=read_pairs, **how) -> str:
    with pytest.raises(UserError) as caught:
        read(open_source(source, **how))
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


def answers(rows) -> list:
    return [row["response"] for row in rows]


# ------------------------------------------------------------------------------------------ files


def test_csv(tmp_path):
    """A spreadsheet's export: a mark at the start, Windows line ends, quotes with all they may hold."""
    path = tmp_path / "d.csv"
    path.write_bytes(
        b"\xef\xbb\xbfinstruction,input,response,weight,id\r\n"
        b'"say ""hi"", twice",,"first line\r\nsecond, line",2.5,x\r\n'
        b"\r\n"
        b"caf\xc3\xa9,in,,,\r\n"
        b"last,,no line end,0,7"
    )
    rows = read_pairs(str(path))
    assert [(r["instruction"], r["input"], r["response"], r["weight"]) for r in rows] == [
        ('say "hi", twice', "", "first line\r\nsecond, line", 2.5),
        ("café", "in", "", 1.0),
        ("last", "", "no line end", 0.0),
    ]
    assert [r["row_number"] for r in rows] == [2, 5, 6]  # as an editor counts
    assert rows[0]["id"] == "x" and len(rows[1]["id"]) == 16 and rows[2]["id"] == "7"
    long = tmp_path / "long.csv"
    long.write_text("text\n" + "x" * 300_000 + "\n")
    assert [len(text) for text in answers(read_responses(str(long)))] == [300_000]


HEADER = b"instruction,response\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ": no rows in it"),
        (HEADER, ": no rows in it"),
        (HEADER + b"q,a\nq,a,more\n", ", row 3: 3 fields, but the header names 2 columns"),
        (HEADER + b'"two\nlines",a\nq\n', ", row 4: 1 fields, but"),
        (HEADER + b'q,"never closed\nq,a\n', ", row 2: not valid CSV (unexpected end of data)"),
        (HEADER + b'q,"a" b\n', ", row 2: not valid CSV"),
        (HEADER + b"q,a\nq,caf\xe9\n", ", row 3: not valid UTF-8"),
        (HEADER + b"q,a\x00\n", ", row 2: a NUL character in it"),
        (HEADER.decode().encode("utf-16"), ", row 1: not valid UTF-8"),
        (b"a,a\n1,2\n", ", row 1: two columns are called 'a'"),
        (b"q1,a1\nq2,a2\n", ", row 2: missing column: expected instruction+response or"),
        (b"instruction,response,weight\nq,a,heavy\n", ", row 2, weight: expected a number >= 0, found 'h"),
        (b"instruction,response,id\nq,a,1\nq,a,1\n", ", row 3, id: '1' was already given in row 2"),
    ],
)  # fmt: skip
def test_broken_csv_is_one_line_with_file_and_row(content, expected, tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(content)
    line = refusal(str(path))
    assert line.removeprefix(str(path)).startswith(expected), line


def test_compressed(tmp_path):
    content = "".join(json.dumps(pair(i)) + "\n" for i in range(3)).encode()
    half = len(content) // 2
    two = tmp_path / "two.jsonl.gz"
    two.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    assert answers(read_pairs(str(two))) == ["a0", "a1", "a2"]
    packed = tmp_path / "d.csv.zst"
    with pa.CompressedOutputStream(str(packed), "zstd") as out:
        out.write(HEADER + b"q,a\n")
    assert answers(read_pairs(str(packed))) == ["a"]
    for path in (two, packed):
        path.write_bytes(path.read_bytes()[:-9])
        assert "Truncated compressed stream" in refusal(str(path))
    two.write_bytes(content)
    assert refusal(str(two)).startswith(f"{two}: cannot be read after row 0")


def test_globs_are_sorted_and_their_rows_numbered_by_file(tmp_path):
    """Each file's format is recognised by itself; an empty one among others does not matter."""
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "deep" / "part-2.jsonl", [{"prompt": "q2", "completion": "a2"}])
    jsonl(tmp_path / "part-1.jsonl", [pair(0), pair(1)])
    jsonl(tmp_path / "part-0.jsonl", [])
    parquet(tmp_path / "part-3.parquet", [{"instruction": "q3", "output": "a3"}])
    rows = read_pairs(f"{tmp_path}/part-?.*")
    assert answers(rows) == ["a0", "a1", "a3"]
    assert [(Path(r["source"]).name, r["row_number"]) for r in rows] == [
        ("part-1.jsonl", 1), ("part-1.jsonl", 2), ("part-3.parquet", 1),
    ]  # fmt: skip
    assert answers(read_pairs(f"{tmp_path}/*/part-[12].jsonl")) == ["a2"]
    assert refusal(f"{tmp_path}/none-*") == f"{tmp_path}/none-*: no file matches"
    literal = jsonl(tmp_path / "odd[1]?.jsonl", [pair(9)])
    assert answers(read_pairs(literal)) == ["a9"]
    jsonl(tmp_path / "part-9.jsonl", [{"id": "x"} | pair(1)])
    jsonl(tmp_path / "part-8.jsonl", [{"id": "x"} | pair(1)])
    assert refusal(f"{tmp_path}/part-[89].jsonl") == (
        f"{tmp_path}/part-9.jsonl, row 1, id: 'x' was already given in row 1 of {tmp_path}/part-8.jsonl"
    )
    (tmp_path / "part-9.jsonl").write_text('{"instruction": "q"}\n')
    assert refusal(f"{tmp_path}/part-[89].jsonl").startswith(
        f"{tmp_path}/part-9.jsonl, row 1: missing"
    )


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(pair(0)) + "\n{broken\n")
    rows = iter(open_source(str(path)))
    assert next(rows) == (str(path), 1, pair(0))
    with pytest.raises(UserError, match="row 2: not valid JSON"):
        next(rows)


def test_the_row_of_a_bad_text_in_parquet(tmp_path):
    bad = pa.array([b"x"] * 1500 + [b"caf\xe9"])
    text = pa.Array.from_buffers(pa.string(), 1501, bad.buffers())  # no check of the bytes
    pq.write_table(pa.table({"text": text}), tmp_path / "d.parquet")
    line = refusal(f"{tmp_path}/d.parquet", read_responses)
    assert line == f"{tmp_path}/d.parquet, row 1501: a text in it is not valid UTF-8"


def test_columns_of_other_names(tmp_path):
    rows = [{"question": "q", "answer": "a", "response": "not this", "score": 2, "key": "k"}]
    columns = {"instruction": "question", "response": "answer", "weight": "score", "id": "key"}
    for path in (jsonl(tmp_path / "d.jsonl", rows), parquet(tmp_path / "d.parquet", rows)):
        row = read_pairs(open_source(path, columns=columns | {"input": "lacking"}))[0]
        assert [row[k] for k in ("id", "instruction", "response", "weight")] == ["k", "q", "a", 2.0]
    table = tmp_path / "d.csv"
    table.write_text("question,answer,score\nq,a,2\n")
    assert read_pairs(open_source(str(table), columns=columns))[0]["weight"] == 2.0
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chats = jsonl(tmp_path / "chats.jsonl", [{"dialog": turns}])
    assert answers(read_pairs(open_source(chats, columns={"messages": "dialog"}))) == ["a"]
    swapped = jsonl(tmp_path / "s.jsonl", [pair(1)])
    same = open_source(swapped, columns={"instruction": "response", "response": "response"})
    assert [read_pairs(same)[0][k] for k in ("instruction", "response")] == ["a1", "a1"]
    swap = {"instruction": "response", "response": "instruction"}
    assert answers(read_pairs(open_source(swapped, columns=swap))) == ["q1"]
    line = refusal(swapped, columns={"response": "answer"})
    assert line == (
        f"{swapped}, row 1: missing column 'answer' (columns: {{response: answer}}); "
        "found instruction, response"
    )


def test_fingerprints_follow_the_content(tmp_path):
    def prints(*sources):
        return [open_source(str(s)).fingerprint() for s in sources]

    one, two = jsonl(tmp_path / "1.jsonl", [pair(1)]), jsonl(tmp_path / "2.jsonl", [pair(2)])
    same = jsonl(tmp_path / "same.jsonl", [pair(1)])
    assert prints(one) == prints(same) != prints(two)
    both = prints(f"{tmp_path}/[12].jsonl")
    assert both == prints(f"{tmp_path}/?.jsonl") != prints(one)
    with_rules = [
        f"refinedweb:{one}",
        f"refinedweb:{one}?limit=5",
        f"oasst1:{one}",
        f"oasst1:{two}",
    ]
    assert len({*prints(one, *with_rules)}) == 5
    assert prints(f"oasst1:{one}?limit=3200") == prints(f"oasst1:{same}")  # the default
    jsonl(tmp_path / "2.jsonl", [pair(3)])
    assert prints(f"{tmp_path}/[12].jsonl") != both
    assert open_source(f"{tmp_path}/[12].jsonl").size_bytes() == 2 * len(json.dumps(pair(1)) + "\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("oasst1:FILE?turn=first", "oasst1:FILE?turn=first: unknown option turn; did you mean turns?"),
        ("oasst1:FILE?turns=last", "expected one of first, every; found 'last'"),
        ("oasst1:FILE?limit=0", "limit: expected a positive number, or null for all, found 0"),
        ("oasst1:FILE?limit=1.5", "limit: expected a whole number, found 1.5"),
        ("oasst1:FILE?lone_replies=maybe", "lone_replies: expected true or false, found 'maybe'"),
        ("oasst1:FILE?min_quality=high", "min_quality: expected a number, found 'high'"),
        ("oasst1:FILE?limit=[", "limit: expected a whole number, found '['"),
        ("oasst1:FILE?limit=1&limit=2", "option 'limit=2': expected each once"),
        ("oasst1:FILE?limit=1&order", "option 'order': expected each once, as name=value"),
        ("oasst1:FILE?data_dir=x", "unknown option data_dir; known: turns, lone_replies, language"),
        ("refinedweb:FILE?max_character=9", "did you mean max_characters?"),
        ("oasst1:org/name?splt=train", "unknown option splt; did you mean split?"),
        ("hf:org/name?revison=x", "unknown option revison; did you mean revision?"),
        ("hf:FILE", "is a file; give its path without hf:"),
        ("hf:no/such/folder", "hf:no/such/folder: no such directory; expected a folder or a name"),
        ("tfds:name?dir=x", "unknown option dir; did you mean data_dir?"),
        ("oasst1:", "oasst1:: expected a name or a path"),
        ("oasst1:org/none.jsonl", "org/none.jsonl: no such file"),
        ("gs:x", "gs:x: no such file"),
    ],
)  # fmt: skip
def test_wrong_sources_are_refused_before_anything_is_read(source, expected, tmp_path):
    file = jsonl(tmp_path / "d.jsonl", [pair(1)])
    with pytest.raises(UserError) as caught:
        open_source(source.replace("FILE", file), "--data")
    line = str(caught.value)
    assert line.startswith("--data: ")
    assert expected.replace("FILE", file) in line


# ------------------------------------------------------------------------------------------ OASST1


def message(name, role, quality, text="six words are just enough here", lang="en", **more) -> dict:
    """One of a tree, with the fields of the published files."""
    labels = {"spam": {"value": 0.0, "count": 3}}
    if quality is not None:
        labels["quality"] = {"value": quality, "count": 4}
    of_all = {
        "user_id": "u",
        "created_date": "2023-02-05",
        "review_count": 3,
        "review_result": True,
    }
    own = {"message_id": name, "text": text, "role": role, "lang": lang, "labels": labels}
    return of_all | own | {"deleted": False, "rank": None, "replies": []} | more


def prompt(name, quality, *replies, **more) -> dict:
    return message(name, "prompter", quality, replies=list(replies), **more)


def reply(name, quality, *replies, **more) -> dict:
    return message(name, "assistant", quality, replies=list(replies), **more)


TREES = [
    prompt("p1", 0.8,
        reply("low", 0.9, rank=1),
        reply("best", 0.9, prompt("p1b", 0.7, reply("later", 0.7), text="and now six words once more"),
              rank=0)),
    prompt("p2", 0.7, reply("lone", 0.65), text="a question that is not ranked"),
    prompt("p3", 0.9, reply("german", 0.9, lang="de"), lang="de"),
    prompt("p4", 0.9, reply("spanish", 0.9, lang="es")),
    prompt("p5", 0.6, reply("at the limit", 0.9)),
    prompt("p6", 0.9, reply("five words", 0.9, text="five words are too few")),
    prompt("p7", 0.9, reply("unranked 1", 0.9), reply("unranked 2", 0.9)),
    prompt("p8", 0.9, reply("gone", 0.9, deleted=True)),
    prompt("p9", None, reply("unlabelled", 0.9)),
    prompt("p10", 0.9),
    prompt("p11", 0.7, reply("second", 0.9, rank=1, lang="fr"), reply("tie", 0.65, rank=0)),
]  # fmt: skip


def flat(node, tree, parent=None):
    """The tree's messages as the table has them: depth first, `labels` untouched."""
    own = {k: v for k, v in node.items() if k != "replies"}
    yield own | {"parent_id": parent, "message_tree_id": tree}
    for child in node["replies"]:
        yield from flat(child, tree, node["message_id"])


def as_trees(folder) -> str:
    rows = [
        {"message_tree_id": t["message_id"], "tree_state": "ready_for_export", "prompt": t}
        for t in TREES
    ]
    return jsonl(folder / "2023-04-12_oasst_ready.trees.jsonl.gz", rows)


def as_messages(folder) -> str:
    rows = [m for t in TREES for m in flat(t, t["message_id"])]
    return jsonl(folder / "2023-04-12_oasst_ready.messages.jsonl.gz", rows)


def as_parquet(folder) -> str:
    """Labels as lists; null for a message that has none."""
    rows = [m for t in TREES for m in flat(t, t["message_id"])]
    for row in rows:
        names = list(row["labels"])
        lists = {k: [row["labels"][n][k] for n in names] for k in ("value", "count")}
        row["labels"] = {"name": names, **lists} if len(names) > 1 else None
    return parquet(folder / "train-00000-of-00001.parquet", rows)


SKIPPED = {"later_turn": 1, "rank": 4, "language": 2, "quality": 2, "words": 1, "deleted": 1}


@pytest.fixture(params=[as_trees, as_messages, as_parquet])
def oasst1(request, tmp_path):
    """Reads the trees, stored in one of the published forms, under some options."""
    path = request.param(tmp_path)

    def read(options=""):
        source = open_source(f"oasst1:{path}{options}")
        rows = read_pairs(source)
        return [row["id"] for row in rows], dict(source.skipped), rows

    return read


@pytest.mark.parametrize(
    ("options", "ids", "skipped"),
    [
        ("", ["best", "lone", "tie"], {}),
        ("?turns=every", ["best", "later", "lone", "tie"], {"later_turn": 0}),
        ("?lone_replies=false", ["best", "tie"], {"lone_reply": 4, "quality": 0, "words": 0}),
        ("?order=file", ["best", "lone", "tie"], {}),
        ("?limit=2", ["best", "lone"], {"limit": 1}),
        ("?limit=null", ["best", "lone", "tie"], {}),
        ("?language=de", ["german"], {"language": 12, "rank": 0, "quality": 0, "words": 0, "deleted": 0}),
        ("?language=null&limit=9", ["german", "spanish", "best", "lone", "tie"], {"language": 0, "rank": 4}),
        ("?min_quality=0.5", ["best", "at the limit", "lone", "tie"], {"quality": 1}),
        ("?min_quality=0.65", ["best"], {"quality": 4}),
        ("?min_words=4", ["five words", "best", "lone", "tie"], {"words": 0}),
        ("?turns=every&order=file", ["best", "later", "lone", "tie"], {"later_turn": 0}),
    ],
)  # fmt: skip
def test_oasst1_rules(options, ids, skipped, oasst1):
    """p11's second reply is French and of rank 1: the language is looked at first."""
    expected = Counter(
        {"later_turn": 1, "language": 3, "rank": 3, "quality": 2, "words": 1, "deleted": 1}
    )
    found = oasst1(options)
    assert found[0] == ids
    assert Counter(found[1]) == Counter(dict(expected) | skipped)


def test_oasst1_pairs(oasst1):
    _, _, rows = oasst1("?turns=every")
    later = rows[1]
    assert later["instruction"] == "and now six words once more"  # what was said before is left out
    assert later["response"] == "six words are just enough here"
    assert rows[2]["instruction"] == "a question that is not ranked"
    assert rows[0]["weight"] == 1.0


def test_oasst1_serves_questions_and_responses_too(tmp_path):
    source = f"oasst1:{as_trees(tmp_path)}?limit=1"
    assert [row["instruction"] for row in read_instructions(source)] == [TREES[0]["text"]]
    assert answers(read_responses(source)) == ["six words are just enough here"]
    by_file = open_source(f"oasst1:{as_parquet(tmp_path)}?order=file&limit=1")
    assert [row["row_number"] for row in read_pairs(by_file)] == [3]
    assert [row["row_number"] for row in read_pairs(f"oasst1:{as_trees(tmp_path)}")] == [1, 2, 11]


def test_oasst1_with_what_is_no_tree(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [pair(1)])
    assert refusal(f"oasst1:{path}") == (
        f"{path}, row 1: missing column 'message_id'; expected OASST1's messages or trees"
    )
    rows = [m for t in TREES[:2] for m in flat(t, t["message_id"])]
    rootless = open_source("oasst1:" + jsonl(tmp_path / "rootless.jsonl", rows[1:]))
    assert [row["id"] for row in read_pairs(rootless)] == ["lone"]
    assert dict(rootless.skipped) == {"no_prompt": 2, "later_turn": 1}
    torn = jsonl(tmp_path / "torn.jsonl", [*rows[1:], rows[0]])
    assert refusal(f"oasst1:{torn}") == (
        f"{torn}, row 7: tree p1 was interrupted by another; sort by message_tree_id"
    )
    jsonl(tmp_path / "d.jsonl", [rows[0] | {"text": 3}])
    assert refusal(f"oasst1:{path}").endswith("row 1, text: expected text, found int")
    jsonl(tmp_path / "d.jsonl", [{"prompt": TREES[9] | {"replies": ["hi"]}}])
    assert "row 1, replies: expected messages, found 'hi'" in refusal(f"oasst1:{path}")
    jsonl(tmp_path / "d.jsonl", rows)
    assert refusal(f"oasst1:{path}?language=xx") == (
        f"oasst1:{path}?language=xx: no row passes the rules (language 3, later_turn 1)"
    )


# ------------------------------------------------------------------------------------------ RefinedWeb


def text_of(length, *ends) -> str:
    """So many characters, on lines of 90 and the given last ones."""
    end = "".join(f"\n{e}" for e in ends)
    lines = ("x" * 90 + "\n") * 30
    return lines[: length - len(end) - 1] + "x" + end


WEB = {
    "short": text_of(999),
    "shortest": text_of(1000),
    "longest": text_of(2200),
    "long": text_of(2201),
    "line of 4": text_of(1500, "four", "a last one"),
    "line of 5": text_of(1500, "5five"),
    "empty line": text_of(1500, "", "paragraph"),
}


def web_rows() -> list[dict]:
    more = {
        "timestamp": "2013-05-18T10:42:00Z",
        "dump": "CC-MAIN-2013-20",
        "segment": "1368696381249",
    }
    return [{"content": text, "url": f"http://{name}"} | more for name, text in WEB.items()]


@pytest.mark.parametrize(
    ("options", "names", "skipped"),
    [
        ("", ["shortest", "longest", "line of 5"],
         {"too_few_characters": 1, "too_many_characters": 1, "short_line": 2}),
        ("?min_characters=999&max_characters=2201",
         ["short", "shortest", "longest", "long", "line of 5"], {"short_line": 2}),
        ("?min_line_characters=4", ["shortest", "longest", "line of 4", "line of 5"],
         {"too_few_characters": 1, "too_many_characters": 1, "short_line": 1}),
        ("?min_line_characters=0", ["shortest", "longest", "line of 4", "line of 5", "empty line"],
         {"too_few_characters": 1, "too_many_characters": 1}),
        ("?limit=1", ["shortest"], {"too_few_characters": 1}),
    ],
)  # fmt: skip
def test_refinedweb_rules(options, names, skipped, tmp_path):
    """The first that pass, in the order of the stream; after the last one nothing is read."""
    assert [len(t) for t in WEB.values()] == [999, 1000, 2200, 2201, 1500, 1500, 1500]
    path = parquet(tmp_path / "web.parquet", web_rows())
    source = open_source(f"refinedweb:{path}{options}")
    rows = read_responses(source)
    assert answers(rows) == [WEB[name] for name in names]
    assert dict(source.skipped) == skipped
    assert [row.values["url"] for row in source] == [f"http://{name}" for name in names]
    assert len(list(source)) == len(rows) and dict(source.skipped) == skipped  # not counted twice


def test_refinedweb_stops_at_its_limit(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text(json.dumps({"text": text_of(1200)}) + "\n{broken\n")
    source = open_source(f"refinedweb:{path}?limit=1")
    assert len(read_responses(source)) == 1
    assert "row 2: not valid JSON" in refusal(f"refinedweb:{path}?limit=2", read_responses)
    assert source.size_bytes() == min(path.stat().st_size, 2200)
    jsonl(path, [{"body": text_of(1200)}])
    assert refusal(f"refinedweb:{path}").endswith("row 1: missing column 'content'; found body")
    renamed = open_source(f"refinedweb:{path}", columns={"response": "body"})
    assert len(read_responses(renamed)) == 1


# ------------------------------------------------------------------------------------------ datasets


def conversation(i) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"q{i}"},
            {"role": "assistant", "content": f"a{i}"},
        ]
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with data sets in every form that a folder may have."""
    folder = tmp_path_factory.mktemp("hf")
    train = datasets.Dataset.from_list([conversation(i) for i in range(20)])
    test = datasets.Dataset.from_list([conversation(i) for i in range(100, 103)])
    train.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "splits")
    (folder / "files").mkdir()
    train.to_parquet(folder / "files" / "train-00000-of-00001.parquet")
    test.to_parquet(folder / "files" / "test-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("one", range(20)),
        ("one?split=train[5:8]", range(5, 8)),
        ("splits", range(20)),
        ("splits?split=test", range(100, 103)),
        ("splits?split=train[:10%]", range(2)),
        ("splits?split=train[-1:]+test[:1]", (19, 100)),
        ("files", range(20)),
        ("files?split=test", range(100, 103)),
        ("files?split=train[18:]+test[1:2]", (18, 19, 101)),
    ],
)
def test_datasets_in_a_folder(source, expected, saved):
    rows = read_pairs(f"hf:{saved}/{source}")
    assert answers(rows) == [f"a{i}" for i in expected]
    assert [row["row_number"] for row in rows] == [i % 100 + 1 for i in expected]
    assert rows[0]["source"].startswith(f"hf:{saved}/{source.split('?')[0]}, split t")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "splits?split=dev",
            ": split dev: Unknown split \"dev\". Should be one of ['train', 'test']",
        ),
        ("splits?split=train[", ": split train[: "),
        ("files?split=train[:10%]", ": split train[:10%]: its number of rows is not known"),
        ("files?split=train[-3:]", "give rows, such as train[:1000]"),
        ("none/of/them", "/none/of/them: no such directory"),
        ("files:config", ": cannot be opened (BuilderConfig 'config' not found"),
    ],
)
def test_datasets_in_a_folder_that_are_not_there(source, expected, saved):
    line = refusal(f"hf:{saved}/{source}")
    assert line.startswith(f"hf:{saved}/")
    assert expected in line, line


def test_what_names_a_data_set_is_its_fingerprint(saved):
    sources = [
        f"hf:{saved}/one", f"hf:{saved}/splits", f"hf:{saved}/splits?split=test", "hf:org/name",
        "hf:org/other", "hf:org/name:config", "hf:org/name?revision=v2", "hf:org/name?split=train[:9]",
    ]  # fmt: skip
    assert len({open_source(s).fingerprint() for s in sources}) == len(sources)
    assert open_source("hf:org/name").size_bytes() is None
    files = [f for f in (saved / "one").iterdir() if f.is_file()]
    assert open_source(f"hf:{saved}/one").size_bytes() == sum(f.stat().st_size for f in files)


def test_without_a_connection_one_line_says_how_to_fetch(tmp_path):
    code = (
        "from main_jax.data.reading import read_pairs\n"
        "from main_jax.errors import UserError\n"
        "for source in ('hf:org/name', 'oasst1:org/name?split=train&limit=3'):\n"
        "    try: list(read_pairs(source))\n"
        "    except UserError as error: print(error)\n"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    for line in lines:
        assert line.startswith("hf:org/name: cannot be opened (")
        assert "`hf download org/name --repo-type dataset --local-dir DIR`" in line


# ------------------------------------------------------------------------------------------ TFDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set that TFDS has prepared, in array_record and in Parquet."""
    folder, text = tmp_path_factory.mktemp("tfds"), tfds.features.Text()

    with tfds.core.registered.skip_registration():

        class WebPairs(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.2.0")

            def _info(self):
                turns = tfds.features.Sequence({"role": text, "content": text})
                features = tfds.features.FeaturesDict({"text": text, "messages": turns})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples(range(20)),
                    "test": self._generate_examples([7]),
                }

            def _generate_examples(self, numbers):
                for i in numbers:
                    yield (
                        i,
                        {"text": b"caf\xe9" if i == 7 and len(numbers) == 1 else f"é{i}"}
                        | conversation(i),
                    )

    for kind in ("array_record", "parquet"):
        builder = WebPairs(data_dir=folder / kind, file_format=kind)
        builder.download_and_prepare()
    return folder


def test_tfds_without_tensorflow(prepared):
    source = open_source(f"tfds:web_pairs?data_dir={prepared}/array_record")
    assert sorted(answers(read_responses(source))) == sorted(f"é{i}" for i in range(20))
    pairs = read_pairs(source)
    assert {(r["instruction"], r["response"]) for r in pairs} == {
        (f"q{i}", f"a{i}") for i in range(20)
    }
    assert [r["row_number"] for r in pairs] == list(range(1, 21))
    some = open_source(f"tfds:web_pairs:1.2.0?split=train[:10%]&data_dir={prepared}/array_record")
    assert answers(read_pairs(some)) == answers(pairs[:2])
    assert some.fingerprint() != source.fingerprint()
    assert (source.size_bytes() or 0) > 100
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("web_pairs?data_dir=DIR/parquet", "stored as parquet in DIR/parquet; prepare it with"),
        ("none_such?data_dir=DIR/array_record", "none_such: not prepared in DIR/array_record; give data_dir"),
        ("web_pairs:9.9.9?data_dir=DIR/array_record", "not prepared in DIR/array_record"),
        ("mnist?data_dir=DIR", "tfds:mnist: not prepared in DIR"),
        ("web_pairs?split=dev&data_dir=DIR/array_record", "split dev: Unknown split 'dev'"),
        ("web_pairs?split=test&data_dir=DIR/array_record", "test, row 1: a text in it is not valid UTF-8"),
    ],
)  # fmt: skip
def test_tfds_refusals_are_one_line(source, expected, prepared):
    line = refusal(f"tfds:{source.replace('DIR', str(prepared))}")
    assert expected.replace("DIR", str(prepared)) in line, line


def test_tfds_rows_that_were_lost_are_noticed(prepared, tmp_path, monkeypatch):
    cut = shutil.copytree(prepared / "array_record", tmp_path / "cut")
    shard = next(cut.rglob("web_pairs-train.*"))
    records = ArrayRecordReader(str(shard)).read(0, 12)
    shard.unlink()
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    assert "split train, row 13: " in refusal(f"tfds:web_pairs?data_dir={cut}")
    # TFDS counts by its own notes; where it does not:
    found = tfds.core.data_sources.array_record.ArrayRecordDataSource
    monkeypatch.setattr(found, "__len__", lambda self: 12)
    line = refusal(f"tfds:web_pairs?data_dir={prepared}/array_record")
    assert "split train: 12 rows are there, but its dataset_info.json says 20" in line


# ------------------------------------------------------------------------------------------ gs://


def test_files_and_globs_of_a_bucket(monkeypatch):
    bucket = use_bucket(monkeypatch)
    lines = [json.dumps(pair(i)).encode() + b"\n" for i in range(5)]
    bucket.pipe("gs://data/pairs/b.jsonl", b"".join(lines[3:]))
    bucket.pipe("gs://data/pairs/a.jsonl.gz", gzip.compress(b"".join(lines[:3])))
    bucket.pipe("gs://data/other/c.jsonl", lines[0])
    one, several = (open_source(f"gs://data/pairs/{n}") for n in ("b.jsonl", "*.jsonl*"))
    assert answers(read_pairs(one)) == ["a3", "a4"]
    assert answers(read_pairs(several)) == ["a0", "a1", "a2", "a3", "a4"]
    assert read_pairs(several)[3]["source"] == "gs://data/pairs/b.jsonl"
    assert one.size_bytes() == len(b"".join(lines[3:]))
    before = several.fingerprint()
    bucket.pipe("gs://data/pairs/b.jsonl", lines[3])
    assert several.fingerprint() != before
    for path, line in (("pairs/none.jsonl", "no such file"), ("n*/*.jsonl", "no file matches")):
        assert f"gs://data/{path}: {line}" in refusal(f"gs://data/{path}")


# ------------------------------------------------------------------------------------------ a run


def test_a_plan_counts_what_is_here(tmp_path):
    def work(source):
        return work_of(load_config(Config, None, ["--data.seed_path", source]), {}).seed_pairs

    assert work(f"oasst1:{as_trees(tmp_path)}?limit=2") == 2
    for elsewhere in (f"{tmp_path}/none.jsonl", "hf:org/name", f"tfds:none?data_dir={tmp_path}"):
        assert work(elsewhere) == 3_200
    with pytest.raises(UserError, match="did you mean limit"):
        work("oasst1:org/name?limt=2")


def test_score_and_generate_take_any_source(tmp_path, capsys):
    model = str(make_tiny_llama(tmp_path / "model", seed=2, num_hidden_layers=2))
    out = tmp_path / "out.jsonl"
    trees = f"oasst1:{as_trees(tmp_path)}?limit=2"
    assert main(["score", "--forward-model", model, "--data", trees, "--output", str(out)]) == 0
    scored = [row.values for row in open_source(str(out))]
    assert [row["id"] for row in scored] == ["best", "lone"]
    assert all(row["forward_nll_sum"] > 0 and row["quality"] > 1.3 for row in scored)
    assert f"{trees}: 1 rows left out by its rules: limit" in capsys.readouterr().err
    asked = tmp_path / "asked.csv"
    asked.write_text("prompt,topic\nHow?,a\n")
    arguments = ["--prompts", str(asked), "--output", str(out), "--max-new-tokens", "2"]
    assert main(["generate", "--model", model, *arguments]) == 0
    assert [(row.values["topic"], "completion" in row.values) for row in open_source(str(out))] == [
        ("a", True)
    ]
    code = main(["score", "--forward-model", model, "--data", "hf:none/x/y", "--output", str(out)])
    assert code == 2 and "--data: hf:none/x/y: no such directory" in capsys.readouterr().err


def test_a_run_counts_what_the_rules_leave_out(tmp_path, capsys):
    """`prepare` on two sources with rules and a mapping; other rules are another stage."""
    make_tiny_llama(tmp_path / "model", seed=2, num_hidden_layers=2)
    web = parquet(tmp_path / "web.parquet", [{"body": r["content"]} for r in web_rows()])
    values = {
        "output_dir": str(tmp_path / "run"),
        "model_name_or_path": str(tmp_path / "model"),
        "data": {
            "seed_path": f"oasst1:{as_trees(tmp_path)}",
            "responses_path": f"refinedweb:{web}",
            "responses_columns": {"response": "body"},
        },
        "prompt": {"max_length": 160, "template": "none", "excess_length_strategy": "truncate"},
    } | {stage: {"sampling": {"max_new_tokens": 8}} for stage in ("align", "augment", "evaluate")}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))

    def prepare(*more):
        assert main(["prepare", str(config), *more]) == 0, capsys.readouterr().err
        manifest = json.loads((tmp_path / "run/stages/01-prepare/manifest.json").read_text())
        return manifest["counts"], capsys.readouterr().err

    counts, said = prepare()
    assert counts == {
        "seed_skipped_deleted": 1, "seed_skipped_language": 3, "seed_skipped_later_turn": 1,
        "seed_skipped_quality": 2, "seed_skipped_rank": 3, "seed_skipped_words": 1,
        "responses_skipped_short_line": 2, "responses_skipped_too_few_characters": 1,
        "responses_skipped_too_many_characters": 1, "seed": 3, "responses": 3, "validation_pairs": 0,
    }  # fmt: skip
    assert "3 seed skipped language" in said
    assert "kept" in prepare()[1]
    again, _ = prepare("--data.seed_path", f"{values['data']['seed_path']}?limit=2")
    assert (again["seed"], again["seed_skipped_limit"]) == (2, 1)
    code = main(["prepare", str(config), "--data.seed_columns", "{instrution: q}"])
    said = capsys.readouterr().err
    assert code == 2 and "unknown column instrution; did you mean instruction?" in said
