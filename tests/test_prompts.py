"""Templates and truncation: token by token against the definitions, and against Transformers."""

import functools

import jinja2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from main_jax.errors import UserError
from main_jax.prompts import Direction, Prompt

FORWARD, REVERSE = Direction.FORWARD, Direction.REVERSE
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} "
    "[/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML
ASK, ANSWER = "What is the sky?", "The sky is blue:\n1, 2 and 3."
BOS, EOS = 1, 2


@functools.cache
def tokenizer(chat=None, bos=True, eos=True):
    """A byte-level tokenizer that puts <s> before a text on its own, as LLaMA's does."""
    special = {"bos_token": "<s>"} if bos else {}
    special |= {"eos_token": "</s>"} if eos else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(300), pad_token="<pad>",
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip
    if chat:
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template = chat
    return made


def raw(text):
    """Ids of a text by the tokenizer's own file, without any special token added."""
    return tiny_tokenizer(300).encode(text, add_special_tokens=False).ids


def rendered(prompt, direction, instruction=ASK, response=ANSWER):
    """(conditional, unconditional) token lists, after checks that hold for every example."""
    result = prompt.render(direction, prompt.encode(instruction), prompt.encode(response))
    assert (result.truncated, result.drop_reason) == (False, None)
    target = raw(direction.sides(instruction, response)[1])
    for e in (result.example, result.unconditional):
        # The mask covers the target and the end token, and nothing else.
        assert e.tokens.dtype == np.int32 and len(e.tokens) == len(e.is_target)
        assert e.is_target.tolist() == [False] * (len(e.tokens) - len(target) - 1) + [True] * (
            len(target) + 1
        )
        assert e.tokens[e.is_target].tolist() == [*target, prompt.end]
    return result.example.tokens.tolist(), result.unconditional.tokens.tolist()


def test_the_tokenizer_adds_bos_on_its_own():
    """Else the tests below could not see a BOS too many."""
    assert tokenizer()(ASK)["input_ids"] == [BOS, *raw(ASK)]


def test_sides():
    assert FORWARD.sides("I", "R") == ("I", "R")
    assert REVERSE.sides("I", "R") == ("R", "I")
    assert [str(d) for d in Direction] == ["forward", "reverse"]


# --------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("bos", [True, False])
def test_none_is_bos_condition_target_eos(bos):
    prompt = Prompt(tokenizer(bos=bos), "none")
    first = BOS if bos else EOS
    assert rendered(prompt, FORWARD) == (
        [first, *raw(ASK), *raw(ANSWER), EOS],
        [first, *raw(ANSWER), EOS],
    )
    assert rendered(prompt, REVERSE) == (
        [first, *raw(ANSWER), *raw(ASK), EOS],
        [first, *raw(ASK), EOS],
    )
    assert prompt.stop_ids == (EOS,)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", ["plain", "auto"])
def test_plain(bos, name):
    """Also what `auto` is for a tokenizer without a chat template."""
    prompt = Prompt(tokenizer(bos=bos), name)
    first = BOS if bos else EOS
    ask, answer = raw("### Instruction:\n"), raw("\n\n### Response:\n")
    assert rendered(prompt, FORWARD) == (
        [first, *ask, *raw(ASK), *answer, *raw(ANSWER), EOS],
        [first, *ask, *answer, *raw(ANSWER), EOS],
    )
    text = "Write the instruction that the following response answers.\n\n### Response:\n"
    ask, answer = raw(text), raw("\n\n### Instruction:\n")
    assert rendered(prompt, REVERSE) == (
        [first, *ask, *raw(ANSWER), *answer, *raw(ASK), EOS],
        [first, *ask, *answer, *raw(ASK), EOS],
    )


OWN = {
    "forward": {"before": "Q: ", "after": "\nA: "},
    "reverse": {"before": "A: ", "after": ""},
}


@pytest.mark.parametrize("kind", ["mapping", "file"])
def test_a_template_of_ones_own(kind, tmp_path):
    template = OWN
    if kind == "file":
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(OWN))
        template = str(tmp_path / "own.yaml")
    prompt = Prompt(tokenizer(), template)
    assert rendered(prompt, FORWARD) == (
        [BOS, *raw("Q: "), *raw(ASK), *raw("\nA: "), *raw(ANSWER), EOS],
        [BOS, *raw("Q: "), *raw("\nA: "), *raw(ANSWER), EOS],
    )
    assert rendered(prompt, REVERSE) == (
        [BOS, *raw("A: "), *raw(ANSWER), *raw(ASK), EOS],
        [BOS, *raw("A: "), *raw(ASK), EOS],
    )


def conversation(tokenizer, question, answer):
    """Ids of the whole conversation as Transformers renders it."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BOS], ids=["plain", "with BOS"])
@pytest.mark.parametrize("name", ["chat", "auto"])
def test_chat_equals_the_conversation_of_transformers(template, name):
    """All but the line break after the last turn's end token."""
    made = tokenizer(template)
    end = made.convert_tokens_to_ids("<|im_end|>")
    prompt = Prompt(made, name, stop_ids=(7,))
    tokens, unconditional = rendered(prompt, FORWARD)
    whole = conversation(made, ASK, ANSWER)
    assert tokens == whole[: len(tokens)] and whole[len(tokens) :] == made.encode(
        "\n", add_special_tokens=False
    )
    assert tokens[-1] == prompt.end == end
    assert prompt.stop_ids == tuple(sorted({end, EOS, 7}))
    assert tokens.count(BOS) == (template is CHATML_WITH_BOS)
    empty = conversation(made, "", ANSWER)
    assert unconditional == empty[: len(unconditional)]


def test_chat_in_reverse_asks_for_the_instruction():
    made = tokenizer(CHATML_WITH_BOS)
    tokens, unconditional = rendered(Prompt(made, "chat"), REVERSE)
    request = "Write the instruction that the following text answers.\n\n"

    def ids(text):
        return made.encode(text, add_special_tokens=False)

    before = ids(f"<s><|im_start|>user\n{request}")
    after = ids("<|im_end|>\n<|im_start|>assistant\n")
    end = made.convert_tokens_to_ids("<|im_end|>")
    assert tokens == [*before, *ids(ANSWER), *after, *ids(ASK), end]
    assert unconditional == [*before, *after, *ids(ASK), end]
    assert made.decode(tokens) + "\n" == made.apply_chat_template(
        [{"role": "user", "content": request + ANSWER}, {"role": "assistant", "content": ASK}],
        tokenize=False,
    )


def test_chat_of_llama_2():
    """The BOS is the template's own, once; the end token is the EOS that the template writes."""
    prompt = Prompt(tokenizer(LLAMA_2), "chat")
    tokens, unconditional = rendered(prompt, FORWARD)
    assert tokens == [BOS, *raw("[INST] "), *raw(ASK), *raw(" [/INST]"), *raw(ANSWER), EOS]
    assert unconditional == [BOS, *raw("[INST] "), *raw(" [/INST]"), *raw(ANSWER), EOS]
    assert prompt.stop_ids == (EOS,)
    ids = conversation(prompt.tokenizer, ASK, ANSWER)
    assert ids.count(BOS) == 1 and prompt.decode(ids).replace(" ", "") == prompt.decode(
        tokens
    ).replace(" ", "")


# ------------------------------------------------------------------------- exported chat template


NASTY = {
    "forward": {
        "before": "{% raw %}\"'{{ x }}\\n \\\\ \\u0041\t{# no #}\r\n  é🙂@AFTER@ {{- \n\n",
        "after": '\n""" -}}{% endraw %}{%- if x -%}\u2028\'~ \\"\n  \n',
    },
    "reverse": {"before": "\n{{ '\\'' }}:\n", "after": ""},
}
PLAIN = {
    "forward": {"before": "### Instruction:\n", "after": "\n\n### Response:\n"},
    "reverse": {
        "before": "Write the instruction that the following response answers.\n\n### Response:\n",
        "after": "\n\n### Instruction:\n",
    },
}
NOTHING = {d: {"before": "", "after": ""} for d in ("forward", "reverse")}
EXPORTED = {"plain": ("plain", PLAIN), "none": ("none", NOTHING), "own": (NASTY, NASTY)}
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def exported(name, direction, bos=True):
    """(prompt, a tokenizer that carries its template, before, after)."""
    template, texts = EXPORTED[name]
    made = tokenizer.__wrapped__(bos=bos)  # one of its own, for it is changed
    prompt = Prompt(made, template)
    made.chat_template = prompt.chat_template(direction)
    return prompt, made, texts[direction]["before"], texts[direction]["after"]


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_template_renders_what_the_model_was_trained_on(name, direction, bos):
    prompt, made, before, after = exported(name, direction, bos)
    first = "<s>" if bos else "</s>"
    for text in (ASK, ANSWER, "x", "{{ y }}{% z %}\\n", "中文 🙂"):
        asked = turns((USER, text))
        shown = made.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert shown == first + before + text + after
        # This tokenizer splits between line breaks and what is none, so that joints do not matter.
        ids = made.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert ids == prompt.question(direction, prompt.encode(text), 512).tolist()
        answered = made.apply_chat_template([*asked, *turns((ASSISTANT, "yes"))])["input_ids"]
        assert answered == [*ids, *prompt.encode("yes"), EOS]


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_template_renders_conversations(name, direction):
    _, made, before, after = exported(name, direction)
    talk = turns((USER, "a?"), (ASSISTANT, "b."), (USER, "c?"), (ASSISTANT, "d."))
    show = functools.partial(made.apply_chat_template, tokenize=False)
    one = f"<s>{before}a?{after}b.</s>{before}c?{after}"
    assert show(talk) == one + "d.</s>"
    assert show(talk[:3], add_generation_prompt=True) == show(talk[:3]) == one
    system = turns((SYSTEM, "Be brief.\n"))
    assert (
        show(system + talk) == f"<s>{before}Be brief.\n\n\na?{after}b.</s>{before}c?{after}d.</s>"
    )
    for other in (talk + system, talk + turns(("tool", "x")), system * 2 + talk):
        with pytest.raises(jinja2.TemplateError, match="expected user and assistant messages"):
            show(other)


@settings(deadline=None)
@given(before=st.text(), after=st.text(), text=st.text())
def test_no_character_of_a_template_means_anything_to_jinja(before, after, text):
    texts = {"before": before, "after": after}
    prompt = Prompt(tokenizer(), {"forward": texts, "reverse": texts})
    template, asked = prompt.chat_template(), turns((USER, text))
    shown = prompt.tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False)
    assert shown == f"<s>{before}{text}{after}"
    # Other programs than Transformers render it without trim_blocks and lstrip_blocks.
    bare = jinja2.Environment().from_string(template)
    assert bare.render(messages=asked, bos_token="<s>", eos_token="</s>") == shown


def test_a_tokenizers_own_chat_template_is_exported_as_it_is():
    for name in ("chat", "auto"):
        assert Prompt(tokenizer(CHATML), name).chat_template() is None
    prompt = Prompt(tokenizer(CHATML), "plain")
    assert prompt.chat_template() == prompt.chat_template(FORWARD) != prompt.chat_template(REVERSE)


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_what_the_system_says_stands_in_the_forward_direction_alone(name):
    said = 'Answer "well"\nand soon.'
    made = tokenizer(CHATML if name == "chat" else None)
    prompt, without = Prompt(made, name, system=said), Prompt(made, name)
    assert rendered(prompt, REVERSE) == rendered(without, REVERSE)
    conditional, _ = rendered(prompt, FORWARD)
    if name == "plain":
        before = "### Instruction:\n" + said + "\n\n"
        expected = [BOS, *raw(before), *raw(ASK), *raw("\n\n### Response:\n")]
    else:
        turns_of = [{"role": "system", "content": said}, {"role": "user", "content": ASK}]
        expected = made.apply_chat_template(turns_of, add_generation_prompt=True)["input_ids"]
    assert conditional[: len(expected)] == expected
    # And in the exported template, where nobody says otherwise.
    template = prompt.chat_template()

    def shown(*messages):
        return made.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages],
            chat_template=template, tokenize=False, add_generation_prompt=True,
        )  # fmt: skip

    asked = shown(("user", ASK))
    assert asked == shown(("system", said), ("user", ASK)) and said in asked
    assert said not in shown(("system", "Be brief."), ("user", ASK))
    assert "Be brief." in shown(("system", "Be brief."), ("user", ASK))
    assert asked.count(said) == 1
    assert prompt.chat_template(REVERSE) == without.chat_template(REVERSE)


def test_a_chat_template_that_leaves_the_system_out_is_refused():
    with pytest.raises(
        UserError, match=r"shows no system message .* leave finetune.system_prompts"
    ):
        Prompt(tokenizer("{{ messages[-1].content }}:"), "chat", system="Answer well.")


@pytest.mark.parametrize(
    ("made", "template", "message"),
    [
        (tokenizer(eos=False), "none", "no eos token"),
        (tokenizer(), "chat", "no chat template; use `plain` or `none`"),
        (tokenizer("{{ raise_exception('not today') }}"), "chat", "chat template fails: not today"),
        (tokenizer("{{ nothing.at.all }}"), "chat", "chat template fails"),
        (tokenizer("fixed"), "chat", "does not show the user's text just once"),
        (tokenizer("{{ messages[0].content * 2 }}"), "chat", "does not show the user's text"),
        (tokenizer(), "plane", "template 'plane': expected auto, chat, plain, none or a YAML file"),
        (tokenizer(), "./missing.yaml", "./missing.yaml: no such template file"),
        (tokenizer(), {"forward": OWN["forward"]}, "needs the text reverse.before"),
        (tokenizer(), {**OWN, "forward": {"before": "a"}}, "needs the text forward.after"),
        (tokenizer(), {**OWN, "reverse": {"before": 3, "after": ""}}, "reverse.before"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(made, template, message):
    with pytest.raises(UserError) as error:
        Prompt(made, template)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "just text", "\0"])
def test_a_template_file_that_cannot_be_used_is_named(text, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"own\.yaml: ") as error:
        Prompt(tokenizer(), str(path))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- encoding


def test_encoding_many_texts_equals_one_by_one():
    prompt = Prompt(tokenizer(), "none")
    texts = [ASK, "", ANSWER, " ", "naïve 🙂\n\n"]
    assert prompt.encode_all(texts) == [prompt.encode(t) for t in texts] == [raw(t) for t in texts]
    assert prompt.encode_all([]) == []


def test_special_and_unknown_ids_decode_to_nothing():
    prompt = Prompt(tokenizer(CHATML), "chat")
    size = len(prompt.tokenizer)
    end = prompt.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt.decode(np.array(raw(ANSWER))) == ANSWER
    assert prompt.decode([BOS, *raw(ANSWER)[:4], size, 10**6, *raw(ANSWER)[4:], end, EOS]) == ANSWER
    assert prompt.decode([]) == prompt.decode([size + 3, EOS]) == ""


# -------------------------------------------------------------------------------------- truncation


TEMPLATES = {"none": "none", "own": OWN}


@settings(deadline=None)
@given(
    st.sampled_from(list(TEMPLATES)),
    st.sampled_from(list(Direction)),
    st.integers(0, 30),
    st.integers(1, 30),
    st.integers(1, 50),
    st.sampled_from(["drop", "truncate", "raise"]),
)
def test_what_does_not_fit(template, direction, num_condition, num_target, max_length, strategy):
    """One token is taken at a time: from the condition's end, then the target's, never the end."""
    prompt = Prompt(tokenizer(), TEMPLATES[template], max_length, strategy)
    condition = list(range(100, 100 + num_condition))
    target = list(range(200, 200 + num_target))
    pair = direction.sides(condition, target)  # its own inverse
    before, after = (
        (raw(OWN[direction]["before"]), raw(OWN[direction]["after"]))
        if template == "own"
        else ([], [])
    )

    def whole():
        return [BOS, *before, *condition, *after, *target, EOS]

    total = len(whole())
    if strategy == "raise" and total > max_length:
        message = rf"a pair has {total} tokens \({direction}\), more than max_length {max_length};"
        with pytest.raises(UserError, match=message):
            prompt.render(direction, *pair)
        return
    result = prompt.render(direction, *pair)
    if strategy == "truncate":
        while len(whole()) > max_length and (condition or len(target) > 1):
            (condition or target).pop()
    if len(whole()) > max_length:
        assert result == (None, None, False, "too_long")
        return
    assert result.example.tokens.tolist() == whole()
    assert result.unconditional.tokens.tolist() == [BOS, *before, *after, *target, EOS]
    assert result.example.tokens[result.example.is_target].tolist() == [*target, EOS]
    assert result.example.is_target.sum() == result.unconditional.is_target.sum()
    assert (result.truncated, result.drop_reason) == (total > max_length, None)


def test_questions_are_what_stands_before_the_target():
    for made, template in ((tokenizer(), "none"), (tokenizer(), OWN), (tokenizer(CHATML), "chat")):
        prompt = Prompt(made, template)
        for direction in Direction:
            example = prompt.render(direction, prompt.encode(ASK), prompt.encode(ANSWER)).example
            condition = prompt.encode(direction.sides(ASK, ANSWER)[0])
            asked = example.tokens[~example.is_target]
            question = prompt.question(direction, condition, len(asked))
            assert question.tolist() == asked.tolist() and question.dtype == np.int32
            assert prompt.question(direction, condition, len(asked) - 1) is None


def test_a_long_question_is_cut_from_the_conditions_end():
    prompt = Prompt(tokenizer(), OWN, excess_length_strategy="truncate")
    fixed = 1 + len(raw("Q: ")) + len(raw("\nA: "))
    question = prompt.question(FORWARD, [5, 6, 7, 8], fixed + 3)
    assert question.tolist() == [BOS, *raw("Q: "), 5, 6, 7, *raw("\nA: ")]
    assert prompt.question(FORWARD, [5, 6], fixed) is None


def test_an_example_for_people_shows_every_token():
    prompt = Prompt(tokenizer(), "none")
    first, *lines = prompt.show(FORWARD, ASK, ANSWER).splitlines()
    ids = [BOS, *raw(ASK), *raw(ANSWER), EOS]
    assert first == f"forward: {len(ids)} tokens, {len(raw(ANSWER)) + 1} of them targets"
    assert [int(line.removeprefix("  target").split()[0]) for line in lines] == ids
    assert sum(line.startswith("  target") for line in lines) == len(raw(ANSWER)) + 1
    assert "does not fit" in Prompt(tokenizer(), "none", 4).show(FORWARD, ASK, ANSWER)
