"""Several processes: how they find each other, how they end, and what `main-jax launch` makes of it.

What runs in them is `launch_worker.py`, and `main-jax` itself where its command line is the point.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from main_jax import launch, processes
from main_jax.cli import build_parser, main
from main_jax.errors import UserError
from main_jax.lm import progress
from main_jax.lm.rendezvous import StartError, meet
from main_jax.lm.runtime import Distributed, detect

WORKER = Path(__file__).with_name("launch_worker.py")
TOOL = Path(sys.executable).with_name("main-jax")
NOT_FROM_HERE = ("MAIN_JAX_", "SLURM_", "OMPI_", "TPU_", "JAX_COORD")
LIMIT_S = 60
LIBRARIES = re.compile(r"Gloo|peer ranks|^(\[1\] )?$|^(\[1\] )?[A-Z]\d{4} .*\.cc:\d+\]")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(NOT_FROM_HERE) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # may set a device count too
    monkeypatch.setattr(progress, "_process", (0, 1))


def start(*command, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | variables,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr), without what C++ libraries write."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    lines = [
        [line for line in text.splitlines() if not LIBRARIES.search(line)] for text in (out, err)
    ]
    return process.returncode, *lines


def launched(*task, grace: float = 1, devices: int = 1, **variables) -> subprocess.Popen:
    """`main-jax launch` of two workers."""
    return start(sys.executable, WORKER, "launch", 2, grace, devices, *task, **variables)


def pids(folder: Path) -> list[int]:
    """Of both workers, when both have come so far."""
    files = [folder / f"{i}.pid" for i in range(2)]
    until = time.monotonic() + LIMIT_S
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < until
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def gone(pid: int, limit_s: float = 5) -> bool:
    """Whether it ends within the limit; one that nobody has waited for yet counts as ended."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        shown = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        if shown.stdout.strip()[:1] in ("", "Z"):
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------------------ options


def options_of(*words) -> dict:
    arguments, rest = build_parser().parse_known_args(["run", "config.yaml", *words])
    assert rest == []
    return processes.start_options(arguments)


FLAGS = ("--coordinator", "host:1234", "--num-processes", "3", "--process-id", "2")


def test_flags_win_over_variables(monkeypatch):
    assert options_of() == {"cpu_devices": None, "distributed": None}
    monkeypatch.setenv("MAIN_JAX_COORDINATOR", "elsewhere:1")
    monkeypatch.setenv("MAIN_JAX_NUM_PROCESSES", "8")
    monkeypatch.setenv("MAIN_JAX_PROCESS_ID", "7")
    monkeypatch.setenv("MAIN_JAX_CPU_DEVICES", "5")
    given = options_of()
    assert given == {"cpu_devices": 5, "distributed": Distributed("elsewhere:1", 8, 7, 300, 100)}
    given = options_of(*FLAGS, "--cpu-devices", "4", "--heartbeat-timeout", "10",
                       "--initialization-timeout", "20")  # fmt: skip
    assert given == {"cpu_devices": 4, "distributed": Distributed("host:1234", 3, 2, 20, 10)}
    mixed = options_of("--process-id", "0")["distributed"]
    assert mixed == Distributed("elsewhere:1", 8, 0)
    assert options_of("--distributed", "off")["distributed"] is None
    assert options_of("--distributed", "auto")["distributed"] == Distributed(auto=True)


def test_overrides_stay_overrides():
    words = ["run", "c.yaml", "--align.rounds", "2", *FLAGS, "--seed", "3", "--mesh.fsdp=2"]
    _, rest = build_parser().parse_known_args(words)
    assert rest == ["--align.rounds", "2", "--seed", "3", "--mesh.fsdp=2"]


def test_detection(monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    }  # fmt: skip
    assert detect(slurm) == "SLURM"
    assert detect(slurm | {"SLURM_NTASKS": "1"}) is None  # a shell in an allocation
    assert detect({k: v for k, v in slurm.items() if k != "SLURM_STEP_NODELIST"}) is None  # no srun
    mpi = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "4"}
    assert detect(mpi) == "Open MPI"
    assert detect({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}) == "a TPU pod"
    assert detect({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    assert detect({}) is None
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert options_of()["distributed"] == Distributed(auto=True)
    assert options_of("--distributed", "off")["distributed"] is None
    assert options_of(*FLAGS)["distributed"].auto is False


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run c --coordinator h:1 --process-id 0", "--num-processes (or MAIN_JAX_NUM_PROCESSES)"),
        ("run c --num-processes 2", "--coordinator (or MAIN_JAX_COORDINATOR) is missing"),
        ("run c --coordinator h:1 --num-processes 2 --process-id 2", "--process-id: 2 is too large"),
        ("filter c --coordinator h --num-processes 2 --process-id 1", "expected HOST:PORT, not 'h'"),
        ("run c --num-processes 0", "--num-processes: expected a positive number"),
        ("run c --cpu-devices x", "--cpu-devices: expected a whole number, not 'x'"),
        ("run c --distributed auto --coordinator h:1", "--coordinator and --distributed exclude"),
        ("launch --num-processes 2", "launch: expected -- and one of run, "),
        ("launch --num-processes 2 -- convert a b", "after the options, not 'convert'"),
        ("launch -- run c", "--num-processes"),
        ("launch --num-processes 2 -- run c --process-id=1", "--process-id: launch says it"),
        ("launch --num-processes 2 run c", "unknown argument run"),
    ],
)  # fmt: skip
def test_mistakes_in_the_options(words, expected, capsys):
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert expected in err


def test_mistakes_in_the_variables(monkeypatch, capsys):
    monkeypatch.setenv("MAIN_JAX_PROCESS_ID", "first")
    with pytest.raises(UserError, match="MAIN_JAX_PROCESS_ID: expected a whole number"):
        options_of()


def test_help_has_examples(capsys):
    for verb in ("launch", "run", "score", "generate", "finetune"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = capsys.readouterr().out
        assert f"main-jax {verb} " in shown.split("examples:")[1]
        assert "--cpu-devices" in shown
        assert verb == "launch" or "several processes:" in shown


def test_errors_name_process_and_stage(capsys):
    assert progress.mark("align") == ""
    progress.set_process(1, 4)
    assert progress.mark() == "[process 1 of 4] "
    assert progress.mark("align") == "[process 1 of 4, align] "
    progress.say("nothing")
    with progress.track("nothing", 1, "s") as bar:
        bar.advance()
    assert main(["run", "nofile.yaml"]) == 2
    assert (
        capsys.readouterr().err == "main-jax: [process 1 of 4] nofile.yaml: no such config file\n"
    )


# ------------------------------------------------------------------------------------------ rendezvous


def meeting(*processes, timeout_s=5.0, port=None) -> list[str]:
    """What each (number of processes, process id) says in the end: "" or its error."""
    where = f"localhost:{port or launch.free_port()}"
    said = [""] * len(processes)

    def one(place, count, index):
        try:
            meet(where, count, index, timeout_s)
        except StartError as error:
            said[place] = str(error).replace(where, "HERE")

    threads = [threading.Thread(target=one, args=(i, *p)) for i, p in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return said


def test_all_meet():
    assert meeting((4, 2), (4, 1), (4, 0), (4, 3)) == [""] * 4
    assert meeting((1, 0)) == [""]


def test_every_process_hears_who_is_missing():
    said = meeting((4, 0), (4, 2), timeout_s=0.5)
    assert (
        said
        == [
            "processes 1, 3 of 4 did not come to the coordinator HERE within 0.5 s "
            "(--initialization-timeout)"
        ]
        * 2
    )


def test_every_process_hears_that_numbers_do_not_fit(monkeypatch):
    monkeypatch.setattr("main_jax.lm.rendezvous.LINGER_S", 0.5)
    assert (
        meeting((3, 0), (3, 1), (4, 2))
        == [
            "process 2 of 4 came to the coordinator HERE, where process 0 counts 3: "
            "--num-processes must be the same everywhere"
        ]
        * 3
    )
    assert (
        meeting((3, 0), (3, 1), (3, 1))
        == [
            "two processes came to the coordinator HERE as process 1 of 3: "
            "--process-id must be another for each"
        ]
        * 3
    )


def test_nobody_there_and_something_else_there():
    (line,) = meeting((2, 1), timeout_s=0.5)
    assert line.startswith(
        "process 1 of 2 could not start with the coordinator HERE within 0.5 s ("
    )
    assert "--initialization-timeout" in line
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        (line,) = meeting((2, 0), port=port)
        assert f"process 0 cannot listen on port {port}" in line

        def answer():
            peer, _ = other.accept()
            with peer:
                peer.sendall(b"HTTP/1.0 400\n")

        threading.Thread(target=answer).start()
        (line,) = meeting((2, 1), port=port)
        assert line.startswith("the coordinator HERE: another program answers there")


def test_strangers_and_restarts_do_no_harm():
    """A connection that says nothing of ours, and a process that went away and came again."""
    port = launch.free_port()
    result: list[list[str]] = []
    first = threading.Thread(target=lambda: result.append(meeting((3, 0), port=port)))
    first.start()
    for words in (b"GET / HTTP/1.0\n", b"main_jax 1 of 3\n"):
        until = time.monotonic() + LIMIT_S
        while True:
            try:
                visitor = socket.create_connection(("localhost", port))
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.01)
        with visitor:
            visitor.sendall(words)
    result.append(meeting((3, 1), (3, 2), port=port))
    first.join(LIMIT_S)
    assert sorted(result) == [[""], ["", ""]]


# ------------------------------------------------------------------------------------------ the start


def test_two_processes_with_two_devices_are_one(tmp_path):
    """By variables, from the launcher; what gRPC would ask a web proxy for is on this machine."""
    proxies = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    code, out, err = ended(launched("psum", devices=2, **proxies))
    assert code == 0, err
    assert sorted(out) == ["[0, 2, 2, 10.0]", "[1] [1, 2, 2, 10.0]"], out
    assert err[0] == "said once"
    assert err[1].startswith("adding: 1/1 sums")
    assert len(err) == 2


def test_two_processes_by_flags():
    port = launch.free_port()
    both = [
        start(sys.executable, WORKER, "psum", "--coordinator", f"localhost:{port}",
              "--num-processes", 2, "--process-id", i, "--cpu-devices", 2)
        for i in range(2)
    ]  # fmt: skip
    results = [ended(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    assert [json.loads(out[-1]) for _, out, _ in results] == [[0, 2, 2, 10], [1, 2, 2, 10]]


def slurm(index: int, port: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


def test_two_processes_as_slurm_says():
    port = launch.free_port()
    both = [
        start(sys.executable, WORKER, "psum", "--cpu-devices", 1, **slurm(i, port))
        for i in range(2)
    ]
    results = [ended(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    assert [json.loads(out[-1]) for _, out, _ in results] == [[0, 2, 1, 3], [1, 2, 1, 3]]


def test_a_task_that_slurm_did_not_start_is_missed_in_time():
    """JAX would end the process by an abort."""
    start_ = time.monotonic()
    process = start(sys.executable, WORKER, "psum", "--initialization-timeout", 2,
                    **slurm(0, launch.free_port()))  # fmt: skip
    code, out, err = ended(process)
    assert (code, out) == (2, [])
    assert err == [
        "main-jax: --distributed auto: the processes did not come together within 2 s "
        "(--initialization-timeout)"
    ]
    assert time.monotonic() - start_ < 20


def test_nothing_to_detect():
    code, _, err = ended(start(sys.executable, WORKER, "psum", "--distributed", "auto"))
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith("main-jax: --distributed auto: no TPU pod, SLURM or Open MPI found")


def test_a_wrong_coordinator_is_one_line(tmp_path):
    where = f"localhost:{launch.free_port()}"
    process = start(TOOL, "generate", "--model", tmp_path, "--prompts", "p.jsonl", "--output", "o.jsonl",
                    "--coordinator", where, "--num-processes", 2, "--process-id", 1,
                    "--initialization-timeout", 1)  # fmt: skip
    code, out, err = ended(process)
    assert (code, out) == (2, [])
    assert len(err) == 1, err
    for part in ("main-jax: [process 1 of 2] ", where, "within 1 s", "--initialization-timeout"):
        assert part in err[0]


# ------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize(
    ("ends", "code", "line"),
    [
        ("0,0", 0, None),
        ("75,75", 75, "process {} of 2 ended early as it was asked to (exit code 75); "),
        ("75,1", 1, "process 1 of 2 ended first, with exit code 1; "),
        ("2,.", 2, "process 0 of 2 ended first, with exit code 2, the other was stopped; "),
        ("1,1", 1, "process {} of 2 ended first, with exit code 1; "),
        (".,-9", 1, "process 1 of 2 ended first, by SIGKILL (by a user, or the system for want of "
         "memory), the other was stopped; "),
        ("1,-9", 1, "process 1 of 2 ended first, by SIGKILL ("),
        ("1,-6", 1, "process 0 of 2 ended first, with exit code 1; "),
        ("0,-6", 1, "process 1 of 2 ended first, by SIGABRT (as JAX ends a process that has lost "
         "another); "),
        ("75,.", 75, "process 0 of 2 ended early as it was asked to (exit code 75), the other was "),
    ],
)  # fmt: skip
def test_exit_codes(ends, code, line):
    found, out, err = ended(launched("end", ends))
    assert (found, out) == (code, [])
    if line is None:
        assert err == []
    else:
        (said,) = err
        assert any(said.startswith("main-jax: " + line.format(i)) for i in range(2)), said
        assert said.endswith("the same command continues where the run stopped")


def test_output_and_mistakes_of_several():
    code, out, err = ended(launched("end", "no such file,no such file"))
    assert code == 2
    assert sorted(out) == ["[1] out 1", "out 0"]
    assert sorted(err) == ["[1] err 1", "err 0", "main-jax: no such file"]
    code, out, err = ended(launched("end", "one thing,another"))
    assert code == 2
    assert sorted(err)[2:] == [
        "main-jax: [process 0 of 2] one thing",
        "main-jax: [process 1 of 2] another",
    ]


def test_a_mistake_of_the_command_line_is_said_once(tmp_path):
    code, out, err = ended(start(TOOL, "launch", "--num-processes", 2, "--", "run", "NOFILE.yaml"))
    assert (code, out) == (2, [])
    assert err == ["main-jax: NOFILE.yaml: no such config file"]


@pytest.mark.parametrize("kind", ["known", "unknown"])
def test_one_fails_while_the_other_waits_for_it(kind):
    """Without care JAX waits at the end of the one for the other, which waits in the collective."""
    begin = time.monotonic()
    code, _, err = ended(launched("fail_alone", kind))
    assert time.monotonic() - begin < 20
    ours = [line for line in err if line.startswith("main-jax: ")]
    if kind == "known":
        assert code == 2
        assert ours == ["main-jax: [process 1 of 2, align] the disk is full"]
        assert err[-1] == ours[0]
    else:
        assert code == 1
        assert ours[0] == "main-jax: [process 1 of 2, align] KeyError: 'surprise'"
        assert ours[-1].startswith("main-jax: process 1 of 2 ended first, with exit code 1")
        assert any("Traceback" in line for line in err)


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_one_ends_the_other(victim, tmp_path):
    """Process 0 is also the coordinator of the others, which JAX aborts when it is gone."""
    parent = launched("wait_for_the_killed", tmp_path, VICTIM=str(victim))
    both = pids(tmp_path)
    time.sleep(0.3)  # the other goes into the collective
    os.kill(both[victim], signal.SIGKILL)
    code, _, err = ended(parent)
    assert code == 1
    (ours,) = [line for line in err if line.startswith("main-jax: ")]
    assert ours == err[-1]
    assert ours.startswith(f"main-jax: process {victim} of 2 ended first, by SIGKILL (")
    assert all(gone(pid) for pid in both)


def test_one_that_does_not_hear_sigterm_is_killed(tmp_path):
    parent = launched("deaf", tmp_path, grace=0.5)
    both = pids(tmp_path)
    code, _, err = ended(parent)
    assert code == 7
    assert err == [
        "main-jax: process 1 of 2 ended first, with exit code 7, the other was stopped; "
        "the same command continues where the run stopped"
    ]
    assert gone(both[0])


def test_sigterm_reaches_all(tmp_path):
    parent = launched("wait_for_sigterm", tmp_path)
    both = pids(tmp_path)
    parent.send_signal(signal.SIGTERM)
    code, _, err = ended(parent)
    assert code == 75
    assert len(err) == 1
    assert all(gone(pid) for pid in both)


def test_sigint_is_said_once(tmp_path):
    parent = launched("sleep", tmp_path)
    pids(tmp_path)
    parent.send_signal(signal.SIGINT)
    code, _, err = ended(parent)
    assert code == 130
    assert err == ["main-jax: interrupted; a run continues where it stopped with the same command"]


def test_nothing_outlives_a_killed_launcher(tmp_path):
    parent = launched("sleep", tmp_path)
    both = pids(tmp_path)
    parent.kill()
    parent.wait()
    assert all(gone(pid) for pid in both)
