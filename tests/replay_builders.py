"""Small tokenizers, chat templates and replay files for the tests of records, formats and data."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from heterofusion.data.formats import detect_format, render, to_conversation, tokenize
from heterofusion.data.replay import DataArguments, build_replay

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The shape of information-extraction data: the instruction holds the input already, the output starts with a space.
UIE = {
    "instruction": "List the entities.\nText: Ann met Bob .\nAnswer:",
    "input": "Ann met Bob .",
    "output": " person: Ann; person: Bob",
    "history": [["List the entities.\nText: Rome is old .\nAnswer:", " place: Rome"]],
}
GOOD = {"prompt": "q0", "completion": " a"}
USER = {"role": "user", "content": "q0"}


def byte_level(single: str = "<s> $A", template: str | None = None, trim: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE that was trained on a few words; adds what `single` says."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(UIE)] * 3 + ["the answer is yes", "the answer is no"] * 3, trainer)
    pieces = [(name, SPECIAL.index(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=trim), processors.TemplateProcessing(single=single, special_tokens=pieces)]
    )
    return wrap(backend, template)


def word_level(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word, white space dropped, nothing added."""
    words = ["q0", "q1", "q2", "a", "b", "c", "d"]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    return wrap(backend, template)


def wrap(backend: Tokenizer, template: str | None, kind=PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return kind(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


def write(path: Path, records) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def encode(record: dict, tokenizer) -> tuple[list[int], list[int]]:
    format = detect_format(record)
    return tokenize(render(*to_conversation(record, format), format, tokenizer), tokenizer)


def labelled(record: dict, tokenizer) -> list[str]:
    """The stretches of text that get loss, exactly as decoded."""
    ids, labels = encode(record, tokenizer)
    assert len(ids) == len(labels) and all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label == -100:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def whole(record: dict, tokenizer) -> str:
    return tokenizer.decode(encode(record, tokenizer)[0])


def numbered(count: int, prefix: str = "") -> list[dict]:
    return [{"prompt": f"the answer {prefix}{i} is", "completion": f" {prefix}{i}"} for i in range(count)]


def answers(dataset, tokenizer) -> list[str]:
    texts = [tokenizer.decode([t for t in labels if t != -100]) for labels in dataset["labels"]]
    return [text.removesuffix("</s>").strip() for text in texts]


def args_for(*names, **kwargs) -> DataArguments:
    return DataArguments(dataset_name=list(map(str, names)), **kwargs)


def refused(path, match, tokenizer=None, **kwargs):
    """The message is one line, holds the full path, and says what `match` says."""
    with pytest.raises(ValueError, match=match) as caught:
        build_replay(args_for(path, **kwargs), tokenizer or word_level())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
