"""Batched greedy generation against generating one prompt at a time."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from heterofusion.evaluation import generate_answers
from heterofusion.zoo import FAMILIES, make_examples, zoo_path


def load(family: str, task: str | None = None):
    tokenizer = AutoTokenizer.from_pretrained(zoo_path(family))
    model = AutoModelForCausalLM.from_pretrained(zoo_path(family), dtype=torch.float32)
    if task is not None:
        model = PeftModel.from_pretrained(model, zoo_path(family, task))
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def expert():
    return load("llama", "ner_garden")


@pytest.fixture(scope="module")
def prompts():
    # of two tasks, so that lengths differ
    return [e["prompt"] for task in ("ner_garden", "et_harbor") for e in make_examples(task, "test", 6, seed=3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_at_a_time(family, prompts):
    model, tokenizer = load(family, "ner_garden")
    single = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        single.append(tokenizer.decode(new, skip_special_tokens=True))
    batched = generate_answers(model, tokenizer, prompts, max_new_tokens=24, batch_size=5, progress=False)
    assert batched == single


def test_order_is_the_callers(expert, prompts):
    forward = generate_answers(*expert, prompts, max_new_tokens=16, batch_size=4, progress=False)
    backward = generate_answers(*expert, prompts[::-1], max_new_tokens=16, batch_size=3, progress=False)
    assert forward == backward[::-1]


def test_answers_stop_at_end_of_sequence(expert, prompts):
    model, tokenizer = expert
    answers = generate_answers(model, tokenizer, prompts[:6], max_new_tokens=64, progress=False)
    assert all(tokenizer.eos_token not in answer for answer in answers)
    assert all(len(tokenizer(answer)["input_ids"]) < 40 for answer in answers)


def test_max_new_tokens_is_kept(expert, prompts):
    model, tokenizer = expert
    full = generate_answers(model, tokenizer, prompts[:2], max_new_tokens=30, progress=False)
    short = generate_answers(model, tokenizer, prompts[:2], max_new_tokens=1, progress=False)
    assert all(whole.startswith(part) and len(part) < len(whole) for whole, part in zip(full, short, strict=True))


def test_model_mode_is_restored(expert, prompts):
    model, tokenizer = expert
    model.train()
    generate_answers(model, tokenizer, prompts[:1], max_new_tokens=2, progress=False)
    assert model.training
    model.eval()


def test_no_prompts_give_no_answers(expert):
    assert generate_answers(*expert, [], progress=False) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one string"}, "got one string"),
        ({"prompts": ["fine", ""]}, r"prompts\[1\]"),
        ({"prompts": ["fine", None]}, r"prompts\[1\]"),
        ({"prompts": ["fine"], "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompts": ["fine"], "batch_size": -1}, "batch_size must be at least 1, got -1"),
    ],
)
def test_bad_input_raises(expert, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_answers(*expert, progress=False, **arguments)


def test_tokenizer_without_padding_and_end_raises(expert):
    model, _ = expert
    bare = AutoTokenizer.from_pretrained(zoo_path("llama"))
    bare.pad_token = None
    bare.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        generate_answers(model, bare, ["fine"], progress=False)
