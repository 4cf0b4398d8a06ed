"""Prompts of an evaluation against what training made of the same records."""

import pytest

from heterofusion.data.formats import IGNORE_INDEX, detect_format, render_prompt, to_conversation
from heterofusion.data.formats import tokenize_prompt as prompt_ids
from replay_builders import CHAT, byte_level, encode

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[A] {% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}[U] {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A] {% endif %}"
)
PLAIN = [
    {"prompt": "the answer is", "completion": " yes; no"},
    {"prompt": "the answer is  ", "completion": "yes"},  # a token has the second space and the answer
    {"prompt": "the answer is ", "completion": "5 or 6"},  # the space is a token of its own
    {"prompt": "the answer is\n", "completion": "yes"},
    {"prompt": "<s>the answer is", "completion": " yes</s>"},
]
ALPACA = [
    {"instruction": "do it", "output": "yes"},
    {"instruction": "rate it", "output": "3.5"},
    {"instruction": "do it", "input": "here\n", "output": " no", "history": [["one", "two"], ["a ", "b"]]},
]
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
CHATS = [
    {"messages": MESSAGES},
    {"messages": [*MESSAGES, {"role": "user", "content": "thanks"}]},
    {"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]},
]
CASES = [(record, None) for record in PLAIN + ALPACA]
CASES += [(record, template) for template in (CHAT, MARKED) for record in ALPACA + CHATS]


def both(record: dict, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of a training example before its last answer."""
    format = detect_format(record)
    ids, labels = encode(record, tokenizer)
    start = len(ids) - next(i for i, label in enumerate(reversed([*labels])) if label != IGNORE_INDEX)
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return prompt_ids(render_prompt(*to_conversation(record, format), format, tokenizer), tokenizer), ids[:start]


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize(("record", "template"), CASES)
def test_prompts_are_the_beginning_of_training_examples(record, template, single):
    asked, trained = both(record, byte_level(single, template))
    assert asked == trained


@pytest.mark.parametrize(
    ("record", "text", "reference"),
    [
        ({"prompt": "say: ", "completion": "yes\n"}, "say:", "yes\n"),  # the answer's first token has the space
        ({"prompt": "say: ", "completion": "5"}, "say: ", "5"),
        ({"prompt": "say:", "completion": ""}, "say:", ""),
    ],
)
def test_space_before_the_answer_and_no_answer(record, text, reference):
    format = detect_format(record)
    prompt = render_prompt(*to_conversation(record, format), format, byte_level())
    assert (prompt.text, prompt.templated, prompt.reference) == (text, False, reference)


def test_templated_prompt_without_an_answer_is_the_same():
    tokenizer = byte_level(template=CHAT)
    full = render_prompt([], MESSAGES, "messages", tokenizer)
    asked = render_prompt([], [*MESSAGES[:-1], {"role": "assistant", "content": ""}], "messages", tokenizer)
    applied = tokenizer.apply_chat_template(MESSAGES[:-1], tokenize=False, add_generation_prompt=True)
    assert asked.text == full.text == applied and asked.templated
    assert (asked.reference, full.reference) == ("", "four")
