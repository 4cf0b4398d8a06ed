"""The three tiny model families of the zoo: architecture, size and tokenizer of each, and its base model untrained."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from heterofusion.zoo.corpus import pretraining_documents
from heterofusion.zoo.language import TASKS, lexicon, make_examples

MAX_POSITIONS = 512
TOKENIZER_DOCUMENTS = 12_000


@dataclass(frozen=True)
class Family:
    """Size and tokenizer of one family."""

    sizes: tuple[int, int, int, int, int]  # as in `SIZES`
    tokenizer: str  # "byte_bpe" (GPT-2 style) or "sentencepiece_bpe" (word mark, byte fallback)
    vocab_size: int
    bos: bool  # whether every text starts with a begin-of-sequence token


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
FAMILY_SPECS = {
    "llama": Family((80, 4, 4, 2, 224), "byte_bpe", 1792, bos=True),
    "qwen2": Family((72, 5, 4, 1, 200), "byte_bpe", 1600, bos=False),
    "mistral": Family((96, 3, 6, 3, 288), "sentencepiece_bpe", 1664, bos=True),
}
_SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}


def _tokenizer_texts(seed: int) -> Iterable[str]:
    yield from itertools.islice(pretraining_documents(seed), TOKENIZER_DOCUMENTS)
    for labels in lexicon().words.values():
        for words in labels.values():
            yield from (f" {word} " for word in words for _ in range(10))
    for task in TASKS:
        yield from (example["prompt"] + example["completion"] for example in make_examples(task, "train", 200, seed))


def train_tokenizer(family: str, seed: int) -> PreTrainedTokenizerFast:
    """Trains the fast tokenizer of a family, a key of `FAMILY_SPECS`, on its pretraining text and on prompts."""
    spec = FAMILY_SPECS[family]
    special = list(_SPECIAL.values())
    if spec.tokenizer == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=spec.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL["unk"], byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(),
                pre_tokenizers.Split(Regex(r"▁?\p{P}"), "isolated"),
                pre_tokenizers.Split("\n", "isolated"),
            ]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=spec.vocab_size,
            special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
            show_progress=False,
        )
    tokenizer.train_from_iterator(_tokenizer_texts(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    if spec.bos:
        bos = _SPECIAL["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL["bos"] if spec.bos else None,
        eos_token=_SPECIAL["eos"],
        pad_token=_SPECIAL["pad"],
        unk_token=_SPECIAL["unk"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_base(family: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """An untrained base model of a family, in fp32 on the CPU."""
    spec = FAMILY_SPECS[family]
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        **dict(zip(SIZES, spec.sizes, strict=True)),
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "mistral":
        settings["sliding_window"] = None
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
