"""The script that measures a pool, on a small one: every stage killed at work, continued, and equal."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "measure_pool.py"
DATA = ("prepare", "augment", "score", "filter", "export-data")


@pytest.mark.slow
def test_a_small_pool_survives_a_kill_in_every_stage():
    command = [sys.executable, SCRIPT, "--responses", "3000", "--kill"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    equal = re.findall(
        r"^(\S+) +killed after [\d.]+ s: (\d+) files equal$", done.stdout, re.MULTILINE
    )
    assert {stage for stage, _ in equal} == {*DATA, "align"}
    assert all(int(n) > 0 for stage, n in equal if stage in DATA)
    assert re.search(r"^near duplicates +[\d.]+ ", done.stdout, re.MULTILINE)
