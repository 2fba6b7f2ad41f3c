"""What IFEval's checkers need, looked at before anything is generated: packages, punkt_tab, the prompts.

The checkers are the harness's (`lm_eval.tasks.ifeval`); they would notice after the work, if at all.
"""

from __future__ import annotations

import io
import json
from importlib import import_module
from pathlib import Path

import yaml

from main_jax.errors import UserError

PACKAGES = ("nltk", "langdetect", "immutabledict")
PUNKT = "tokenizers/punkt_tab"
PUNKT_URL = (
    "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/tokenizers/punkt_tab.zip"
)


def check_checkers() -> None:
    """Makes the checkers ready, and their verdicts on languages always the same. Raises UserError."""
    for package in PACKAGES:
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(f"ifeval: {error}; pip install 'main-jax[eval]'") from None
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # it draws; without a seed verdicts change from run to run
    try:
        _ = nltk.data.find(f"{PUNKT}/english/")
    except LookupError:
        _fetch_punkt()
    try:
        sentences = nltk.tokenize.PunktTokenizer("english").tokenize("One. Two.")
    except Exception as error:  # of whatever is in the folder
        raise UserError(f"ifeval: nltk's punkt_tab cannot be read ({_line(error)})") from None
    if not sentences:
        raise UserError("ifeval: nltk's punkt_tab finds no sentences")


def _fetch_punkt() -> None:
    import nltk
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if HF_HUB_OFFLINE:
            raise ValueError("offline mode is on, HF_HUB_OFFLINE")
        nltk.downloader.Downloader().download(
            "punkt_tab", quiet=True, raise_on_error=True, print_error_to=io.StringIO()
        )
        nltk.data.find(f"{PUNKT}/english/")
    except (ValueError, LookupError, OSError) as error:
        raise UserError(
            f"ifeval: nltk's punkt_tab is not here and cannot be fetched ({_line(error)[:160]}); unpack "
            f"{PUNKT_URL} as DIR/{PUNKT} and set NLTK_DATA=DIR"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------- one's own prompts


def check_prompts(path: str) -> None:
    """Every row has a prompt and instructions that the checkers know, with arguments that they take.

    Rows are Google's: key, prompt, instruction_id_list, kwargs (one for each instruction). Raises
    UserError that names the row.
    """
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ifeval-prompts: {path}: {_line(error)}") from None
    rows = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"--ifeval-prompts: {path}: no prompts")
    for number, line in rows:
        place = f"--ifeval-prompts: {path}, row {number}"
        try:
            row = json.loads(line)
            names, arguments = row["instruction_id_list"], row["kwargs"]
            _ = row["key"] + 0, row["prompt"] + ""
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{place}: expected key, prompt, instruction_id_list and kwargs ({_line(error)})"
            ) from None
        if not names or len(names) != len(arguments):
            raise UserError(f"{place}: expected instructions, and kwargs for each of them")
        for name, given in zip(names, arguments, strict=True):
            if name not in INSTRUCTION_DICT:
                raise UserError(f"{place}: no such instruction: {name}")
            given = {key: value for key, value in given.items() if value}  # as the checkers do
            try:
                INSTRUCTION_DICT[name](name).build_description(**given)
            except (
                Exception
            ) as error:  # TypeError, ValueError: whatever the checker has against them
                raise UserError(f"{place}: kwargs of {name}: {_line(error)}") from None


def task_with(path: str, harness_file: Path, folder: Path) -> str:
    """Writes a task file: the harness's IFEval with the prompts of this file."""
    task = {
        "include": str(harness_file),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(Path(path).expanduser().absolute())}},
    }
    file = folder / "ifeval.yaml"
    file.write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(file)
