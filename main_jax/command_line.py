"""The command line: verbs, options and their help. What the verbs do is in `cli.py`."""

from __future__ import annotations

import argparse

from main_jax import launch, processes
from main_jax.errors import UserError
from main_jax.evaluation import options as evaluation

EXAMPLES = """\
examples:
  main-jax run configs/demo.yaml                        the embedded world, a few minutes on a CPU
  main-jax run configs/own_data.yaml --align.rounds 2   your own checkpoint and files
  main-jax filter runs/own/config.yaml --filter.keep 0.2
  main-jax ablate configs/demo.yaml --seeds 3           what each part of the method brings
  main-jax score --forward-model DIR --data pairs.jsonl --output scored.parquet
  main-jax generate --model DIR --prompts prompts.jsonl --output answers.jsonl
  main-jax evaluate --model DIR --tasks ifeval,openllm --output results.json
  main-jax verify DIR                                   our logits against transformers' on PyTorch
  main-jax convert DIR NEW                              Hugging Face <-> Orbax
  main-jax export runs/own NEW                          a run's model for everybody else
  main-jax export-data runs/own NEW                     the kept pairs as a data set
  main-jax report runs/own                              the run as one page, runs/own/report.html
  main-jax launch --num-processes 2 -- run CONFIG.yaml  several processes on this machine
  main-jax plan CONFIG.yaml --topology v5p:2x2x2        memory and hours, before you rent

Wherever a model's DIR is expected, a name on the Hugging Face hub will do: org/name or org/name@revision.
"""

STAGES = {
    "prepare": "read and check the data",
    "align": "train both directions in alternation",
    "augment": "write an instruction for every unlabelled response",
    "score": "score every pair in both directions (in a run, or a file of your own)",
    "filter": "keep the pairs that explain each other",
    "finetune": "train the base model on the kept pairs",
    "evaluate": "measure what it brought (in a run, or any model by lm-evaluation-harness)",
}


FILE_OPTIONS = {
    "score": (
        "forward_model", "reverse_model", "data", "output", "template", "max_length",
        "excess_length_strategy", "tokens_per_batch", "columns", "self_curation", "curation_prompt",
    ),
    "evaluate": evaluation.NAMES,
}  # fmt: skip
"""They belong to a file or a model of one's own; a run has its configuration."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="main-jax",
        description="Instruction tuning by mutual alignment (MAIN) in JAX.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    def verb(name: str, text: str, epilog: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    run = verb(
        "run",
        "the whole method: all stages in order, each resumable",
        "examples:\n  main-jax run configs/demo.yaml --seed 1 --output_dir runs/world-1\n"
        "  main-jax run configs/own_data.yaml --finetune.learning_rate 2e-5",
    )
    _add_config(run)
    processes.add_options(run)
    for name, text in STAGES.items():
        if name != "score":
            stage = verb(name, f"stage: {text}", f"examples:\n  main-jax {name} configs/demo.yaml")
            _add_config(stage, optional=name == "evaluate")
            if name == "filter":
                _add_filter(stage)
            if name == "evaluate":
                evaluation.add_options(stage)
                evaluation.add_alpaca_options(stage)
            processes.add_options(stage)

    ablation = verb(
        "ablate",
        "filters, weightings and rounds against each other, over seeds",
        "examples:\n  main-jax ablate configs/demo.yaml --output_dir runs/ablation\n"
        "  main-jax ablate configs/own_data.yaml --filters seed_only,none,random,forward_ce,mutual"
        " --rounds 0,1 --seeds 3\n\n"
        "Writes ablation.json, ablation.md and ablation.html; docs/results.md shows one. What is stopped\n"
        "or killed continues with the same command.",
    )
    _add_config(ablation)
    _add_ablation(ablation)
    processes.add_options(ablation)

    score = verb(
        "score",
        f"stage: {STAGES['score']}",
        "examples:\n  main-jax score configs/demo.yaml\n"
        "  main-jax score --forward-model DIR --data pairs.jsonl --output scored.jsonl\n"
        "  main-jax score --forward-model F --reverse-model R --data p.parquet --output s.parquet"
        " --template none",
    )
    _add_config(score, optional=True)
    score.usage = (
        f"{score.usage}\n       {score.prog} --forward-model DIR --data FILE --output FILE"
    )
    score.add_argument("--forward-model", metavar="DIR", help="model folder or hub name: p(R|I)")
    score.add_argument(
        "--reverse-model", metavar="DIR", help="of p(I|R); default: the forward model"
    )
    score.add_argument(
        "--data",
        metavar="SOURCE",
        help="instruction and response: JSONL, Parquet, CSV, hf:NAME, ...",
    )
    score.add_argument(
        "--output",
        metavar="FILE",
        help="JSONL or Parquet: the same rows, with scores; a page beside it",
    )
    _add_columns(score)
    score.add_argument("--template", help="auto (default), chat, plain, none or a YAML file")
    score.add_argument("--max-length", type=int, metavar="N", help="longest example, in tokens")
    score.add_argument(
        "--excess-length-strategy", choices=("drop", "truncate", "raise"), help="default: drop"
    )
    score.add_argument(
        "--tokens-per-batch", type=int, metavar="N", help="padded tokens at once (8192)"
    )
    score.add_argument(
        "--self-curation", action="store_true", default=None,
        help="the forward model also grades every pair from 1 to 5, for filter --by self_curation",
    )  # fmt: skip
    score.add_argument(
        "--curation-prompt", metavar="FILE", help="text in place of ours that asks for it"
    )
    processes.add_options(score)

    generate = verb(
        "generate",
        "write completions for a file of prompts",
        "examples:\n  main-jax generate --model DIR --prompts prompts.jsonl --output answers.jsonl\n"
        "  main-jax generate --model DIR --prompts texts.jsonl --output instructions.jsonl"
        " --direction reverse --temperature 0.7",
    )
    generate.add_argument("--model", required=True, metavar="DIR", help="model folder or hub name")
    generate.add_argument(
        "--prompts", required=True, metavar="SOURCE",
        help="instruction (reverse: response): JSONL, Parquet, CSV, hf:NAME, ...",
    )  # fmt: skip
    generate.add_argument("--output", required=True, metavar="FILE", help="JSONL or Parquet")
    _add_columns(generate)
    generate.add_argument(
        "--template", default="auto", help="auto, chat, plain, none or a YAML file"
    )
    generate.add_argument("--direction", choices=("forward", "reverse"), default="forward")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    generate.add_argument("--seed", type=int, default=0, metavar="S")
    generate.add_argument("--batch-size", type=int, default=32, metavar="B")
    processes.add_options(generate)

    convert = verb(
        "convert",
        "a checkpoint from Hugging Face's form to Orbax's, or back (the direction is detected)",
        "examples:\n  main-jax convert meta-llama/Llama-2-7b-hf llama-orbax --dtype bfloat16\n"
        "  main-jax convert llama-orbax llama-hf --max-shard-size 2GB",
    )
    convert.add_argument("source", metavar="SRC", help="model folder in either form, or a hub name")
    convert.add_argument("destination", metavar="DST", help="a new folder")

    export = verb(
        "export",
        "a model of a run as a Hugging Face folder",
        "examples:\n  main-jax export runs/own my-model --dtype bfloat16\n"
        "  main-jax export runs/own my-labeller --model reverse",
    )
    export.add_argument("run", metavar="RUN", help="a run's directory")
    export.add_argument("destination", metavar="DST", help="a new folder")
    export.add_argument(
        "--model",
        help="an arm, or forward or reverse (aligned); default: the model trained on the kept pairs",
    )
    for parser_ in (convert, export):
        parser_.add_argument(
            "--dtype", choices=("float32", "bfloat16", "float16"),
            help="default: that of the source (export: of the base model)",
        )  # fmt: skip
        parser_.add_argument(
            "--max-shard-size",
            metavar="SIZE",
            help="of a file of weights in Hugging Face form (5GB)",
        )

    product = verb(
        "export-data",
        "the kept pairs as a data set: Parquet, JSONL, every score, provenance, a card",
        "examples:\n  main-jax export-data runs/own my-pairs\n"
        "  main-jax export-data runs/own all-pairs --every-pair\n\n"
        "`datasets.load_dataset(DST)` loads it. The card's licence is what data.seed_license and\n"
        "data.responses_license declare.",
    )
    product.add_argument("run", metavar="RUN", help="a run's directory")
    product.add_argument("destination", metavar="DST", help="a new folder")
    product.add_argument(
        "--every-pair",
        action="store_true",
        help="also those that were cut, with keep and drop_reason",
    )
    product.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="also upload it, as the data set org/name; a new one is public (needs HF_TOKEN)",
    )

    report = verb(
        "report",
        "a run as one page, RUN/report.html (every stage writes it too)",
        "examples:\n  main-jax report runs/demo\n\n"
        "Works on an unfinished run: the page names what is not there yet.",
    )
    report.add_argument("run", metavar="RUN", help="a run's directory")

    verify = verb(
        "verify",
        "compare our logits with those of transformers on PyTorch; exit code 1 where they differ",
        "examples:\n  main-jax verify DIR\n  main-jax verify mistralai/Mistral-7B-v0.1 --positions 5000",
    )
    verify.add_argument("model", metavar="DIR", help="Hugging Face checkpoint, or a hub name")
    verify.add_argument("--positions", type=int, default=512, metavar="N", help="tokens (512)")
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="T",
        help="largest difference of logits (1e-3)",
    )
    verify.add_argument("--seed", type=int, default=0, metavar="S", help="of the random tokens (0)")

    plan = verb(
        "plan",
        "what a run will need on a machine that is not rented yet: memory, FLOPs, hours",
        "examples:\n  main-jax plan configs/llama-2-7b-v5p.yaml --topology v5p:2x2x2\n"
        "  main-jax plan configs/own_data.yaml --topology v5e:4x4 --slices 2 --mesh.data 2\n"
        "  main-jax plan configs/llama-2-7b-8xh100.yaml --topology h100:8 --stages score finetune\n\n"
        "Every program of the run is compiled ahead of time, without the machine: it needs the tpu or the\n"
        "gpu extra, no weights and no data. Exit code 1 where something does not fit; what would is said.",
    )
    plan.usage = f"{plan.prog} CONFIG.yaml --topology NAME [options] [--a.b VALUE ...]"
    plan.add_argument("config", metavar="CONFIG", help="YAML file")
    plan.add_argument(
        "--topology", required=True, metavar="NAME",
        help="a TPU slice (v5p:2x2x2, v5e:4x4) or GPUs (h100:8; h100:4x8: 4 hosts)",
    )  # fmt: skip
    plan.add_argument("--slices", type=processes.positive, metavar="N", help="so many TPU slices")
    plan.add_argument(
        "--stages", nargs="+", choices=("align", "augment", "score", "finetune"), default=(),
        help="only these",
    )  # fmt: skip
    for name, text in {
        "seed-pairs": "how many (3,200)",
        "responses": "how many (502,000)",
        "instruction-tokens": "mean length (50)",
        "response-tokens": "mean length (375)",
    }.items():
        plan.add_argument(
            f"--{name}", type=processes.positive, metavar="N",
            help=f"{text}; default: of the configured file, where it is here",
        )  # fmt: skip
    plan.add_argument("--no-suggestion", action="store_true", help="do not look for what fits")
    plan.add_argument("--output", metavar="FILE", help="also write the numbers as JSON")

    launcher = verb(
        "launch",
        "several processes of another verb, on this machine",
        "examples:\n  main-jax launch --num-processes 2 --cpu-devices 4 -- run configs/demo.yaml\n"
        "  main-jax launch --num-processes 8 --gpus-per-process 1 -- finetune configs/own_data.yaml\n\n"
        "What process 0 writes passes unchanged, lines of the others begin with [1]. When one process\n"
        "fails, the others are stopped. Exit codes: 0 all did well; 2 a mistake; 75 all were preempted,\n"
        "and the same command continues; 1 otherwise.",
    )
    launcher.usage = f"{launcher.prog} --num-processes N [options] -- VERB ..."
    launcher.add_argument("--num-processes", type=processes.positive, required=True, metavar="N")
    launcher.add_argument(
        "--cpu-devices", type=processes.positive, metavar="D", help="CPU devices of each process"
    )
    launcher.add_argument(
        "--gpus-per-process", type=processes.positive, metavar="G",
        help="process 0 takes the first G GPUs, process 1 the next (one process takes all without)",
    )  # fmt: skip
    launcher.add_argument(
        "--coordinator-port", type=processes.positive, metavar="P", help="default: a free one"
    )
    launcher.add_argument(
        "--grace", type=processes.positive, default=int(launch.GRACE_S), metavar="S",
        help=f"seconds from SIGTERM to SIGKILL for the others when one fails ({launch.GRACE_S:g})",
    )  # fmt: skip
    return parser


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--columns", metavar="OURS=THEIRS,...",
        help="where they are not recognised: instruction=question,response=answer",
    )  # fmt: skip


def _add_filter(parser: argparse.ArgumentParser) -> None:
    """The options of a scored file in place of a run."""
    parser.usage = (
        f"{parser.usage}\n       {parser.prog} SCORED --by SCORE [--keep 0.4] --output FILE"
    )
    example = "main-jax filter scored.parquet --by mutual --keep 0.4 --output kept.parquet"
    parser.epilog = f"{parser.epilog}\n  {example}"
    group = parser.add_argument_group(
        "a scored file", "What `main-jax score` wrote; no model is needed."
    )
    group.add_argument("--by", metavar="SCORE", help="mutual, forward_ce, pmi, ifd, ...")
    group.add_argument(
        "--select", help="what --keep means: fraction (default), top_k, quantile or threshold"
    )
    group.add_argument("--keep", type=float, metavar="N", help="default: 0.4")
    group.add_argument("--output", metavar="FILE", help="JSONL or Parquet: the rows that are kept")
    group.add_argument(
        "--every-pair", action="store_true", help="also the others, with keep and drop_reason"
    )
    group.add_argument(
        "--random-seed", type=processes.natural, default=0, metavar="S", help="of `random`"
    )


def _add_ablation(parser: argparse.ArgumentParser) -> None:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def numbers(text: str) -> list[int]:
        return [processes.natural(word) for word in words(text)]

    def add(name: str, default: str, text: str, kind=words) -> None:
        parser.add_argument(
            name, metavar="A,B,...", type=kind, default=kind(default), help=f"{text} ({default})"
        )

    add("--filters", "seed_only,none,random,length,forward_ce,ifd,mutual", "final sets to train on")
    add("--weighting", "constant,pair_ratio", "strategies; they differ from the first round on")
    add("--rounds", "0,1", "values of K", numbers)
    parser.add_argument(
        "--equal-epochs", metavar="A,B,...", type=words,
        help="filters that are also trained for as many epochs as the main one (none, if it is there)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds",
        type=processes.positive,
        default=3,
        metavar="N",
        help="from the configured one on (3)",
    )


def _add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.usage = f"{parser.prog} CONFIG.yaml [--a.b VALUE ...]"
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?" if optional else None, help="YAML file"
    )
    parser.add_argument(
        "--show-example", action="store_true",
        help="also print the tokens and target mask of the first pair in both directions",
    )  # fmt: skip
