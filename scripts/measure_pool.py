"""A pool of many texts through the stages of a run, with the peak memory and the time of each.

    python scripts/measure_pool.py [--responses 200000] [--folder DIR] [--kill]

With `--kill` every stage is then run once more, killed (SIGKILL) at a random time of its work and continued:
its data files must end equal.

The model is the embedded world's, small and hardly trained, the texts are its words at random, since what is
measured is the data's way: prepare (with near-duplicate removal, whose time is also taken alone), augment,
score, filter, export-data. Every stage is a process of its own; its peak is what the system says of it
(ru_maxrss), that of continued ones included. Exit code 1 above 2 GB, above 300 s of near-duplicate removal,
or when files differ.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from main_jax.data import clean

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
LIMIT_MB = 2000
LIMIT_S = 300
"""Of near-duplicate removal."""
NEAR = 0.8
WORLD = {
    "world.documents": 1000, "world.hidden_size": 32, "world.num_layers": 1, "world.responses": 500,
    "world.pretraining.max_steps": 2,
}  # fmt: skip
OWN = {
    "prompt.max_length": 128, "prompt.template": "none", "align.rounds": 0,
    "align.round_0.max_steps": 2, "align.sampling.max_new_tokens": 4,
    "augment.sampling.max_new_tokens": 4, "clean.near_duplicates": NEAR,
    "filter.hygiene.keep_cut": "true", "filter.hygiene.min_characters": 1,
    "filter.hygiene.max_repeats": "null",
    "runtime.generation_batch_size": 256,
}  # fmt: skip


WITHOUT_DATA = ("align",)
"""Its files are checkpoints."""


def main() -> int:
    """Run the stages, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=200_000)
    parser.add_argument("--folder", help="of the run; default: a temporary one")
    parser.add_argument("--kill", action="store_true", help="also kill every stage once")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        world = folder / "world"
        measured(["prepare", CONFIG, "--output_dir", world, *options(WORLD)])
        model = world / "stages" / "00-world"
        texts = folder / "texts.jsonl"
        write_texts(texts, model / "responses.jsonl", arguments.responses)
        (folder / "own.yaml").write_text("")
        settings = OWN | {
            "model_name_or_path": model / "base",
            "data.seed_path": model / "seed.jsonl", "data.responses_path": texts,
        }  # fmt: skip
        # Several chunks of every stage, of fewer texts too: what is killed has something to continue.
        settings["runtime.chunk_rows"] = min(4096, max(1, arguments.responses // 8))
        took, worst = {}, 0.0
        print(f"{'stage':<15} {'seconds':>8} {'peak MB':>8}", flush=True)
        near = near_duplicate_seconds(texts)
        print(f"{'near duplicates':<15} {near:>8.1f} {'':>8} of prepare's", flush=True)
        for stage, command in commands(folder / "run", folder / "own.yaml", settings):
            took[stage], peak = measured(command)
            print(f"{stage:<15} {took[stage]:>8.1f} {peak:>8.0f}", flush=True)
            worst = max(worst, peak)
        differ = 0
        draw = random.Random(arguments.seed)
        killed = commands(folder / "killed", folder / "own.yaml", settings)
        for stage, command in killed if arguments.kill else ():
            worked = manifest(folder / "run", stage).get("seconds", took[stage])
            after = kill_at_work(folder / "killed", stage, command, worked, draw)
            worst = max(worst, measured(command)[1])
            old, new = (files(f, stage) for f in (folder / "run", folder / "killed"))
            equal = old == new and (bool(old) or stage in WITHOUT_DATA)
            differ += not equal
            verdict = "equal" if equal else "DIFFER"
            print(f"{stage:<15} killed after {after:.1f} s: {len(old)} files {verdict}", flush=True)
        print(
            f"{arguments.responses:,} texts of {texts.stat().st_size / 1e6:.0f} MB; "
            f"peak {worst:.0f} MB of {LIMIT_MB}, near duplicates {near:.0f} s of {LIMIT_S}"
        )
    return int(worst > LIMIT_MB or near > LIMIT_S or differ > 0)


def commands(run: Path, config: Path, settings: dict) -> list[tuple[str, list]]:
    """The stages of a run and the words of their verbs."""
    words = [config, *options(settings | {"output_dir": run})]
    stages: list[tuple[str, list]] = [
        (stage, [stage, *words]) for stage in ("prepare", "align", "augment", "score", "filter")
    ]
    return [*stages, ("export-data", ["export-data", run, run.with_suffix(".product")])]


def kill_at_work(run: Path, stage: str, words: list, worked: float, draw: random.Random) -> float:
    """Start a verb and send SIGKILL at a random time of its work, and say at which second of it.

    A kill before the stage has begun, or after its end, is none: it is drawn anew from half the time, until
    one hits.
    """
    while worked > 0.001:
        process, after = start(words), draw.uniform(0, worked)
        while not at_work(run, stage) and process.poll() is None:
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(after)
        process.kill()
        if process.wait() == -signal.SIGKILL and at_work(run, stage):
            return after
        shutil.rmtree(folder_of(run, stage), ignore_errors=True)  # it was done
        worked /= 2
    raise SystemExit(f"{stage}: no kill hit it at work")


def at_work(run: Path, stage: str) -> bool:
    """Whether a stage has begun and not ended, as its files say."""
    if stage == "export-data":
        product = folder_of(run, stage)
        return product.with_name(f".{product.name}.tmp").exists()
    return manifest(run, stage).get("status") == "running"


def manifest(run: Path, stage: str) -> dict:
    """What a stage has recorded of itself, if anything."""
    file = folder_of(run, stage) / "manifest.json"
    return json.loads(file.read_text()) if file.exists() else {}


def folder_of(run: Path, stage: str) -> Path:
    """Where a verb writes."""
    if stage == "export-data":
        return run.with_suffix(".product")
    return next((run / "stages").glob(f"??-{stage}"), run / "stages" / stage)


def near_duplicate_seconds(texts: Path) -> float:
    """Of the removal alone, as prepare does it, text after text."""
    said_before = clean.duplicates(NEAR)
    with texts.open() as file:
        read = [json.loads(line)["text"] for line in file]
    begin = time.monotonic()
    found = sum(said_before(text) == "near_duplicate" for text in read)
    if not found:
        raise SystemExit("no near duplicate was found; a tenth of the texts are")
    return time.monotonic() - begin


def files(run: Path, stage: str) -> dict[str, str]:
    """Digests of the data files of a stage, by their names."""
    folder = folder_of(run, stage)
    found = [p for p in sorted(folder.rglob("*")) if p.suffix in (".parquet", ".jsonl")]
    return {
        str(p.relative_to(run.parent)).partition("/")[2]: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in found
        if p.name != "metrics.jsonl"
    }


def options(settings: dict) -> list[str]:
    """As they stand on the command line."""
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


def write_texts(path: Path, like: Path, count: int) -> None:
    """Texts of 20 to 80 words that the model's tokenizer knows; every tenth nearly repeats the one before."""
    words = sorted(
        {w for line in like.read_text().splitlines() for w in json.loads(line)["response"].split()}
    )
    draw = random.Random(0)
    said: list[str] = []
    with path.open("w") as file:
        for i in range(count):
            if i % 10 == 9:
                said = [*said[:-1], draw.choice(words)]
            else:
                said = draw.choices(words, k=draw.randint(20, 80))
            file.write(json.dumps({"id": f"t{i}", "text": " ".join(said)}) + "\n")


def measured(words: list) -> tuple[float, float]:
    """(seconds, peak resident memory in MB) of a verb, which must succeed."""
    begin = time.monotonic()
    process = start(words)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(map(str, words))}: exit code {code}")
    return time.monotonic() - begin, usage.ru_maxrss / 1000


def start(words: list) -> subprocess.Popen:
    """A verb in a process of its own."""
    command = [sys.executable, "-m", "main_jax.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
