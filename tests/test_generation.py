"""Batched generation against one prompt and one forward at a time; sampling that no batch changes."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from heterofusion.experts.generation import AnswerGenerator, SampleTokens, Sampling, cut_prompt
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


@pytest.fixture(scope="module")
def encoded(expert, prompts):
    return {10 + i: expert[1](prompt)["input_ids"] for i, prompt in enumerate(prompts)}


def collect(generator: AnswerGenerator, prompts) -> dict:
    return {answer.index: answer for batch in generator.answers(prompts) for answer in batch}


def limit_memory(monkeypatch, model, most: int) -> list[int]:
    """Let generation run out of memory above a batch size; gives the sizes that were tried."""
    tried, generate = [], model.generate

    def limited(input_ids, **kwargs):
        tried.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", limited)
    return tried


def test_generation_config_of_the_base_does_not_leak(expert, encoded, monkeypatch):
    """Sampling, penalties, lengths, forbidden and forced tokens of a generation_config.json."""
    model, tokenizer = expert
    expected = collect(AnswerGenerator(model, tokenizer, 16), encoded)
    base = model.get_base_model()
    first = next(iter(expected.values())).text
    word = tokenizer(first, add_special_tokens=False)["input_ids"][0]
    leaking = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=3,
        min_new_tokens=15, max_length=3, suppress_tokens=[word], forced_eos_token_id=7, bad_words_ids=[[word]],
        cache_implementation="static", num_return_sequences=2, use_cache=False,
        eos_token_id=base.generation_config.eos_token_id,
    )  # fmt: skip
    monkeypatch.setattr(base, "generation_config", leaking)
    assert collect(AnswerGenerator(model, tokenizer, 16), encoded) == expected
    assert base.generation_config is leaking


def test_automatic_batch_size_halves_until_it_fits(expert, encoded, monkeypatch):
    model, tokenizer = expert
    expected = collect(AnswerGenerator(model, tokenizer, 4), encoded)
    tried = limit_memory(monkeypatch, model, most=3)
    generator = AnswerGenerator(model, tokenizer, 4)
    assert collect(generator, encoded) == expected
    assert tried == [12, 6, 3, 3, 3, 3]
    assert generator.batches.size == 3


def test_one_prompt_that_does_not_fit_raises(expert, encoded, monkeypatch):
    limit_memory(monkeypatch, expert[0], most=0)
    with pytest.raises(ValueError, match=r"1 prompts of \d+ tokens and 4 new tokens .* lower --batch_size"):
        collect(AnswerGenerator(*expert, max_new_tokens=4), encoded)


def test_prompts_are_cut_on_the_left():
    assert cut_prompt([1, 5, 6, 7], 3, bos_token_id=1) == [1, 6, 7]
    assert cut_prompt([4, 5, 6, 7], 3, bos_token_id=1) == [5, 6, 7]
    assert cut_prompt([4, 5], 2) == [4, 5] == cut_prompt([4, 5], None)
    assert cut_prompt([1, 5], 1, bos_token_id=1) == [1]


@torch.no_grad()
def naive(model, ids: list[int], stops: list[int], most: int) -> tuple[list[int], float]:
    """Greedy tokens and their summed log-probability, without cache, padding or batch."""
    new: list[int] = []
    total = 0.0
    while len(new) < most and not (new and new[-1] in stops):
        scores = model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].double().log_softmax(-1)
        new.append(int(scores.argmax()))
        total += float(scores[new[-1]])
    return new, total


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_have_their_log_probability_and_can_be_joined_with_their_prompts(family, prompts):
    """A tokenizer whose decoder drops the first space gives one that training reads as the tokens generated."""
    model, tokenizer = load(family, "ner_garden")
    encoded = {3 + i: tokenizer(prompt)["input_ids"] for i, prompt in enumerate(prompts)}
    alone = collect(AnswerGenerator(model, tokenizer, 24, 3), encoded)
    for index, answer in collect(AnswerGenerator(model, tokenizer, 24, 3, in_context=True), encoded).items():
        new, total = naive(model, encoded[index], [tokenizer.eos_token_id], 24)
        assert answer.new_tokens == alone[index].new_tokens == len(new)
        assert alone[index].text == tokenizer.decode(new, skip_special_tokens=True)
        assert answer.text.strip() == alone[index].text.strip() and answer.text.startswith(" ")
        assert answer.ended == (new[-1] == tokenizer.eos_token_id)
        assert answer.log_probability == pytest.approx(total, abs=1e-3)
        assert answer.mean_log_probability == pytest.approx(total / len(new), abs=1e-4)
        joined = tokenizer(prompts[index - 3] + answer.text)["input_ids"]
        assert joined[: len(encoded[index])] == encoded[index]


def test_tokens_are_drawn_with_their_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    uniforms = torch.linspace(0, 1, 4001)[:-1].unsqueeze(1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.5)):
        scores = SampleTokens(uniforms, Sampling(0, temperature, top_p))(None, logits.repeat(4000, 1))
        assert torch.equal(scores.isfinite().sum(1), torch.ones(4000, dtype=torch.long))
        found = torch.bincount(scores.argmax(1), minlength=5) / 4000
        wanted = (logits / temperature).softmax(0)
        kept = wanted.cumsum(0) - wanted < top_p  # they are sorted
        torch.testing.assert_close(found, wanted * kept / (wanted * kept).sum(), atol=1e-3, rtol=0)


def test_sampling_depends_on_seed_and_key_alone(expert, prompts):
    model, tokenizer = expert
    head = tokenizer(prompts[0].partition("Text:")[0] + "Text:")["input_ids"]

    def drawn(keys, batch_size, seed=5):
        generator = AnswerGenerator(model, tokenizer, 12, batch_size, sampling=Sampling(seed, 1.0, 0.9))
        return {index: answer.text for index, answer in collect(generator, dict.fromkeys(keys, head)).items()}

    whole = drawn(range(6), 6)
    assert len(set(whole.values())) > 1
    assert drawn([4, 1, 5], 2) == {index: whole[index] for index in (4, 1, 5)}
    assert drawn(range(6), 6, seed=6) != whole
