"""What is checked before any work starts: paths, and the room on the disk. One line each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from etils import epath

from main_jax.errors import UserError


def check_directory(path: str, key: str) -> str:
    """The path of a checkpoint directory, or UserError naming the argument `key`."""
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{key}: {path}: no such directory; give a local Hugging Face checkpoint")
    if not found.is_dir():
        raise UserError(f"{key}: {path}: is a file, expected a checkpoint directory")
    return str(found)


def check_file(path: str, key: str) -> None:
    """Raises UserError unless `path` is a file."""
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{key}: {path}: no such file")
    if file.is_dir():
        raise UserError(f"{key}: {path}: is a directory, expected a .jsonl or .parquet file")


def check_output(path: epath.PathLike, key: str) -> None:
    """Raises UserError when `path` cannot become a folder that we write into."""
    if "://" in str(path):
        return
    at = Path(path).absolute()
    while not at.exists():
        at = at.parent
    if not at.is_dir():
        raise UserError(f"{key}: {at} is a file, expected a directory")
    if not os.access(at, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {at}: no permission to write there")


def check_room(path: epath.PathLike, needed: int, what: str) -> None:
    """Raises UserError when the disk of `path` has fewer than `needed` bytes free."""
    if "://" in str(path):
        return  # object stores have no end
    at = Path(path).absolute()
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < needed:
        raise UserError(
            f"{path}: {what} needs about {needed / 1e6:,.0f} MB, only {free / 1e6:,.0f} MB are free "
            "on that disk; free some or choose another place"
        )
