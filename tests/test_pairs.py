"""Reading what users bring (and what they break), ids, atomic writing, and chunks that resume."""

import datetime
import hashlib
import json
import os
import time

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from together import Together

from main_jax import pairs, parts
from main_jax.data import reading
from main_jax.data.sources import open_source
from main_jax.errors import UserError
from main_jax.lm import progress
from main_jax.lm.multihost import Preempted
from main_jax.pairs import COLUMNS


def read_pairs(source) -> list[dict]:
    return list(reading.read_pairs(source))


def read_responses(source) -> list[dict]:
    return list(reading.read_responses(source))


def read_instructions(source) -> list[dict]:
    return list(reading.read_instructions(source))


def jsonl(path, rows, newline="\n"):
    path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + newline for r in rows).encode())
    return str(path)


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(params=[jsonl, parquet], ids=["jsonl", "parquet"])
def write(request, tmp_path):
    """Writes rows to a file of either kind."""
    return lambda rows: request.param(tmp_path / f"data.{request.param.__name__}", rows)


def refusal(read, path) -> str:
    with pytest.raises(UserError) as caught:
        read(str(path))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    return line


def texts(rows):
    return [(r.get("instruction"), r.get("input"), r.get("response")) for r in rows]


# ------------------------------------------------------------------------------------------ formats


def test_alpaca(write):
    rows = read_pairs(
        write(
            [
                {"instruction": "add", "input": "1 2", "output": "3"},
                {"instruction": "say", "input": "", "output": "hi"},
                {"instruction": "go", "input": None, "output": "gone"},
            ]
        )
    )
    assert texts(rows) == [("add", "1 2", "3"), ("say", "", "hi"), ("go", None, "gone")]
    assert [pairs.joined_instruction(r) for r in rows] == ["add\n\n1 2", "say", "go"]


@pytest.mark.parametrize(
    "names", [("instruction", "response"), ("prompt", "completion"), ("prompt", "response")]
)
def test_two_columns(names, write):
    rows = [dict(zip(names, (f"q{i}", f"a{i}"), strict=True)) | {"other": i} for i in range(3)]
    read = read_pairs(write(rows))
    assert texts(read) == [(f"q{i}", None, f"a{i}") for i in range(3)]
    assert [r["row_number"] for r in read] == [1, 2, 3]
    assert [r["row_number"] for r in read] == [1, 2, 3]


@pytest.mark.parametrize(
    ("column", "role", "text", "names"),
    [("messages", "role", "content", ("system", "user", "assistant")),
     ("conversations", "from", "value", ("system", "human", "gpt"))],
)  # fmt: skip
def test_conversations(column, role, text, names, write):
    """The last assistant turn is the response, everything before it the instruction."""
    system, user, assistant = names

    def turns(*pairs):
        return [{role: r, text: t} for r, t in pairs]

    rows = [
        {column: turns((user, "q"), (assistant, "a"))},
        {column: turns((system, "s"), (user, "q1"), (assistant, "a1"), (user, "q2"), (assistant, "a2"))},
        {column: turns((user, "q"), (assistant, "a"), (user, "unanswered"))},
    ]  # fmt: skip
    assert texts(read_pairs(write(rows))) == [
        ("q", None, "a"), ("s\n\nq1\n\na1\n\nq2", None, "a2"), ("q", None, "a"),
    ]  # fmt: skip


def test_turns_that_come_as_lists_of_their_parts(write):
    """As a `Sequence` of `datasets` of old, and TFDS, keep them."""
    rows = [
        {"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}},
        {"conversations": {"from": ["human", "gpt", "human", "gpt"], "value": ["q1", "a1", "q2", "a2"]}},
    ]  # fmt: skip
    assert texts(read_pairs(write(rows))) == [("q", None, "a"), ("q1\n\na1\n\nq2", None, "a2")]


@pytest.mark.parametrize("name", ["response", "text", "content", "output", "completion"])
def test_responses_and_prompts(name, write):
    rows = [{name: "one", "url": "u"}, {name: "two", "url": None}]
    assert [r["response"] for r in read_responses(write(rows))] == ["one", "two"]


@pytest.mark.parametrize("name", ["instruction", "prompt"])
def test_instructions(name, write):
    rows = [{name: "one", "input": "x"}, {name: "two", "input": None}]
    assert texts(read_instructions(write(rows))) == [("one", "x", None), ("two", None, None)]


def test_the_clearest_columns_win(tmp_path):
    both = {"instruction": "i", "response": "r", "output": "o", "prompt": "p", "text": "t"}
    assert texts(read_pairs(jsonl(tmp_path / "a.jsonl", [both]))) == [("i", None, "r")]
    assert read_responses(jsonl(tmp_path / "b.jsonl", [both]))[0]["response"] == "r"


def test_weights(write):
    rows = read_pairs(
        write([{"instruction": "q", "response": "a", "weight": w} for w in (2.5, None, 0.0)])
    )
    assert [r["weight"] for r in rows] == [2.5, 1.0, 0.0]


# ------------------------------------------------------------------------------------------ ids


def test_given_ids_stay(write):
    rows = read_pairs(write([{"id": f"n{i}", "instruction": "q", "response": "a"} for i in (3, 1)]))
    assert [r["id"] for r in rows] == ["n3", "n1"]
    rows = read_pairs(write([{"id": i, "instruction": "q", "response": "a"} for i in (7, 8)]))
    assert [r["id"] for r in rows] == ["7", "8"]


def test_other_ids_are_content_hashes_with_an_ordinal_for_repeats(write):
    def row(i, r, x=None):
        return {"instruction": i, "input": x, "response": r}

    rows = [
        row("q", "a"),
        row("q", "b"),
        row("q", "a"),
        row("qa", ""),
        row("q", "a"),
        row("q", "a", "x"),
    ]
    ids = [r["id"] for r in read_pairs(write(rows))]
    first = hashlib.sha256(b"q\0\0a").hexdigest()[:16]
    assert ids[0] == first
    assert ids[2] == f"{first}-1"
    assert ids[4] == f"{first}-2"
    assert len(set(ids)) == 6
    assert all("-" not in i for i in (ids[1], ids[3], ids[5]))
    assert [r["id"] for r in read_pairs(write(rows[1:] + rows[:1]))][-1] == f"{first}-2"


def test_given_and_missing_ids_together(write):
    rows = [{"id": i, "instruction": "q", "response": "a"} for i in (None, "mine", None)]
    ids = [r["id"] for r in read_pairs(write(rows))]
    assert ids[1] == "mine"
    assert ids[2] == f"{ids[0]}-1"


def test_repeated_given_ids_are_refused(write):
    rows = [{"id": i, "instruction": "q", "response": "a"} for i in ("x", "y", "z", "y")]
    path = write(rows)
    assert refusal(read_pairs, path) == f"{path}, row 4, id: 'y' was already given in row 2"
    mixed = jsonl_of_ids(path, [1, "1"])
    assert "row 2, id: '1' was already given in row 1" in refusal(read_pairs, mixed)


def jsonl_of_ids(path, ids):
    lines = [json.dumps({"id": i, "instruction": "q", "response": "a"}) for i in ids]
    path = path.rsplit(".", 1)[0] + "-ids.jsonl"
    with open(path, "w") as file:
        file.write("\n".join(lines))
    return path


@pytest.mark.parametrize("value", [1.5, True, ["a"], {"a": 1}])
def test_ids_of_other_types(value, tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"id": value, "instruction": "q", "response": "a"}])
    assert refusal(read_pairs, path).endswith("row 1, id: expected text or a whole number")


# ------------------------------------------------------------------------------------------ bad files

GOOD = b'{"instruction": "q", "response": "a"}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD + b"\n{oops}\n", ", row 2: not valid JSON"),
        (GOOD + b'\n{"instruction": "q", "resp', ", row 2: not valid JSON"),
        (b"[" * 100_000, ", row 1: not valid JSON"),
        (GOOD + b"\n\n" + b'{"id": ' + b"9" * 5000 + b"}\n", ", row 3: not valid JSON"),
        (GOOD + b"\n[1, 2]\n", ", row 2: expected an object"),
        (b'"text"\n', ", row 1: expected an object"),
        (b"null\n", ", row 1: expected an object"),
        (b"[" + GOOD + b"]\n", ", row 1: expected an object"),
        (b'{"question": "q", "answer": "a"}\n',
         ", row 1: missing column: expected instruction+response or instruction+output or"),
        (b"{}\n", ", row 1: missing column: expected"),
        (GOOD + b'\n{"instruction": "q"}\n', ", row 2: missing column 'response'"),
        (GOOD + b'\n{"instruction": 3, "response": "a"}\n', ", row 2, instruction: expected text, found int"),
        (b'{"instruction": "q", "response": ["a"]}', ", row 1, response: expected text, found list"),
        (b'{"instruction": "q", "response": "a", "input": {}}', ", row 1, input: expected text, found dict"),
        (b'{"instruction": "q", "response": true}', ", row 1, response: expected text, found bool"),
        (b'{"instruction": "q", "response": "a", "weight": "2"}', ", row 1, weight: expected a number"),
        (b'{"instruction": "q", "response": "a", "weight": -1}', ", row 1, weight: expected a number"),
        (b'{"instruction": "q", "response": "a", "weight": NaN}', ", row 1, weight: expected a number"),
        (b'{"instruction": "q", "response": "a", "weight": Infinity}', ", row 1, weight: expected a number"),
        (b'{"instruction": "q", "response": "\\ud83d"}', ", row 1, response: half a surrogate pair"),
        (b'{"id": "\\udc00", "instruction": "q", "response": "a"}', ", row 1, id: half a surrogate pair"),
        (GOOD + b'\n{"instruction": "caf\xe9", "response": "a"}\n', ", row 2: not valid UTF-8"),
        (GOOD.decode().encode("utf-16"), ", row 1: not valid UTF-8"),
        (b"\x00\x01\x02", ", row 1: not valid JSON"),
        (b"PAR1\xff\xfe", ", row 1: not valid UTF-8"),
        (b"", ": no rows in it"),
        (b"\n \n\t\r\n", ": no rows in it"),
        (b"\xef\xbb\xbf", ": no rows in it"),
        (b'{"messages": "hi"}', ", row 1, messages: expected a list of turns"),
        (b'{"messages": null}', ", row 1, messages: expected a list of turns"),
        (b'{"messages": ["hi"]}', ", row 1, messages: expected a list of turns"),
        (b'{"messages": {"role": ["user"], "content": ["q", "a"]}}', ", row 1, messages: expected a list of"),
        (b'{"messages": {"role": [], "content": []}}', ", row 1, messages: no assistant turn"),
        (b'{"messages": []}', ", row 1, messages: no assistant turn"),
        (b'{"messages": [{"role": "user", "content": "q"}]}', ", row 1, messages: no assistant turn"),
        (b'{"messages": [{"role": "assistant"}]}', ", row 1, messages: every turn needs a role and a text"),
        (b'{"messages": [{"role": 1, "content": "a"}]}', ", row 1, messages: every turn needs a role"),
        (b'{"conversations": [{"from": "gpt", "value": null}]}', ", row 1, conversations: every turn needs"),
    ],
)  # fmt: skip
def test_broken_jsonl_is_one_line_with_file_and_row(content, expected, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    line = refusal(read_pairs, path)
    assert line.removeprefix(str(path)).startswith(expected), line
    assert len(line) < 500


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    second = '{"instruction": "Zeile\\r\\nzwei", "response": "a\u2028b\x85c"}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + second)
    rows = read_pairs(str(path))
    assert texts(rows) == [("q", None, "a"), ("Zeile\r\nzwei", None, "a\u2028b\x85c")]
    assert [r["row_number"] for r in rows] == [1, 4]  # as an editor counts


def test_nulls_are_empty_not_wrong(write):
    rows = read_pairs(
        write([{"instruction": None, "response": "a"}, {"instruction": "q", "response": None}])
    )
    assert texts(rows) == [(None, None, "a"), ("q", None, None)]


def test_whole_surrogate_pairs_are_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"instruction": "\\ud83d\\ude42", "response": "\xf0\x9f\x91\x8d"}')
    assert texts(read_pairs(str(path))) == [("🙂", None, "👍")]


def test_broken_parquet(tmp_path):
    good = tmp_path / "good.parquet"
    rows = [{"instruction": f"q{i}", "response": "a" * 200 + str(i)} for i in range(500)]
    parquet(good, rows)
    content = good.read_bytes()
    broken = tmp_path / "broken.parquet"
    middle = len(content) // 2
    for damaged in (
        b"", b"PAR1", b"not parquet at all", content[:middle], content[4:], GOOD,
        content[:-8] + b"\xff\xff\xff\x7fPAR1",
    ):  # fmt: skip
        broken.write_bytes(damaged)
        assert "not a readable Parquet file" in refusal(read_pairs, broken)
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"instruction": pa.array([], pa.string())}), empty)
    assert refusal(read_pairs, empty) == f"{empty}: no rows in it"


def test_parquet_with_bad_text(tmp_path):
    path = tmp_path / "data.parquet"
    bad = pa.array([b"fine", b"caf\xe9"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, bad.buffers())  # no check of the bytes
    pq.write_table(pa.table({"instruction": text, "response": ["a", "b"]}), path)
    assert "not valid UTF-8" in refusal(read_pairs, path)
    pq.write_table(pa.table({"instruction": [b"q"], "response": ["a"]}), path)
    assert refusal(read_pairs, path).endswith("row 1, instruction: expected text, found bytes")


def test_parquet_of_other_text_types(tmp_path):
    """Dictionary and large strings are text as well."""
    path = tmp_path / "data.parquet"
    table = pa.table(
        {
            "instruction": pa.array(["q", "q"]).dictionary_encode(),
            "response": pa.array(["a", "b"], pa.large_string()),
            "id": pa.array([4, 5], pa.uint8()),
        }
    )
    pq.write_table(table, path)
    assert [(r["id"], r["response"]) for r in read_pairs(str(path))] == [("4", "a"), ("5", "b")]


def test_missing_files_and_folders(tmp_path):
    for name in ("none.jsonl", "none.parquet"):
        assert refusal(read_pairs, tmp_path / name).endswith("no such file")
    assert "is a directory" in refusal(read_pairs, tmp_path)


@pytest.mark.parametrize(("read", "wanted"), [
    (read_responses, "response or text or content"), (read_instructions, "instruction or prompt"),
])  # fmt: skip
def test_missing_columns_of_the_other_readers(read, wanted, tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"a": 1, "b": 2}])
    line = refusal(read, path)
    assert f"row 1: missing column: expected {wanted}" in line
    assert line.endswith("found a, b")


# ------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_failing_write_leaves_the_old_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"out{suffix}"
    pairs.write_table(path, pa.table({"a": [1, 2]}))
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="No space"):
        pairs.write_table(path, pa.table({"a": [3]}))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]  # no temporary file is left


def test_a_write_that_stops_half_way_is_never_seen(tmp_path):
    path = tmp_path / "deep" / "out.json"

    def half(temporary):
        temporary.write_text('{"a": ')
        assert not path.exists()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        pairs.write_atomically(path, half)
    assert os.listdir(path.parent) == []
    pairs.write_json(path, {"a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_tables_come_back(suffix, tmp_path):
    rows = [
        {"id": "1", "instruction": "q\n", "response": "🙂\u2028", "weight": 0.5, "mine": [1]},
        {"id": "2", "instruction": None, "keep": False, "drop_reason": "too_long", "mine": None},
    ]
    table = pairs.table_of(rows)
    assert table.column_names == [*COLUMNS, "mine"]
    assert {n: table.schema.field(n).type for n in COLUMNS} == COLUMNS
    path = tmp_path / f"t{suffix}"
    pairs.write_table(path, table)
    read = [row.values for row in open_source(str(path))]
    assert read == table.to_pylist()
    assert len(path.read_bytes().splitlines()) == 2 or suffix == ".parquet"


def test_jsonl_of_values_that_json_lacks(tmp_path):
    """A user's Parquet file may carry dates beside the texts."""
    day = datetime.datetime(2024, 5, 6, 7, 8)
    path = tmp_path / "t.jsonl"
    pairs.write_table(path, pa.table({"when": [day], "x": [1.5]}))
    rows = [(row.number, row.values) for row in open_source(str(path))]
    assert rows == [(1, {"when": "2024-05-06 07:08:00", "x": 1.5})]


def test_half_a_surrogate_pair_in_a_users_own_column_is_kept(tmp_path):
    path = tmp_path / "t.jsonl"
    pairs.write_jsonl(path, [{"note": "\ud83d"}, {"note": "é"}])
    path.read_bytes().decode("utf-8")
    assert [row.values["note"] for row in open_source(str(path))] == ["\ud83d", "é"]


def test_empty_tables_keep_their_columns():
    assert pairs.table_of([]).column_names == list(COLUMNS)


# ------------------------------------------------------------------------------------------ chunks


def test_map_chunks_resumes_and_never_computes_twice(tmp_path):
    rows = [{"id": str(i), "instruction": f"q{i}"} for i in range(10)]
    calls, fail_at = [], 2

    def work(chunk, advance):
        if len(calls) == fail_at:
            raise RuntimeError("stopped")
        calls.append([r["id"] for r in chunk])
        return [r | {"response": r["id"] * 2} for r in chunk]

    with pytest.raises(RuntimeError, match="stopped"):
        parts.map_chunks(rows, tmp_path / "d", 4, work)
    assert calls == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]
    assert sorted(os.listdir(tmp_path / "d")) == ["part-00000.parquet", "part-00001.parquet"]
    fail_at = -1
    done = parts.map_chunks(rows, tmp_path / "d", 4, work)
    assert calls[2:] == [["8", "9"]]
    assert done.column("id") == [str(i) for i in range(10)]
    assert done.column("response") == [str(i) * 2 for i in range(10)]
    again = parts.map_chunks(rows, tmp_path / "d", 4, work)
    assert len(calls) == 3
    assert list(again) == list(done) == parts.read_parts(tmp_path / "d").to_pylist()


def test_chunks_without_rows_or_with_unlike_columns(tmp_path):
    def own(chunk, advance):
        return [chunk[0] | {f"own{chunk[0]['id']}": 1}]

    none = parts.map_chunks([], tmp_path / "none", 4, lambda chunk, advance: list(chunk))
    assert (len(none), list(none)) == (0, [])
    parts.map_chunks([{"id": str(i)} for i in range(3)], tmp_path / "d", 1, own)
    assert parts.read_parts(tmp_path / "d")["own1"].to_pylist() == [None, 1, None]
    assert list(pairs.batched(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(pairs.batched(range(4), 2)) == [[0, 1], [2, 3]]
    assert list(pairs.batched([], 2)) == [[]]


def test_stored_rows_are_read_part_by_part(tmp_path, monkeypatch):
    for part, ids in enumerate(["abc", "d", "", "ef"]):
        rows = pairs.table_of([{"id": i} for i in ids])
        pairs.write_table(tmp_path / f"part-{part:05}.parquet", rows)
    stored, read = parts.Rows(tmp_path), []
    whole = parts._read_part
    monkeypatch.setattr(
        parts, "_read_part", lambda f, c=None: read.append(f.name[-9]) or whole(f, c)
    )
    for start in range(7):
        for stop in range(start, 9):
            assert [row["id"] for row in stored[start:stop]] == list("abcdef"[start:stop])
    read.clear()
    assert [row["id"] for row in stored[1:4]] == list("bcd")
    assert read == ["0", "1"]
    assert [row["id"] for row in stored] == stored.column("id") == list("abcdef")
    assert len(stored) == 6


# ---------------------------------------------------------------------------- several processes


def map_doubled(together, rows, folder, delay=lambda index, ids: 0.0):
    """What map_chunks gives in each process, the ids that each was asked for, how often it asked."""
    calls = [[] for _ in range(together.count)]

    def work(index):
        def double(chunk, advance):
            calls[index].append([row["id"] for row in chunk])
            time.sleep(delay(index, calls[index][-1]))
            return [row | {"response": row["id"] * 2} for row in chunk]

        return list(parts.map_chunks(rows, folder, 4, double))

    found, asked = together.run(work)
    return found, tuple(calls), asked


ROWS = [{"id": chr(ord("a") + i)} for i in range(19)]  # abcd efgh ijkl mnop qrs


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def alone(tmp_path):
    """The parts that one process writes."""
    found = parts.map_chunks(
        ROWS, tmp_path / "alone", 4, lambda c, _: [r | {"response": r["id"] * 2} for r in c]
    )
    return tmp_path / "alone", list(found)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_process_does_its_own_missing_chunks(count, alone, tmp_path, monkeypatch):
    folder, rows = tmp_path / "d", alone[1]
    folder.mkdir()
    (folder / "part-00001.parquet").write_bytes((alone[0] / "part-00001.parquet").read_bytes())
    together = Together(monkeypatch, count)
    # The first process is the slowest: what others have written by then is not taken for done before.
    found, calls, asked = map_doubled(together, ROWS, folder, lambda index, ids: 0.2 * (index == 0))
    assert [["".join(ids) for ids in mine] for mine in calls] == {
        2: [["abcd", "mnop"], ["ijkl", "qrs"]],
        3: [["abcd", "qrs"], ["ijkl"], ["mnop"]],
        7: [["abcd"], ["ijkl"], ["mnop"], ["qrs"], [], [], []],
    }[count]
    assert asked == {2: (1, 1), 3: (1, 1, 1), 7: (0,) * 7}[count]
    assert all(each == rows for each in found)
    assert files(folder) == files(alone[0])
    # Once more: nothing to do, and nobody asks.
    _, calls, asked = map_doubled(together, ROWS, folder)
    assert (calls, asked) == (([],) * count, (0,) * count)


def test_all_processes_stop_after_the_same_round_and_continue(alone, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    found, calls, asked = map_doubled(Together(monkeypatch, 2, stop_at=2), ROWS, folder)
    assert all(isinstance(each, Preempted) for each in found)
    assert [str(each).split(": ")[1] for each in found] == [
        f"stopped after part-{part:05}.parquet" for part in (2, 3)
    ]
    assert asked == (2, 2) and [len(mine) for mine in calls] == [2, 2]
    assert len(files(folder)) == 4
    found, calls, _ = map_doubled(Together(monkeypatch, 3), ROWS, folder)
    assert calls == ([list("qrs")], [], [])
    assert files(folder) == files(alone[0])


def test_the_bar_counts_what_its_process_does(tmp_path, monkeypatch, capsys):
    """And a part that another process should have written but nobody sees is an error."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parts, "barrier", lambda name: None)
    monkeypatch.setattr(parts, "stop_asked", lambda: False)
    monkeypatch.setattr(parts, "VISIBLE_S", 0)
    monkeypatch.setattr(progress, "_process", (0, 2))

    def work(chunk, advance):
        advance(len(chunk))
        return list(chunk)

    with pytest.raises(UserError, match=r"part-00001.parquet: another process .* one folder"):
        parts.map_chunks(ROWS, tmp_path / "d", 4, work, "augment", "pairs")
    assert list(files(tmp_path / "d")) == [f"part-0000{part}.parquet" for part in (0, 2, 4)]
    assert capsys.readouterr().err.startswith("[process 0 of 2] augment: 11/11 pairs, ")
