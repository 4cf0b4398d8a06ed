"""Labels as they are generated: log-probabilities against one forward at a time, sampling that no batch changes."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from heterofusion.evaluation.store import PartWriter
from heterofusion.experts.generation import AnswerGenerator
from heterofusion.experts.label_generation import Label, LabelGenerator, SampleTokens, Sampling
from heterofusion.labelling.parts import read_parts, write_labels
from heterofusion.zoo import FAMILIES, make_examples, zoo_path


def load(family: str, task: str):
    tokenizer = AutoTokenizer.from_pretrained(zoo_path(family))
    base = AutoModelForCausalLM.from_pretrained(zoo_path(family), dtype=torch.float32)
    return PeftModel.from_pretrained(base, zoo_path(family, task)).eval(), tokenizer


def labels_of(generator: LabelGenerator, prompts) -> dict[int, Label]:
    return {label.index: label for batch in generator.answers(prompts) for label in batch}


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


@pytest.fixture(scope="module", params=FAMILIES)
def expert(request):
    return load(request.param, "ner_garden")


@pytest.fixture(scope="module")
def prompts():
    return [e["prompt"] for task in ("ner_garden", "et_harbor") for e in make_examples(task, "test", 4)]


def test_labels_are_the_greedy_answers_with_their_log_probability(expert, prompts):
    model, tokenizer = expert
    encoded = {3 + i: tokenizer(prompt)["input_ids"] for i, prompt in enumerate(prompts)}
    labels = labels_of(LabelGenerator(model, tokenizer, 24, 3), encoded)
    answers = {a.index: a for batch in AnswerGenerator(model, tokenizer, 24, 3).answers(encoded) for a in batch}
    assert "generate" not in vars(model)  # left as it was
    for index, ids in encoded.items():
        new, total = naive(model, ids, [tokenizer.eos_token_id], 24)
        label = labels[index]
        assert label.new_tokens == answers[index].new_tokens == len(new)
        assert label.text.strip() == answers[index].text.strip()
        assert label.ended == (new[-1] == tokenizer.eos_token_id)
        assert label.log_probability == pytest.approx(total, abs=1e-3)
        assert label.mean_log_probability == pytest.approx(total / len(new), abs=1e-4)


def test_texts_can_be_joined_with_their_prompts(expert, prompts):
    """A tokenizer whose decoder drops the first space gives one that training reads as the tokens generated."""
    model, tokenizer = expert
    encoded = {i: tokenizer(prompt)["input_ids"] for i, prompt in enumerate(prompts)}
    for index, label in labels_of(LabelGenerator(model, tokenizer, 24, 8), encoded).items():
        assert label.text.startswith(" ")
        assert tokenizer(prompts[index] + label.text)["input_ids"][: len(encoded[index])] == encoded[index]


def test_an_answer_that_was_cut_did_not_end(expert, prompts):
    model, tokenizer = expert
    encoded = {0: tokenizer(prompts[0])["input_ids"]}
    label = labels_of(LabelGenerator(model, tokenizer, 1), encoded)[0]
    assert (label.ended, label.new_tokens) == (False, 1)


# ---- sampling ---------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_with_their_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    uniforms = torch.linspace(0, 1, 4001)[:-1].unsqueeze(1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.5)):
        scores = SampleTokens(uniforms, temperature, top_p)(None, logits.repeat(4000, 1))
        assert torch.equal(scores.isfinite().sum(1), torch.ones(4000, dtype=torch.long))
        found = torch.bincount(scores.argmax(1), minlength=5) / 4000
        wanted = (logits / temperature).softmax(0)
        kept = wanted.cumsum(0) - wanted < top_p  # they are sorted
        torch.testing.assert_close(found, wanted * kept / (wanted * kept).sum(), atol=1e-3, rtol=0)


def test_sampling_depends_on_seed_and_key_alone(expert, prompts):
    model, tokenizer = expert
    head = tokenizer(prompts[0].partition("Text:")[0] + "Text:")["input_ids"]

    def drawn(keys, batch_size, seed=5):
        generator = LabelGenerator(model, tokenizer, 12, batch_size, sampling=Sampling(seed, 1.0, 0.9))
        return {index: label.text for index, label in labels_of(generator, dict.fromkeys(keys, head)).items()}

    whole = drawn(range(6), 6)
    assert len(set(whole.values())) > 1
    assert drawn([4, 1, 5], 2) == {index: whole[index] for index in (4, 1, 5)}
    assert drawn(range(6), 6, seed=6) != whole


# ---- parts ------------------------------------------------------------------------------------------------------


def test_part_files_keep_labels_and_survive_a_cut(tmp_path):
    labels = [Label(0, " a\u2028b", 3, -0.25, True), Label(1, "", 1, -1.5, False), Label(2, "ü", 2, -3.0, True)]
    with PartWriter(tmp_path / "key" / "rank-0.jsonl") as part:
        write_labels(part, labels[:2], 1.0)
        write_labels(part, labels[2:], 3.0)
    found, seconds = read_parts(tmp_path / "key")
    assert found == dict(enumerate(labels)) and seconds == pytest.approx(4.0)
    path = tmp_path / "key" / "rank-0.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    with PartWriter(path) as part:
        write_labels(part, [Label(5, "x", 1, -0.5, True)], 1.0)
    assert sorted(read_parts(tmp_path / "key")[0]) == [0, 1, 5]
    assert read_parts(tmp_path / "none") == ({}, 0.0)
