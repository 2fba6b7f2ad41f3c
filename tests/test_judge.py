"""The judge against a stub endpoint on this machine: known preferences, refusals, kills, the key."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime
from itertools import count

import numpy as np
import pytest
import scipy.stats
from chat_stub import stub

from main_jax.errors import UserError
from main_jax.evaluation import chat
from main_jax.evaluation.judge import (
    bootstrap_interval,
    judge_outputs,
    open_judge,
    show,
    verdict,
)

KEY = "sk-stub-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(chat, "FIRST_WAIT_S", 0.01)
    for name in ("OPENAI_API_KEY", "STUB_KEY"):
        monkeypatch.delenv(name, raising=False)


def write(path, outputs, generator="g"):
    rows = [
        {"instruction": f"Question {i}?", "output": text, "generator": generator}
        for i, text in enumerate(outputs)
    ]
    path.write_text(json.dumps(rows, indent=2))
    return str(path)


def number(text):
    return int(text.split()[0])


def larger(a, b):
    """Prefers the larger first number; equal ones tie."""
    return "[[C]]" if number(a) == number(b) else "[[A]]" if number(a) > number(b) else "[[B]]"


def test_known_preferences_give_the_win_rate_by_hand(tmp_path):
    mine = ["3 x", "1 x", "2 x", "5 same", "4 x", "7 x", "6 first", "9 half"]
    other = ["1 yy", "3 yy", "2 yy", "5 same", "0 yy", "2 yy", "8 first", "9 HALF"]

    def say(a, b):
        if a.endswith("first"):
            return "The first one.\n\n[[A]]"
        if a.lower().endswith("half"):
            return "[[A]]" if a.endswith("half") else "I waver: [[A]], no, [[C]]"
        return larger(a, b)

    with stub(say) as server:
        # The reference in another order, with one row too many: instructions are what is matched.
        candidate, reference = tmp_path / "mine.json", tmp_path / "other.jsonl"
        write(candidate, mine)
        rows = [{"instruction": f"Question {i}?", "output": text} for i, text in enumerate(other)]
        rows = [{"instruction": "Another?", "output": "1"}, *reversed(rows)]
        reference.write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = judge_outputs(str(candidate), str(reference), open_judge(server.url, "stub"))
        assert sorted(server.asked) == sorted(
            pair for m, o in zip(mine, other, strict=True) if m != o for pair in ((m, o), (o, m))
        )
        path, key, body = server.seen[0]
        assert (path, key) == ("/v1/chat/completions", None)
        assert body["model"] == "stub" and body["temperature"] == 0
        said = [body["messages"][0]["content"] for _, _, body in server.seen]  # in any order
        assert sum("Question 0?" in text for text in said) == 2
    # 1, 0, tie, identical, 1, 1, both times the first, first and then a tie
    by_hand = [1, 0, 0.5, 0.5, 1, 1, 0.5, 0.75]
    saved = json.loads((tmp_path / "mine.judged.json").read_text())
    assert [c["score"] for c in saved["comparisons"]] == by_hand
    assert {k: v for k, v in saved.items() if k != "comparisons"} == results
    assert results["win_rate"] == 5.25 / 8
    assert [results[k] for k in ("wins", "ties", "losses", "identical")] == [4, 3, 1, 1]
    assert results["agreement"] == 5 / 7 and results["unparsable"] == 0
    low, high = results["interval"]
    assert 0.3 < low < 5.25 / 8 < high < 0.95
    mine_mean, other_mean = np.mean([len(t) for t in mine]), np.mean([len(t) for t in other])
    assert results["length_ratio"] == pytest.approx(mine_mean / other_mean)
    table = show(results)
    assert "65.6%" in table and "4, 3, 1" in table and "caution" not in table


def test_a_judge_that_says_first_gives_a_half(tmp_path):
    mine, other = write(tmp_path / "m.json", "abcde"), write(tmp_path / "o.json", "vwxyz")
    with stub(lambda a, b: "A") as server:
        results = judge_outputs(mine, other, open_judge(server.url, "stub"))
    assert results["win_rate"] == 0.5 and results["interval"] == [0.5, 0.5]
    assert results["ties"] == 5 and results["agreement"] == 0


def test_long_outputs_are_warned_of(tmp_path):
    mine = write(tmp_path / "m.json", ["2 " + "long " * 9, "1 " + "long " * 9])
    other = write(tmp_path / "o.json", ["1 short", "2 short"])
    with stub(larger) as server:
        results = judge_outputs(mine, other, open_judge(server.url, "stub"))
    assert results["length_ratio"] == pytest.approx(47 / 7)
    assert "caution: not length-matched" in show(results) and "6.71" in show(results)


def test_unreadable_answers_are_counted_and_their_questions_left_out(tmp_path):
    mine = write(tmp_path / "m.json", ["9 a", "8 a", "0 a", "odd a"])
    other = write(tmp_path / "o.json", ["1 b", "1 b", "1 b", "1 b"])

    def say(a, b):
        if a.startswith("odd"):
            return "I would rather not say."
        return "[[B]]" if b.startswith("odd") else larger(a, b)

    with stub(say) as server:
        results = judge_outputs(mine, other, open_judge(server.url, "stub"))
        assert (results["unparsable"], results["unparsable_share"]) == (1, 1 / 8)
        assert results["win_rate"] == 2 / 3 and (results["questions"], results["counted"]) == (4, 3)
        server.say = lambda a, b: "hm"
        with pytest.raises(UserError, match=r"no question with two readable answers.*'hm'"):
            judge_outputs(mine, other, open_judge(server.url, "another"))
    assert json.loads((tmp_path / "m.judged.json").read_text())["unparsable_share"] == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[[A]]", "A"), ("so [[A]] … but [[B]]", "B"), (" **C**.\n", "C"), ("B", "B"),
        ("Answer A is better", None), ("", None), ("[[D]]", None), ("ab", None),
    ],
)  # fmt: skip
def test_verdict(answer, expected):
    assert verdict(answer) == expected


def test_busy_then_answered(tmp_path, monkeypatch):
    mine, other = write(tmp_path / "m.json", ["2"]), write(tmp_path / "o.json", ["1"])
    waits, tries = [], iter([(429, "slow down", {"Retry-After": "7"}), (503, "{}"), (200, "[[A]]")])
    busy = stub(lambda a, b: next(tries) if number(a) == 2 else "[[B]]")
    with busy as server:
        endpoint = open_judge(server.url, "stub").endpoint
        said = endpoint.ask(
            "<answer_a>\n2\n</answer_a>\n\n<answer_b>\n1\n</answer_b>",
            lambda seconds, reason: waits.append((seconds, reason)),
        )
        assert said == "[[A]]" and len(server.asked) == 3
        (first, why), (second, _) = waits
        assert 7 <= first < 7.1 and why == "HTTP 429 (slow down)"
        assert 0.01 <= second <= 0.02  # doubled, and its jitter
        tries = iter([(500, "oops"), (200, "[[A]]")])
        results = judge_outputs(mine, other, open_judge(server.url, "stub"))
        assert results["win_rate"] == 1 and len(server.asked) == 3 + 3
        monkeypatch.setattr(chat, "ATTEMPTS", 3)
        server.say = lambda a, b: (502, "bad gateway")
        with pytest.raises(UserError, match=r"new at http://.*HTTP 502 .*, 3 times in a row"):
            judge_outputs(mine, other, open_judge(server.url, "new"))
        server.say = lambda a, b: (429, "", {"Retry-After": "86400"})
        with pytest.raises(UserError, match="asks to come back in 86,400 s"):
            judge_outputs(mine, other, open_judge(server.url, "new"))
    with pytest.raises(UserError, match=r"refused, 3 times in a row"):  # nobody is there any more
        judge_outputs(mine, other, open_judge(server.url, "new"))


def test_a_silent_endpoint_is_asked_again():
    calls = []

    def say(a, b):
        calls.append(a)
        time.sleep(1.5 * (len(calls) == 1))
        return "[[B]]"

    with stub(say) as server:
        endpoint = chat.Endpoint(f"{server.url}/chat/completions", "stub", timeout_s=0.5)
        assert endpoint.ask("x") == "[[B]]" and len(calls) == 2


@pytest.mark.parametrize(
    "header", ["9", "Wed, 21 Oct 2099 07:28:00 GMT", "soon", None, "-3", "nan"]
)
def test_retry_after(header, monkeypatch):
    now = datetime(2099, 10, 21, 7, 27, 50, tzinfo=UTC).timestamp()
    monkeypatch.setattr(time, "time", lambda: now)
    expected = {"9": 9, "-3": 0, "Wed, 21 Oct 2099 07:28:00 GMT": 10}.get(header)
    assert chat._retry_after(header) == expected


def test_what_one_message_is_refused_for_does_not_stop_the_others(tmp_path):
    mine = write(tmp_path / "m.json", ["3", "4", "99999 long", "5"])
    other = write(tmp_path / "o.json", ["1", "1", "1", "1"])
    long = (400, json.dumps({"error": {"message": "maximum context length"}}))
    with stub(lambda a, b: long if "long" in a + b else larger(a, b)) as server:
        results = judge_outputs(mine, other, open_judge(server.url, "stub", concurrency=1))
        assert results["win_rate"] == 1 and results["counted"] == 3 and results["unparsable"] == 2
        saved = json.loads((tmp_path / "m.judged.json").read_text())
        assert "maximum context length" in saved["comparisons"][2]["answers"][0]
        assert len(server.asked) == 8
        judge_outputs(mine, other, open_judge(server.url, "stub"))
        assert len(server.asked) == 10  # a refusal is no answer: asked again
        server.say = lambda a, b: (400, "temperature is not supported")
        with pytest.raises(UserError, match=r"HTTP 400 .temperature is not supported"):
            judge_outputs(mine, other, open_judge(server.url, "new", concurrency=2))
        assert len(server.asked) < 10 + 8  # and not all of them


def test_what_is_no_endpoint_is_said_at_once(tmp_path):
    mine, other = write(tmp_path / "m.json", ["2"]), write(tmp_path / "o.json", ["1"])
    for said, line in (
        ((404, "no such model"), "HTTP 404"),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), "HTTP 302"),
        ((200, '{"error": "<html>"}'), "no chat completion but"),
    ):
        with stub(lambda a, b, said=said: said) as server:
            judge = open_judge(server.url, "stub", concurrency=1)
            with pytest.raises(UserError, match=line):
                judge_outputs(mine, other, judge)
            assert len(server.asked) <= 2  # no retries (the second question may have left already)


def test_the_key_stays_in_the_header(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STUB_KEY", f" {KEY}\n")
    mine, other = write(tmp_path / "m.json", ["2"]), write(tmp_path / "o.json", ["1"])
    with stub(larger) as server:
        judge = open_judge(server.url, "stub", key_env="STUB_KEY")
        assert KEY not in repr(judge) + str(judge)
        tries = iter([(429, f"slow down, {KEY}"), (200, "[[A]]")])
        server.say = lambda a, b: next(tries) if number(a) == 2 else "[[B]]"
        judge_outputs(mine, other, judge)
        assert {key for _, key, _ in server.seen} == {f"Bearer {KEY}"}
        server.say = lambda a, b: (401, json.dumps({"error": {"message": f"bad key {KEY}"}}))
        judge = open_judge(server.url, "new", key_env="STUB_KEY")
        with pytest.raises(UserError, match=r"HTTP 401 \(bad key \*\*\*\)") as error:
            judge_outputs(mine, other, judge)
        assert KEY not in str(error.value)
    said = "".join(capfd.readouterr())
    assert "slow down, ***" in said and KEY not in said
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(kept) == 5 and not any(KEY.encode() in file.read_bytes() for file in kept)


def test_killed_it_asks_only_what_was_not_answered(tmp_path):
    """SIGKILL while the endpoint holds some requests; what it had answered is not asked again."""
    mine = write(tmp_path / "m.json", [f"{i} a" for i in range(10)])
    other = write(tmp_path / "o.json", [f"{9 - i} b" for i in range(10)])
    number_of, answered, killed = count(), [], threading.Event()

    def say(a, b):
        if next(number_of) >= 7:
            killed.wait(60)
        else:
            answered.append((a, b))
        return larger(a, b)

    program = textwrap.dedent("""
        import sys
        from main_jax.evaluation.judge import judge_outputs, open_judge
        url, mine, other = sys.argv[1:]
        judge_outputs(mine, other, open_judge(url, "stub", concurrency=3))
    """)
    with stub(say) as server:
        process = subprocess.Popen([sys.executable, "-c", program, server.url, mine, other])
        cache = tmp_path / "m.judged.cache"
        until = time.monotonic() + 60
        while len(list(cache.glob("*.json"))) < 7 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.set()
        assert len(answered) == 7
        assert len(list(cache.glob("*.json"))) == 7 and not (tmp_path / "m.judged.json").exists()
        (cache / "left-by-a-crash.json").write_text("")
        server.asked.clear()
        results = judge_outputs(mine, other, open_judge(server.url, "stub"))
        assert len(server.asked) == 13 and not set(answered) & set(server.asked)
        assert results["win_rate"] == 0.5 and results["agreement"] == 1
        assert judge_outputs(mine, other, open_judge(server.url, "stub")) == results
        assert len(server.asked) == 13
        judge_outputs(mine, other, open_judge(server.url, "other model"))
        assert len(server.asked) == 33


def test_a_stop_is_heeded(tmp_path, monkeypatch):
    from main_jax.lm.multihost import Preempted

    mine = write(tmp_path / "m.json", [f"{i} a" for i in range(30)])
    other = write(tmp_path / "o.json", [f"{i} b" for i in range(30)])
    with stub(larger) as server:
        monkeypatch.setattr(chat, "stop_asked", lambda: len(server.asked) > 5)
        with pytest.raises(Preempted, match=r"stopped after \d+ answers"):
            judge_outputs(mine, other, open_judge(server.url, "stub", concurrency=2))
        assert len(server.asked) < 30


def test_a_reference_that_does_not_match_is_named(tmp_path):
    mine = write(tmp_path / "m.json", ["1", "2", "3"])
    other = write(tmp_path / "o.json", ["1", "2"])
    with stub(larger) as server:
        with pytest.raises(UserError, match=r"o\.json: no output for question 3, 'Question 2\?'"):
            judge_outputs(mine, other, open_judge(server.url, "stub"))
        twice = tmp_path / "twice.json"
        twice.write_text(json.dumps([{"instruction": "Question 0?", "output": "1"}] * 2))
        with pytest.raises(UserError, match="question 2, 'Question 0"):
            judge_outputs(str(twice), other, open_judge(server.url, "stub"))
        assert not server.asked
    for text, line in (("[1]", "row 1: expected an object"), ("[{", "not a valid JSON list")):
        twice.write_text(text)
        with pytest.raises(UserError, match=line):
            judge_outputs(mine, str(twice), open_judge(server.url, "stub"))


def test_a_prompt_of_ones_own(tmp_path):
    mine, other = write(tmp_path / "m.json", ["{output_b} 2"]), write(tmp_path / "o.json", ["1"])
    file = tmp_path / "prompt.txt"
    file.write_text("{output_a} or {output_b}? {instruction} {else}")
    with stub(lambda a, b: "A") as server:
        judge = open_judge(
            server.url, "stub", prompt=str(file), parameters='{"top_p": 1, "temperature": null}'
        )
        judge_outputs(mine, other, judge)
        messages = {body["messages"][0]["content"] for _, _, body in server.seen}
        assert "{output_b} 2 or 1? Question 0? {else}" in messages
        body = server.seen[0][2]
        assert body["top_p"] == 1 and "temperature" not in body
    file.write_text("{output_a} or {output_b}?")
    with pytest.raises(UserError, match=r"prompt\.txt: lacks \{instruction\}"):
        open_judge(server.url, "stub", prompt=str(file))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"url": "localhost:8000/v1"}, "expected an address"),
        ({"url": "file:///etc/hosts"}, "expected an address"),
        ({"url": "http://a:x/v1"}, "expected an address"),
        ({"url": "http://me:secret@host/v1"}, "a password in it"),
        ({"key_env": "STUB_KEY"}, "variable STUB_KEY is not set"),
        ({"parameters": "{"}, "not valid JSON"),
        ({"parameters": "1"}, "expected an object"),
        ({"prompt": "none.txt"}, "none.txt: cannot be read"),
    ],
)
def test_mistakes_are_one_line(given, line):
    with pytest.raises(UserError, match=line) as error:
        open_judge(**{"url": "http://localhost/v1", "model": "stub"} | given)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_no_header_holds(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ä")
    with pytest.raises(UserError, match="OPENAI_API_KEY: holds what cannot") as error:
        open_judge("http://localhost/v1", "stub")
    assert "sk-" not in str(error.value)


def test_the_interval_is_scipys():
    values = np.random.default_rng(3).choice(
        [0, 0.25, 0.5, 0.75, 1], 300, p=[0.3, 0.1, 0.2, 0.1, 0.3]
    )
    low, high = bootstrap_interval(values, seed=1)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    width = high - low
    assert width == pytest.approx(2 * 1.96 * values.std() / 300**0.5, rel=0.05)
    assert low == pytest.approx(theirs.low, abs=width / 30)
    assert high == pytest.approx(theirs.high, abs=width / 30)
    assert bootstrap_interval(values, seed=1) == [low, high] != bootstrap_interval(values, seed=2)
