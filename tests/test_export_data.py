"""The data product: loaded by `datasets`, read again as a seed, and a card that the hub's parser takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard

from main_jax.cli import main
from main_jax.data import product
from main_jax.data.reading import read_pairs
from main_jax.data.sources import open_source
from main_jax.errors import UserError
from main_jax.filter import with_filter
from main_jax.pairs import table_of, write_table
from main_jax.pipeline import existing_run

CONFIG = {
    "model_name_or_path": "some/model", "seed": 3,
    "data": {"seed_path": "seed.jsonl", "responses_path": "texts.jsonl"},
    "filter": {"by": "mutual", "select": "fraction", "keep": 0.5},
}  # fmt: skip


def pair(i: int, **more) -> dict:
    nll = {"forward_nll_sum": 10.0 + i, "reverse_nll_sum": 5.0 + i, "response_nll_sum": 20.0,
           "instruction_nll_sum": 9.0, "forward_tokens": 10, "reverse_tokens": 5}  # fmt: skip
    row = {"id": f"p{i}", "instruction": f"Wie heißt Nr. {i}?", "input": None,
           "response": f"Nummer {i} — so.",
           "origin": "augmented", "source": "texts.jsonl", "round": 1, "truncated": False, "weight": 1.0,
           "finish_reason": "stop"}  # fmt: skip
    return row | nll | more


def make_run(folder: Path, rows: list[dict], config=CONFIG) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = existing_run(str(folder))
    for stage in ("prepare", "align", "augment", "score", "filter"):
        counts = {"responses_skipped_length": 4} if stage == "prepare" else {}
        run.directory(stage).mkdir(parents=True)
        manifest = {"status": "done", "fingerprint": run.fingerprint(stage), "counts": counts}
        (run.directory(stage) / "manifest.json").write_text(json.dumps(manifest))
    read = run.directory("prepare") / "data" / "responses"
    for data in (read, run.directory("augment") / "data", run.directory("score") / "data"):
        write_table(data / "part-00000.parquet", table_of(rows))
    table = with_filter(table_of(rows), "mutual", "fraction", 0.5, seed=3)
    for part, start in enumerate(range(0, len(rows), 4)):
        write_table(
            run.directory("filter") / "data" / f"part-{part:05}.parquet", table.slice(start, 4)
        )
    return folder


ROWS = [
    pair(i, input="Zusatz" if i == 1 else None, weight=2.5 if i == 3 else 1.0) for i in range(9)
] + [pair(9, response="", drop_reason="empty_response", forward_nll_sum=None)]
KEPT = ["p0", "p1", "p2", "p3", "p4"]  # 9 in the pool; 4.5 is rounded up


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", ROWS)


def test_it_is_loaded_by_datasets_with_every_score(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert main(["export-data", str(run), str(tmp_path / "out")]) == 0
    code = (
        "import datasets, json, sys; d = datasets.load_dataset(sys.argv[1], split='train');"
        "print(json.dumps([dict(r) for r in d]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr[-2000:]
    rows = json.loads(out.stdout.splitlines()[-1])
    assert [row["id"] for row in rows] == KEPT
    second = rows[1]
    assert second["instruction"] == "Wie heißt Nr. 1?" and second["input"] == "Zusatz"
    assert second["output"] == "Nummer 1 — so."
    assert second["messages"] == [
        {"role": "user", "content": "Wie heißt Nr. 1?\n\nZusatz"},
        {"role": "assistant", "content": "Nummer 1 — so."},
    ]
    assert second["forward_nll_sum"] == 11.0 and second["forward_tokens"] == 10
    assert second["pmi"] == pytest.approx((20 - 11) / 10)
    assert (
        second["round"] == 1
        and second["origin"] == "augmented"
        and second["generator"] == "some/model"
    )
    assert "keep" not in second
    lines = (
        (tmp_path / "out" / "jsonl" / "train-00000.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert [json.loads(line) for line in lines] == rows


def test_read_again_as_a_seed_it_gives_equal_pairs(run, tmp_path):
    product.export_data(existing_run(str(run)), str(tmp_path / "out"))
    kept = [row for row in ROWS if row["id"] in KEPT]
    for path in ("data/train-*.parquet", "jsonl/train-*.jsonl"):
        again = read_pairs(open_source(str(tmp_path / "out" / path)))
        for a, b in zip(again, kept, strict=True):
            for name in ("id", "instruction", "response", "weight"):
                assert a[name] == b[name]
            assert (a["input"] or None) == b["input"]


def test_the_card_says_how_it_was_made(run, tmp_path, capfd):
    assert main(["export-data", str(run), str(tmp_path / "out")]) == 0
    err = capfd.readouterr().err
    assert re.search(r"5 pairs, other licence, [\d,]{3,} MB of host memory at most\n", err)
    assert "data.seed_license and data.responses_license not set" in err
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other"
    assert card.data.configs == [{"config_name": "default", "data_files": "data/train-*.parquet"}]
    assert card.data.size_categories == "n<1K"
    funnel = card.text.partition("|---|---:|---|\n")[2].partition("\n\n")[0].splitlines()
    assert funnel == [  # each drop in the stage where it happened, and there alone
        "| read | 14 | |",
        "| rules of the source | 10 | length 4 |",
        "| prepare | 9 | empty_response 1 |",
        "| augment | 9 | – |",
        "| score | 9 | – |",
        "| filter | 5 | filter_mutual 4 |",
    ]
    # mutual is the worse rank: the fifth of nine pairs is the last that is kept
    assert f"`mutual`, fraction 0.5: at most {5 / 9:.6g}" in card.text
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["seed"] == 3 and facts["rows"] == 5 and facts["config"]["filter"]["by"] == "mutual"
    assert facts["config_hash"] in card.text


@pytest.mark.parametrize(
    ("seed", "responses", "licence"),
    [
        ("apache-2.0", "apache-2.0", "apache-2.0"),
        ("apache-2.0", "odc-by", "other"),
        (None, "mit", "other"),
    ],
)
def test_the_licence_is_the_one_that_all_declare(seed, responses, licence, tmp_path):
    data = CONFIG["data"] | {"seed_license": seed, "responses_license": responses}
    run = make_run(tmp_path / "run", ROWS, CONFIG | {"data": data})
    product.export_data(existing_run(str(run)), str(tmp_path / "out"))
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == licence
    assert f"`data.seed_license`: {seed or 'not declared'}" in card.text


def test_every_pair_comes_with_its_reason(run, tmp_path):
    assert main(["export-data", str(run), str(tmp_path / "out"), "--every-pair"]) == 0
    table = pq.read_table(tmp_path / "out" / "data" / "train-00000.parquet")
    assert table["keep"].to_pylist() == [True] * 5 + [False] * 5
    assert table["drop_reason"].to_pylist() == [None] * 5 + ["filter_mutual"] * 4 + [
        "empty_response"
    ]


def test_files_hold_so_many_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(product, "FILE_ROWS", 2)
    product.export_data(existing_run(str(run)), str(tmp_path / "out"))
    files = sorted((tmp_path / "out" / "data").iterdir())
    assert [pq.read_table(f).num_rows for f in files] == [2, 2, 1]
    assert len({pq.read_schema(f) for f in files}) == 1


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the hub, in order; `refusal` is raised where it is to refuse."""

    class Hub(list):
        refusal = None

        def create_repo(self, repo_id, **how):
            if self.refusal:
                raise self.refusal
            self.append(("create", repo_id, how))

        def upload_folder(self, *, folder_path, **how):
            files = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*.*")}
            self.append(("upload", files, how))

    found = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: found)
    return found


def test_it_is_pushed_to_the_hub(run, tmp_path, hub, capfd):
    words = ["export-data", str(run), str(tmp_path / "out"), "--push-to-hub", "me/pairs"]
    assert main(words) == 0
    files = {"README.md", "provenance.json", "data/train-00000.parquet", "jsonl/train-00000.jsonl"}
    assert hub == [
        ("create", "me/pairs", {"repo_type": "dataset", "exist_ok": True}),
        ("upload", files, {"repo_type": "dataset", "repo_id": "me/pairs"}),
    ]
    assert "me/pairs: on the hub" in capfd.readouterr().err


def test_what_the_hub_refuses_is_on_the_disk(run, tmp_path, hub, capfd):
    hub.refusal = RuntimeError("401\nwho are you?")
    words = ["export-data", str(run), str(tmp_path / "out"), "--push-to-hub", "me/pairs"]
    assert main(words) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("main-jax: --push-to-hub me/pairs: 401 who are you?; the folder")
    assert "hf upload me/pairs" in line and (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("name", ["datasets/me/pairs", "me/pa irs", "me--you", ""])
def test_a_name_that_the_hub_cannot_take_is_refused_before_the_work(
    name, run, tmp_path, hub, capfd
):
    assert main(["export-data", str(run), str(tmp_path / "out"), f"--push-to-hub={name}"]) == 2
    line = capfd.readouterr().err
    assert line.startswith("main-jax: --push-to-hub: Repo") or "Cannot have -- or .." in line
    assert line.count("\n") == 1 and not hub and not (tmp_path / "out").exists()


def test_mistakes(run, tmp_path, capfd):
    (tmp_path / "taken").mkdir()
    assert main(["export-data", str(run), str(tmp_path / "taken")]) == 2
    assert "is there already" in capfd.readouterr().err
    (run / "stages" / "05-filter" / "manifest.json").unlink()
    with pytest.raises(UserError, match="stage filter is not done"):
        product.export_data(existing_run(str(run)), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
