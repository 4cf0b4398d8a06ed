"""Prompts without answers, labels in the columns of their prompts, templates, and which labels are well formed."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from heterofusion.data.files import Records
from heterofusion.experts.generation import Answer as Label
from heterofusion.experts.generation import GenerationArguments
from heterofusion.labelling.arguments import LabelModelArguments
from heterofusion.labelling.prompts import find_template, invented_prompts
from heterofusion.labelling.tasks import format_check, labelled_record, prompt_set
from heterofusion.zoo import TASKS, make_examples, zoo_path

USER, SYSTEM = {"role": "user", "content": "tool?"}, {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "wrong"}
EMPTY = {"role": "assistant", "content": ""}


def prompts_of(rows):
    return prompt_set("task", Records("prompt file p.jsonl", rows), [*range(len(rows))])


@pytest.mark.parametrize(
    ("row", "example", "record"),
    [
        ({"prompt": "a:"}, ("a:", ""), {"prompt": "a:", "completion": " b "}),
        ({"prompt": "a:", "completion": " wrong"}, ("a:", ""), {"prompt": "a:", "completion": " b "}),
        ({"prompt": "a: "}, ("a: ", ""), {"prompt": "a: ", "completion": "b "}),
        ({"prompt": [USER]}, ([USER], [EMPTY]),
         {"prompt": [USER], "completion": [{"role": "assistant", "content": "b"}]}),
        ({"messages": [SYSTEM, USER, ANSWER]}, ([], [SYSTEM, USER, EMPTY]),
         {"messages": [SYSTEM, USER, {"role": "assistant", "content": "b"}]}),
        ({"messages": [USER, ANSWER, USER]}, ([], [USER, ANSWER, USER, EMPTY]),
         {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "b"}]}),
        ({"instruction": "Say", "input": "it", "history": []}, ([{"role": "user", "content": "Say\nit"}], [EMPTY]),
         {"instruction": "Say", "input": "it", "output": "b"}),
        # as the replay is read: `prompt` beside these columns is often the whole example, its answer included
        ({"instruction": "Say", "input": "it", "output": "wrong", "prompt": "### Say it: wrong"},
         ([{"role": "user", "content": "Say\nit"}], [EMPTY]), {"instruction": "Say", "input": "it", "output": "b"}),
        ({"prompt": "a:", "text": "a: wrong"}, ("a:", ""), {"prompt": "a:", "completion": " b "}),
    ],
)  # fmt: skip
def test_answers_are_not_looked_at_and_labels_have_the_columns_of_the_prompt(row, example, record):
    prompts = prompts_of([row])
    assert prompts.examples == [example]
    assert labelled_record(prompts, 0, " b ", "a:") == record


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"prompt file p\.jsonl has no column of prompts \(found: text\)"),
        ({"prompt": "  "}, "record 1: `prompt` is empty"),
        ({"prompt": None}, "`prompt` .* null"),
        ({"prompt": [USER, ANSWER]}, "`prompt` ends with a turn of the assistant"),
        ({"messages": [SYSTEM, ANSWER]}, "`messages` ends with a turn of the system"),
        ({"messages": []}, "`messages` ends with no turn"),
    ],
)
def test_records_without_a_prompt_raise(row, message):
    with pytest.raises(ValueError, match=message):
        prompts_of([row])


# ---- well-formed labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "text", "fine"),
    [
        ("NER", " tool: axe; plant: rose", True),
        ("NER", " None", True),
        ("NER", " insect: bee", True),  # named by the prompt alone
        ("NER", " boat: ship", False),
        ("NER", " axe", False),
        ("NER", "", False),
        ("RE", " tool: a, b", True),
        ("RE", " tool: a", False),
        ("uie", " tool: a", True),
        ("sst2", " Positive.", True),
        ("sst2", " rather positive", False),
        ("stsb", " 4.5", True),
        ("stsb", " 6", False),
        ("exact_match", " anything", True),
        ("exact_match", " ", False),
        (None, " anything", True),
        (None, "", False),
    ],
)
def test_labels_that_the_metric_can_read(metric, text, fine):
    check = format_check(metric, [" tool: axe; plant: rose", " None"])
    assert check(Label(0, text, 3), "Options: Insect\nText: a bee") is fine
    assert not check(Label(0, text, 3, ended=False), "Options: Insect\nText: a bee")


# ---- templates --------------------------------------------------------------------------------------------------


def template_of(rows):
    prompts = prompts_of(rows)
    return find_template(prompts, prompts)


@pytest.mark.parametrize("task", TASKS)
def test_template_of_the_zoo(task):
    rows = make_examples(task, "replay", 12)
    template = template_of(rows)
    assert template.beginning.endswith("\nText:") and template.end == "\nAnswer:"
    assert template.lines == (["", "Entities:"] if TASKS[task].kind == "ET" else [""])
    for row in rows:  # continued by the rest, the beginning gives the prompt again
        label = Label(0, row["prompt"][len(template.beginning) :] + row["completion"], 9)
        assert template.input_of(label) == row["prompt"]


def test_what_is_off_the_template_repeated_or_of_the_replay_is_dropped():
    rows = [{"prompt": f"Find it.\nText: {text} .\nWords: {text}\nAnswer:"} for text in ("one", "two", "three")]
    template = template_of(rows)
    texts = [
        " four .\nWords: four\nAnswer: x", " four  .\nWords: four\nAnswer: y", " two .\nWords: two\nAnswer:",
        " five .\nAnswer:", " six .\nWord: six\nAnswer:", " seven .\nWords: seven", "\nAnswer:",
    ]  # fmt: skip
    drawn = [Label(i, text, 9) for i, text in enumerate(texts)]
    prompts, counts = invented_prompts("task", template, "prompt_completion", drawn)
    assert [example[0] for example in prompts.examples] == ["Find it.\nText: four .\nWords: four\nAnswer:"]
    assert counts == {"drawn": 7, "kept": 1, "off_template": 4, "repeated": 1, "replay": 1}
    assert invented_prompts("task", template, "prompt_completion", drawn[2:])[0] is None


def test_template_of_conversations():
    rows = [{"messages": [SYSTEM, {"role": "user", "content": f"Find it in: {text}"}, ANSWER]} for text in "abc"]
    template = template_of(rows)
    assert (template.turns, template.beginning, template.end) == ([SYSTEM], "Find it in:", "")
    drawn = [Label(0, " d", 2), Label(1, " cut", 2, ended=False)]
    prompts, counts = invented_prompts("task", template, "messages", drawn)
    assert prompts.records.rows == [{"messages": [SYSTEM, {"role": "user", "content": "Find it in: d"}]}]
    assert counts["off_template"] == 1
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("llama"))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    head = template.head("messages", tokenizer)
    assert tokenizer.decode(head) == "<system>Be brief.\n<user>Find it in:"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a b c"}] * 3, "are all the same"),
        ([{"prompt": "x text\nAnswer:"}, {"prompt": "y text\nAnswer:"}], "have no common beginning"),
        ([{"prompt": "Text: one"}, {"prompt": "Text: two"}], "have no common end"),
        ([{"messages": [SYSTEM, USER]}, {"messages": [USER]}], "differ in turns before the last"),
    ],
)
def test_prompts_without_a_template_raise(rows, message):
    with pytest.raises(ValueError, match=rf"--self_prompt: .*p\.jsonl.* {message}|--self_prompt: .* {message}"):
        template_of(rows)


# ---- what answers depend on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "file"),
    [("base", "tokenizer_config.json"), ("base", "generation_config.json"), ("adapter", "tokenizer_config.json")],
)
def test_answers_are_not_those_of_a_model_that_ends_them_elsewhere(where, file, tmp_path):
    """A corrected EOS token asks again, with `--resume true` too."""
    shutil.copytree(zoo_path("qwen2"), tmp_path / "base")
    shutil.copytree(zoo_path("qwen2", "ner_garden"), tmp_path / "adapter")
    if where == "adapter":
        AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    args = {"source_models": [str(tmp_path / "base")], "source_adapters": [str(tmp_path / "adapter")], "use_cpu": True}

    def identity():
        (source,) = LabelModelArguments(**args).experts(GenerationArguments()).values()
        return source.identity()

    before = identity()
    assert identity() == before
    path = tmp_path / where / file
    content = json.loads(path.read_text())
    changed = {"eos_token_id": 3} if file == "generation_config.json" else {"eos_token": content["pad_token"]}
    path.write_text(json.dumps({**content, **changed}))
    assert identity() != before
