"""Convert a synthetic checkpoint there and back, and print what memory that took.

    python scripts/measure_convert.py [--preset qwen2.5-0.5b] [--files 4] [--dtype float32] [--folder DIR]

The checkpoint has random weights in the shapes of a preset: 2 GB in four files by default. Each conversion
runs in a process of its own; its anonymous memory (RssAnon of /proc/self/status, so Linux only) is sampled
every few milliseconds and compared with the state after imports. The bound: twice the largest stacked
parameter plus 256 MB. Exit code 1 where it is exceeded, or where the tensors that come back are not the
same bits.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from etils import epath
from safetensors import safe_open

from main_jax.lm.arch import PRESETS, DecoderConfig
from main_jax.lm.hf_config import to_hf
from main_jax.lm.hf_table import weights
from main_jax.lm.weights import Planned, write_tensors

MB = 1_000_000


def main() -> int:
    """Make the checkpoint, convert it both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="qwen2.5-0.5b")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--folder", help="where to work (default: the temporary folder)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    config, dtype = PRESETS[arguments.preset], np.dtype(arguments.dtype)
    rows = weights(config)
    largest = max(math.prod(row.our_shape(config)) for row in rows) * dtype.itemsize
    bound = 2 * largest + 256 * MB
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, orbax, back = (f"{folder}/{name}" for name in ("source", "orbax", "back"))
        files = make_checkpoint(epath.Path(source), config, dtype, arguments.files)
        total = sum(file.stat().length for file in files)
        print(f"{arguments.preset}, {arguments.dtype}: {total / MB:,.0f} MB in {len(files)} files")
        print(f"largest stacked parameter {largest / MB:,.0f} MB, bound {bound / MB:,.0f} MB\n")
        print("conversion               peak RssAnon above imports   seconds")
        fits = True
        for label, names in (
            ("Hugging Face -> Orbax", (source, orbax)),
            ("Orbax -> Hugging Face", (orbax, back)),
        ):
            command = [sys.executable, __file__, "--child", *names]
            found = json.loads(
                subprocess.run(command, check=True, stdout=-1).stdout.splitlines()[-1]
            )
            fits &= found["peak"] <= bound
            print(f"{label:24} {found['peak'] / MB:23,.0f} MB {found['seconds']:9.1f}", flush=True)
        same = tensors_equal(Path(source), Path(back))
    print(f"\nwithin the bound: {fits}; every tensor the same bits after the round trip: {same}")
    return 0 if fits and same else 1


def make_checkpoint(
    folder: epath.Path, config: DecoderConfig, dtype: np.dtype, files: int
) -> list[epath.Path]:
    """Write random weights, tensor by tensor, in `files` files."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)

    folder.mkdir(parents=True)
    shapes = {
        name: row.their_shape(config) for row in weights(config) for name in row.names(config)
    }
    planned = [
        Planned(name, dtype, shape, functools.partial(draw, shape))
        for name, shape in shapes.items()
    ]
    size = sum(tensor.nbytes for tensor in planned) / files
    write_tensors(folder, planned, math.ceil(1.01 * size))
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    return sorted(folder.glob("*.safetensors"))


def child(source: str, destination: str) -> int:
    """Convert, watching this process's anonymous memory."""
    import jax

    from main_jax.convert import convert

    jax.devices()
    start, peak, done = rss_anon(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.003):
            peak = max(peak, rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    convert(source, destination)
    done.set()
    watcher.join()
    print(json.dumps({"peak": peak - start, "seconds": time.monotonic() - began}))
    return 0


def rss_anon() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def tensors_equal(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    tensors: list[dict] = [{}, {}]
    for found, folder in zip(tensors, (first, second), strict=True):
        for file in folder.glob("*.safetensors"):
            handle = safe_open(file, framework="numpy")
            found |= {name: handle for name in handle.keys()}  # noqa: SIM118
    return tensors[0].keys() == tensors[1].keys() and all(
        np.array_equal(handle.get_tensor(name), tensors[1][name].get_tensor(name))
        for name, handle in tensors[0].items()
    )


if __name__ == "__main__":
    sys.exit(main())
