"""The scripts in `scripts/launch`, run to their end with stand-ins for what they call.

What main-jax would be told is taken from these runs, so quoting and variables are bash's own. No cloud is
asked: that its commands do what is expected of them, these tests do not show.
"""

import math
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from main_jax import processes
from main_jax.command_line import STAGES, build_parser
from main_jax.config import Config
from main_jax.strict_yaml import load_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
SHELL = sorted(path.name for path in LAUNCH.glob("*.sh"))
YAML = sorted(path.name for path in LAUNCH.glob("*.yaml"))
CONFIGS = [
    f"configs/{model}-{machine}.yaml"
    for model in ("llama-2-7b", "mistral-7b", "qwen2.5-7b")
    for machine in ("v5p", "v5e", "8xh100")
]
VARIABLES = {
    "CONFIG": CONFIGS[0], "MODEL": "meta-llama/Llama-2-7b-hf", "OUTPUT_DIR": "runs/x",
    "SEED_PATH": "seed.jsonl", "RESPONSES_PATH": "texts.parquet", "COORDINATOR": "10.0.0.1",
    "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
}  # fmt: skip

# ------------------------------------------------------------------------------------- what is called

MAIN_JAX = """
printf '%s\\n' "$*" >>"$FAKE/calls"
code=$(head -n 1 "$FAKE/codes"); sed -i 1d "$FAKE/codes"
if [ "$code" = gone ]; then kill -KILL "$PPID"; exit; fi
trap 'echo saved >>"$FAKE/saved"; exit 75' TERM
for _ in $(seq "${FAKE_TENTHS:-0}"); do sleep 0.1; done
exit "${code:-0}"
"""
SRUN = """
printf '%s\\n' "$*" >>"$FAKE/srun"
while [ "$1" != main-jax ]; do shift; done
"$@"
"""
RECORDED = 'printf "%s\\n" "$*" >>"$FAKE/$(basename "$0")"'
GCLOUD = """
printf '%s\\n' "$*" >>"$FAKE/gcloud"
state=$FAKE/state home=$FAKE/home
case "$*" in
*"queued-resources describe"*) cat "$state" ;;
*"queued-resources create"*) echo ACTIVE >"$state" ;;
*"queued-resources delete"*) rm -r "$state" "$home" ;;
*"tpu-vm describe"*) grep -q ACTIVE "$state" && echo READY || echo PREEMPTED ;;
*"tpu-vm scp"*)
    mkdir -p "$home"
    for word in "$@"; do if [ -e "$word" ]; then cp -r "$word" "$home"; fi; done
    ;;
*"tpu-vm ssh"*)
    cd "$home"
    for word in "$@"; do case $word in --command=*) command=${word#--command=} ;; esac; done
    case $command in *follow*) what=$(head -n 1 "$FAKE/connection"); sed -i 1d "$FAKE/connection" ;; esac
    case ${what:-holds} in
    holds) bash -c "$command" ;;
    breaks) timeout --foreground 0.5 bash -c "$command"; exit 255 ;;
    preempted) echo SUSPENDED >"$state"; exit 255 ;;
    esac
    ;;
esac
"""
PYTHON = """
printf '%s\\n' "$*" >>"$FAKE/python3"
case "$*" in
*"pip wheel"*) while [ "$1" != --wheel-dir ]; do shift; done; touch "$2/main_jax-1-py3-none-any.whl" ;;
*"uv venv"*) mkdir -p main-jax/bin; cp "$FAKE/bin/main-jax" "$FAKE/bin/python" main-jax/bin ;;
esac
"""
BUCKET_COPY = 'printf "%s\\n" "$*" >>"$FAKE/python"; mkdir -p model.new'
TAIL = f'exec {shutil.which("tail")} -s 0.05 "$@"'
FAKES = {
    "main-jax": MAIN_JAX, "srun": SRUN, "gcloud": GCLOUD, "python3": PYTHON, "python": BUCKET_COPY,
    "tail": TAIL, "scontrol": RECORDED,
    "xpk": RECORDED.replace('"$*"', '"${@@Q}"').replace("%s\\n", "%s "),
}  # fmt: skip


class Fakes:
    """A folder to run a script in, with the stand-ins on PATH and what they were told."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        for name, body in FAKES.items():
            self.program(self.bin / name, body)
        activate = "export PATH=$FAKE/bin:$PATH"
        for place in (folder / ".venv", folder / "main-jax"):
            self.program(place / "bin" / "activate", activate)
        (folder / "configs").mkdir()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MAIN_JAX_"))}
        self.environment = clean | {
            "FAKE": str(folder), "PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(folder),
            "PAUSE": "0", "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8",
        }  # fmt: skip

    def program(self, path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, script: Path | str, *arguments, codes=(), connection=(), tenths=0, **variables):
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        (self.folder / "connection").write_text("".join(f"{word}\n" for word in connection))
        environment = self.environment | {"FAKE_TENTHS": str(tenths)} | variables
        command = (
            ["bash", script, *arguments] if isinstance(script, Path) else ["bash", "-c", script]
        )
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments, **how) -> tuple[int, str]:
        process = self.start(*arguments, **how)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out

    def told(self, name: str) -> list[str]:
        """A line for each call."""
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


# ----------------------------------------------------------------------------------- what they tell us


def accepted(words: list[str]) -> None:
    """Raises UserError where main-jax would refuse them."""
    if words[0] == "launch":
        at = words.index("--")
        build_parser().parse_args(words[:at])
        return accepted(words[at + 1 :])
    arguments, rest = build_parser().parse_known_args(words)
    processes.start_options(arguments)
    config = getattr(arguments, "config", None)
    assert config in CONFIGS
    load_config(Config, None, rest)
    if (ROOT / config).exists():
        load_config(Config, str(ROOT / config), rest)


def written(path: Path) -> list[list[str]]:
    """Every `main-jax VERB ...` in a file, in comments too: lines joined, variables filled in."""
    text = re.sub(r"\\\n[ #]*", "", path.read_text())
    verbs = "|".join(("run", "launch", *STAGES))
    found = []
    for line in re.findall(rf"main-jax (?:{verbs})\b[^;&|)]*?(?=[;&|)\n]|  )", text):
        for name, value in VARIABLES.items():
            line = re.sub(rf"\$\{{?{name}\b\}}?", value, line)
        found.append(shlex.split(line.replace('"', ""))[1:])
    return found


@pytest.mark.parametrize("name", SHELL + YAML)
def test_every_command_that_is_written_is_accepted(name):
    commands = written(LAUNCH / name)
    if name == "gke_jobset.yaml":
        assert not commands  # a list, see below
        return
    assert commands
    for words in commands:
        accepted(words)


def test_the_check_of_commands_can_fail():
    for words in (["run", CONFIGS[0], "--no_such", "1"], ["run", CONFIGS[0], "--process-id", "x"]):
        with pytest.raises(Exception, match=r"no_such|process-id"):
            accepted(words)
    with pytest.raises(AssertionError):
        accepted(["run", "configs/llama-7b.yaml"])


@pytest.mark.parametrize("name", SHELL + YAML)
def test_two_places_to_edit(name):
    text = (LAUNCH / name).read_text()
    assert re.findall(r"^\s*# (\d)\. EDIT: (where|what) to run", text, re.M) == [
        ("1", "where"),
        ("2", "what"),
    ]
    assert text.count("EDIT") == 2
    assert text.index("nothing to edit below") > text.index("# 2. EDIT")


@pytest.mark.parametrize("name", SHELL)
def test_bash_reads_it(name):
    checked = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_manual_names_every_script():
    manual = (ROOT / "docs" / "launching.md").read_text()
    assert set(re.findall(r"`(\w+\.(?:sh|yaml))`", manual)) == {*SHELL, *YAML}
    assert len(manual.splitlines()) < 80


def test_the_image_has_what_is_there():
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.M)
    assert all((ROOT / word).exists() for words in copied for word in words.split())


# ---------------------------------------------------------------------------------------- one machine


@pytest.mark.parametrize(
    "codes, code, calls", [([0], 0, 1), ([75, 75, 0], 0, 3), ([75, 2], 2, 2), ([1], 1, 1), ([137], 137, 1)]
)  # fmt: skip
def test_multi_gpu_runs_again_after_75_alone(fakes, codes, code, calls):
    assert fakes.run(LAUNCH / "multi_gpu.sh", codes=codes)[0] == code
    told = fakes.told("calls")
    assert len(told) == calls
    assert len(set(told)) == 1
    accepted(told[0].split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_multi_gpu_passes_a_signal_on_and_ends(fakes, number):
    process = fakes.start(LAUNCH / "multi_gpu.sh", tenths=100)
    until(lambda: fakes.told("calls"))
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (len(fakes.told("calls")), fakes.told("saved")) == (1, ["saved"])
    process.communicate()


def until(condition, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------- SLURM


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_slurm_queues_again_after_75_alone(fakes, code):
    assert fakes.run(LAUNCH / "slurm.sh", codes=[code])[0] == code
    assert fakes.told("scontrol") == (["requeue 17"] if code == 75 else [])
    accepted(fakes.told("calls")[0].split())
    assert fakes.told("srun")[0].startswith("--kill-on-bad-exit=0 --cpus-per-task=8 main-jax")


def test_slurm_does_not_queue_again_what_is_cancelled(fakes):
    process = fakes.start(LAUNCH / "slurm.sh", codes=[75], tenths=8)
    until(lambda: fakes.told("calls"))
    process.send_signal(signal.SIGTERM)  # to the batch script: only then the job is being ended
    assert process.wait(20) == 75
    assert fakes.told("scontrol") == []
    process.communicate()


def test_slurm_asks_for_a_task_per_gpu():
    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (LAUNCH / "slurm.sh").read_text(), re.M)
    )
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
    assert options["signal"].startswith("TERM@")  # to the tasks; B: would be to the script alone
    assert "requeue" in options
    assert not [name for name in options if name.startswith(("gpus", "gpu-bind"))]


# ------------------------------------------------------------------------------------------ TPU slices


def calls_of(fakes, what: str) -> list[str]:
    return [line for line in fakes.told("gcloud") if what in line]


def test_tpu_pod_creates_installs_and_runs_on_all_workers(fakes):
    assert fakes.run(LAUNCH / "tpu_pod.sh", HF_TOKEN="it's secret")[0] == 0
    [create] = calls_of(fakes, "queued-resources create")
    for option in (
        "--node-id=main-7b",
        "--accelerator-type=v5p-16",
        "--runtime-version=",
        "--spot",
    ):
        assert option in create
    assert all("--project=my-project --zone=" in line for line in fakes.told("gcloud"))
    assert all("--worker=all" in line for line in calls_of(fakes, "tpu-vm s"))
    installed = "uv pip install --quiet --python main-jax/bin/python --reinstall-package main-jax"
    assert re.search(rf"{installed} \S+\.whl\[tpu\] gcsfs$", "\n".join(fakes.told("python3")), re.M)
    [told] = fakes.told("calls")
    accepted(told.split())
    assert told.endswith("--distributed auto")
    settings = (fakes.folder / "home" / "settings.sh").read_text()
    assert "it's secret" in settings
    assert "it's secret" not in "\n".join(fakes.told("gcloud"))
    assert not list(fakes.folder.glob("tmp*"))


def test_tpu_pod_continues_on_the_same_slice_after_75(fakes):
    assert fakes.run(LAUNCH / "tpu_pod.sh", codes=[75, 0])[0] == 0
    assert len(fakes.told("calls")) == 2
    assert len(calls_of(fakes, "queued-resources create")) == 1


def test_tpu_pod_asks_for_another_slice_after_a_preemption(fakes):
    assert fakes.run(LAUNCH / "tpu_pod.sh", connection=["preempted", "holds"])[0] == 0
    assert len(calls_of(fakes, "queued-resources create")) == 2
    assert len(calls_of(fakes, "queued-resources delete main-7b --force --quiet")) == 1
    assert len(calls_of(fakes, "bash install.sh")) == 2
    assert len(fakes.told("calls")) == 1


def test_tpu_pod_starts_nothing_twice_where_the_connection_breaks(fakes):
    code, _ = fakes.run(LAUNCH / "tpu_pod.sh", connection=["breaks", "holds"], tenths=12)
    assert code == 0
    assert len(calls_of(fakes, "bash follow.sh")) == 2
    assert len(fakes.told("calls")) == 1
    assert sum("uv pip install" in line for line in fakes.told("python3")) == 1


def test_tpu_pod_continues_what_was_shut_down_without_an_exit_code(fakes):
    assert fakes.run(LAUNCH / "tpu_pod.sh", codes=["gone", 0])[0] == 0
    assert len(fakes.told("calls")) == 2


@pytest.mark.parametrize("code", [1, 2])
def test_tpu_pod_ends_with_the_code_of_the_run(fakes, code):
    assert fakes.run(LAUNCH / "tpu_pod.sh", codes=[code])[0] == code
    assert len(fakes.told("calls")) == 1


def test_tpu_pod_copies_a_model_out_of_a_bucket(fakes):
    text = (LAUNCH / "tpu_pod.sh").read_text()
    script = fakes.folder / "edited.sh"
    script.write_text(re.sub("^MODEL=.*", "MODEL=gs://b/models/mine", text, flags=re.M))
    assert fakes.run(script)[0] == 0
    assert fakes.told("python")[0].endswith(" gs://b/models/mine/ model.new/")
    assert "--model_name_or_path model --data" in fakes.told("calls")[0]


def test_tpu_pod_fetches_and_deletes(fakes):
    assert fakes.run(LAUNCH / "tpu_pod.sh", "fetch")[0] == 0
    assert "results.json gs://" in fakes.told("gcloud")[-1]
    assert (fakes.folder / "runs" / "llama-2-7b").is_dir()
    fakes.run(LAUNCH / "tpu_pod.sh", "delete")
    assert "queued-resources delete main-7b --force" in fakes.told("gcloud")[-1]
    assert fakes.run(LAUNCH / "tpu_pod.sh", "remove")[0] == 2


def test_gke_xpk_submits_lists_and_deletes(fakes):
    assert fakes.run(LAUNCH / "gke_xpk.sh")[0] == 0
    words = shlex.split(fakes.told("xpk")[0])
    assert words[:2] == ["workload", "create"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--restart-on-exit-codes"] == "75"
    assert int(options["--max-restarts"]) > 0  # without it nothing is restarted
    command = options["--command"].split()
    assert command[:2] == ["exec", "main-jax"]
    accepted(command[2:])
    for verb in ("list", "delete"):
        assert fakes.run(LAUNCH / "gke_xpk.sh", verb)[0] == 0
        assert f"'workload' '{verb}'" in fakes.told("xpk")[0]
    assert fakes.run(LAUNCH / "gke_xpk.sh", "stop")[0] == 2


def test_gke_jobset():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # else podFailurePolicy is refused
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert chips * job["parallelism"] == math.prod(map(int, sides))
    assert container["command"][0] == "main-jax"
    accepted(container["command"][1:])


def test_gke_jobset_acts_by_exit_code():
    """75 and a lost node: again, uncounted; 2: failed; else: again, counted. As JobSet reads its rules."""
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]

    def action(code: int, disrupted: bool = False) -> str:
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
            wanted = rule.get("onExitCodes", {"values": []})
            where = f"matching {rule['action']} rule at index {index}"
            if code in wanted["values"]:
                reason = "PodFailurePolicy"
                message = f"Container main for pod d/p failed with exit code {code} {where}"
                break
            if disrupted and "onPodConditions" in rule:
                reason = "PodFailurePolicy"
                message = f"Pod d/p has condition DisruptionTarget {where}"
                break
        for rule in spec["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(
                re.search(p, message) for p in patterns
            ):
                return rule["action"]
        return "RestartJobSet"

    assert action(75) == action(137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(2) == "FailJobSet"
    assert action(1) == action(134) == "RestartJobSet"
    assert spec["failurePolicy"]["maxRestarts"] > 0


# -------------------------------------------------------------------------------------------- SkyPilot


def test_skypilot(fakes):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {
        "name",
        "workdir",
        "num_nodes",
        "resources",
        "envs",
        "secrets",
        "setup",
        "run",
    }
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["resources"]["accelerators"] == "H100:8"
    given = task["envs"] | task["secrets"] | {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
    }  # fmt: skip
    for code in (0, 75):
        assert fakes.run(task["run"], codes=[code], **given)[0] == code
    told = fakes.told("calls")[0]
    accepted(told.split())
    assert told.endswith("--coordinator 10.0.0.1:8476 --num-processes 2 --process-id 1")
