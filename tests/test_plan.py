"""`main-jax plan`: programs of a run traced for machines that are not there, and the arithmetic around."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

from main_jax import plan
from main_jax.config import Config
from main_jax.errors import UserError
from main_jax.lm import plan as engine
from main_jax.lm.arch import PRESETS, PUBLISHED, DecoderConfig
from main_jax.lm.hf import load_config as load_hf_config
from main_jax.lm.model import Decoder
from main_jax.lm.topology import (
    CHIPS,
    GIB,
    Chip,
    Topology,
    TopologyError,
    larger,
    open_topology,
    split,
)
from main_jax.strict_yaml import load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
V5P = CHIPS["v5p"]


def one_device(chip=V5P) -> Topology:
    return Topology("v5e:16x16", chip, jax.devices()[:1], jax.devices()[:1])


# ------------------------------------------------------------------------------------------- configs


@pytest.fixture(scope="module")
def lowered():
    """config file -> [[stage, program, argument bytes, has a kernel]], lowered in a process of its own."""
    worker = Path(__file__).with_name("lower_worker.py")
    out = subprocess.run(
        [sys.executable, worker, *CONFIGS], capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_loaded_and_lowered(path, lowered):
    rows = lowered[path.name]
    assert [(stage, name) for stage, name, *_ in rows] == [
        ("align", "training step"),
        ("align", "prefill"),
        ("align", "decoding"),
        ("augment", "prefill"),
        ("augment", "decoding"),
        ("score", "scorer"),
        ("finetune", "training step"),
    ]
    # For a TPU, attention over packed rows is a Pallas kernel; a step of decoding needs none.
    for _, name, _, kernel in rows:
        assert kernel == ("h100" not in path.name and name != "decoding")


@pytest.mark.parametrize(
    ("name", "devices", "tensor"),
    [("llama-2-7b-v5p", 8, 1), ("llama-2-7b-v5e", 32, 4), ("mistral-7b-8xh100", 8, 1)],
)
def test_arguments_are_twelve_bytes_per_parameter_for_training_and_two_for_inference(
    name, devices, tensor, lowered
):
    model = plan.model_of(load_config(Config, str(ROOT / "configs" / f"{name}.yaml")))
    by_name = {(stage, program): size for stage, program, size, _ in lowered[f"{name}.yaml"]}
    for stage in ("align", "finetune"):  # float32 parameters and two moments, over all devices
        expected = 12 * model.num_params() / devices
        assert by_name[stage, "training step"] == pytest.approx(expected, rel=1e-3)
    half = 2 * model.num_params() / tensor
    assert by_name["score", "scorer"] == pytest.approx(2 * half, rel=2e-3)
    # Both programs of generation hold the cache beside them, and little else.
    config = load_config(Config, str(ROOT / "configs" / f"{name}.yaml"))
    rows, new = config.runtime.generation_batch_size, config.augment.sampling.max_new_tokens
    slots = config.prompt.max_length + new
    at_most = 2 * 2 * rows * slots * model.num_layers * model.num_kv_heads * model.head_dim / tensor
    for program in ("prefill", "decoding"):
        assert half < by_name["augment", program] <= half + 1.1 * at_most


# ------------------------------------------------------------------------------------------- FLOPs


def test_forward_flops_are_those_that_the_compiler_counts():
    # One layer: of a longer stack, which is scanned, the compiler counts the body once.
    config = DecoderConfig(1000, 64, 176, 1, 4, 2, 24)
    decoder = Decoder(config, attention="xla")
    params = decoder.init(jax.random.key(0))
    tokens = jnp.zeros((4, 256), jnp.int32)

    def logits(params, tokens):
        hidden, _ = decoder.apply(params, tokens, tokens, tokens + 1)
        return hidden @ decoder.unembed(params)

    counted = jax.jit(logits).lower(params, tokens).cost_analysis()["flops"]
    expected = engine.forward_flops(config, tokens.size, 256)
    assert expected == pytest.approx(counted, rel=0.05)  # norms, RoPE and softmax are left out
    assert expected < counted


def test_forward_flops_by_hand():
    config = DecoderConfig(10, 4, 6, 2, 2, 1, 2)
    # per layer: q 4·2·2, k and v 2·4·2, o 2·2·4, three of 4·6; head 4·10; attention 4·2·2 per layer and slot
    layers, head, attend = 2 * (16 + 16 + 16 + 72), 40, 2 * 4 * 4
    assert engine.matrix_params(config) == layers + head
    assert engine.forward_flops(config, 3, 5) == 2 * 3 * (layers + head) + 3 * 5 * attend
    assert (
        engine.forward_flops(config, 3, 5, head_tokens=1) == 2 * (3 * layers + head) + 15 * attend
    )


def test_seconds_are_those_of_the_slowest():
    assert engine.seconds(V5P, 8, flops=8 * V5P.flops) == pytest.approx(1 / 0.4)
    assert engine.seconds(V5P, 8, flops=1, read=V5P.bandwidth) == pytest.approx(1 / 0.6)
    assert engine.seconds(V5P, 8, read=1, moved=V5P.link) == pytest.approx(1 / 0.5)


def test_published_models_are_presets():
    assert set(PUBLISHED.values()) == set(PRESETS)


# ------------------------------------------------------------------------------------------- work


def test_work_from_files_options_and_defaults(tmp_path):
    assert plan.work_of(Config(), {}) == plan.Work(3200, 502_000, 50, 375)
    seed, texts = tmp_path / "seed.jsonl", tmp_path / "texts.jsonl"
    rows = [{"instruction": "a" * 40, "response": "b" * 100}] * 3
    seed.write_text("".join(json.dumps(r | {"id": i}) + "\n" for i, r in enumerate(rows)))
    texts.write_text("".join(json.dumps({"text": "c" * n}) + "\n" for n in (100, 300)))
    options = ["--data.seed_path", str(seed), "--data.responses_path", str(texts)]
    config = load_config(Config, None, options)
    assert plan.work_of(config, {}) == plan.Work(3, 2, 10, 50)
    assert plan.work_of(config, {"responses": 7, "seed_pairs": None}) == plan.Work(3, 7, 10, 50)


def test_calls_and_hours_follow_from_the_work():
    options = ["--world.hidden_size", "32", "--prompt.max_length", "64", "--align.max_steps", "7",
               "--align.sampling.max_new_tokens", "16", "--augment.sampling.max_new_tokens", "16",
               "--align.rounds", "2", "--align.round_0.max_steps", "5", "--finetune.max_steps", "11",
               "--finetune.arms", "[random, mutual]", "--runtime.generation_batch_size", "10",
               "--score.tokens_per_batch", "640", "--align.train_batch_size", "8"]  # fmt: skip
    config = load_config(Config, None, options)
    model = plan.model_of(config)
    work = plan.Work(30, 100, 10, 20)
    align, _, ask, prefill, augment, score, finetune = plan.calls(config, model, one_device(), work)
    assert align.calls == 2 * 5 + 2 * 2 * 7  # both directions, in round 0 and in rounds 1 and 2
    assert align.shape == "1 × 16 × 64"  # 8 pairs with their twins
    assert ask.calls == 2 * 2 * 30 / 10 and augment.calls == 100 / 10
    assert prefill.shape == "1 × 64" and prefill.calls == 100
    assert score.shape == "2 × 10 × 64"
    assert score.calls == pytest.approx(100 * 3 * 30 / (0.9 * 2 * 640))
    assert finetune.calls == 2 * 11
    twice = list(plan.calls(config, model, one_device(), work._replace(responses=200)))
    assert twice[4].calls == 2 * augment.calls and twice[4].seconds == augment.seconds
    assert twice[0].calls == align.calls


# ------------------------------------------------------------------------------------------- advice


LOAD_OPTIONS = ["--world.hidden_size", "32", "--prompt.max_length", "64", "--align.rounds", "0",
                "--align.sampling.max_new_tokens", "16", "--augment.sampling.max_new_tokens", "16",
                "--finetune.train_batch_size", "32", "--score.tokens_per_batch", "1024",
                "--runtime.generation_batch_size", "32"]  # fmt: skip


def advised(monkeypatch, memory, **topology) -> plan.Plan:
    """A plan whose compiler is `memory(program)`: bytes."""
    monkeypatch.setattr(
        engine, "compiled_memory",
        lambda program: engine.Memory(program.argument_bytes(), 0, memory(program)),
    )  # fmt: skip

    def load(more):
        return load_config(Config, None, [*LOAD_OPTIONS, *more])

    machine = one_device()._replace(**topology)
    return plan.make_plan(load, plan.model_of(load(())), machine, {}, ("finetune", "score"))


def rows_of(program) -> int:
    batches = program.arguments["batches"]  # the scorer's are a list, one of each direction
    return (batches[0] if isinstance(batches, list) else batches).tokens.shape[-2]


def test_what_fits_needs_no_advice(monkeypatch):
    found = advised(monkeypatch, lambda program: 10)
    assert found.fits and found.advice == [] and len(found.rows) == 2
    assert "TOO MUCH" not in plan.show(found)


def test_the_nearest_setting_that_fits_is_advised(monkeypatch):
    found = advised(monkeypatch, lambda program: rows_of(program) * V5P.memory / 6)
    assert not found.fits
    assert found.advice == [
        "score scorer: --score.tokens_per_batch 256 fits "
        f"({4 / 6 * V5P.memory / GIB:.1f} GiB, 67% of a device's memory)",
        "finetune training step: --finetune.gradient_accumulation_steps 8 fits "
        f"({4 / 6 * V5P.memory / GIB:.1f} GiB, 67% of a device's memory)",
    ]
    shown = plan.show(found)
    assert shown.count("TOO MUCH") == 2 and found.advice[0] in shown
    assert json.loads(json.dumps(plan.as_dict(found)))["fits"] is False


def test_remat_is_advised_where_smaller_batches_do_not_help(monkeypatch):
    def memory(program):
        decoder = program.static.get("decoder")  # of a training; the scorer has two
        return int(V5P.memory * (0.5 if decoder and decoder.remat == "full" else 2))

    advice = advised(monkeypatch, memory).advice
    assert "score scorer: nothing that was tried fits" in advice[0]
    assert "finetune training step: --runtime.remat full fits" in advice[1]


def test_a_larger_machine_is_advised_last(monkeypatch):
    opened = []

    def open_it(name):
        opened.append(name)
        if name == "v5p:2x2x4":
            raise TopologyError("not this one")
        return one_device(CHIPS["v5p"])._replace(name=name)

    monkeypatch.setattr("main_jax.plan.search.open_topology", open_it)
    big = lambda program: int(V5P.memory * (2 if len(opened) < 2 else 0.5))  # noqa: E731
    advice = advised(monkeypatch, big, name="v5p:2x2x2").advice
    assert opened[:2] == ["v5p:2x2x4", "v5p:2x4x4"]
    assert "score scorer: v5p:2x4x4 with --score.tokens_per_batch 64 fits" in advice[0]


def test_arguments_that_are_too_much_are_not_compiled(monkeypatch):
    def compiled(program):
        raise AssertionError("compiled")

    monkeypatch.setattr(engine, "compiled_memory", compiled)
    config = load_config(Config, None, LOAD_OPTIONS)
    tiny = one_device(Chip("tpu", 1000, 1, 1, 1))
    call = next(plan.calls(config, plan.model_of(config), tiny, plan.Work()))
    row = plan.compile_row(call, tiny.chip)
    assert not row.fits and row.memory.peak == call.program.argument_bytes() > 1000


def test_a_refusal_of_the_compiler_is_a_number():
    for text, expected in {
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(18.47G) exceeds available HBM (15.75G).": 18.47 * GIB,
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 29.40G of 15.75G hbm. Exceeded hbm capacity by 13.65G.": 29.4 * GIB,
    }.items():

        class Function:
            @staticmethod
            def trace(text=text):
                raise jax.errors.JaxRuntimeError(text)

        memory = engine.compiled_memory(engine.Program(Function, {}, {}))
        assert memory.temporaries is None and memory.peak == int(expected)


# ------------------------------------------------------------------------------------------- machines


def test_names_of_machines():
    assert split("v5p:2x2x2") == ("v5p", (2, 2, 2)) and split("h100:4x8") == ("h100", (4, 8))
    for bad in ("v5p", "v5p:", "v5p:2x", "v9:2x2", "h100-8", "v5e:2x2\n"):
        with pytest.raises(TopologyError, match="expected a chip and a shape"):
            split(bad)


@pytest.mark.parametrize(
    ("name", "then"),
    [("v5e:2x2", "v5e:2x4"), ("v5e:2x4", "v5e:4x4"), ("v5e:16x16", None), ("v5p:2x2x1", "v5p:2x2x2"),
     ("v5p:2x2x2", "v5p:2x2x4"), ("v5p:2x2x4", "v5p:2x4x4"), ("h100:1", "h100:2"), ("h100:8", "h100:2x8"),
     ("h100:2x8", "h100:4x8")],
)  # fmt: skip
def test_the_next_larger_machine(name, then):
    assert larger(name) == then
    if then:
        assert math.prod(split(then)[1]) == 2 * math.prod(split(name)[1])


def test_mistakes_are_one_line(tmp_path):
    def run(*words):
        out = subprocess.run(
            [sys.executable, "-m", "main_jax.cli", "plan", *words], capture_output=True, text=True,
            check=False, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        )  # fmt: skip
        assert out.returncode == 2, out.stderr
        assert out.stderr.count("\n") == 1, out.stderr
        return out.stderr

    demo = str(ROOT / "configs" / "demo.yaml")
    assert "expected a chip and a shape" in run(demo, "--topology", "v9:2x2")
    assert "unknown key finetun" in run(demo, "--topology", "v5e:2x2", "--finetun.max_steps", "1")
    own = str(ROOT / "configs" / "own_data.yaml")
    said = run(own, "--topology", "v5e:2x2", "--model_name_or_path", "someone/unknown-model")
    assert "model_name_or_path: someone/unknown-model" in said and "config.json" in said


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "gpu")])
def test_a_compiler_that_lacks_is_named(name, extra, monkeypatch):
    monkeypatch.setattr("main_jax.lm.topology.find_spec", lambda module: None)
    with pytest.raises(TopologyError, match=rf"pip install 'main-jax\[{extra}\]'"):
        open_topology(name)


def test_a_mesh_that_does_not_fit_is_named():
    config = load_config(Config, None, [*LOAD_OPTIONS, "--mesh.fsdp", "3"])
    with pytest.raises(UserError, match=r"mesh: .*fsdp 3.* does not fit 1 devices"):
        list(plan.calls(config, plan.model_of(config), one_device(), plan.Work()))


# ------------------------------------------------------------------------------------------- a real compiler


@pytest.mark.slow
def test_a_real_compiler_for_tpus(tmp_path):
    """LLaMA-2-7B's widths with two layers, for v5e:2x2, in an environment of its own with the tpu extra."""
    tool = Path(f"{sys.prefix}-tpu") / "bin" / "main-jax"
    assert tool.exists(), "make test-slow makes this environment"
    model = tmp_path / "model"
    model.mkdir()
    fields = dict(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=2, num_attention_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip
    (model / "config.json").write_text(json.dumps(fields))
    settings = {
        "extends": str(ROOT / "configs" / "own_data.yaml"),
        "model_name_or_path": str(model),
        "prompt": {"max_length": 1024},
    }
    (tmp_path / "two_layers.yaml").write_text(yaml.safe_dump(settings))
    output = tmp_path / "plan.json"

    def run(*words) -> tuple[int, str]:
        out = subprocess.run([tool, "plan", *words], capture_output=True, text=True, check=False)
        return out.returncode, out.stdout + out.stderr

    code, said = run(tmp_path / "two_layers.yaml", "--topology", "v5e:2x2", "--output", output)
    assert code == 0, said
    found = json.loads(output.read_text())
    params = load_hf_config(model).num_params()
    by_name = {(p["stage"], p["program"]): p for p in found["programs"]}
    assert len(by_name) == 7 and found["fits"]
    for program in by_name.values():
        assert 0 < program["arguments"] < program["peak"] < found["bytes_per_device"]
    step = by_name["finetune", "training step"]
    assert step["arguments"] == pytest.approx(12 * params / 4, rel=1e-3)
    # Both directions' models in bfloat16, and their batches.
    assert by_name["score", "scorer"]["arguments"] == pytest.approx(2 * 2 * params / 4, rel=2e-2)
    # The whole model: its state alone is more than four such chips hold.
    seven = ROOT / "configs" / "own_data.yaml"
    code, said = run(seven, "--topology", "v5e:2x2", "--stages", "finetune", "--no-suggestion")
    assert code == 1 and "TOO MUCH" in said
    assert f"{12 * PRESETS['llama-2-7b'].num_params() / 4 / GIB:.1f}" in said
