"""The harness's tasks by name, by group, or from a file; what keeps one from loading, in one line."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from main_jax.errors import UserError
from main_jax.evaluation import ifeval
from main_jax.evaluation.published import OPENLLM

PACKAGES = {
    "math_verify": "lm-eval[math]",
    "antlr4": "lm-eval[math]",
    "pkg_resources": "setuptools<81",
}
"""What parts of the leaderboard import that an installed harness may lack, and where it is."""

OFFLINE = (
    "run it once where there is internet access and copy that HF_HOME here (then HF_HUB_OFFLINE=1 asks "
    "nobody), or give a task file of your own with dataset_path: json"
)


def is_file(name: str) -> bool:
    """Whether a task is named by its file."""
    return name.endswith((".yaml", ".yml"))


def check_names(names: Sequence[str], ifeval_prompts: str | None) -> None:
    """What can be said without the harness. Raises UserError."""
    for name in filter(is_file, names):
        if not Path(name).expanduser().is_file():
            raise UserError(f"--tasks: {name}: no such file")
    if not names or len(set(names)) != len(names):
        raise UserError("--tasks: expected names or .yaml files with commas between, each once")
    if ifeval_prompts is not None and "ifeval" not in names:
        raise UserError("--ifeval-prompts: only for --tasks ifeval")


def load_tasks(
    names: Sequence[str], include_path: str | None = None, ifeval_prompts: str | None = None
) -> dict[str, Any]:
    """The tasks, as `lm_eval.evaluator.evaluate` takes them; their data sets are fetched.

    Raises UserError: no such task, a data set that cannot be had, a package that lacks.
    """
    from lm_eval.tasks import TaskManager

    for name in names:
        _check_packages(name)
    # Neither each attempt to reach the hub nor each default of a task's metrics needs a line.
    for package in ("huggingface_hub", "lm_eval"):
        logging.getLogger(package).setLevel(logging.ERROR)
    if any(_needs_checkers(name) for name in names):
        ifeval.check_checkers()
    # Reading the harness's thousands of task files takes seconds.
    manager = TaskManager(include_path=include_path, include_defaults=not all(map(is_file, names)))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            spec = _spec(name, manager.task_index, ifeval_prompts, Path(folder))
            with _one_line(name):
                found = manager.load([spec])
            if again := found["tasks"].keys() & loaded["tasks"].keys():
                raise UserError(f"--tasks: {name}: {min(again)} is in another of them too")
            for part, items in found.items():
                loaded[part].update(items)
    _check_kinds(loaded["tasks"])
    return loaded


def _needs_checkers(name: str) -> bool:
    """Whether IFEval is (in) a task, before it is loaded: the harness would begin to download."""
    text = Path(name).expanduser().read_text(errors="replace") if is_file(name) else name
    return "ifeval" in text or name in ("leaderboard", "leaderboard_instruction_following")


def _check_packages(name: str) -> None:
    """Before gigabytes are fetched for the other parts. Raises UserError."""
    wanted = set()
    if name == "leaderboard" or name.startswith("leaderboard_math"):
        wanted |= {"math_verify", "antlr4"}
    if name in ("leaderboard", "leaderboard_ifeval", "leaderboard_instruction_following"):
        wanted |= {"pkg_resources"}
    if lacks := sorted(p for p in wanted if importlib.util.find_spec(p) is None):
        install = " ".join(sorted({f"'{PACKAGES[package]}'" for package in lacks}))
        raise UserError(f"--tasks: {name}: needs {', '.join(lacks)}; pip install {install}")


def _spec(name: str, index: Mapping[str, Any], ifeval_prompts: str | None, folder: Path) -> str:
    if is_file(name):
        return str(Path(name).expanduser())
    if name == "openllm":
        return str(OPENLLM)
    if name not in index:
        near = difflib.get_close_matches(name, index, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; a file's name ends in .yaml"
        raise UserError(f"--tasks: the harness has no task {name}{hint}")
    if name == "ifeval" and ifeval_prompts is not None:
        ifeval.check_prompts(ifeval_prompts)
        return ifeval.task_with(ifeval_prompts, index[name].yaml_path, folder)
    return name


@contextmanager
def _one_line(name: str) -> Generator[None]:
    """Of the errors of loading a task."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"--tasks: {name}: a package lacks ({_brief(error)})") from None
    except Exception as error:  # of datasets, of the hub, of a task's own code
        fetching = isinstance(error, (ConnectionError, FileNotFoundError))
        hint = f"; {OFFLINE}" if fetching else ""
        reason = f"{type(error).__name__}: {_brief(error)}"
        raise UserError(f"--tasks: {name}: does not load ({reason}){hint}") from None


def _brief(error: BaseException) -> str:
    """What it says, and what was behind it: `datasets` says only that something failed."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return ": ".join(dict.fromkeys(" ".join(str(e).split())[:300] for e in (error, causes[-1])))


def _check_kinds(tasks: Mapping[str, Any]) -> None:
    """What was loaded can be done here. Raises UserError."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"--tasks: {name}: runs code that the model writes; not supported")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"--tasks: {name}: shows pictures; not supported")
        checker = getattr(task.config, "process_results", None)
        if "ifeval" in (getattr(checker, "__module__", None) or ""):
            ifeval.check_checkers()
