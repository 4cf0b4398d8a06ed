"""Formats of a record: what is written, what gets loss, and what a user reads when a field is bad."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from heterofusion.data.formats import detect_format
from replay_builders import (
    CHAT,
    GOOD,
    SPECIAL,
    UIE,
    USER,
    byte_level,
    encode,
    labelled,
    refused,
    whole,
    word_level,
    wrap,
    write,
)

pytestmark = pytest.mark.usefixtures("offline_datasets")

MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Two marked ranges per answer, and a tail between them that no one should learn.
TWO_MARKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}think{% endgeneration %} |{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}<|assistant|>{% endif %}{% endfor %}"
)
# Like the templates of reasoning models: only the last answer is written with its (empty) reasoning.
LAST_DIFFERS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last and m['role'] == 'assistant' %}(thinks) {% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
)


class WithoutOffsets(PreTrainedTokenizerFast):
    """Like a tokenizer in Python, which does not tell where in the text its tokens are."""

    is_fast = False


def merging(kind: type[PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Characters, and the merge `ab`, wherever prompt and answer meet."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "a", "b", "x", "z", "ab"])}
    return wrap(Tokenizer(models.BPE(vocabulary, merges=[("a", "b")])), None, kind)


# ---- what gets loss ---------------------------------------------------------------------------------------------


def test_prompt_completion_strings_get_loss_on_completion_and_eos():
    record = {"prompt": "the answer is", "completion": " yes"}
    for tokenizer in (byte_level(), byte_level(template=CHAT)):  # strings are never templated
        assert whole(record, tokenizer) == "<s>the answer is yes</s>"
        assert labelled(record, tokenizer) == [" yes</s>"]


def test_text_gets_loss_on_everything_but_bos():
    assert labelled({"text": "the answer is yes"}, byte_level()) == ["the answer is yes</s>"]
    # Without a BOS the first token has nothing before it to be predicted from.
    assert encode({"text": "a b c"}, word_level())[1][0] == -100


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the answer is", "  yes\n\n  no "),
        ("the answer is ", "yes"),
        ("the answer is  ", "no"),
        ("", "yes"),
        ("Ann: ä€", "ö 漢字 yes"),
        ("the answer is\n", "\tyes"),
    ],
)
def test_labels_decode_to_the_completion_whatever_the_white_space(prompt, completion, trim):
    tokenizer = byte_level(trim=trim)
    [text] = labelled({"prompt": prompt, "completion": completion}, tokenizer)
    # A token that straddles the border (` yes` after `is `) holds answer characters and gets loss as a whole.
    assert text.removesuffix("</s>").lstrip() == completion.lstrip()
    assert prompt.endswith(text[: len(text) - len(completion + "</s>")])


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, WithoutOffsets])
def test_token_across_the_border_gets_loss(kind):
    tokenizer = merging(kind)
    ids, labels = encode({"prompt": "xa", "completion": "bz"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["x", "ab", "z", "</s>"]
    assert [label != -100 for label in labels] == [False, True, True, True]
    _, labels = encode({"prompt": "xab", "completion": "z"}, tokenizer)
    assert [label != -100 for label in labels] == [False, False, True, True]


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("text", ["the answer is yes", "<s>the answer is yes", "the answer is yes</s>"])
def test_bos_and_eos_are_there_once(single, text):
    ids, labels = encode({"text": text}, byte_level(single))
    assert ids.count(1) == 1 and ids[-1] == labels[-1] == 1
    assert ids.count(0) == ("<s>" in single or "<s>" in text)


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_messages_get_loss_on_every_assistant_turn(template):
    turns = [("system", "be brief"), ("user", "yes?"), ("assistant", "yes"), ("user", "no?"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns], "id": 7}
    tokenizer = byte_level(template=template)
    assert labelled(record, tokenizer) == ["yes</s>", "no</s>"]
    expected = "<s><|system|>be brief</s><|user|>yes?</s><|assistant|>yes</s><|user|>no?</s><|assistant|>no</s>"
    assert whole(record, tokenizer) == expected
    split = {"prompt": record["messages"][:-1], "completion": record["messages"][-1:]}
    assert labelled(split, tokenizer) == ["no</s>"]  # on the completion alone


def test_template_with_several_marks_in_a_turn():
    turns = [{"role": "user", "content": "yes?"}, {"role": "assistant", "content": "yes"}]
    assert labelled({"messages": turns}, byte_level(template=TWO_MARKS)) == ["think", "yes"]


def test_marks_find_turns_that_the_template_rewrites():
    content = "{{ m['content'] }}{{ eos_token }}"
    marked = "{% if m['role'] == 'assistant' %}{% generation %}" + content + "{% endgeneration %}{% else %}"
    template = LAST_DIFFERS.replace(content, marked + content + "{% endif %}")
    turns = [("assistant", " "), ("user", "yes?"), ("assistant", "yes"), ("user", "no?"), ("assistant", "(no)")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    tokenizer = byte_level(template=template)
    assert "</s><|assistant|>(thinks) (no)</s>" in whole(record, tokenizer)
    assert [text.strip() for text in labelled(record, tokenizer)] == ["yes</s>", "(no)</s>"]


@pytest.mark.parametrize(
    ("template", "bos", "thinks"), [(CHAT, "<s>", ""), (MARKED, "<s>", ""), (LAST_DIFFERS, "", "(thinks) ")]
)
def test_alpaca_with_template(template, bos, thinks):
    tokenizer = byte_level(template=template)
    # The template's own words after the generation prompt are part of what the model has to write.
    assert labelled(UIE, tokenizer) == [f"{thinks}person: Ann; person: Bob</s>"]
    assert whole(UIE, tokenizer) == (
        f"{bos}<|user|>List the entities.\nText: Rome is old .\nAnswer:</s><|assistant|>place: Rome</s>"
        "<|user|>List the entities.\nText: Ann met Bob .\nAnswer:</s>"
        f"<|assistant|>{thinks}person: Ann; person: Bob</s>"
    )


def test_alpaca_without_template_is_plain_text():
    tokenizer = byte_level()
    assert labelled(UIE, tokenizer) == [" person: Ann; person: Bob</s>"]
    assert whole(UIE, tokenizer) == (
        "<s>List the entities.\nText: Rome is old .\nAnswer: place: Rome\n"
        "List the entities.\nText: Ann met Bob .\nAnswer: person: Ann; person: Bob</s>"
    )


@pytest.mark.parametrize(
    ("instruction", "extra", "output", "expected"),
    [
        ("Say", "it", "yes", "Say\nit yes"),  # one space where neither side has white space
        ("Say it:", "it", "yes", "Say it: yes"),  # contained already
        ("Say\n", "", "yes", "Say\nyes"),
        ("Say", None, "\nyes", "Say\nyes"),
        ("Say", "  ", " yes", "Say yes"),
    ],
)
def test_alpaca_input_and_spacing(instruction, extra, output, expected):
    record = {"instruction": instruction, "input": extra, "output": output}
    assert whole(record, byte_level()) == f"<s>{expected}</s>"
    assert labelled(record, byte_level())[0].strip().startswith("yes")
    del record["input"]
    if not extra:
        assert whole(record, byte_level()) == f"<s>{expected}</s>"


def test_precedence_of_formats():
    columns = ["text", "output", "instruction", "completion", "prompt", "messages"]
    found = []
    while columns:
        found.append(detect_format(columns))
        columns.pop()
    assert found == ["messages", "prompt_completion", "alpaca", "alpaca", "text", "text"]
    assert detect_format(["prompt", "output"]) is None


# ---- bad records ------------------------------------------------------------------------------------------------


def test_no_known_columns_raises(tmp_path):
    path = write(tmp_path / "a.json", [{"question": "q0", "answer": "a"}])
    refused(path, r"no known columns \(found: question, answer\): give it `messages`, `prompt` and `completion`")
    refused(write(tmp_path / "b.json", [{}]), r"no known columns \(found: none\)")


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (GOOD, {"prompt": "q0", "completion": None}, r"`completion` is null: make it a string"),
        (GOOD, {"prompt": 3, "completion": "a"}, r"`prompt` is of type int"),
        (GOOD, {"prompt": "q0"}, r"the column `completion` is missing \(found: prompt\), but the first record has it"),
        (GOOD, {"prompt": [USER], "completion": "a"}, r"`prompt` and `completion` are of type list and of type str"),
        (GOOD, {"prompt": "\ud800", "completion": "a"}, r"`prompt` holds half a surrogate pair at character 0"),
        ({"text": "a"}, {"text": ["a"]}, r"`text` is of type list"),
        (UIE, {**UIE, "output": None}, r"`output` is null"),
        (UIE, {**UIE, "input": 1.5}, r"`input` is of type float"),
        (UIE, {**UIE, "history": "x"}, r"`history` is 'x': make it a list of \[prompt, answer\] pairs"),
        (UIE, {**UIE, "history": [["x"]]}, r"`history` is .*x.*: make it a list"),
        (UIE, {**UIE, "history": [["x", None]]}, r"`history\[0\]\[1\]` is null"),
        ({"messages": [USER]}, {"messages": "x"}, r"`messages` is of type str: make it a list of messages"),
        ({"messages": [USER]}, {"messages": ["x"]}, r"`messages\[0\]` is 'x': make it an object"),
        ({"messages": [USER]}, {"messages": [{"role": "user"}]}, r"`messages\[0\]` is .*role.*: make it an object"),
        ({"messages": [USER]}, {"messages": [USER, {**USER, "content": None}]}, r"`messages\[1\].content` is null"),
    ],
)
def test_bad_field_raises(tmp_path, first, second, match):
    # Whether the record would be drawn or not: the message is the same for every seed.
    records = [first, second, *[first] * 20]
    refused(write(tmp_path / "a.json", records), rf"a\.json, record 2: {match}", max_examples=1)
    lines = write(tmp_path / "b.jsonl", records)
    refused(lines, rf"b\.jsonl, line 2: {match}", max_examples=1)


def test_messages_without_template_raises(tmp_path):
    turns = [USER, {"role": "assistant", "content": "a"}]
    match = r"needs a chat template, and this tokenizer has none: use `prompt` and `completion` strings"
    refused(write(tmp_path / "a.json", [{"messages": turns}]), match)
    refused(write(tmp_path / "b.json", [{"prompt": turns[:1], "completion": turns[1:]}]), match)


def test_template_that_rewrites_earlier_turns_raises(tmp_path):
    turns = [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}]
    match = r"record 1: .* writes message 2 differently .* mark answers with \{% generation %\}"
    refused(write(tmp_path / "a.json", [{"messages": turns}]), match, word_level(LAST_DIFFERS))
    # The last turn alone can be found.
    split = {"prompt": turns[:3], "completion": turns[3:]}
    assert labelled(split, byte_level(template=LAST_DIFFERS)) == ["(thinks) b</s>"]


@pytest.mark.parametrize(
    ("roles", "template", "match"),
    [
        ("user user assistant", ALTERNATES, r"line 1: .* refuses the conversation \(roles must alternate\)"),
        ("assistant user", CHAT, "line 1: .* starts with an assistant turn"),
    ],
)
def test_conversation_that_the_template_cannot_write_raises(tmp_path, roles, template, match):
    turns = [{"role": role, "content": "a"} for role in roles.split()]
    refused(write(tmp_path / "a.jsonl", [{"messages": turns}]), match, word_level(template))
