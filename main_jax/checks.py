"""What is checked before any work starts: paths, and the room on the disk. One line each."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from etils import epath

from main_jax.errors import UserError


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


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB`, `2GiB` or `1000`. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?))?B?", str(text), re.IGNORECASE)
    if not match:
        raise ValueError(f"max_shard_size: expected a size such as 5GB or 500MB, found {text!r}")
    number, unit, binary = match.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if not size:
        raise ValueError(f"max_shard_size: expected at least one byte, found {text!r}")
    return size


def check_new(path: str, key: str) -> Path:
    """The absolute path of a folder that is to be made. Raises UserError unless the name is free."""
    if "://" in path:
        raise UserError(f"{key}: {path}: expected a local folder; copy it there afterwards")
    target = Path(path).expanduser().absolute()
    if os.path.lexists(target):
        raise UserError(f"{key}: {path}: is there already; choose a new name")
    check_output(target, key)
    return target.parent.resolve() / target.name


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
