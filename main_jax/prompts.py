"""The two directions: a pair becomes tokens and a target mask.

    forward  p(R|I):  [prefix] instruction [suffix] response [end]
    reverse  p(I|R):  [prefix] response [suffix] instruction [end]

The target (and nothing else) is predicted and counted, its end token included. The fixed parts come from
the tokenizer's chat template, the built-in plain template, a template of the user's, or are absent
(`none`: `[bos] + encode(condition) + encode(target) + [eos]`). All parts are tokenised apart and joined.
The *unconditional* example has the same fixed parts and target, and an empty condition.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from main_jax.errors import UserError
from main_jax.lm.batches import Example

Tokens = Sequence[int] | np.ndarray
"""Ids of a text or a part of a prompt."""


class Direction(enum.StrEnum):
    """Which side of a pair is predicted."""

    FORWARD = "forward"
    REVERSE = "reverse"

    def sides(self, instruction: Any, response: Any) -> tuple[Any, Any]:
        """(condition, target) of a pair."""
        return (instruction, response) if self is Direction.FORWARD else (response, instruction)


PLAIN = {
    "forward": {"before": "### Instruction:\n", "after": "\n\n### Response:\n"},
    "reverse": {
        "before": "Write the instruction that the following response answers.\n\n### Response:\n",
        "after": "\n\n### Instruction:\n",
    },
}
NONE = {d.value: {"before": "", "after": ""} for d in Direction}
REVERSE_REQUEST = "Write the instruction that the following text answers.\n\n{}"
"""What the user turn says in the reverse direction of a chat template (ours)."""

EXPORTED = """\
{%- set state = namespace(system=@SYSTEM@) -%}
{{- @FIRST@ -}}
{%- for message in messages -%}
{%- if message["role"] == "system" and loop.first -%}
{%- set state.system = message["content"] + "\\n\\n" -%}
{%- elif message["role"] == "user" -%}
{{- @BEFORE@ + state.system + message["content"] + @AFTER@ -}}
{%- set state.system = "" -%}
{%- elif message["role"] == "assistant" -%}
{{- message["content"] + eos_token -}}
{%- else -%}
{{- raise_exception("expected user and assistant messages, and at most one system message, first") -}}
{%- endif -%}
{%- endfor -%}
"""
"""Before/after texts as a chat template. Every tag strips the white space between it and the next one,
so that no line break of this text is output, whatever the renderer's trim_blocks and lstrip_blocks."""
WITH_SYSTEM = """\
{%- if not messages or messages[0]["role"] != "system" -%}
{%- set messages = [{"role": "system", "content": @SYSTEM@}] + messages -%}
{%- endif -%}
"""
"""Before a tokenizer's own chat template: the system message that the model was trained with."""


class Frame(NamedTuple):
    """The fixed tokens of one direction: before and after the condition."""

    prefix: list[int]
    suffix: list[int]


class Rendered(NamedTuple):
    """One pair in one direction. `example` is None when the pair does not fit (`drop_reason`)."""

    example: Example | None
    unconditional: Example | None
    truncated: bool
    drop_reason: str | None


class Prompt:
    """One template object, bound to a tokenizer; used for training, scoring and generation alike.

    Args:
        tokenizer: a transformers tokenizer.
        template: see `config.PromptSettings.template`.
        max_length: longest example, in tokens.
        excess_length_strategy: `drop`, `truncate` or `raise`.
        stop_ids: further ids that end a turn (of `generation_config.json`).
        system: what the system says before a forward prompt; without a chat template it stands before the
            instruction, with a blank line between.

    Raises:
        UserError: the template cannot be used with this tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | dict = "auto",
        max_length: int = 2048,
        excess_length_strategy: str = "drop",
        stop_ids: Sequence[int] = (),
        system: str | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise _fault(tokenizer, " has no eos token; set eos_token in tokenizer_config.json")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.strategy, self.system = excess_length_strategy, system
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "plain"
        self.end = tokenizer.eos_token_id
        self.texts: Any = None  # direction -> before and after; None for `chat`
        if template == "chat":
            self.frames = self._chat_frames()
        else:
            texts = resolve_template(template)
            self.texts = {"plain": PLAIN, "none": NONE}[texts] if isinstance(texts, str) else texts
            self.frames = self._plain_frames(self.texts)
        self.stop_ids = tuple(sorted({self.end, tokenizer.eos_token_id, *stop_ids}))

    # ------------------------------------------------------------------------------------- templates

    def _plain_frames(self, texts: Any) -> dict[Direction, Frame]:
        bos = self.tokenizer.bos_token_id
        first = [self.tokenizer.eos_token_id if bos is None else bos]
        told = {Direction.FORWARD: f"{self.system}\n\n" if self.system else ""}
        return {
            d: Frame(
                first + self.encode(texts[d]["before"] + told.get(d, "")),
                self.encode(texts[d]["after"]),
            )
            for d in Direction
        }

    def _chat_frames(self) -> dict[Direction, Frame]:
        """Renders the chat template around marks and splits there; the template's own BOS is kept."""
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            raise _fault(tokenizer, " has no chat template; use `plain` or `none`")
        condition, target = "main-jax-condition", "main-jax-target"

        def render(text: str, answer: str | None, system: str | None = None) -> str:
            messages = [{"role": "system", "content": system}] if system else []
            messages += [{"role": "user", "content": text}]
            messages += [{"role": "assistant", "content": answer}] if answer else []
            try:
                shown = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=answer is None
                )
                shown.encode()  # no half of a surrogate pair
            except Exception as error:  # jinja2 raises many kinds; all are the template's fault
                reason = " ".join(str(error).split())
                line = f" in line {n}" if (n := getattr(error, "lineno", None)) else ""
                raise _fault(tokenizer, f"'s chat template fails{line}: {reason}") from None
            return shown

        requests = {
            Direction.FORWARD: condition,
            Direction.REVERSE: REVERSE_REQUEST.format(condition),
        }
        frames = {}
        for direction, request in requests.items():
            system = self.system if direction is Direction.FORWARD else None
            parts = render(request, None, system).split(condition)
            if system and system not in parts[0]:
                raise UserError(
                    "the tokenizer's chat template shows no system message before the user's text; "
                    "leave finetune.system_prompts out or use the template `plain`"
                )
            if len(parts) != 2:
                raise _fault(tokenizer, "'s chat template does not show the user's text just once")
            frames[direction] = Frame(self.encode(parts[0]), self.encode(parts[1]))
            if not frames[direction].prefix + frames[direction].suffix:
                raise _fault(tokenizer, "'s chat template is empty around the user's text")
        tail = render(condition, target).partition(target)[2]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ends = [i for i in self.encode(tail) if i in special]
        self.end = ends[0] if ends else tokenizer.eos_token_id
        return frames

    def chat_template(self, direction: Direction = Direction.FORWARD) -> str | None:
        """The Jinja chat template that renders a user's turn as `question` does; None for `chat`.

        It is for the tokenizer of a model that was trained on `direction`. A system message goes before
        the first user's text, with a blank line between; roles other than these and `assistant` raise.
        """
        system = self.system if direction is Direction.FORWARD else None
        if self.texts is None:  # the tokenizer's own is what the model was trained on
            own = self.tokenizer.get_chat_template()
            return WITH_SYSTEM.replace("@SYSTEM@", _jinja_string(system)) + own if system else None
        texts = {
            "@SYSTEM@": _jinja_string(f"{system}\n\n" if system else ""),
            "@FIRST@": "eos_token" if self.tokenizer.bos_token_id is None else "bos_token",
            "@BEFORE@": _jinja_string(self.texts[direction]["before"]),
            "@AFTER@": _jinja_string(self.texts[direction]["after"]),
        }
        return re.sub("@[A-Z]+@", lambda mark: texts[mark[0]], EXPORTED)

    # ---------------------------------------------------------------------------------------- tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, which is faster."""
        if not texts:
            return []
        return self.tokenizer(
            list(texts), add_special_tokens=False,
            return_attention_mask=False, return_token_type_ids=False,  # twice as fast without
            verbose=False,  # how long a text may be is ours to say, in one place
        )["input_ids"]  # fmt: skip

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens and ids that the tokenizer lacks decode to nothing."""
        known = [int(i) for i in ids if i < len(self.tokenizer)]
        return self.tokenizer.decode(known, skip_special_tokens=True)

    # ---------------------------------------------------------------------------------------- pairs

    def render(self, direction: Direction, instruction: Tokens, response: Tokens) -> Rendered:
        """The example of a tokenised pair, conditional and unconditional.

        A pair above `max_length` gets the drop reason `too_long`; under `truncate` the condition is cut
        first (from its end), then the target, never the end token.

        Raises:
            UserError: the pair is too long and the strategy is `raise`.
        """
        condition, target = direction.sides(instruction, response)
        prefix, suffix = self.frames[direction]
        room = self.max_length - len(prefix) - len(suffix) - 1
        excess = len(condition) + len(target) - room
        if excess > 0:
            if self.strategy == "raise":
                raise UserError(
                    f"a pair has {self.max_length + excess} tokens ({direction}), more than max_length "
                    f"{self.max_length}; raise it or set excess_length_strategy to drop or truncate"
                )
            if self.strategy == "drop" or room < 1:
                return Rendered(None, None, False, "too_long")
            condition = condition[: max(0, len(condition) - excess)]
            target = target[: room - len(condition)]
        conditional = _example([prefix, condition, suffix], [target, [self.end]])
        alone = _example([prefix, suffix], [target, [self.end]])
        return Rendered(conditional, alone, excess > 0, None)

    def question(self, direction: Direction, condition: list[int], limit: int) -> np.ndarray | None:
        """The prompt that asks for a target: [P] int32, or None when it exceeds `limit` tokens.

        Under `truncate` the condition is cut from its end instead.
        """
        prefix, suffix = self.frames[direction]
        room = self.room(direction, limit)
        if len(condition) > room:
            if self.strategy != "truncate" or room < 1:
                return None
            condition = condition[:room]
        return np.asarray([*prefix, *condition, *suffix], np.int32)

    def room(self, direction: Direction, limit: int) -> int:
        """How many tokens of a condition a prompt of at most `limit` tokens holds."""
        prefix, suffix = self.frames[direction]
        return limit - len(prefix) - len(suffix)

    def show(self, direction: Direction, instruction: str, response: str) -> str:
        """One example for people: every token with its id, the target marked."""
        example = self.render(direction, self.encode(instruction), self.encode(response)).example
        if example is None:
            return f"{direction}: the example does not fit max_length"
        lines = [
            f"{direction}: {len(example.tokens)} tokens, {example.is_target.sum()} of them targets"
        ]
        for token, is_target in zip(example.tokens, example.is_target, strict=True):
            text = self.tokenizer.convert_ids_to_tokens(int(token))
            lines.append(f"  {'target ' if is_target else '       '}{token:>7}  {text!r}")
        return "\n".join(lines)


def _fault(tokenizer: Any, what: str) -> UserError:
    """Of a tokenizer, which is named by its folder; one that was made in memory has none."""
    folder = f"{tokenizer.name_or_path}: " if tokenizer.name_or_path else ""
    return UserError(f"{folder}the tokenizer{what}")


def _jinja_string(text: str) -> str:
    """A text as a literal: Jinja reads JSON's escapes alike, and looks for no tags inside a literal."""
    return json.dumps(text, ensure_ascii=False)


def _example(condition: Sequence[Tokens], target: Sequence[Tokens]) -> Example:
    tokens = np.concatenate([np.asarray(part, np.int32) for part in (*condition, *target)])
    return Example(tokens, np.arange(len(tokens)) >= sum(map(len, condition)))


def resolve_template(template: str | dict) -> str | dict:
    """A template by name as it is, one by path or value as its checked before/after texts.

    Raises UserError: neither a known name nor a file, or a text is missing.
    """
    if template in ("auto", "chat", "plain", "none"):
        return template
    source = "prompt.template"
    if isinstance(template, str):
        source = template
        if not (template.startswith(("/", ".", "~")) or Path(template).is_file()):
            raise UserError(
                f"template {template!r}: expected auto, chat, plain, none or a YAML file"
            )
        path = Path(template).expanduser()
        if not path.is_file():
            raise UserError(f"{template}: no such template file")
        try:
            template = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    for direction in Direction:
        for part in ("before", "after"):
            try:
                text = template[direction][part]
            except (KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UserError(f"{source}: a template needs the text {direction}.{part}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"{source}: {direction}.{part}: half a surrogate pair, not text")
    return template
