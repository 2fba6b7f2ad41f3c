"""Messages to an OpenAI-compatible chat-completions endpoint: many at once, none asked twice.

    endpoint = open_endpoint("http://localhost:8000/v1", "my-judge")
    text = endpoint.ask("Which is better? ...")
    answers = ask_all(endpoint, messages, "outputs.judged.cache")

A message is sent again while the endpoint is busy. `ask_all` keeps every answer at once as a file of its
own, named by a digest of what was asked of which model: what is killed continues.

The key comes from the environment and goes nowhere but into the request's header: redirections are not
followed, and what an error says is cleaned of it. Only the standard library is needed.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import jax
from etils import epath

from main_jax.data.files import brief, hashed
from main_jax.errors import UserError
from main_jax.lm.multihost import Preempted, stop_asked
from main_jax.lm.progress import say, track
from main_jax.pairs import write_atomically

KEY_ENV = "OPENAI_API_KEY"
PATH = "/chat/completions"
PARAMETERS = MappingProxyType({"temperature": 0})
BUSY = (408, 425, 429)
"""Statuses, beside 5xx, after which the same request may do."""
UNFIT = (400, 413, 422)
"""Statuses of a request that the endpoint does not take: too long a text, or a wrong parameter."""
ATTEMPTS = 8
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
PATIENCE_S = 900.0
"""The longest Retry-After that is waited for."""
SAID_EVERY_S = 10.0


class Refused(UserError):
    """The endpoint does not take this one message."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked. `parameters` go into the body of every request as they are."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    parameters: Mapping[str, Any] = field(default_factory=PARAMETERS.copy)
    timeout_s: float = 300.0

    def __str__(self) -> str:
        parts = urlsplit(self.url)  # a query may hold what is not for the log
        return f"{self.model} at {parts.scheme}://{parts.netloc}{parts.path}"

    def key_of(self, text: str) -> str:
        """A digest of all that the answer to a message depends on; the address is not of it."""
        return hashed([self.model, dict(self.parameters), text])

    def ask(self, text: str, wait: Callable[[float, str], None] | None = None) -> str:
        """The answer to one user message; empty where the model says nothing.

        Sent again, up to `ATTEMPTS` times, after 429, 5xx, a timeout or a broken connection: after
        FIRST_WAIT_S, doubled every time, with jitter, and never before what Retry-After says.

        Args:
            text: the message.
            wait: called with the seconds and the reason, in place of `time.sleep`; may raise.

        Raises:
            Refused: it does not take this message.
            UserError: it takes none, stays busy, or is no such endpoint; one line, without the key.
        """
        message = {"role": "user", "content": text}
        body = {"model": self.model, "messages": [message], **self.parameters}
        data = json.dumps(body).encode()
        for attempt in range(ATTEMPTS):
            after = None
            try:
                return self._answer(self._post(data))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}{self._detail(error)}"
                if error.code not in BUSY and error.code < 500:
                    hint = f"; is {KEY_ENV} or --judge-key-env right?" if error.code == 401 else ""
                    kind = Refused if error.code in UNFIT else UserError
                    raise kind(f"{self}: {reason}{hint}") from None
                after = _retry_after(error.headers.get("Retry-After"))
            except (OSError, HTTPException) as error:
                reason = self._clean(getattr(error, "reason", None) or error)
            if (after or 0) > PATIENCE_S:
                raise UserError(f"{self}: {reason}; asks to come back in {after:,.0f} s")
            if attempt + 1 < ATTEMPTS:
                delay = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1)
                delay = delay if after is None else after + delay / 2
                wait(delay, reason) if wait else time.sleep(delay)
        raise UserError(f"{self}: {reason}, {ATTEMPTS} times in a row")

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, data, headers)
        with _OPENER.open(request, timeout=self.timeout_s) as response:
            return response.read()

    def _answer(self, raw: bytes) -> str:
        with suppress(ValueError, LookupError, TypeError):
            content = json.loads(raw)["choices"][0]["message"]["content"]
            if content is None or isinstance(content, str):
                return (content or "").encode(errors="replace").decode()  # half a surrogate pair
        raise UserError(
            f"{self}: no chat completion but {self._clean(raw.decode(errors='replace'))}"
        )

    def _detail(self, error: urllib.error.HTTPError) -> str:
        try:
            with error:
                text = error.read(10_000).decode(errors="replace")
        except (OSError, HTTPException):
            text = ""
        with suppress(ValueError, LookupError, TypeError):
            text = json.loads(text)["error"]["message"]
        return f" ({self._clean(text)})" if text else ""

    def _clean(self, said: object) -> str:
        text = str(said)
        return brief(text.replace(self.key, "***") if self.key else text, 200)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the key to another host; it is an error."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def open_endpoint(
    url: str,
    model: str,
    key_env: str | None = None,
    parameters: Mapping[str, Any] = PARAMETERS,
) -> Endpoint:
    """The endpoint, nothing asked yet.

    Args:
        url: the API's base (`https://HOST/v1`), or the address of its chat completions itself.
        model: a name that the endpoint knows.
        key_env: the environment variable that holds the key; by default OPENAI_API_KEY, where it is set.
        parameters: of the sampling; a null leaves one out.

    Raises:
        UserError: no HTTP address, or the key is not there.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port
        known = False
    if not known or not url.isascii() or any(c.isspace() for c in url):
        raise UserError("--judge-url: expected an address like https://HOST/v1")
    if parts.username or parts.password:
        raise UserError("--judge-url: a password in it; give the key by the environment")
    path = parts.path.rstrip("/")
    path = path if path.endswith(PATH) else path + PATH
    key = os.environ.get(key_env or KEY_ENV, "").strip()
    if key_env and not key:
        raise UserError(f"--judge-key-env: the environment variable {key_env} is not set")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{key_env or KEY_ENV}: holds what cannot stand in an HTTP header")
    given = {name: value for name, value in parameters.items() if value is not None}
    return Endpoint(parts._replace(path=path, fragment="").geturl(), model, key or None, given)


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a header with seconds or with a date; None where it says neither."""
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header or "").timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


# ------------------------------------------------------------------------------------------- many


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


def ask_all(
    endpoint: Endpoint, texts: Iterable[str], cache: epath.PathLike, concurrency: int = 8
) -> dict[str, str]:
    """The answer to every text; each is in a file of the folder `cache` as soon as it has come.

    The answer to a message that the endpoint refuses is the reason, which is not kept, where it takes
    others.

    Raises:
        UserError: see `Endpoint.ask`; what was answered is kept.
        Preempted: the program was asked to stop.
    """
    folder = epath.Path(cache)
    files = {text: folder / f"{endpoint.key_of(text)}.json" for text in texts}
    answers, refused = _kept(files), {}
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, str | Exception]] = queue.SimpleQueue()
    for text in files:
        if text not in answers:
            todo.put(text)
    stop, said_at = threading.Event(), -math.inf
    alone = jax.process_count() == 1  # of several processes, one cannot agree on a stop

    def wait(seconds: float, reason: str) -> None:
        nonlocal said_at
        if not stop.is_set() and time.monotonic() - said_at > SAID_EVERY_S:
            said_at = time.monotonic()
            say(f"{endpoint}: {reason}; asks again in {seconds:.0f} s")
        if stop.wait(seconds):
            raise _Stopped

    def work() -> None:
        while not stop.is_set():
            try:
                text = todo.get_nowait()
            except queue.Empty:
                return
            try:
                answer = endpoint.ask(text, wait)
                told = json.dumps({"model": endpoint.model, "answer": answer})
                write_atomically(
                    files[text], lambda file, told=told: file.write_text(told), own=True
                )
            except Exception as error:  # for the thread that waits for this one
                answer = error
            done.put((text, answer))
            if isinstance(answer, Exception) and not isinstance(answer, Refused):
                stop.set()  # nothing more is asked in vain, or for an answer that nobody takes

    with track("judge", len(files), "answers", len(answers)) as bar:
        try:
            for _ in range(min(concurrency, todo.qsize())):  # daemons: an interrupt ends at once
                threading.Thread(target=work, daemon=True).start()
            while len(answers) + len(refused) < len(files):
                if alone and stop_asked():
                    raise Preempted(f"{folder}: stopped after {len(answers):,} answers")
                try:
                    text, answer = done.get(timeout=1)
                except queue.Empty:
                    continue
                if isinstance(answer, Refused):
                    refused[text] = str(answer)
                    if answers or len(refused) < min(concurrency, len(files)):
                        continue
                if isinstance(answer, Exception):
                    raise answer
                answers[text] = answer
                bar.advance()
        finally:
            stop.set()
    return answers | refused


def _kept(files: Mapping[str, epath.Path]) -> dict[str, str]:
    """The answers that are there; a file that a lost machine has left empty is none."""
    answers = {}
    for text, file in files.items():
        with suppress(FileNotFoundError, ValueError):
            answers[text] = json.loads(file.read_bytes())["answer"]
    return answers
