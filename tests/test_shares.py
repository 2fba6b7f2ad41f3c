"""What processes do alone: each its own chunks of rows, on its own devices; the tables are one process's.

The processes run in `shares_worker.py`, on the files and the small random LLaMA of `test_own_data.py`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_own_data import call, config_file, own, response_rows, seed_rows, stage_dir  # noqa: F401

from main_jax.launch import free_port

WORKER = Path(__file__).with_name("shares_worker.py")
TOOL = Path(sys.executable).with_name("main-jax")
LIMIT_S = 240


def run(config: Path, folder: Path, stages: str, processes: int) -> list[dict]:
    """What every process did."""
    which = [[]] if processes == 1 else [[i, port] for port in [free_port()] for i in (0, 1)]
    logs = [folder.with_suffix(f".{i}.json") for i in range(processes)]
    words = [[sys.executable, WORKER, config, folder, log, stages] for log in logs]
    started = [
        subprocess.Popen([*map(str, [*w, *o])], stderr=subprocess.PIPE, text=True)
        for w, o in zip(words, which, strict=True)
    ]
    said = [process.communicate(timeout=LIMIT_S)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
    return [json.loads(log.read_text()) for log in logs]


def parts(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("part-*"))}


@pytest.fixture(scope="module")
def both(own, tmp_path_factory):  # noqa: F811
    """(folder of one process's run, folder of two processes', what each of the two did)."""
    values, _ = own
    folder = tmp_path_factory.mktemp("shares")
    changes = {
        "align": {"rounds": 0},
        "runtime": {"chunk_rows": 16},
        "inference_mesh": {"fsdp": 2},  # in parts, as they would not be by default on a CPU
        "data": {"max_drop_share": 0.6},
    }
    config = config_file(folder / "config.yaml", values, **changes)
    one, two = folder / "one", folder / "two"
    run(config, one, "prepare,align,augment,score", 1)
    shutil.copytree(stage_dir(one, "align"), stage_dir(two, "align"))
    # As if augment had been stopped before its last chunk.
    shutil.copytree(stage_dir(one, "augment"), stage_dir(two, "augment"))
    (stage_dir(two, "augment") / "data" / "part-00003.parquet").unlink()
    manifest = stage_dir(two, "augment") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"status": "running"}))
    return one, two, run(config, two, "prepare,augment,score", 2)


def test_two_processes_write_the_tables_of_one(both):
    one, two, _ = both
    for stage in ("prepare", "augment", "score"):
        found, expected = parts(stage_dir(two, stage)), parts(stage_dir(one, stage))
        assert found == expected and len(expected) >= 4
        counts = [json.loads((stage_dir(r, stage) / "manifest.json").read_text())["counts"]
                  for r in (one, two)]  # fmt: skip
        assert counts[0] == counts[1]
        assert not list(stage_dir(two, stage).rglob(".*.tmp"))


def test_each_process_does_its_own_part_alone(both):
    _, _, (first, second) = both

    def written(did, stage):
        return [int(part[-13:-8]) for part in did[stage]["parts"]]

    # score: four parts; augment: the one that was missing.
    assert [written(did, "score") for did in (first, second)] == [[0, 2], [1, 3]]
    assert [written(did, "augment") for did in (first, second)] == [[3], []]

    def prepared(did, folder):
        return [int(p[-13:-8]) for p in did["prepare"]["parts"] if p.startswith(folder)]

    # The sources are read by the first process alone; the rows are then dealt out.
    for folder, whose in {
        "read/responses": ([0, 1, 2, 3], []), "data/responses": ([0, 2], [1, 3]),
        "read/seed": ([0, 1, 2], []), "read/marked": ([0, 2], [1]),
    }.items():  # fmt: skip
        assert (prepared(first, folder), prepared(second, folder)) == whose
    assert first["score"]["models"] == second["score"]["models"] == ["forward", "reverse"]
    assert (first["augment"]["models"], second["augment"]["models"]) == (["reverse"], [])


def test_each_process_reads_its_own_texts(both):
    one, _, did = both
    folder = stage_dir(one, "augment") / "data"
    tables = [pq.read_table(folder / f"part-0000{i}.parquet").to_pylist() for i in range(4)]

    def sums(texts) -> set[str]:
        return {
            text for text in texts if text.startswith("The sum")
        }  # each in one row, of responses

    of_parts = [sums(row["response"] or "" for row in table) for table in tables]
    assert min(map(len, of_parts)) >= 3
    for i in range(2):
        for stage in ("prepare", "score"):
            assert sums(did[i][stage]["texts"]) == of_parts[i] | of_parts[i + 2]
    assert sums(did[0]["augment"]["texts"]) == of_parts[3]
    assert did[1]["augment"]["texts"] == []


def test_a_mistake_in_one_processs_rows_ends_all_with_one_line(own, tmp_path):  # noqa: F811
    """Row 60 of the responses, the only one that is too long, is of the second process's last chunk."""
    values, _ = own
    changes = {"prompt": {"excess_length_strategy": "raise"}, "runtime": {"chunk_rows": 16}}
    # Without the seed's own row that is too long.
    seed = tmp_path / "seed.jsonl"
    seed.write_text("\n".join(json.dumps(row) for row in seed_rows()[:-1]))
    data = {"seed_path": str(seed)}
    config = config_file(tmp_path / "config.yaml", values, data=data, **changes)
    launched = subprocess.run(
        [TOOL, "launch", "--num-processes", "2", "--cpu-devices", "1", "--", "prepare", config,
         "--output_dir", tmp_path / "run"],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert launched.returncode == 2, launched.stderr
    assert len(response_rows()) == 60
    said = [line for line in launched.stderr.splitlines() if "main-jax:" in line]
    assert len(said) == 1, launched.stderr
    assert "[process 1 of 2, prepare] " in said[0] and "responses.parquet, row 60: " in said[0]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--mesh.fsdp=3", "mesh: data 1, fsdp 3, tensor 1 does not fit 1 devices"),
        ("--inference_mesh.tensor=2", "inference_mesh: data 1, fsdp -1, tensor 2 does not fit 1 "),
        ("--inference_mesh.slices=2", "inference_mesh: data 1 must be a multiple of slices 2"),
        ("--inference_mesh.data=-1", "inference_mesh: expected positive numbers of devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(option, said, own, tmp_path, capsys):  # noqa: F811
    config = config_file(tmp_path / "config.yaml", own[0])
    code, out, err = call(capsys, "prepare", config, option, "--output_dir", tmp_path / "run")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()
