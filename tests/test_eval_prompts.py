"""Prompts of an evaluation against what training made of the same records."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from heterofusion.data.formats import IGNORE_INDEX, detect_format, render, render_prompt, to_conversation, tokenize
from heterofusion.data.formats import tokenize_prompt as prompt_ids
from heterofusion.zoo import FAMILIES, make_examples, zoo_path

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[A] {% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}[U] {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A] {% endif %}"
)


def byte_level(chat: str | None = None, appends_eos: bool = False, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that joins a space with the letters behind it, but not with digits (as Llama 3's)."""
    letters = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ"]
    words = [f"Ġ{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {token: i for i, token in enumerate(letters + words, start=3)}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", word[1]) for word in words]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    single = ("<s> " if adds_bos else "") + "$A" + (" </s>" if appends_eos else "")
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat, **special)


def both(record: dict, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of a training example before its last answer."""
    format = detect_format(record)
    parts = to_conversation(record, format)
    rendered = render(*parts, format, tokenizer)
    ids, labels = tokenize(rendered, tokenizer)
    start = len(ids) - next(i for i, label in enumerate(reversed([*labels])) if label != IGNORE_INDEX)
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return prompt_ids(render_prompt(*parts, format, tokenizer), tokenizer), ids[:start]


PLAIN = [
    {"prompt": "say:", "completion": " yes; no"},
    {"prompt": "say: ", "completion": "yes"},
    {"prompt": "say:  ", "completion": "yes"},
    {"prompt": "say: ", "completion": "5 or 6"},  # the space is a token of its own
    {"prompt": "say:\n", "completion": "yes"},
    {"prompt": "<s>say:", "completion": " yes</s>"},
]
ALPACA = [
    {"instruction": "do it", "output": "done"},
    {"instruction": "do it", "output": " done"},
    {"instruction": "rate it", "output": "3.5"},
    {"instruction": "do it", "input": "here\n", "output": "done", "history": [["one", "two"], ["a ", "b"]]},
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


@pytest.mark.parametrize("appends_eos", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(("record", "template"), CASES)
def test_prompts_are_the_beginning_of_training_examples(record, template, adds_bos, appends_eos):
    asked, trained = both(record, byte_level(template, appends_eos=appends_eos, adds_bos=adds_bos))
    assert asked == trained


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_the_zoo_are_the_beginning_of_training_examples(family):
    tokenizer = AutoTokenizer.from_pretrained(zoo_path(family))
    for record in make_examples("re_town", "test", 5):
        asked, trained = both(record, tokenizer)
        assert asked == trained == tokenizer(record["prompt"])["input_ids"]


@pytest.mark.parametrize(
    ("record", "text", "reference"),
    [
        ({"prompt": "say: ", "completion": ""}, "say:", ""),
        ({"instruction": "do it", "output": ""}, "do it", ""),
        ({"instruction": "do it", "output": "done\n"}, "do it", "done\n"),
    ],
)
def test_prompt_without_an_answer(record, text, reference):
    format = detect_format(record)
    prompt = render_prompt(*to_conversation(record, format), format, byte_level())
    assert (prompt.text, prompt.templated, prompt.reference) == (text, False, reference)


def test_templated_prompt_without_an_answer_is_the_same():
    tokenizer = byte_level(CHAT)
    empty = [*MESSAGES[:-1], {"role": "assistant", "content": ""}]
    full = render_prompt([], MESSAGES, "messages", tokenizer)
    asked = render_prompt([], empty, "messages", tokenizer)
    assert (
        asked.text
        == full.text
        == tokenizer.apply_chat_template(MESSAGES[:-1], tokenize=False, add_generation_prompt=True)
    )
    assert (asked.reference, full.reference) == ("", "four")
    assert asked.templated
