"""What a user names as a model: a local directory, or a name on the Hugging Face hub.

    find_model("models/mine", "--model")                        # itself
    find_model("meta-llama/Llama-2-7b-hf@main", "--model")      # fetched, or taken from the hub cache

Only files that we read are fetched: never pickles, never code. Without a connection the hub cache
serves, where its copy is complete.
"""

from __future__ import annotations

import re
from fnmatch import filter as matching
from os.path import expanduser
from pathlib import Path

from etils import epath

from main_jax.errors import UserError
from main_jax.lm.progress import say
from main_jax.lm.weights import INDEX, SINGLE, one_line, read_json

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(?!.*\.\.)(\w[\w./+-]*))?", re.ASCII)
"""org/name or org/name@revision; the hub's own rules for names are checked after it."""

WEIGHTS = "model*.safetensors"  # not *: consolidated.safetensors holds all weights once more
FILES = [
    "config.json", "generation_config.json", WEIGHTS, INDEX,
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
]  # fmt: skip
SUBFOLDERS = "*/*"  # the hub's * crosses slashes: FILES alone would match model/x.safetensors


def find_model(name: str, key: str) -> str:
    """The path of a checkpoint directory; a hub name is fetched into the hub cache first.

    Raises UserError, one line that names the argument `key`, when there is no such directory and
    the hub does not give the model either; CheckpointError when its index of weights is damaged.
    """
    found = Path(expanduser(name))
    if name and found.is_dir():
        return str(found)
    if name and found.exists():
        raise UserError(f"{key}: {name}: is a file, expected a checkpoint directory")
    return _fetch(name, *_repo(name, key), key)


def find_config(name: str, key: str) -> str:
    """A folder with the model's config.json, without its weights: what `find_model` gives, or from the hub.

    Raises UserError, one line that names the argument `key`.
    """
    if not name or Path(expanduser(name)).exists():
        return find_model(name, key)
    from huggingface_hub import hf_hub_download

    repo, revision = _repo(name, key)
    try:
        return str(Path(hf_hub_download(repo, "config.json", revision=revision)).parent)
    except Exception as error:  # of the hub, of its HTTP client
        raise UserError(
            f"{key}: {name}: the hub does not give its config.json ({one_line(error)[:120]}); give a folder"
        ) from None


def _repo(name: str, key: str) -> tuple[str, str | None]:
    """The repository and the revision of a hub name. Raises UserError."""
    match = NAME.fullmatch(name)
    if not match or not _is_legal(match[1]):
        raise UserError(
            f"{key}: {name}: no such directory; give a local Hugging Face checkpoint "
            "or a hub name such as meta-llama/Llama-2-7b-hf"
        )
    return match[1], match[2]


def _is_legal(repo: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True


def _fetch(name: str, repo: str, revision: str | None, key: str) -> str:
    """The folder of a complete snapshot in the hub cache. Raises UserError."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        # snapshot_download asks the same without a time limit, and an unreachable hub would hang it.
        info = HfApi().model_info(
            repo,
            revision=revision or constants.DEFAULT_REVISION,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        files = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
        _check_listing(files, name, repo, key)
        folder, _ = _cached(repo, revision)
        if folder and Path(folder).name == info.sha:
            wanted = {file for pattern in FILES for file in matching(files, pattern)}
            if all(Path(folder, file).is_file() for file in wanted):
                return folder
        say(f"fetching {name} from the hub into {constants.HF_HUB_CACHE}")
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=FILES, ignore_patterns=SUBFOLDERS
        )
    except UserError:
        raise
    except Exception as error:  # of the hub, of its HTTP client, of its downloader
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(
                f"{key}: {name}: cannot be written into the hub cache ({one_line(error)}); "
                "set HF_HOME to a place where it can"
            ) from None
        return _without_hub(error, name, repo, revision, key)
    if lacks := _lacks(folder):
        raise UserError(f"{key}: {name}: the hub's repository lacks {lacks}")
    return folder


def _check_listing(files: list[str], name: str, repo: str, key: str) -> None:
    """Raises UserError for a repository without weights that we read, before any of it is fetched."""
    if "config.json" in files and matching(files, WEIGHTS):
        return
    if matching(files, "pytorch_model*.bin"):
        raise UserError(
            f"{key}: {name}: only pickled PyTorch weights on the hub; write them as safetensors first, "
            f"with torch: AutoModelForCausalLM.from_pretrained({repo!r}).save_pretrained(DIR), the same "
            "with AutoTokenizer, and give DIR"
        )
    lacks = SINGLE if "config.json" in files else "config.json"
    raise UserError(
        f"{key}: {name}: the hub's repository lacks {lacks}; expected a Transformers checkpoint"
    )


def _without_hub(error: Exception, name: str, repo: str, revision: str | None, key: str) -> str:
    """What an earlier download left, where it is complete; else UserError, with the reason."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    reason = _reason(error, repo, revision)
    folder, lacks = _cached(repo, revision)
    if folder and not lacks:
        if not isinstance(error, OfflineModeIsEnabled):
            say(f"{name}: {reason}; using the copy in the hub cache, {folder}")
        return folder
    cached = f"the copy in the hub cache lacks {lacks}" if lacks else "it is not in the hub cache"
    at = f" --revision {revision}" if revision else ""
    raise UserError(
        f"{key}: {name}: no such directory; as a hub name: {reason}, and {cached} "
        f"({constants.HF_HUB_CACHE}); on a machine with internet access run "
        f"`hf download {repo}{at} --local-dir DIR` and give DIR, or copy its hub cache and set HF_HOME"
    ) from None


def _cached(repo: str, revision: str | None) -> tuple[str | None, str | None]:
    """The folder where the hub cache has a revision, and what it lacks."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=FILES, ignore_patterns=SUBFOLDERS,
            local_files_only=True,
        )  # fmt: skip
    except LocalEntryNotFoundError as error:
        folder = getattr(error, "snapshot_path", None)  # of one that is known to be incomplete
        return folder, folder and (_lacks(folder) or "some files")
    return folder, _lacks(folder)


def _lacks(folder: str) -> str | None:
    """The first file that a snapshot must hold and does not. Raises CheckpointError."""
    here = epath.Path(folder)
    needed = ["config.json", SINGLE]
    if (here / INDEX).exists():
        weight_map = read_json(here / INDEX).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, dict) else ()
        needed[1:] = sorted({str(file) for file in shards})
    return next((file for file in needed if not (here / file).exists()), None)


def _reason(error: Exception, repo: str, revision: str | None) -> str:
    """Why the hub did not give a model, in a few words."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)"
    if isinstance(error, errors.GatedRepoError):
        return f"gated: accept the licence at https://huggingface.co/{repo} and run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision} of it"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return "not found on the hub (if it is private, run `hf auth login`)"
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status}; run `hf auth login`)"
    if status is not None:
        return f"the hub failed (HTTP {status})"
    detail = f"{type(error).__name__}: {one_line(error)}"[:200]
    return f"no connection to {constants.ENDPOINT}, or a broken one ({detail})"
