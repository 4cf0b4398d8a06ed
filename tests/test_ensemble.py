"""Ensembles against what they are by definition: dictionaries of token strings, and models without a cache."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from heterofusion.experts.generation import stop_ids
from heterofusion.rivals.codec import AnswerCodec, split_characters
from heterofusion.rivals.ensemble import CachedReader, EnsembleGenerator, Member
from heterofusion.rivals.voting import END, GaC, Union, UniTE
from heterofusion.zoo import make_examples, zoo_path
from recipe_runner import save_tokenizer

KINDS = ("byte_level", "sentencepiece", "words")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One of each kind."""
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder)
    folders = zoo_path("llama"), zoo_path("mistral"), folder
    return {kind: AutoTokenizer.from_pretrained(path) for kind, path in zip(KINDS, folders, strict=True)}


@pytest.fixture(scope="module")
def codecs(tokenizers):
    """With a few entries more than tokens, as vocabularies are that were padded to a round number."""
    return {kind: AnswerCodec(tokenizer, len(tokenizer) + 3) for kind, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def experts():
    """Experts of the zoo with their tokenizers, by family and task."""
    loaded = {}

    def load(family: str, task: str):
        if (family, task) not in loaded:
            model = AutoModelForCausalLM.from_pretrained(zoo_path(family), dtype=torch.float32)
            model = PeftModel.from_pretrained(model, zoo_path(family, task)).eval()
            loaded[family, task] = model, AutoTokenizer.from_pretrained(zoo_path(family))
        return loaded[family, task]

    return load


PROMPTS = [e["prompt"] for task in ("ner_kitchen", "ner_garden") for e in make_examples(task, "test", 3, seed=5)]


def ensemble(members, **options) -> EnsembleGenerator:
    """GaC of pairs of model and tokenizer."""
    codecs = [AnswerCodec(tokenizer, model.config.vocab_size) for model, tokenizer in members]
    union = Union(codecs, [stop_ids(*member) for member in members])
    parts = [
        Member(model, codec, tokenizer.pad_token_id, context=512)
        for (model, tokenizer), codec in zip(members, codecs, strict=True)
    ]
    return EnsembleGenerator(parts, union, GaC(union), **options)


def ids_of(members, prompts=PROMPTS) -> dict:
    return {i: [tokenizer(prompt)["input_ids"] for _, tokenizer in members] for i, prompt in enumerate(prompts)}


def collect(generator, prompts) -> dict:
    return {answer.index: answer for batch in generator.answers(prompts) for answer in batch}


def needed(prompts, answers) -> list[int]:
    """Tokens that each member would run if it had every chosen token."""
    written = sum(answer.new_tokens - 1 for answer in answers.values())
    return [sum(map(len, lists)) + written for lists in zip(*prompts.values(), strict=True)]


def random_probabilities(codecs, rows: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(4 * torch.randn(rows, len(codec.pieces), generator=generator)).softmax(-1) for codec in codecs]


def by_string(codec, stops, probabilities) -> dict[bytes | None, float]:
    """A distribution as a dictionary; None is the end."""
    found: dict[bytes | None, float] = {}
    for token, value in enumerate(probabilities.tolist()):
        piece = None if token in stops else codec.pieces[token]
        if token in stops or piece:
            found[piece] = found.get(piece, 0.0) + value
    return found


def chosen_string(union, choice: int) -> bytes | None:
    return None if choice == END else union.pieces[choice]


STOPS = ([1], [1, 300], [2])  # of the second, an ordinary token ends answers too
VOTING = torch.tensor([[True, True, True], [True, True, True], [True, False, True], [False, True, False]])


def test_gac_is_the_mean_over_token_strings(codecs):
    codecs = [*codecs.values()]
    union = Union(codecs, STOPS)
    probabilities = random_probabilities(codecs)
    mean, choices = GaC(union).mean(probabilities, VOTING), GaC(union)(probabilities, VOTING)
    assert len(set(union.pieces)) == len(union)
    for row, voting in enumerate(VOTING.tolist()):
        expected: dict[bytes | None, float] = {}
        for codec, stops, member, votes in zip(codecs, STOPS, probabilities, voting, strict=True):
            for piece, value in by_string(codec, stops, member[row]).items() if votes else ():
                expected[piece] = expected.get(piece, 0.0) + value / sum(voting)
        found = {chosen_string(union, i): value for i, value in enumerate(mean[row].tolist()) if value}
        assert found == pytest.approx(expected, abs=1e-6)
        assert chosen_string(union, int(choices[row])) == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize("top_k", [1, 10, 10**6])
def test_unite_is_the_mean_over_the_union_of_top_tokens(codecs, tokenizers, top_k):
    codecs = [*codecs.values()]
    union = Union(codecs, STOPS)
    probabilities = random_probabilities(codecs)
    vote = UniTE(union, codecs, top_k)
    candidates, shares = vote.shares(probabilities, VOTING)
    for row, voting in enumerate(VOTING.tolist()):
        members = [
            (codec, by_string(codec, stops, member[row]), member[row])
            for codec, stops, member, votes in zip(codecs, STOPS, probabilities, voting, strict=True)
            if votes
        ]
        top = {s for _, strings, _ in members for s in sorted(strings, key=strings.__getitem__)[-top_k:]}
        expected = dict.fromkeys(top, 0.0)
        for codec, strings, own in members:
            scores = {}
            for piece in top:
                if piece in strings or piece is None:
                    scores[piece] = strings.get(piece, 0.0)
                else:
                    ids = codec.encode(piece)[0]
                    scores[piece] = float(own[ids[0]]) if ids else 0.0
            logs = torch.tensor([*scores.values()]).log().softmax(0).tolist()  # the softmax of the paper, of logits
            for piece, share in zip(scores, logs, strict=True):
                expected[piece] += share / len(members)
        found = {
            chosen_string(union, candidate): share
            for candidate, share in zip(candidates[row].tolist(), shares[row].tolist(), strict=True)
            if share > 0
        }
        assert found == pytest.approx({piece: share for piece, share in expected.items() if share}, abs=1e-6)
        choice = chosen_string(union, int(vote(probabilities, VOTING)[row]))
        assert choice == max(expected, key=expected.__getitem__)


TEXTS = ("\n\n two", "  a  b", "naïve ∑ é", "</s>", "<0x0A>", "日本")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_answers_are_tokenized_as_they_are(codecs, tokenizers, kind):
    """No BOS, no space before, no special token that an answer only spells."""
    codec = codecs[kind]
    text = " tool: axe; insect: bee"
    assert codec.encode(text.encode())[0] == tokenizers[kind](text, add_special_tokens=False)["input_ids"]
    for text in TEXTS:
        ids, whole = codec.encode(text.encode())
        assert whole and b"".join(codec.pieces[token] for token in ids) == text.encode(), text


def test_middle_of_a_character(codecs):
    data = b"a\xff\xc3\xa9\xe6\x97"
    assert split_characters(data) == ["a", b"\xff", "é", b"\xe6\x97"] and split_characters(b"") == []
    assert split_characters(b"\xff\xc3a") == [b"\xff\xc3", "a"]
    half = "é".encode()[:1]
    for kind in ("byte_level", "sentencepiece"):
        ids, whole = codecs[kind].encode(b" a" + half)
        assert whole and b"".join(codecs[kind].pieces[token] for token in ids) == b" a" + half
    words = codecs["words"]
    known = words.encode(b" w5")[0]
    assert words.encode(b" w5" + half) == (known, False)  # it waits
    assert words.encode(b" w5" + half + half) == (known, False)
    assert words.encode(b" w5" + half + b" w6") == (words.encode(b" w5 w6")[0], True)  # which never came


def test_reader_of_a_sliding_window():
    """What a window has left behind can be needed again."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    reader = CachedReader(model, 0)
    for ids in ([*range(1, 11)], [*range(1, 13)], [*range(1, 8), 20, 21]):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        torch.testing.assert_close(reader.read([ids])[0], expected, atol=1e-6, rtol=1e-4)
    assert reader.tokens_run == 10 + 2 + 2


def naive_answer(members, prompt: str, max_new_tokens: int) -> tuple[str, int]:
    """GaC without a cache, a batch, or tensors over a union."""
    codecs = [AnswerCodec(tokenizer, model.config.vocab_size) for model, tokenizer in members]
    prompts = [tokenizer(prompt)["input_ids"] for _, tokenizer in members]
    ids: list[list[int]] = [[] for _ in members]
    text, count = b"", 0
    for _ in range(max_new_tokens):
        count += 1
        mean: dict[bytes | None, float] = {}
        for (model, tokenizer), codec, start, answer in zip(members, codecs, prompts, ids, strict=True):
            with torch.no_grad():
                own = model(input_ids=torch.tensor([start + answer])).logits[0, -1].softmax(-1)
            for piece, value in by_string(codec, stop_ids(model, tokenizer), own).items():
                mean[piece] = mean.get(piece, 0.0) + value / len(members)
        piece = max(mean, key=mean.__getitem__)
        if piece is None:
            break
        text += piece
        ids = [
            [*answer, codec.ids[piece]] if piece in codec.ids else codec.encode(text)[0]
            for codec, answer in zip(codecs, ids, strict=True)
        ]
    return text.decode(errors="replace"), count


def test_members_of_three_families_are_the_naive_ensemble(experts):
    members = [experts("llama", "ner_kitchen"), experts("qwen2", "ner_garden"), experts("mistral", "ner_garden")]
    generator = ensemble(members, max_new_tokens=20, batch_size=4)
    found = collect(generator, ids_of(members))
    for index, prompt in enumerate(PROMPTS):
        assert (found[index].text, found[index].new_tokens) == naive_answer(members, prompt, 20)
    for run, least in zip(generator.tokens_run, needed(ids_of(members), found), strict=True):
        assert least * 0.99 <= run < least * 1.1  # without the cache, it would be more than ten times as much


def test_answers_end_where_a_member_has_no_more_room(experts):
    members = [experts("llama", "ner_kitchen"), experts("mistral", "ner_kitchen")]
    generator = ensemble(members, max_new_tokens=20)
    prompts = ids_of(members, PROMPTS[:1])
    whole = collect(generator, prompts)[0]
    room = len(prompts[0][1]) + 3
    generator.members = [generator.members[0], Member(*members[1][:1], generator.members[1].codec, 0, context=room)]
    short = collect(generator, prompts)[0]
    assert short.new_tokens == 3 < whole.new_tokens and whole.text.startswith(short.text)
