"""Before JAX starts: every process tells process 0 who it is, so that a failed start can be told in a line.

    process i -> 0    main_jax 2 of 4          over the port that JAX's coordinator takes afterwards
    process 0 -> i    main_jax go              once all have come; or
                      main_jax no WHY          to everyone, when they do not fit or one is missing

JAX itself aborts such processes, without saying who is missing. Nothing here is secret or believed
further than these lines.
"""

from __future__ import annotations

import errno
import re
import socket
import time
from contextlib import suppress

LINE_BYTES = 1000
HELLO_S = 2.0
"""For a stranger on our port that says nothing."""
LINGER_S = 2.0
"""Process 0 stays so long where the numbers do not fit: those that come a little later shall hear it too."""


class StartError(Exception):
    """The processes of a run did not come together; the message is one line that says what to do."""


def meet(coordinator: str, num_processes: int, process_id: int, timeout_s: float) -> None:
    """Returns when all processes have called it with the same numbers; raises StartError in all if not.

    coordinator: "host:port" of process 0.
    """
    if num_processes == 1:
        return
    host, port = split(coordinator)
    if process_id == 0:
        _gather(coordinator, port, num_processes, timeout_s)
    else:
        _come(coordinator, host, port, num_processes, process_id, timeout_s)


def split(coordinator: str) -> tuple[str, int]:
    """(host, port). Raises ValueError, one line, without a key."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"expected HOST:PORT, not {coordinator!r}")
    return host.strip("[]"), int(port)


def _gather(coordinator: str, port: int, num_processes: int, timeout_s: float) -> None:
    """Process 0: wait for all, and tell all how it ended."""
    until = time.monotonic() + timeout_s
    try:
        listener = _listen(port, num_processes)
    except OSError as error:
        raise StartError(
            f"the coordinator {coordinator}: process 0 cannot listen on port {port} "
            f"({error.strerror or error}); choose another port"
        ) from None
    peers: list[socket.socket] = []  # also those that do not fit: all hear the answer
    present: dict[int, socket.socket] = {}
    problem = ""
    answer = "no process 0 was stopped"
    try:
        with listener:
            while problem or len(present) < num_processes - 1:
                listener.settimeout(max(until - time.monotonic(), 0.001))
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    missing = sorted({*range(1, num_processes)} - {*present})
                    raise StartError(
                        problem
                        or f"{_named(missing)} of {num_processes} did not come to the coordinator "
                        f"{coordinator} within {timeout_s:g} s (--initialization-timeout)"
                    ) from None
                peers.append(peer)
                hello = re.fullmatch(r"main_jax (\d{1,9}) of (\d{1,9})", _line(peer, HELLO_S))
                if hello is None or problem:
                    continue
                index, count = (int(word) for word in hello.groups())
                if count != num_processes:
                    problem = (
                        f"process {index} of {count} came to the coordinator {coordinator}, where "
                        f"process 0 counts {num_processes}: --num-processes must be the same everywhere"
                    )
                elif index in present and not _gone(present[index]):
                    problem = (
                        f"two processes came to the coordinator {coordinator} as process {index} of "
                        f"{count}: --process-id must be another for each"
                    )
                if problem:
                    until = min(until, time.monotonic() + LINGER_S)
                    continue
                present[index] = peer
                if len(present) == num_processes - 1:  # some may have been stopped since
                    present = {i: peer for i, peer in present.items() if not _gone(peer)}
        answer = "go"
    except StartError as error:
        answer = f"no {error}"
        raise
    finally:
        for peer in peers:
            _send(peer, answer)
            peer.close()


def _come(
    coordinator: str, host: str, port: int, num_processes: int, process_id: int, timeout_s: float
) -> None:
    """Another process: find process 0, say who we are, and wait for its word."""
    until = time.monotonic() + timeout_s
    reason = "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 5.0)) as peer:
                if peer.getsockname() == peer.getpeername():  # nobody there: TCP met itself
                    continue
                reason = "not all other processes came"
                _send(peer, f"{process_id} of {num_processes}")
                # A little longer than process 0, which knows more.
                answer = _line(peer, until - time.monotonic() + 1.0)
        except OSError as error:
            reason, answer = error.strerror or str(error), ""
        if answer == "main_jax go":
            return
        if answer.startswith("main_jax no "):
            raise StartError(answer.removeprefix("main_jax no "))
        if answer:
            raise StartError(
                f"the coordinator {coordinator}: another program answers there, or a run that has "
                f"begun without process {process_id} of {num_processes}; choose another port, and the "
                "same --num-processes everywhere"
            )
        time.sleep(0.2)
    raise StartError(
        f"process {process_id} of {num_processes} could not start with the coordinator {coordinator} "
        f"within {timeout_s:g} s ({reason}): process 0 must run there; for more time "
        "--initialization-timeout"
    )


def _listen(port: int, backlog: int) -> socket.socket:
    """On all addresses, as JAX's coordinator does."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
            )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
    return socket.create_server(("", port), backlog=backlog)


def _line(peer: socket.socket, timeout_s: float) -> str:
    """What it says up to a line's end, or as far as it came: "" for nothing."""
    until = time.monotonic() + timeout_s
    said = b""
    with suppress(OSError):
        while not said.endswith(b"\n") and len(said) < LINE_BYTES:
            peer.settimeout(max(until - time.monotonic(), 0.001))
            part = peer.recv(LINE_BYTES)
            if not part:
                break
            said += part
    return said.decode("utf-8", "replace").strip()


def _send(peer: socket.socket, text: str) -> None:
    with suppress(OSError):
        peer.settimeout(HELLO_S)
        peer.sendall(f"main_jax {text}\n".encode())


def _gone(peer: socket.socket) -> bool:
    """Whether the other side, which waits for our word, has closed."""
    try:
        peer.setblocking(False)
        return peer.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _named(missing: list[int]) -> str:
    if len(missing) == 1:
        return f"process {missing[0]}"
    shown = ", ".join(str(i) for i in missing[:8])
    return f"processes {shown}{' and more' if len(missing) > 8 else ''}"
