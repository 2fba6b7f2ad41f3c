"""The verbs. Every heavy import is inside a verb, so that `main-jax --help` answers at once.

Exit codes: 0 done; 1 failed check or run; 2 a user's mistake (one line, no traceback); 75 preempted, to be
continued; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from main_jax import launch, processes
from main_jax.errors import UserError
from main_jax.lm import progress
from main_jax.lm.rendezvous import StartError
from main_jax.lm.runtime import initialize, joined

EXAMPLES = """\
examples:
  main-jax run configs/demo.yaml                        the embedded world, a few minutes on a CPU
  main-jax run configs/own_data.yaml --align.rounds 2   your own checkpoint and files
  main-jax filter runs/own/config.yaml --filter.keep 0.2
  main-jax score --forward-model DIR --data pairs.jsonl --output scored.parquet
  main-jax generate --model DIR --prompts prompts.jsonl --output answers.jsonl
  main-jax verify DIR                                   our logits against transformers' on PyTorch
  main-jax convert DIR NEW                              Hugging Face <-> Orbax
  main-jax export runs/own NEW                          a run's model for everybody else
  main-jax launch --num-processes 2 -- run CONFIG.yaml  several processes on this machine

Wherever a model's DIR is expected, a name on the Hugging Face hub will do: org/name or org/name@revision.
"""

STAGES = {
    "prepare": "read and check the data",
    "align": "train both directions in alternation",
    "augment": "write an instruction for every unlabelled response",
    "score": "score every pair in both directions (in a run, or a file of your own)",
    "filter": "keep the pairs that explain each other",
    "finetune": "train the base model on the kept pairs",
    "evaluate": "measure what it brought",
}


FILE_OPTIONS = (
    "forward_model", "reverse_model", "data", "output", "template", "max_length",
    "excess_length_strategy", "tokens_per_batch",
)  # fmt: skip
"""Of `score`: they belong to a file of one's own; a run has its configuration."""


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
            _add_config(stage)
            processes.add_options(stage)

    score = verb(
        "score",
        f"stage: {STAGES['score']}",
        "examples:\n  main-jax score configs/demo.yaml\n"
        "  main-jax score --forward-model DIR --data pairs.jsonl --output scored.jsonl\n"
        "  main-jax score --forward-model F --reverse-model R --data p.parquet --output s.parquet"
        " --template none",
    )
    _add_config(score, optional=True)
    score.add_argument("--forward-model", metavar="DIR", help="model folder or hub name: p(R|I)")
    score.add_argument(
        "--reverse-model", metavar="DIR", help="of p(I|R); default: the forward model"
    )
    score.add_argument(
        "--data", metavar="FILE", help="JSONL or Parquet with instruction and response"
    )
    score.add_argument(
        "--output", metavar="FILE", help="JSONL or Parquet: the same rows, with scores"
    )
    score.add_argument("--template", help="auto (default), chat, plain, none or a YAML file")
    score.add_argument("--max-length", type=int, metavar="N", help="longest example, in tokens")
    score.add_argument(
        "--excess-length-strategy", choices=("drop", "truncate", "raise"), help="default: drop"
    )
    score.add_argument(
        "--tokens-per-batch", type=int, metavar="N", help="padded tokens at once (8192)"
    )
    processes.add_options(score)
    score.set_defaults(function=score_file)

    generate = verb(
        "generate",
        "write completions for a file of prompts",
        "examples:\n  main-jax generate --model DIR --prompts prompts.jsonl --output answers.jsonl\n"
        "  main-jax generate --model DIR --prompts texts.jsonl --output instructions.jsonl"
        " --direction reverse --temperature 0.7",
    )
    generate.add_argument("--model", required=True, metavar="DIR", help="model folder or hub name")
    generate.add_argument(
        "--prompts", required=True, metavar="FILE",
        help="JSONL or Parquet with instruction (reverse: response)",
    )  # fmt: skip
    generate.add_argument("--output", required=True, metavar="FILE", help="JSONL or Parquet")
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
    generate.set_defaults(function=generate_file)

    convert = verb(
        "convert",
        "a checkpoint from Hugging Face's form to Orbax's, or back (the direction is detected)",
        "examples:\n  main-jax convert meta-llama/Llama-2-7b-hf llama-orbax --dtype bfloat16\n"
        "  main-jax convert llama-orbax llama-hf --max-shard-size 2GB",
    )
    convert.add_argument("source", metavar="SRC", help="model folder in either form, or a hub name")
    convert.add_argument("destination", metavar="DST", help="a new folder")
    convert.set_defaults(function=convert_folder)

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
    export.set_defaults(function=export_folder)
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
    verify.set_defaults(function=verify_folder)

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
    launcher.set_defaults(function=launch_processes)
    return parser


def _add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.usage = f"{parser.prog} CONFIG.yaml [--a.b VALUE ...]"
    if optional:
        parser.usage += f"\n       {parser.prog} --forward-model DIR --data FILE --output FILE"
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?" if optional else None, help="YAML file"
    )
    parser.add_argument(
        "--show-example", action="store_true",
        help="also print the tokens and target mask of the first pair in both directions",
    )  # fmt: skip


def run_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`run`, or one stage of it."""
    from main_jax.config import Config
    from main_jax.strict_yaml import load_config

    config = load_config(Config, arguments.config, overrides)
    from main_jax import evaluate, pipeline

    initialize(config.runtime.compile_cache, **arguments.start)
    from main_jax.lm.multihost import Preempted, barrier, watch_sigterm

    watch_sigterm()
    run = pipeline.open_run(config)
    stage = None if arguments.verb == "run" else arguments.verb
    try:
        pipeline.execute(run, stage, arguments.show_example)
    except Preempted as error:
        barrier("preempted")  # nobody leaves while another still writes
        progress.say(f"{error}; the same command continues there")
        return config.runtime.preemption_exit_code
    if stage in (None, "evaluate") and progress.first():
        print(evaluate.show(evaluate.read_results(run)))
        print(f"\nresults: {run.path / 'results.json'}")
    return 0


def score_file(arguments: argparse.Namespace) -> int:
    """`score` outside a run."""
    for name in ("forward_model", "data", "output"):
        if not getattr(arguments, name):
            raise UserError(f"score needs CONFIG, or --{name.replace('_', '-')}")
    for name in ("max_length", "tokens_per_batch"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number")
    from main_jax import tools

    initialize(**arguments.start)
    tools.score_file(
        arguments.forward_model, arguments.reverse_model, arguments.data, arguments.output,
        template=arguments.template or "auto", max_length=arguments.max_length,
        excess_length_strategy=arguments.excess_length_strategy or "drop",
        tokens_per_batch=arguments.tokens_per_batch or 8192,
        show_example=arguments.show_example,
    )  # fmt: skip
    return 0


def generate_file(arguments: argparse.Namespace) -> int:
    """`generate`."""
    from main_jax import tools
    from main_jax.lm.generate import Sampling
    from main_jax.prompts import Direction

    if arguments.batch_size < 1:
        raise UserError("--batch-size: expected a positive number")
    try:
        sampling = Sampling(
            arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.top_k
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    initialize(**arguments.start)
    tools.generate_file(
        arguments.model, arguments.prompts, arguments.output,
        template=arguments.template, direction=Direction(arguments.direction),
        sampling=sampling, seed=arguments.seed, batch_size=arguments.batch_size,
    )  # fmt: skip
    return 0


def convert_folder(arguments: argparse.Namespace) -> int:
    """`convert`."""
    size = _shard_bytes(arguments)
    from main_jax.convert import convert

    initialize()
    convert(arguments.source, arguments.destination, arguments.dtype, size)
    return 0


def export_folder(arguments: argparse.Namespace) -> int:
    """`export`."""
    size = _shard_bytes(arguments)
    from main_jax import pipeline
    from main_jax.export import export_model

    initialize()
    run = pipeline.existing_run(arguments.run)
    export_model(run, arguments.destination, arguments.model, arguments.dtype or "auto", size)
    return 0


def _shard_bytes(arguments: argparse.Namespace) -> int | None:
    from main_jax.checks import parse_size

    try:
        return parse_size(arguments.max_shard_size) if arguments.max_shard_size else None
    except ValueError as error:
        raise UserError(str(error)) from None


def verify_folder(arguments: argparse.Namespace) -> int:
    """`verify`."""
    from main_jax.verify import verify

    initialize()
    verdict = verify(
        arguments.model, positions=arguments.positions, tolerance=arguments.tolerance,
        seed=arguments.seed,
    )  # fmt: skip
    print(verdict.show())
    return 0 if verdict.ok else 1


def launch_processes(arguments: argparse.Namespace) -> int:
    """`launch`."""
    command: list[str] = arguments.command
    verbs = ("run", *STAGES, "generate")
    if not command or command[0] not in verbs:
        found = f", not {command[0]!r}" if command else ""
        raise UserError(
            f"launch: expected -- and one of {', '.join(verbs)} after the options{found}"
        )
    ours = (*map(processes.option, processes.TOGETHER), "--distributed")
    for name in (word.partition("=")[0] for word in command):
        if name in ours:
            raise UserError(f"{name}: launch says it to every process; leave it out")
    variables = launch.environments(
        arguments.num_processes, arguments.coordinator_port, arguments.cpu_devices,
        arguments.gpus_per_process,
    )  # fmt: skip
    program = [sys.executable, "-P", "-m", "main_jax.cli"]
    return launch.launch([program + command] * len(variables), variables, arguments.grace)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    launch.attach()
    command: list[str] = []
    if argv[:1] == ["launch"] and "--" in argv:
        at = argv.index("--")
        argv, command = argv[:at], argv[at + 1 :]
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.command = command
    if arguments.verb is None:
        parser.print_help()
        return 0
    if hasattr(arguments, "coordinator"):
        arguments.start = processes.start_options(arguments)
        how = arguments.start["distributed"]
        if how is not None and how.coordinator is not None:
            progress.set_process(how.process_id, how.num_processes)
    of_a_file = [name for name in FILE_OPTIONS if getattr(arguments, name, None) is not None]
    if getattr(arguments, "config", None) and not of_a_file:
        return run_config(arguments, rest)
    if rest:
        raise UserError(f"unknown argument {rest[0]} (see main-jax {arguments.verb} --help)")
    if getattr(arguments, "config", None):
        raise UserError(
            f"score takes CONFIG or {processes.option(of_a_file[0])}, not both (see main-jax score --help)"
        )
    return arguments.function(arguments)


def guarded(function: Callable[[], int]) -> int:
    """The exit code of `function`; an error of a known kind becomes one line.

    One of several processes does not return from an error: the interpreter's end would have JAX wait for
    the others, and these may wait for this one.
    """
    try:
        return function()
    except KeyboardInterrupt:
        line = "interrupted; a run continues where it stopped with the same command"
        code = _fail(line, 130)
    except Exception as error:
        known = _exit_code(error)
        if known is None and not joined():
            raise
        if known is None:
            traceback.print_exc()
        name = f"{type(error).__name__}: " if known is None else ""
        code = _fail(name + str(error), known or 1, getattr(error, "stage", None))
    if joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that needs no traceback, or None."""
    if isinstance(error, (UserError, StartError)):
        return 2
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM,
        errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
    ):  # fmt: skip
        return 2
    if "main_jax.lm.hf" in sys.modules:
        from main_jax.lm.hf import CheckpointError

        if isinstance(error, CheckpointError):
            return 2
    if "main_jax.lm.train" in sys.modules:
        from main_jax.lm.train import TrainingDiverged

        if isinstance(error, TrainingDiverged):
            return 1
    return None


def _fail(message: str, code: int, stage: str | None = None) -> int:
    """The line of an error, from every process; where they were launched together it is said once."""
    message = " ".join(message.split())
    if not launch.report(code, progress.mark(stage), message):
        print(f"main-jax: {progress.mark(stage)}{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
