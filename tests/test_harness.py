"""`evaluate --tasks`: the numbers of the harness's own Hugging Face model, resumable, without torch.

The tasks are local files, so that nothing is downloaded.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.instance import Instance
from tiny_llama import FAMILIES, make_tiny_llama
from tiny_run import finish_run, start_run

from main_jax import parts
from main_jax.cli import main
from main_jax.config import Runtime
from main_jax.errors import UserError
from main_jax.evaluation import adapter
from main_jax.evaluation import tasks as task_files
from main_jax.evaluation.harness import evaluate_model
from main_jax.evaluation.published import CHOICES, OPENLLM, above_guessing, published
from main_jax.lm.generate import Sampling, generate
from main_jax.lm.loss import CHUNK_LOGITS
from main_jax.lm.sharding import MeshShape
from main_jax.lm.tokenizer import load_tokenizer
from main_jax.models import open_checkpoint

WORDS = ("sky", "blue", "clear", "day", "number", "add", "answer", "sentence", "task", "short")
TOOL = Path(sys.executable).with_name("main-jax")


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    """The tasks' data sets are not kept; nobody is asked for others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A LLaMA whose tokenizer puts <s> before a text."""
    return str(make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3))


@pytest.fixture(scope="module")
def no_bos(tmp_path_factory):
    """A Qwen: no token before a text, and the end token before one without context."""
    path = make_tiny_llama(tmp_path_factory.mktemp("qwen") / "tiny", seed=4, **FAMILIES["qwen2"])
    change(path / "tokenizer.json", post_processor=None)
    change(path / "tokenizer_config.json", bos_token=None)
    return str(path)


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def texts(seed=0):
    rng = random.Random(seed)
    return lambda n: " ".join(rng.choice(WORDS) for _ in range(n))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[str]:
    """Multiple choice with long and with one-letter choices, whole texts, generation."""
    folder, text, rng = tmp_path_factory.mktemp("tasks"), texts(), random.Random(1)

    def questions(name, n):
        rows = [
            {
                "q": f"{text(rng.randint(2, 9))}?",
                "choices": [text(rng.randint(1, 3)) for _ in range(3)],
                "a": rng.randint(0, 2),
            }
            for _ in range(n)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    files = {"train": questions("train.jsonl", 6), "test": questions("test.jsonl", 9)}
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "training_split": "train",
        "fewshot_split": "train", "test_split": "test", "num_fewshot": 2, "doc_to_target": "a",
        "metadata": {"version": 1},
    }  # fmt: skip
    choice = common | {"output_type": "multiple_choice", "metric_list": metrics("acc", "acc_norm")}
    found = {
        "tiny_choice": choice | {"doc_to_text": "Q: {{q}}\nA:", "doc_to_choice": "choices"},
        "tiny_letters": choice
        | {
            "doc_to_text": "{{q}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C"],
        },
        "tiny_rolling": common
        | {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "num_fewshot": 0,
            "doc_to_target": "{% for i in range(a * 40 + 1) %}{{q}} {% endfor %}",
            "metric_list": metrics("word_perplexity", "bits_per_byte"),
        },
        "tiny_generation": common
        | {
            "output_type": "generate_until", "doc_to_text": "Say {{q}}:",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["a", "</s>"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": metrics("exact_match"),
        },
    }  # fmt: skip
    paths = []
    for name, task in found.items():
        paths.append(str(folder / f"{name}.yaml"))
        Path(paths[-1]).write_text(yaml.safe_dump({"task": name} | task))
    return paths


def metrics(*names) -> list[dict]:
    return [{"metric": name} for name in names]


def ours(path, folder, **how):
    settings = {"max_length": 512, "tokens_per_batch": 1024, "batch_size": 4, "seed": 0}
    settings |= {"mesh": MeshShape()} | how
    return adapter.HarnessModel(
        open_checkpoint(path, Runtime()), load_tokenizer(path), folder, **settings
    )


def theirs(path, **how):
    pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(path, device="cpu", dtype="float32", batch_size=1, **how)


def instances(kind, arguments) -> list[Instance]:
    return [Instance(kind, {}, a, i, (None, i, 1)) for i, a in enumerate(arguments)]


def evaluated(lm, paths, **how) -> dict:
    from lm_eval.evaluator import evaluate

    loaded = task_files.load_tasks(paths)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
    return evaluate(lm, loaded, bootstrap_iters=0, log_samples=True, **how)


def answers(samples) -> list:
    """The model's answers to every document, as numbers, truths and strings."""
    return [
        value
        for sample in sorted(samples, key=lambda s: s["doc_id"])
        for resps in sample["resps"]
        for value in (resps[0] if isinstance(resps[0], (tuple, list)) else [resps[0]])
    ]


def numbers(results) -> dict[str, float]:
    """Of every task and metric."""
    return {
        f"{task} {metric}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-4) if type(b) is float else a == b


# ------------------------------------------------------------------------------ the harness's numbers


def test_tasks_end_with_the_numbers_of_the_harness_own_model(model, tasks, tmp_path):
    output = tmp_path / "results.json"
    words = ["--model", model, "--tasks", ",".join(tasks), "--output", str(output), "--log-samples"]
    assert main(["evaluate", *words, "--tokens-per-batch", "2048", "--batch-size", "16"]) == 0
    lines = output.with_suffix(".samples.jsonl").read_text().splitlines()
    expected = evaluated(theirs(model), tasks)
    found = json.loads(output.read_text())
    kinds = set()
    for name, samples in expected["samples"].items():
        mine = [s for s in map(json.loads, lines) if s["task"] == name]
        assert_same(answers(mine), answers(samples))
        kinds |= {type(a) for a in answers(samples)}
        for metric, value in expected["results"][name].items():
            if metric.endswith(",none") and "stderr" not in metric:
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-5), metric
    assert kinds == {float, bool, str}
    assert found["n-shot"] == {
        "tiny_choice": 2, "tiny_letters": 2, "tiny_rolling": 0, "tiny_generation": 2
    }  # fmt: skip
    assert found["n-samples"]["tiny_choice"] == {"original": 9, "effective": 9}
    assert found["versions"]["tiny_choice"] == 1
    assert found["how"]["seeds"] == {"random": 0, "numpy": 1234, "fewshot": 1234, "sampling": 0}
    assert found["how"]["max_length"] == 512 and "lm_eval" in found["software"]
    assert not Path(f"{output}.partial").exists()


@pytest.mark.parametrize("kind", ["model", "no_bos"])
def test_pairs_are_cut_and_joined_as_there(kind, request, tmp_path, monkeypatch):
    """Spaces between, none before, a BOS that is there already, and more than fits."""
    monkeypatch.setattr(adapter, "REQUESTS_OF_A_CHUNK", 25)
    path, text = request.getfixturevalue(kind), texts(2)
    asked = [
        ("The sky is", " blue"), ("The sky is ", "blue"), ("", "blue day"), ("", "</s> day"),
        ("<s>The sky", " is"), ("", "<s> a"), (text(60), f" {text(3)}"), ("Sum: a b", f" {text(22)}"),
        ("Which?\n\n", "A"), ("Which?\n\n", "B"), ("Which?\n\n", "AB"), (text(40), " a"),
        (text(40), "\n"), ("naïve 🙂", " 中文"), ("a", "a"), *[(f"{text(5)}:", " yes") for _ in range(6)],
    ]  # fmt: skip
    their = theirs(path, max_length=100)
    for context in (texts(n)(3) for n in range(40)):  # and what greedy decoding gives
        ids = their.tok_encode(context)
        logits = their._model_call(their.model.dummy_inputs["input_ids"].new_tensor([ids]))
        best = int(logits[0, -1].argmax())
        word = their.tokenizer.decode([best])
        if their.tok_encode(context + word) == [*ids, best]:
            asked.append((context, word))
    expected = their.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    assert {greedy for _, greedy in expected} == {True, False}
    lm = ours(path, tmp_path, max_length=100)
    found = lm.loglikelihood(instances("loglikelihood", asked))
    assert_same([x for pair in found for x in pair], [x for pair in expected for x in pair])
    rolling = [(text(n),) for n in (1, 200, 20, 80)]
    expected = their.loglikelihood_rolling(instances("", rolling), disable_tqdm=True)
    assert_same(lm.loglikelihood_rolling(instances("", rolling)), expected)


def test_greedy_tokens_are_told(model, tmp_path):
    lm = ours(model, tmp_path)
    context = lm.tok_encode("The sky is")
    prompts = [np.asarray(context, np.int32)]
    (text,) = generate(*lm._model(), prompts, ["a"], Sampling(6), stop_ids=(), seed=0)
    tokens = text.tokens.tolist()
    wrong = [*tokens[:3], tokens[3] + 1, *tokens[4:]]
    asked = [(context, tokens), (context, wrong), (context, tokens[:3]), (context, wrong[:4])]
    found = adapter.likelihoods(lm._model(), asked, 512, 1024)
    assert [answer.is_greedy for answer in found] == [True, False, True, False]


@pytest.mark.parametrize("kind", ["model", "no_bos"])
def test_texts_are_the_same_strings(kind, request, tmp_path):
    path, text = request.getfixturevalue(kind), texts(3)
    kwargs = [
        {"until": [], "max_gen_toks": 14},
        {"until": ["t", "clear", "*"], "max_new_tokens": 14, "do_sample": False},
        {"until": "r t", "max_gen_toks": 14, "temperature": 0.0},
    ]
    asked = [
        (f"{start}{text(n)}", how)
        for how in kwargs
        for start, n in (("", 2), ("Q: ", 4), ("<s>Q ", 2), ("", 70), ("A", 60), ("A ", 3))
    ]
    their = theirs(path, max_length=46)
    expected = their.generate_until(instances("generate_until", asked), disable_tqdm=True)
    lm = ours(path, tmp_path, max_length=46)  # prompts of up to 32: one shape
    found = lm.generate_until(instances("generate_until", asked))
    assert found == expected
    assert len({len(text) for text in found}) > 6  # some end early


def test_a_text_ends_where_theirs_would(model, tmp_path):
    """Also at a string that goes across a special token, which the text itself does not show."""
    torch = pytest.importorskip("torch")
    criteria = pytest.importorskip("lm_eval.models.utils_hf").stop_sequences_criteria
    lm, rng, ends = ours(model, tmp_path), random.Random(5), set()
    special = [1, 2]
    for _ in range(60):
        ids = lm._encode(texts(rng.random())(6), False)
        ids = [i for token in ids for i in ([token, rng.choice(special)][: rng.choice([1, 1, 2])])]
        until = rng.sample(["y<s>", "</s> a", "a", "e s", "k</s>", "day", "ay", "r n"], 3)
        stop = criteria(lm.tokenizer, until, 0, 1)
        steps = (n for n in range(1, len(ids)) if bool(stop(torch.tensor([ids[:n]]), None).any()))
        expected = next(steps, len(ids))
        assert lm._end(ids, until) == expected, (ids, until)
        ends.add(expected == len(ids))
    assert ends == {True, False}
    ids = [*lm._encode("blue day", False), 1, *lm._encode(" sky", False)]
    assert lm._text(ids, ["y<s>"]) == "blue day" and lm._text(ids, ["day"]) == "blue "


def test_chat_prompts_are_the_same(model, tmp_path):
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    refuses = "{{ raise_exception('no system') if messages[0]['role'] == 'system' else '' }}"
    turns = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    end = "{{ '[assistant]' if add_generation_prompt else '' }}"
    change(folder / "tokenizer_config.json", chat_template=f"{refuses}{turns}{end}")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    lm, their = ours(str(folder), tmp_path / "calls"), theirs(str(folder))
    more = [*messages, {"role": "assistant", "content": "Beca"}]
    assert lm.apply_chat_template(messages) == "[user]Why?[assistant]"
    for chat, prompt in ((messages, True), (messages[1:], True), (more, False)):
        assert lm.apply_chat_template(chat, prompt) == their.apply_chat_template(chat, prompt)
    assert lm.chat_template(True) == their.chat_template(True)
    assert lm.tokenizer_name == their.tokenizer_name


# ------------------------------------------------------------------------------ the work is kept


@pytest.fixture
def counted(monkeypatch):
    """How many requests were computed; `fail_at` interrupts before that call."""
    calls, fail_at = [], [None]

    def count(name):
        real = getattr(adapter, name)

        def wrapper(*arguments, **how):
            if len(calls) == fail_at[0]:
                raise KeyboardInterrupt
            calls.append(len(arguments[1] if name == "likelihoods" else arguments[2]))
            return real(*arguments, **how)

        monkeypatch.setattr(adapter, name, wrapper)

    count("likelihoods")
    count("generate")
    return calls, fail_at


def test_what_is_killed_continues_and_ends_equal(
    model, tasks, tmp_path, monkeypatch, counted, capfd
):
    monkeypatch.setattr(adapter, "REQUESTS_OF_A_CHUNK", 20)
    calls, fail_at = counted

    def run(name, *more):
        words = ["--model", model, "--tasks", ",".join([tasks[0], tasks[3]]), "--log-samples"]
        words += ["--batch-size", "4", "--output", str(tmp_path / f"{name}.json"), *more]
        return main(["evaluate", *words])

    assert run("whole") == 0 and calls == [20, 7, 8, 1]  # 9 questions of 3 choices, 9 texts
    for at in (0, 1, 3):
        calls.clear()
        fail_at[0] = at
        assert run(f"again-{at}") == 130 and len(calls) == at
        assert not (tmp_path / f"again-{at}.json").exists()
        fail_at[0] = None
        assert run(f"again-{at}") == 0 and calls == [20, 7, 8, 1]
        assert f"again-{at}.json: continues" in capfd.readouterr().err
        for suffix in (".json", ".samples.jsonl"):
            again, whole = (tmp_path / f"{name}{suffix}" for name in (f"again-{at}", "whole"))
            assert again.read_bytes() == whole.read_bytes()
    # Other settings begin anew.
    fail_at[0] = len(calls) + 3
    assert run("other") == 130
    fail_at[0] = None
    calls.clear()
    assert run("other", "--num-fewshot", "1") == 0 and calls == [20, 7, 8, 1]
    assert json.loads((tmp_path / "other.json").read_text())["n-shot"]["tiny_choice"] == 1


def test_a_stop_is_agreed_and_continues(model, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "REQUESTS_OF_A_CHUNK", 10)
    asked = iter([False, True])
    monkeypatch.setattr("main_jax.parts.stop_asked", lambda: next(asked, False))
    output, run = tmp_path / "o.json", tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    (run / "hf").symlink_to(model)
    words = ["evaluate", "--model", str(run), "--tasks", tasks[0], "--output", str(output)]
    assert main(words) == 75
    assert len(list(tmp_path.glob("o.json.partial/000-*/part-*.parquet"))) == 2
    assert main(words) == 0 and output.exists()


def test_answers_come_in_the_order_of_the_requests(model, tmp_path, monkeypatch):
    """One by one, each with calls of its own, the answers are those of all together."""
    monkeypatch.setattr(adapter, "REQUESTS_OF_A_CHUNK", 3)
    asked = [("colour " * n, f" {word}") for n in (2, 5, 1, 5) for word in ("sky", "A", "B")]
    found = ours(model, tmp_path / "all").loglikelihood(instances("", asked))
    for i, pair in enumerate(asked):
        alone = ours(model, tmp_path / f"one-{i}").loglikelihood(instances("", [pair]))
        assert_same(list(found[i]), list(alone[0]))
    assert len({round(nats, 3) for nats, _ in found}) == 9  # of equal requests equal answers


def test_a_shared_context_is_computed_once(model, tmp_path, monkeypatch):
    packed = []
    real = adapter.likelihoods.__globals__["pack_table"]

    def count(examples, *rest):
        packed.append(len(examples))
        return real(examples, *rest)

    monkeypatch.setitem(adapter.likelihoods.__globals__, "pack_table", count)
    asked = [(f"{q}? Answer:", f" {x}") for q in ("sky", "day", "task") for x in "ABCDE"]
    lm = ours(model, tmp_path)
    together = lm.loglikelihood(instances("", asked))
    assert packed == [3]
    for (context, letter), answer in zip(asked, together, strict=True):
        # With something after it, it is the first of two tokens, and shares nothing.
        pair = lm._encode_pair(context, letter)
        (alone,) = adapter.likelihoods(lm._model(), [pair], 512, 1024)
        assert answer[0] == pytest.approx(alone.log_likelihood, abs=1e-4)
        assert answer[1] == alone.is_greedy


def test_chunks_of_logits_change_nothing(model, tmp_path, monkeypatch):
    lm = ours(model, tmp_path)
    asked = [(lm.tok_encode(f"{text}:"), [7 + i]) for text in WORDS for i in range(3)]
    asked += [(lm.tok_encode("a"), lm.tok_encode(texts(4)(12)))]
    whole = adapter.likelihoods(lm._model(), asked, 512, 600)
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 307 * 36)  # so many tokens
    jax.clear_caches()
    chunked = adapter.likelihoods(lm._model(), asked, 512, 600)
    jax.clear_caches()
    for a, b in zip(whole, chunked, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-6)
        assert a.is_greedy == b.is_greedy


# ------------------------------------------------------------------------------ as published


def test_published_numbers_by_hand():
    bbh = {f"leaderboard_bbh_{part}": 1 / n for part, n in CHOICES["BBH"].items()}  # all guessed,
    bbh |= {"leaderboard_bbh_navigate": 0.75, "leaderboard_bbh_snarks": 0.3}  # but: half way, below
    musr = {"murder_mysteries": 0.75, "object_placements": 0.6, "team_allocation": 0.2}
    results = {name: {"acc_norm,none": score} for name, score in bbh.items()}
    results |= {f"leaderboard_musr_{n}": {"acc_norm,none": score} for n, score in musr.items()}
    results |= {
        "leaderboard_gpqa": {"acc_norm,none": 0.4}, "leaderboard_mmlu_pro": {"acc,none": 0.19},
        "leaderboard_math_hard": {"exact_match,none": 0.07},
        "leaderboard_ifeval": {"inst_level_strict_acc,none": 0.5, "prompt_level_strict_acc,none": 0.3},
        "arc_challenge": {"acc_norm,none": 0.5, "acc,none": 0.9},
        "hellaswag": {"acc_norm,none": 0.6, "acc,none": 0.9}, "truthfulqa_mc2": {"acc,none": 0.4},
        "winogrande": {"acc,none": 0.7},
        "gsm8k": {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.9},
        "mmlu": {"acc,none": 0.99}, "mmlu_a": {"acc,none": 0.2}, "mmlu_b": {"acc,none": 0.4},
        "mmlu_c": {"acc,none": 0.9}, "mmlu_pro": {"acc,none": 0.9},
    }  # fmt: skip
    groups = {"mmlu": ["mmlu_x", "mmlu_c"], "mmlu_x": ["mmlu_a", "mmlu_b"]}
    assert published({"results": results, "group_subtasks": groups}) == {}
    groups |= {"leaderboard": [], "openllm": []}
    found = published({"results": results, "group_subtasks": groups})
    v2 = {"IFEval": 40, "BBH": 50 / 24, "MuSR": 100 / 3, "MATH": 7, "GPQA": 20, "MMLU-Pro": 10}
    v1 = {"ARC": 50, "HellaSwag": 60, "TruthfulQA": 40, "Winogrande": 70, "GSM8K": 10, "MMLU": 50}
    assert found["leaderboard"] == pytest.approx(v2 | {"average": sum(v2.values()) / 6})
    assert found["openllm"] == pytest.approx(v1 | {"average": 280 / 6})
    assert above_guessing(0.6, 4) == pytest.approx(46.67, abs=0.01)  # the leaderboard's own example


def test_what_is_published_is_what_the_harness_has():
    """The tables here agree with the task files of the installed harness."""
    tasks = Path(lm_eval.__file__).parent / "tasks"
    for part, choices in CHOICES["BBH"].items():
        task = yaml.safe_load((tasks / "leaderboard" / "bbh_mc" / f"{part}.yaml").read_text())
        assert task["task"] == f"leaderboard_bbh_{part}"
        assert task["doc_to_choice"] is not None and len(task["doc_to_choice"]) == choices
    assert len(CHOICES["BBH"]) == len(list((tasks / "leaderboard" / "bbh_mc").glob("[a-z]*.yaml")))
    here = yaml.safe_load(OPENLLM.read_text())["task"]
    there = yaml.safe_load((tasks / "benchmarks" / "openllm.yaml").read_text())["task"]
    assert {t["task"] for t in there} - {t["task"] for t in here} == {"truthfulqa"}
    assert [t for t in here if t in there] == [t for t in there if t["task"] != "truthfulqa"]
    assert {"task": "truthfulqa_mc2", "num_fewshot": 0} in here


# ------------------------------------------------------------------------------ what is refused


def test_mistakes_are_one_line(model, tasks, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    good = {"--model": model, "--tasks": tasks[0], "--output": str(tmp_path / "o.json")}
    greedy = yaml.safe_load(Path(tasks[3]).read_text())
    beams = tmp_path / "beams.yaml"
    beams.write_text(yaml.safe_dump(greedy | {"generation_kwargs": {"num_beams": 4}}))
    long = tmp_path / "long.yaml"
    long.write_text(yaml.safe_dump(greedy | {"generation_kwargs": {"max_gen_toks": 600}}))
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    missing = tmp_path / "missing.yaml"
    nowhere = {"dataset_path": "nobody/nothing-of-the-kind", "dataset_kwargs": {}}
    missing.write_text(yaml.safe_dump(greedy | nowhere))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    for changed, said in (
        ({"--tasks": str(beams)}, "num_beams: not supported"),
        ({"--tasks": str(long)}, "600 new tokens"),
        ({"--tasks": str(broken)}, f"{broken}: does not load"),
        ({"--tasks": str(missing)}, "nobody/nothing-of-the-kind"),
        ({"--tasks": str(missing)}, "HF_HUB_OFFLINE"),
        ({"--tasks": str(tmp_path / "no.yaml")}, "no.yaml: no such file"),
        ({"--tasks": f"{tasks[0]},{tasks[0]}"}, "each once"),
        ({"--model": str(run)}, "stage finetune is not done"),
        ({"--arm": "mutual"}, "--arm mutual:"),
        ({"--inference-mesh": "2,1"}, "three numbers like 1,-1,1"),
        ({"--inference-mesh": "1,1,64"}, "tensor 64 does not fit"),
        ({"--output": str(tmp_path / "o.csv")}, "ends in .json"),
        ({"--max-length": "513"}, "max_position_embeddings 512"),
        ({"--apply-chat-template": None}, "no chat template"),
        ({"--ifeval-prompts": "x.jsonl"}, "only for --tasks ifeval"),
        ({"--limit": "1.5"}, "a share below 1"),
    ):
        words = [w for pair in (good | changed).items() for w in pair if w is not None]
        assert main(["evaluate", *words]) == 2, changed
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("main-jax: ")]
        assert len(lines) == 1 and said in lines[0] and "Traceback" not in err, err
    assert main(["evaluate", "--tasks", "ifeval"]) == 2
    assert "needs CONFIG, or --model" in capfd.readouterr().err
    assert main(["evaluate", "config.yaml", "--limit", "3"]) == 2
    assert "evaluate takes CONFIG or --limit, not both" in capfd.readouterr().err


def test_an_old_harness_is_named(monkeypatch):
    monkeypatch.setattr("main_jax.evaluation.harness.OLDEST", (99,))
    with pytest.raises(
        UserError, match=r"found lm_eval .*, need 99; pip install 'main-jax\[eval\]'"
    ):
        evaluate_model("model", ["x.yaml"], "o.json")
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: _raise(PackageNotFoundError(name))
    )
    with pytest.raises(UserError, match="needs lm-evaluation-harness"):
        evaluate_model("model", ["x.yaml"], "o.json")


def _raise(error):
    raise error


def test_an_unknown_name_has_a_near_one(tmp_path):
    with pytest.raises(UserError, match="no task hellaswagg; did you mean hellaswag"):
        task_files._spec("hellaswagg", {"hellaswag": None, "arc_easy": None}, None, tmp_path)


def test_torch_is_not_needed(model, tasks, tmp_path):
    """As where it is not installed. (Where it is, Transformers' tokenizers import it.)"""
    code = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *more):
        return None if name in ("torch", "accelerate") else PathFinder.find_spec(name, *more)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from main_jax.cli import main
words = ["--model", {model!r}, "--tasks", {",".join(tasks[1:])!r}, "--output", {str(tmp_path / "o.json")!r}]
assert main(["evaluate", *words, "--limit", "2", "--log-samples"]) == 0
assert "lm_eval.evaluator" in sys.modules
assert "torch" not in sys.modules and "accelerate" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|tiny_letters" in done.stdout.replace(" ", "")


def test_an_arm_of_a_run_is_measured_as_its_export(model, tasks, tmp_path):
    """With the template that it was trained on, which only an export writes down."""
    folder = tmp_path / "run"
    trained = make_tiny_llama(tmp_path / "trained", seed=9)
    one = {"data": 1, "fsdp": 1, "tensor": 1}
    prompt = {"max_length": 64, "template": "plain"}
    start_run(folder, model, prompt=prompt, inference_mesh=one)
    finish_run(folder, str(trained))
    assert main(["export", str(folder), str(tmp_path / "exported"), "--model", "mutual"]) == 0
    common = ["--tasks", f"{tasks[0]},{tasks[3]}", "--apply-chat-template", "--log-samples"]
    of_run = ["--model", str(folder), "--arm", "mutual"]
    assert main(["evaluate", *common, *of_run]) == 0
    output = tmp_path / "exported.json"
    of_export = ["--model", str(tmp_path / "exported"), "--output", str(output)]
    assert main(["evaluate", *common, *of_export]) == 0
    mine = folder / "evaluations" / "tiny_choice-tiny_generation-mutual.json"
    found, expected = (json.loads(file.read_text()) for file in (mine, output))
    assert found["results"] == expected["results"]
    lines = [file.with_suffix(".samples.jsonl").read_text() for file in (mine, output)]
    assert lines[0] == lines[1] and "### Instruction" in lines[0]
    assert found["how"]["inference_mesh"] == one | {"slices": 1}
    assert expected["how"]["inference_mesh"]["fsdp"] == -1


def test_a_model_cut_up_gives_the_same_numbers(model, tasks, tmp_path):
    """Two devices that share heads, features and vocabulary; in a process that has two."""
    words = ["--model", model, "--tasks", f"{tasks[0]},{tasks[2]},{tasks[3]}", "--log-samples"]
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert main(["evaluate", *words, "--output", str(whole), "--inference-mesh", "1,1,1"]) == 0
    code = f"""
import jax
from main_jax.cli import main
from main_jax.evaluation import adapter
specs = set()
def watched(name):
    real = getattr(adapter, name)
    def call(*args, **how):
        params = args[0].params if name == "likelihoods" else args[1]
        leaves = jax.tree.leaves(params)
        specs.add((name, any("tensor" in str(leaf.sharding.spec) for leaf in leaves)))
        return real(*args, **how)
    setattr(adapter, name, call)
watched("likelihoods"), watched("generate")
words = {[*words, "--output", str(cut), "--cpu-devices", "2", "--inference-mesh", "1,1,2"]!r}
assert main(["evaluate", *words]) == 0
assert specs == {{("likelihoods", True), ("generate", True)}}, specs
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(file.read_text()) for file in (whole, cut))
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-4)
    lines = [file.with_suffix(".samples.jsonl").read_text().splitlines() for file in (whole, cut)]
    samples = [[json.loads(line) for line in of] for of in lines]
    assert_same(answers(samples[1]), answers(samples[0]))
    assert two["how"]["inference_mesh"]["tensor"] == 2


@pytest.mark.slow
def test_two_processes_give_what_one_gives(model, tasks, tmp_path):
    found = []
    for name, before in (
        ("one", ()),
        ("two", ("launch", "--num-processes", "2", "--cpu-devices", "2", "--")),
    ):
        output = tmp_path / f"{name}.json"
        words = ["--model", model, "--tasks", ",".join(tasks), "--output", str(output)]
        words += ["--log-samples", "--batch-size", "2"]
        variables = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [TOOL, *before, "evaluate", *words],
            capture_output=True, text=True, check=False, timeout=300, env=variables,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("tiny_rolling") == 1  # one process prints
        lines = output.with_suffix(".samples.jsonl").read_text().splitlines()
        found.append((json.loads(output.read_text()), [json.loads(line) for line in lines]))
    (one, samples), (two, others) = found
    assert one["results"].keys() == two["results"].keys()
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-5)
    assert_same(answers(others), answers(samples))
    assert not (tmp_path / "two.json.partial").exists()


@pytest.mark.slow
def test_sigkill_between_chunks_leaves_no_trace(model, tasks, tmp_path):
    """A process that is really killed, at its second and at its fourth chunk of texts."""

    def start(name):
        output = tmp_path / f"{name}.json"
        words = ["--model", model, "--tasks", tasks[3], "--output", output, "--batch-size", "1"]
        with (tmp_path / f"{name}.log").open("a") as log:
            return subprocess.Popen(
                [TOOL, "evaluate", *words, "--log-samples"], stdout=log, stderr=log,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip

    assert start("whole").wait(200) == 0, (tmp_path / "whole.log").read_text()
    for part in (1, 3):
        process = start("killed")
        while not list(tmp_path.glob(f"killed.json.partial/000-*/part-{part:05}.parquet")):
            assert process.poll() is None, (tmp_path / "killed.log").read_text()
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed.json").exists()
    assert start("killed").wait(200) == 0, (tmp_path / "killed.log").read_text()
    assert (tmp_path / "killed.log").read_text().count("killed.json: continues") == 2
    for suffix in (".json", ".samples.jsonl"):
        killed, whole = ((tmp_path / f"{name}{suffix}").read_text() for name in ("killed", "whole"))
        assert killed.replace("killed.json", "whole.json") == whole


@pytest.mark.slow
def test_a_mistake_on_process_0_ends_the_others(model, tmp_path):
    file = tmp_path / "missing.yaml"
    task = {
        "task": "x",
        "dataset_path": "nobody/nothing-of-the-kind",
        "output_type": "generate_until",
    }
    file.write_text(yaml.safe_dump(task))
    done = subprocess.run(
        [TOOL, "launch", "--num-processes", "2", "--cpu-devices", "1", "--", "evaluate",
         "--model", model, "--tasks", str(file), "--output", str(tmp_path / "o.json")],
        capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("main-jax:")]
    assert len(lines) == 1 and "nobody/nothing-of-the-kind" in lines[0], done.stderr


def test_calls_are_kept_by_their_requests(tmp_path):
    """Another list of requests has another folder."""
    asked = []

    def answer(chunk, advance):
        asked.extend(row["text"] for row in chunk)
        return [{"text": row["text"].upper()} for row in chunk]

    from main_jax.evaluation.calls import Calls

    def ask(*found):
        calls = Calls(tmp_path, {"shout": (answer, 2)})
        return calls.lead(
            lambda: [row["text"] for row in calls.ask("shout", [{"text": t} for t in found])]
        )

    assert ask("a", "b", "c") == ["A", "B", "C"] and asked == ["a", "b", "c"]
    assert ask("a", "b", "c") == ["A", "B", "C"] and asked == ["a", "b", "c"]
    assert ask("a", "b") == ["A", "B"] and asked == ["a", "b", "c", "a", "b"]
    assert sorted(len(parts.Rows(folder)) for folder in tmp_path.glob("000-*")) == [2, 3]


@pytest.mark.parametrize(
    "text", ["no such task", "e\u0301" * 3000, "🙂\n" * 2000, '\x00"\\' * 2000, "\ud800" * 900]
)
def test_any_error_fits_a_message(text):
    """Other shapes in other processes would end them all with an error of another kind."""
    from main_jax.evaluation.calls import MESSAGE_BYTES, cut, packed

    message = packed({"error": cut(text)})
    assert message.shape == (MESSAGE_BYTES,)
    told = json.loads(message.tobytes())["error"]
    assert told and text.replace("\ud800", "?").startswith(told) and len(told.encode()) <= 600
    assert len(text) > 600 or told == text
    assert packed(None).shape == (MESSAGE_BYTES,)
