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
from pathlib import Path
from typing import Any

from main_jax import launch, processes
from main_jax.command_line import FILE_OPTIONS, STAGES, build_parser
from main_jax.errors import UserError
from main_jax.lm import progress
from main_jax.lm.rendezvous import StartError
from main_jax.lm.runtime import initialize, joined, start_with_huge_pages


def run_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`run`, or one stage of it."""
    from main_jax.config import Config
    from main_jax.strict_yaml import load_config

    config = load_config(Config, arguments.config, overrides)
    from main_jax import evaluate, pipeline

    initialize(config.runtime.compile_cache, **arguments.start)
    from main_jax.lm.multihost import first

    stage = None if arguments.verb == "run" else arguments.verb
    run = pipeline.open_run(config)
    code = _unless_stopped(
        lambda: pipeline.execute(run, stage, arguments.show_example),
        config.runtime.preemption_exit_code,
    )
    if code:
        return code
    if stage in (None, "evaluate") and first():
        print(evaluate.show(evaluate.read_results(run)))
        print(f"\nresults: {run.path / 'results.json'}")
    return 0


def ablate_config(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`ablate`."""
    from main_jax.config import Config
    from main_jax.strict_yaml import load_config

    config = load_config(Config, arguments.config, overrides)
    from main_jax import ablate

    initialize(config.runtime.compile_cache, **arguments.start)
    from main_jax.lm.multihost import first

    def work() -> None:
        results = ablate.ablate(
            config, filters=arguments.filters, rounds=arguments.rounds,
            weightings=arguments.weighting, seeds=arguments.seeds, equal_epochs=arguments.equal_epochs,
        )  # fmt: skip
        if first():
            print(ablate.show(results))
            print(f"\nresults: {config.output_dir}/ablation.json")

    return _unless_stopped(work, config.runtime.preemption_exit_code)


def _unless_stopped(work: Callable[[], None], exit_code: int = 75) -> int:
    """0; or `exit_code` where the program was asked to stop, and what was done is on disk."""
    from main_jax.lm.multihost import Preempted, barrier, watch_sigterm

    watch_sigterm()
    try:
        work()
    except Preempted as error:
        barrier("preempted")  # nobody leaves while another still writes
        progress.say(f"{error}; the same command continues there")
        return exit_code
    return 0


def score_file(arguments: argparse.Namespace) -> int:
    """`score` outside a run."""
    for name in ("forward_model", "data", "output"):
        if not getattr(arguments, name):
            raise UserError(f"score needs CONFIG, or --{name.replace('_', '-')}")
    for name in ("max_length", "tokens_per_batch"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a positive number")
    from main_jax.tools.score import score_file as score

    initialize(**arguments.start)
    return _unless_stopped(lambda: score(
        arguments.forward_model, arguments.reverse_model, arguments.data, arguments.output,
        template=arguments.template or "auto", max_length=arguments.max_length,
        excess_length_strategy=arguments.excess_length_strategy or "drop",
        tokens_per_batch=arguments.tokens_per_batch or 8192,
        show_example=arguments.show_example, columns=arguments.columns,
        self_curation=bool(arguments.self_curation), curation_prompt=arguments.curation_prompt,
    ))  # fmt: skip


def filter_file(arguments: argparse.Namespace) -> int:
    """`filter` of a scored file."""
    if not arguments.by or not arguments.output:
        lacks = "--output" if arguments.by else "--by"
        raise UserError(f"filter: a scored file needs {lacks} (see main-jax filter --help)")
    from main_jax.config import Config
    from main_jax.strict_yaml import from_mapping
    from main_jax.tools.filter import filter_file as keep_rows

    asked = {"by": arguments.by, "select": arguments.select, "keep": arguments.keep}
    asked = {"filter": {k: v for k, v in asked.items() if v is not None}}
    asked["score"] = {"self_curation": True}  # whether there are grades, the file says
    settings = from_mapping(Config, asked, "command line").filter
    keep_rows(
        arguments.config, arguments.output, by=settings.by, select=settings.select,
        keep=settings.keep, every_pair=arguments.every_pair, seed=arguments.random_seed,
    )  # fmt: skip
    return 0


def generate_file(arguments: argparse.Namespace) -> int:
    """`generate`."""
    from main_jax.lm.generate import Sampling
    from main_jax.prompts import Direction
    from main_jax.tools.generate import generate_file as generate

    if arguments.batch_size < 1:
        raise UserError("--batch-size: expected a positive number")
    try:
        sampling = Sampling(
            arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.top_k
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    initialize(**arguments.start)
    return _unless_stopped(lambda: generate(
        arguments.model, arguments.prompts, arguments.output,
        template=arguments.template, direction=Direction(arguments.direction),
        sampling=sampling, seed=arguments.seed, batch_size=arguments.batch_size,
        columns=arguments.columns,
    ))  # fmt: skip


def evaluate_model(arguments: argparse.Namespace) -> int:
    """`evaluate` outside a run."""
    from main_jax.evaluation import options

    if options.by_alpaca_eval(arguments):
        code = _alpaca_eval(options.alpaca_settings(arguments), arguments.start)
    else:
        how = options.settings(arguments)
        from main_jax.evaluation import harness

        initialize(**arguments.start)
        code = _unless_stopped(lambda: harness.evaluate_model(**how))
    if arguments.model and (run := options.run_folder(arguments.model)):
        from main_jax.report.page import refresh_report

        refresh_report(run)  # which shows what lies in RUN/evaluations
    return code


def _alpaca_eval(given: dict[str, Any], start: dict[str, Any]) -> int:
    """AlpacaEval's outputs, and a judge's verdict on them or on outputs that are there."""
    from main_jax.evaluation import alpaca_eval, judge
    from main_jax.lm.generate import Sampling

    try:
        sampling = Sampling(
            given.get("max_new_tokens", 1024), given.get("temperature", 0.0),
            given.get("top_p", 1.0), given.get("top_k", 0),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None
    asked = None
    if "judge_url" in given:
        names = ("key_env", "prompt", "parameters", "concurrency")
        how = {name: given[f"judge_{name}"] for name in names if f"judge_{name}" in given}
        asked = judge.open_judge(given["judge_url"], given["judge_model"], **how)
    seed = given.get("random_seed", 0)
    initialize(**start)

    def work() -> None:
        if "alpaca_eval" in given:
            results = alpaca_eval.alpaca_eval(
                given["model"], given["alpaca_eval"], given["output"], sampling=sampling,
                generator=given.get("generator"), template=given.get("template"),
                arm=given.get("arm"), inference_mesh=given.get("inference_mesh"), seed=seed,
                batch_size=given.get("batch_size", 32),
                judge=asked, reference=given.get("reference"),
            )  # fmt: skip
        else:
            assert asked is not None
            results = judge.judge_outputs(given["output"], given["reference"], asked, seed)
        if results:
            print(judge.show(results))

    return _unless_stopped(work)


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


def export_data_of(arguments: argparse.Namespace) -> int:
    """`export-data`."""
    from main_jax import pipeline
    from main_jax.data.product import export_data

    run = pipeline.existing_run(arguments.run)
    export_data(
        run, arguments.destination,
        every_pair=arguments.every_pair, push_to_hub=arguments.push_to_hub,
    )  # fmt: skip
    return 0


def report_run(arguments: argparse.Namespace) -> int:
    """`report`; touches no device: a run may be at work on them."""
    from main_jax.report.page import write_report

    print(write_report(arguments.run))
    return 0


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


def plan_run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`plan`."""
    from main_jax.lm import topology

    topology.prepare()
    from main_jax import plan
    from main_jax.checks import check_output
    from main_jax.config import Config
    from main_jax.pairs import write_json
    from main_jax.run import versions
    from main_jax.strict_yaml import load_config

    if arguments.slices:
        overrides = [*overrides, "--mesh.slices", str(arguments.slices)]

    def load(more: Sequence[str]) -> Config:
        return load_config(Config, arguments.config, [*overrides, *more])

    config = load(())
    if arguments.output:
        check_output(Path(arguments.output).parent, "--output")
    model = plan.model_of(config)
    initialize(compile_cache=False)
    try:
        machine = topology.open_topology(arguments.topology, config.mesh.slices)
    except topology.TopologyError as error:
        raise UserError(f"--topology {error}") from None
    given = {name: getattr(arguments, name) for name in plan.Work._fields}
    found = plan.make_plan(
        load, model, machine, given, arguments.stages, not arguments.no_suggestion
    )
    print(plan.show(found))
    if arguments.output:
        write_json(
            arguments.output,
            {"versions": versions(), "config": config.as_dict()} | plan.as_dict(found),
        )
    return 0 if found.fits else 1


def launch_processes(arguments: argparse.Namespace) -> int:
    """`launch`."""
    command: list[str] = arguments.command
    verbs = ("run", *STAGES, "generate", "ablate")
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


VERBS = {
    "score": score_file,
    "evaluate": evaluate_model,
    "generate": generate_file,
    "convert": convert_folder,
    "export": export_folder,
    "export-data": export_data_of,
    "report": report_run,
    "verify": verify_folder,
    "launch": launch_processes,
}
"""Those that are no stage of a run; `score` and `evaluate` are both."""


def console() -> int:
    """The console script; returns the exit code."""
    start_with_huge_pages()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """What the words of a command line ask for; returns the exit code."""
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
    if arguments.verb == "plan":
        return plan_run(arguments, rest)
    if arguments.verb == "ablate":
        return ablate_config(arguments, rest)
    if arguments.verb == "filter" and (arguments.by or arguments.output):
        if rest:
            raise UserError(f"unknown argument {rest[0]} (see main-jax filter --help)")
        return filter_file(arguments)
    options = FILE_OPTIONS.get(arguments.verb, ())
    of_a_file = [name for name in options if getattr(arguments, name) is not None]
    if getattr(arguments, "config", None) and not of_a_file:
        return run_config(arguments, rest)
    if rest:
        raise UserError(f"unknown argument {rest[0]} (see main-jax {arguments.verb} --help)")
    if getattr(arguments, "config", None):
        raise UserError(
            f"{arguments.verb} takes CONFIG or {processes.option(of_a_file[0])}, not both "
            f"(see main-jax {arguments.verb} --help)"
        )
    return VERBS[arguments.verb](arguments)


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
    if "main_jax.lm.metrics" in sys.modules:
        from main_jax.lm.metrics import TrainingDiverged

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
    sys.exit(console())
