"""Our scorer and generator as a language model of lm-evaluation-harness. No torch.

The numbers are those of the harness's own Hugging Face model on the same checkpoint, for which everything
before and after the model is done as there: how a prompt is tokenised, what is cut off where it is too
long, where a generated text ends. (The model's own generation_config.json gives nothing but its end
tokens: no repetition penalty, no default sampling.)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import jinja2
import numpy as np
from etils import epath
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from main_jax.data.files import hashed
from main_jax.errors import UserError
from main_jax.evaluation.calls import Calls
from main_jax.evaluation.likelihood import likelihoods
from main_jax.lm import hf
from main_jax.lm.generate import Sampling, generate
from main_jax.lm.progress import say
from main_jax.lm.sharding import MeshShape, use_mesh
from main_jax.models import Checkpoint

REQUESTS_OF_A_CHUNK = 1024
TEXTS_OF_A_CHUNK = 128
BATCHES_OF_A_CHUNK = 2


class Plan(NamedTuple):
    """What generation_kwargs ask for: how to sample, and the strings and tokens that end a text."""

    sampling: Sampling
    until: list[str]
    stop_ids: tuple[int, ...]


class HarnessModel(TemplateLM):
    """A checkpoint as the harness sees it. Of several processes the first one hands it to the harness.

    Args:
        checkpoint: the model folder, opened.
        tokenizer: its tokenizer, which has an end token.
        folder: where calls are kept, see `Calls`.
        max_length: tokens that the model sees at once, continuation included.
        tokens_per_batch: padded tokens of a scored batch.
        batch_size: texts generated at once.
        seed: of sampling, where a task samples.
        mesh: of this process's devices.
        stop_ids: ids that end a text, beside those of the folder.
    """

    tokenizer: Any

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Any,
        folder: epath.PathLike,
        *,
        max_length: int,
        tokens_per_batch: int,
        batch_size: int,
        seed: int,
        mesh: MeshShape,
        stop_ids: Sequence[int] = (),
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length, self.max_gen_toks = max_length, 256  # as the harness's own
        self._model, self._mesh = cache(checkpoint.model), mesh
        self._stops = {self.eot_token_id, *hf.stop_ids(checkpoint.path), *stop_ids}
        self._budget, self._batch_size, self._seed = tokens_per_batch, batch_size, seed
        self._plans: dict[str, Plan] = {}
        self.calls = Calls(folder, {
            "loglikelihood": (self._score, REQUESTS_OF_A_CHUNK),
            "loglikelihood_rolling": (self._score_texts, TEXTS_OF_A_CHUNK),
            "generate_until": (self._generate, BATCHES_OF_A_CHUNK * batch_size),
        })  # fmt: skip

    # ------------------------------------------------------------------------------- the tokenizer

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context comes after."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids with the special tokens that the tokenizer adds by itself, but no second BOS."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        return self._encode(string, add_special_tokens)

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **how)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation; without its system message where the template takes none."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

        try:
            return render(chat_history)
        except jinja2.TemplateError:
            return render([m for m in chat_history if m["role"] != "system"])

    # ------------------------------------------------------------------------------- what is asked

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding gives it) of each continuation after its context."""
        rows = [dict(zip(("context", "continuation"), r.args, strict=True)) for r in requests]
        return self._ask(
            "loglikelihood", rows, lambda row: (-len(row["context"]), row["context"]),
            "log_likelihood", "is_greedy",
        )  # fmt: skip

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, in windows of `max_length` that follow one another."""
        rows = [{"text": request.args[0]} for request in requests]
        found = self._ask(
            "loglikelihood_rolling", rows, lambda row: -len(row["text"]), "log_likelihood"
        )
        return [nats for (nats,) in found]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to where its `until` says."""
        repeats: Counter[str] = Counter()
        rows = []
        for context, asked in (request.args for request in requests):
            row = {"context": context, "arguments": json.dumps(asked, sort_keys=True)}
            self.plan(row["arguments"])  # better now than after the work
            name = hashed(row)[:16]
            rows.append(row | {"sample": f"{name}-{repeats[name]}"})
            repeats[name] += 1
        found = self._ask(
            "generate_until", rows, lambda row: (row["arguments"], -len(row["context"])), "text"
        )
        return [text for (text,) in found]

    def _ask(
        self, kind: str, rows: list[dict], place: Callable[[dict], Any], *names: str
    ) -> list[tuple]:
        """These columns of the answers, in the requests' order.

        They are worked on in the order of `place`, long ones first: rows of a chunk have about one length,
        and those with the same context are together.
        """
        order = sorted(range(len(rows)), key=lambda i: place(rows[i]))
        answers = self.calls.ask(kind, [rows[i] for i in order])
        if cut := sum(answers.column("truncated")):
            say(
                f"{kind}: {cut:,} of {len(rows):,} requests do not fit {self.max_length} tokens and lost "
                "their beginning"
            )
        columns = zip(*map(answers.column, names), strict=True)
        found = dict(zip(order, columns, strict=True))
        return [found[i] for i in range(len(rows))]

    # ---------------------------------------------------------------------------- what is answered

    def _score(self, chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        asked: list[Any] = [
            SimpleNamespace(args=(row["context"], row["continuation"])) for row in chunk
        ]
        # The harness's method tokenises the pairs, and gives back what `_loglikelihood_tokens` does.
        found: list[Any] = TemplateLM.loglikelihood(self, asked, disable_tqdm=True)
        advance(len(chunk))
        return [answer._asdict() for answer in found]

    def _score_texts(self, chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        windows, owner = [], []
        for i, row in enumerate(chunk):
            for window in get_rolling_token_windows(
                self.tok_encode(row["text"]), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append(("", *make_disjoint_window(window)))
                owner.append(i)
        sums = np.zeros(len(chunk))
        for i, answer in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            sums[i] += answer.log_likelihood
        advance(len(chunk))
        return [{"log_likelihood": float(nats), "truncated": False} for nats in sums]

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[Any]:
        """A `Likelihood` for each (_, context ids, continuation ids)."""
        with use_mesh(self._mesh, local=True):
            pairs = [(context, continuation) for _, context, continuation in requests]
            return likelihoods(self._model(), pairs, self.max_length, self._budget)

    def _generate(self, chunk: Sequence[dict], advance: Callable[[int], None]) -> list[dict]:
        found: dict[int, dict] = {}
        for arguments in dict.fromkeys(row["arguments"] for row in chunk):
            plan = self.plan(arguments)
            members = [i for i, row in enumerate(chunk) if row["arguments"] == arguments]
            contexts = [self._context(chunk[i]["context"]) for i in members]
            room = self.max_length - plan.sampling.max_new_tokens
            with use_mesh(self._mesh, local=True):
                generations = generate(
                    *self._model(), [np.asarray(c[-room:], np.int32) for c in contexts],
                    [chunk[i]["sample"] for i in members], plan.sampling,
                    stop_ids=plan.stop_ids, seed=self._seed, batch_size=self._batch_size,
                    on_done=advance,
                )  # fmt: skip
            for i, context, generation in zip(members, contexts, generations, strict=True):
                text = self._text(generation.tokens.tolist(), plan.until)
                found[i] = {"text": text, "truncated": len(context) > room}
        return [found[i] for i in range(len(chunk))]

    def _context(self, text: str) -> list[int]:
        bos = has_bos_prefix(text, self.tokenizer.bos_token)
        return self._encode(text, False if bos else None) or [self.prefix_token_id]

    def plan(self, arguments: str) -> Plan:
        """What generation_kwargs, as JSON, ask for. Raises UserError for what we do not do."""
        if arguments not in self._plans:
            self._plans[arguments] = self._new_plan(json.loads(arguments))
        return self._plans[arguments]

    def _new_plan(self, asked: dict[str, Any]) -> Plan:
        given: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        eos = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(given.pop("until"), eos=eos)
        new, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
        temperature = float(given.pop("temperature", 0)) * bool(sampled)
        top_p, top_k = given.pop("top_p", None) or 1.0, given.pop("top_k", None) or 0
        if given.pop("num_beams", 1) != 1:
            given["num_beams"] = asked["num_beams"]
        if given:
            raise UserError(
                f"generation_kwargs: {', '.join(given)}: not supported; a task may set until, max_gen_toks, "
                "do_sample, temperature, top_p and top_k"
            )
        if new >= self.max_length:
            raise UserError(
                f"a task asks for {new} new tokens, which leaves no room for a prompt in {self.max_length} "
                "(--max-length, or the model's max_position_embeddings)"
            )
        try:
            sampling = Sampling(new, temperature, top_p, top_k)
        except ValueError as error:
            raise UserError(f"generation_kwargs: {error}") from None
        stops = set(self._stops)
        for text in until:  # where one token is the string, the model need not run on
            ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
            if len(ids) == 1 and self.tokenizer.decode(ids) == text:
                stops.add(ids[0])
        return Plan(sampling, until, tuple(sorted(stops)))

    def _text(self, ids: list[int], until: list[str]) -> str:
        """The text up to the first of `until`, among special tokens too, which it then goes without."""
        ids = ids[: self._end(ids, until)]
        return postprocess_generated_text(
            self.tokenizer.decode(ids, skip_special_tokens=True), until, None
        )

    def _end(self, ids: list[int], until: list[str]) -> int:
        """After how many tokens the harness's own model would have stopped, which looks a few back."""
        whole = self.tokenizer.decode(ids)
        looks = [
            (text, len(self.tokenizer.encode(text, add_special_tokens=False)) + 2)
            for text in until
            if text in whole
        ]
        for end in range(1, len(ids) + 1 if looks else 0):
            for text, back in looks:
                if text in self.tokenizer.decode(ids[max(0, end - back) : end]):
                    return end
        return len(ids)
