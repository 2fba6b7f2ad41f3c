"""Models by hub name: what is fetched from a hub that a thread plays, what the cache serves, every refusal.

huggingface_hub reads its environment when imported, so find_model runs in a process of its own.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from main_jax import hub
from main_jax.errors import UserError
from main_jax.hub import find_model

CALL = """
import json, sys
from main_jax.errors import UserError
from main_jax.hub import find_model
found = []
for name in sys.argv[1:]:
    try:
        found.append([find_model(name, "--model"), None])
    except UserError as error:
        found.append([None, str(error)])
print(json.dumps(found))
"""

MAIN, OLD = "a" * 40, "b" * 40
SINGLE = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"[]"}
INDEX = json.dumps(
    {"weight_map": {"x": "model-1-of-2.safetensors", "y": "model-2-of-2.safetensors"}}
).encode()
WANTED = {
    "config.json": b'{"a": 1}',
    "generation_config.json": b"{}",
    "model.safetensors.index.json": INDEX,
    "model-1-of-2.safetensors": b"first" * 1000,
    "model-2-of-2.safetensors": b"second" * 1000,
    "tokenizer.json": b"[]",
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": b"{ }",
    "special_tokens_map.json": b"{  }",
    "added_tokens.json": b"{   }",
    "vocab.json": b"{    }",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "chat_template.json": b"{     }",
}
UNWANTED = {
    "README.md": b"text",
    "consolidated.safetensors": b"twice",
    "pytorch_model.bin": b"pickle",
    "modeling_x.py": b"import os",
    "original/model.safetensors": b"below",
    "original/tokenizer.model": b"below too",
    "model/x.safetensors": b"in a folder of that name",
    "onnx/config.json": b"other",
}


class Repo(NamedTuple):
    """What the stub knows of a repository; `refused` answers every request for a file."""

    files: dict[str, bytes] = SINGLE
    info: tuple[int, dict] = (200, {})
    refused: tuple[int, dict] | None = None


GATED = {"X-Error-Code": "GatedRepo"}
REPOS = {
    "org/full": Repo(WANTED | UNWANTED),
    "org/pinned": Repo(),
    "org/moved": Repo(),
    "org/gone": Repo(info=(404, {})),
    "org/secret": Repo(info=(401, {"X-Error-Code": "RepoNotFound"})),
    "org/token": Repo(
        info=(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    ),
    "org/down": Repo(info=(503, {})),
    "org/gated": Repo(refused=(403, GATED)),
    "org/gated-too": Repo(refused=(401, GATED)),
    "org/pickled": Repo({"config.json": b"{}", "pytorch_model-1-of-1.bin": b"", "x.json": b""}),
    "org/adapter": Repo({"adapter_model.safetensors": b"", "training_args.bin": b""}),
    "org/weightless": Repo({"config.json": b"{}", "original/model.safetensors": b""}),
    "org/indexless": Repo({"config.json": b"{}", "model-1-of-2.safetensors": b"first"}),
}


class Hub(ThreadingHTTPServer):
    """Notes every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Stub)
        self.seen: list[tuple[str, str]] = []


class Stub(BaseHTTPRequestHandler):
    """The endpoints that snapshot_download uses."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        assert isinstance(self.server, Hub)
        self.server.seen.append((self.command, path))
        api = path.startswith("/api/models/")
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        repo, what = REPOS[name], path.split(name, 1)[1]
        if api and what.startswith("/revision/"):
            if repo.info[0] != 200:
                return self.answer(b"", *repo.info)
            revision = what.removeprefix("/revision/")
            if (sha := {"main": MAIN, "refs/pr/1": OLD, OLD: OLD}.get(revision)) is None:
                return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            listing = [{"rfilename": file} for file in repo.files]
            return self.answer(json.dumps({"id": name, "sha": sha, "siblings": listing}).encode())
        if api:
            tree = [
                {"type": "file", "path": f, "size": len(data), "oid": "0"}
                for f, data in repo.files.items()
            ]
            return self.answer(json.dumps(tree).encode())
        if repo.refused:
            return self.answer(b"", *repo.refused)
        _, resolve, sha, file = what.split("/", 3)
        assert resolve == "resolve"
        data = repo.files[file]
        etag = hashlib.sha1(data).hexdigest()
        return self.answer(data, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, headers: dict | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server() -> Iterator[Hub]:
    stub = Hub()
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield stub
    stub.shutdown()
    stub.server_close()
    thread.join()


@pytest.fixture
def closed() -> int:
    """A port where nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def find(home: Path, *names: str, port: int = 9, **more: str) -> tuple[list[list], str]:
    """([path, None] or [None, error line] of each name, what was said); no proxy and no token of ours."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    env = {k: v for k, v in env.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "NO_PROXY": "*",
            "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CALL, *names],
        env=env | more, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def refused(home: Path, *names: str, **how) -> tuple[list[str], str]:
    """The one line of each."""
    found, said = find(home, *names, **how)
    for (path, line), name in zip(found, names, strict=True):
        assert path is None
        assert line.startswith(f"--model: {name}: ")
        assert "\n" not in line
    return [line for _, line in found], said


def put(home: Path, name: str, files: dict[str, bytes], ref: str = "main", sha: str = MAIN) -> Path:
    """A snapshot as the hub's client lays it out."""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / sha
    for file, data in files.items():
        blob = repo / "blobs" / hashlib.sha1(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).symlink_to(blob)
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(sha)
    return snapshot


# ------------------------------------------------------------------------------------------ names


@pytest.fixture
def no_fetch(monkeypatch):
    def fetch(*args):
        raise AssertionError("went to the hub")

    monkeypatch.setattr(hub, "_fetch", fetch)


def test_a_directory_comes_before_the_hub(no_fetch, tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("org/name", "--model") == "org/name"
    assert find_model(str(tmp_path), "--model") == str(tmp_path)
    assert find_model("~/org", "--model") == str(tmp_path / "org")


def test_a_file_is_refused(no_fetch, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^model_name_or_path: org/name: is a file, expected a ch"):
        find_model("org/name", "model_name_or_path")


@pytest.mark.parametrize(
    "name",
    ["", "gpt2", "a/b/c", "/a/b", "/a", "./a", "../a", "a/..", ".a/b", "a/.b", "~/a", "~nobody/a", "a/",
     "a//b", "gs://a/b", "https://huggingface.co/a/b", "a/b@", "a/b@../c", "a/b@x/../../c", "a@b/c", "a b/c",
     "a/b c", "a/b\n", "ä/b", "a--b/c", "a/b..c", "-a/b", "a/b-", "a/b.git", "a\\b/c", "a/b@c d", "a/b@c@d",
     "a/b@ä"],
)  # fmt: skip
def test_what_is_no_hub_name_never_goes_there(name, no_fetch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        find_model(name, "--model")
    assert str(error.value) == (
        f"--model: {name}: no such directory; give a local Hugging Face checkpoint "
        "or a hub name such as meta-llama/Llama-2-7b-hf"
    )


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", None),
     ("Qwen/Qwen2.5-0.5B@main", "Qwen/Qwen2.5-0.5B", "main"), ("1_a/b.c_@v1.0", "1_a/b.c_", "v1.0"),
     ("a/b@refs/pr/1", "a/b", "refs/pr/1"), (f"a/b@{MAIN}", "a/b", MAIN)],
)  # fmt: skip
def test_hub_names(name, repo, revision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_fetch", lambda *args: args)
    assert find_model(name, "--model") == (name, repo, revision, "--model")


# ------------------------------------------------------------------------------------------ offline


def test_the_cache_serves_offline(tmp_path):
    single = put(tmp_path, "org/single", SINGLE)
    sharded = put(tmp_path, "org/sharded", WANTED)
    tagged = put(tmp_path, "org/tagged", SINGLE, ref="v1")
    names = "org/single", "org/sharded", "org/tagged@v1", f"org/single@{MAIN}"
    found, said = find(tmp_path, *names, HF_HUB_OFFLINE="1")
    assert found == [[str(path), None] for path in (single, sharded, tagged, single)]
    assert said == ""


def test_the_cache_serves_without_a_connection(closed, tmp_path):
    single = put(tmp_path, "org/single", SINGLE)
    found, said = find(tmp_path, "org/single", port=closed)
    assert found == [[str(single), None]]
    assert said.startswith(
        f"org/single: no connection to http://127.0.0.1:{closed}, or a broken one (ConnectError"
    )
    assert said.endswith(f"; using the copy in the hub cache, {single}\n")


def test_an_incomplete_cache_is_refused(tmp_path):
    for lost in ("config.json", "model.safetensors"):
        files = {file: data for file, data in SINGLE.items() if file != lost}
        put(tmp_path, f"org/no-{lost}", files)
    put(tmp_path, "org/no-shard", WANTED | {"model-2-of-2.safetensors": b"half"})
    (blob,) = (tmp_path / "hub" / "models--org--no-shard").glob(
        f"blobs/{hashlib.sha1(b'half').hexdigest()}"
    )
    blob.unlink()  # as after an interrupted copy: the link is there and leads nowhere
    listed = put(tmp_path, "org/listed", {k: SINGLE[k] for k in SINGLE if k != "tokenizer.json"})
    trees = listed.parent.parent / "trees"
    trees.mkdir()
    listing = {file: {"size": len(data), "blob_id": "0"} for file, data in SINGLE.items()}
    (trees / f"{MAIN}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    names = "org/no-config.json", "org/no-model.safetensors", "org/no-shard", "org/listed"
    lines, _ = refused(tmp_path, *names, HF_HUB_OFFLINE="1")
    expected = "config.json", "model.safetensors", "model-2-of-2.safetensors", "some files"
    for line, lacks in zip(lines, expected, strict=True):
        assert f"the copy in the hub cache lacks {lacks} ({tmp_path / 'hub'})" in line


def test_without_hub_and_cache_the_line_says_how_to_fetch(closed, tmp_path):
    put(tmp_path, "org/tagged", SINGLE, ref="v1")
    lines, said = refused(tmp_path, "org/name", "org/tagged@v2", HF_HUB_OFFLINE="1")
    assert said == ""
    for line, command in zip(lines, ["org/name", "org/tagged --revision v2"], strict=True):
        assert "no such directory; as a hub name: offline mode is on (HF_HUB_OFFLINE)" in line
        assert f"it is not in the hub cache ({tmp_path / 'hub'})" in line
        assert f"run `hf download {command} --local-dir DIR` and give DIR" in line
        assert "HF_HOME" in line
    (line,), _ = refused(tmp_path, "org/name", port=closed)
    assert (
        f"as a hub name: no connection to http://127.0.0.1:{closed}, or a broken one (ConnectError: "
        in line
    )
    assert "`hf download org/name --local-dir DIR`" in line


def test_a_hub_that_never_answers_does_not_hang_us(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        port = silent.getsockname()[1]
        (line,), _ = refused(tmp_path, "org/name", port=port, HF_HUB_ETAG_TIMEOUT="1")
    assert "no connection to" in line
    assert "Timeout" in line
    assert time.monotonic() - start < 15


# ------------------------------------------------------------------------------------------ online


def test_only_what_we_read_is_fetched(server, tmp_path):
    port = server.server_port
    ((path, line),), said = find(tmp_path, "org/full", port=port)
    assert line is None
    assert f"fetching org/full from the hub into {tmp_path / 'hub'}\n" in said
    here = Path(path)
    assert here == tmp_path / "hub" / "models--org--full" / "snapshots" / MAIN
    held = {str(f.relative_to(here)): f.read_bytes() for f in here.rglob("*") if f.is_file()}
    assert held == WANTED
    at = f"/org/full/resolve/{MAIN}/"
    files = {seen.removeprefix(at) for _, seen in server.seen if not seen.startswith("/api/")}
    assert files == set(WANTED)

    server.seen.clear()  # and once more: nothing is fetched, nothing said
    assert find(tmp_path, "org/full", port=port) == ([[path, None]], "")
    assert server.seen
    assert all(seen.startswith("/api/") for _, seen in server.seen)
    assert find(tmp_path, "org/full", HF_HUB_OFFLINE="1") == ([[path, None]], "")


def test_a_part_or_an_older_copy_in_the_cache_is_brought_up_to_date(server, tmp_path):
    """Only what is not there is fetched."""
    part = put(tmp_path, "org/pinned", {k: v for k, v in SINGLE.items() if k != "tokenizer.json"})
    old = put(tmp_path, "org/moved", SINGLE | {"config.json": b"old"}, sha=OLD)
    found, said = find(tmp_path, "org/pinned", "org/moved", port=server.server_port)
    assert found == [[str(part), None], [str(old.with_name(MAIN)), None]]
    assert "fetching org/pinned " in said
    assert "fetching org/moved " in said
    got = {seen for what, seen in server.seen if what == "GET" and "/resolve/" in seen}
    assert got == {
        f"/org/pinned/resolve/{MAIN}/tokenizer.json",
        f"/org/moved/resolve/{MAIN}/config.json",
    }
    for path, _ in found:
        assert {f.name: f.read_bytes() for f in Path(path).iterdir()} == SINGLE


def test_the_revision_is_passed_on(server, tmp_path):
    port = server.server_port
    names = "org/pinned@refs/pr/1", f"org/pinned@{OLD}"
    found, _ = find(tmp_path, *names, port=port)
    snapshot = tmp_path / "hub" / "models--org--pinned" / "snapshots" / OLD
    assert found == [[str(snapshot), None]] * 2
    assert ("GET", f"/org/pinned/resolve/{OLD}/model.safetensors") in server.seen
    (line,), _ = refused(tmp_path, "org/pinned@v9", port=port)
    assert "as a hub name: the hub has no revision v9 of it, and it is not in the hub cache" in line


def test_what_the_hub_refuses(server, tmp_path):
    expected = {
        "org/gone": "not found on the hub (if it is private, run `hf auth login`)",
        "org/secret": "not found on the hub (if it is private, run `hf auth login`)",
        "org/token": "the hub refuses access (HTTP 401; run `hf auth login`)",
        "org/down": "the hub failed (HTTP 503)",
        "org/gated": "gated: accept the licence at https://huggingface.co/org/gated and run `hf auth login`",
        "org/gated-too": "gated: accept the licence at https://huggingface.co/org/gated-too and run",
    }
    lines, _ = refused(tmp_path, *expected, port=server.server_port)
    for line, (name, reason) in zip(lines, expected.items(), strict=True):
        assert f"no such directory; as a hub name: {reason}" in line
        assert f"`hf download {name} --local-dir DIR`" in line


def test_repositories_without_weights_for_us(server, tmp_path):
    names = "org/pickled", "org/adapter", "org/weightless", "org/indexless"
    (pickled, adapter, weightless, indexless), _ = refused(
        tmp_path, *names, port=server.server_port
    )
    assert "only pickled PyTorch weights on the hub; write them as safetensors first" in pickled
    assert "AutoModelForCausalLM.from_pretrained('org/pickled').save_pretrained(DIR)" in pickled
    assert "the hub's repository lacks config.json" in adapter
    assert "the hub's repository lacks model.safetensors" in weightless
    assert "the hub's repository lacks model.safetensors" in indexless
    fetched = {seen.split("/resolve/")[0] for _, seen in server.seen if "/resolve/" in seen}
    assert fetched == {"/org/indexless"}


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "hub")
    (line,), _ = refused(tmp_path, "org/pinned", port=server.server_port, HF_HUB_CACHE=cache)
    assert "cannot be written into the hub cache ([Errno 20] Not a directory" in line
    assert "set HF_HOME" in line
