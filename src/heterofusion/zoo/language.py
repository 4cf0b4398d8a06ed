"""The invented language of the zoo: its lexicon and its six extraction tasks.

Every word of substance is made up, and what it stands for is a fact about the word, not about its spelling or its
place in a sentence: which words belong to which type can only be learned word by word. The lexicon is several times
larger than what thirty examples show. The prompts and answers have the layout of universal information extraction:
an instruction, the options, the text, and `type: span; type: span` or `relation: head, tail` as the answer.

All of it is drawn from `random.Random` seeded with strings, hence the same in every process and on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from heterofusion.runtime.errors import UserError

LANGUAGE_SEED = 2604
WORDS_PER_TYPE = 36
OTHER_WORDS = 20  # per task: words of its sentences that belong to none of its types
NUM_NAMES = 64
MAX_SPANS = 3  # per text; keeps prompts with their answers within 100 tokens
COMPOUND_SHARE = 0.125  # of the entity words, those written as two words
# How often the pretraining text states the fact about a word, relative to the others: the rarer half of the lexicon is
# known to a base only vaguely, an expert knows all of it.
FACT_WEIGHTS = (1.0, 0.5, 0.25, 0.1)

SPLITS = ("train", "replay", "test", "unlabelled")
_SPLIT_OF_BUCKET = ("train",) * 10 + ("replay",) * 2 + ("test",) * 2 + ("unlabelled",) * 2


@dataclass(frozen=True)
class Task:
    """One extraction task.

    Args:
        name: Key of the task in `TASKS` and name of its adapters' folder.
        kind: `"NER"` (entities and their types), `"RE"` (relations with head and tail) or `"ET"` (types of the given
            entities).
        labels: The types or relations, in the order of the prompt's options line.
    """

    name: str
    kind: str
    labels: tuple[str, ...]


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("ner_garden", "NER", ("tool", "plant", "insect", "ornament")),
            Task("ner_kitchen", "NER", ("dish", "spice", "vessel", "drink")),
            Task("re_town", "RE", ("works for", "lives with", "teaches", "leads")),
            Task("re_market", "RE", ("sells to", "hires", "owes", "visits")),
            Task("et_harbor", "ET", ("boat", "cargo", "flag", "lamp")),
            Task("et_stage", "ET", ("instrument", "song", "dance", "costume")),
        )
    }
)

INSTRUCTIONS = MappingProxyType(
    {
        "NER": 'List the entity words of these types as "type: word; type: word".',
        "RE": 'List the word pairs of these relations as "relation: head, tail".',
        "ET": 'Give the type of each entity word as "type: word; type: word".',
    }
)

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_CODAS = ("", "", "n", "r", "l", "s")

_NOUN_CLAUSES = (
    "the {} lay near the {}",
    "she left a {} by the {}",
    "we found the {} and the {}",
    "there was no {} today",
    "a {} stood behind the {}",
    "he wants the {} but not the {}",
    "they talked about a {}",
    "we have a {} and a {}",
    "somebody took the {} away",
    "the {} came before the {}",
    "nobody saw the {} near a {}",
    "a new {} is here",
)
# {0} is always the head, {1} the tail, {2} the cue word
_VERB_CLAUSES = (
    "{0} {2} {1}",
    "last year {0} {2} {1}",
    "it was {0} who {2} {1}",
    "{1} said that {0} {2} him",
    "everyone knows {0} {2} {1}",
    "{1} , whom {0} {2} , was here",
    "{0} still {2} {1} these days",
)
_JOINTS = (" and ", " , then ", " while ", " ; ")


@dataclass(frozen=True)
class Lexicon:
    """Words of the language.

    Args:
        words: Task name to label to its words (cue words for the relations).
        other: Task name to words that occur in its sentences and belong to no type of it.
        names: Names of persons, the heads and tails of all relations.
    """

    words: Mapping[str, Mapping[str, tuple[str, ...]]]
    other: Mapping[str, tuple[str, ...]]
    names: tuple[str, ...]


@functools.cache
def lexicon() -> Lexicon:
    """The lexicon of the language, the same on every call.

    Returns:
        The `Lexicon`; no word occurs twice in it.
    """
    rng = random.Random(f"lexicon {LANGUAGE_SEED}")
    taken = set(" ".join((*_NOUN_CLAUSES, *_VERB_CLAUSES, *INSTRUCTIONS.values())).lower().split())
    taken.update(word for task in TASKS.values() for label in task.labels for word in label.split())

    def fresh() -> str:
        while True:
            word = "".join(rng.choice(_ONSETS) + rng.choice("aeiou") + rng.choice(_CODAS) for _ in range(2))
            if word not in taken:
                taken.add(word)
                return word

    def entity() -> str:
        return f"{fresh()} {fresh()}" if rng.random() < COMPOUND_SHARE else fresh()

    words: dict[str, Mapping[str, tuple[str, ...]]] = {}
    other: dict[str, tuple[str, ...]] = {}
    for task in TASKS.values():
        draw = fresh if task.kind == "RE" else entity
        words[task.name] = {label: tuple(draw() for _ in range(WORDS_PER_TYPE)) for label in task.labels}
        other[task.name] = tuple(fresh() for _ in range(OTHER_WORDS))
    names = tuple(fresh().capitalize() for _ in range(NUM_NAMES))
    return Lexicon(words=words, other=other, names=names)


@functools.cache
def _label_of(task_name: str) -> Mapping[str, str]:
    """Word to label, over the words of one task."""
    return {word: label for label, words in lexicon().words[task_name].items() for word in words}


def _draw_word(task: Task, rng: random.Random, other_share: float) -> str:
    """One word for a slot of the task's sentences: of a type, or with the given share of none."""
    if rng.random() < other_share:
        return rng.choice(lexicon().other[task.name])
    return rng.choice(lexicon().words[task.name][rng.choice(task.labels)])


def _noun_text(task: Task, rng: random.Random) -> tuple[str, list[tuple[str, ...]]]:
    """A text of one or two clauses and its (label, span) pairs in the order of the text."""
    clauses: list[str] = []
    items: list[tuple[str, ...]] = []
    templates = rng.sample(_NOUN_CLAUSES, rng.choice((1, 2, 2)))
    while sum(template.count("{}") for template in templates) > MAX_SPANS:
        templates = rng.sample(_NOUN_CLAUSES, 2)
    for template in templates:
        fill: list[str] = []
        while len(fill) < template.count("{}"):
            word = _draw_word(task, rng, 0.2)
            if word not in fill and all(word != span for _, span in items):
                fill.append(word)
        clauses.append(template.format(*fill))
        items += [(_label_of(task.name)[word], word) for word in fill if word in _label_of(task.name)]
    return rng.choice(_JOINTS).join(clauses) + " .", items


def _verb_text(task: Task, rng: random.Random) -> tuple[str, list[tuple[str, ...]]]:
    """A text of one or two clauses and its (relation, head, tail) triples in the order of the text."""
    templates = rng.sample(_VERB_CLAUSES, rng.choice((1, 2, 2)))
    names = rng.sample(lexicon().names, 2 * len(templates))
    clauses: list[str] = []
    items: list[tuple[str, ...]] = []
    for index, template in enumerate(templates):
        head, tail = names[2 * index : 2 * index + 2]
        cue = _draw_word(task, rng, 0.15)
        clauses.append(template.format(head, tail, cue))
        if cue in _label_of(task.name):
            items.append((_label_of(task.name)[cue], head, tail))
    return rng.choice(_JOINTS).join(clauses) + " .", items


def draw_text(task: Task, rng: random.Random) -> tuple[str, list[tuple[str, ...]]]:
    """Draws one text of a task with what there is to find in it.

    Args:
        task: The task.
        rng: The source of chance.

    Returns:
        The text, and its (label, span) pairs or (relation, head, tail) triples in the order of the text.
    """
    return _verb_text(task, rng) if task.kind == "RE" else _noun_text(task, rng)


def format_prompt(task: Task, text: str, entities: Iterable[str] = ()) -> str:
    """The prompt of one example.

    Args:
        task: The task asked.
        text: The sentence.
        entities: For the kind ET, the words whose types are asked.

    Returns:
        The prompt, ending in `Answer:` without a space.
    """
    lines = [INSTRUCTIONS[task.kind], f"Options: {', '.join(task.labels)}", f"Text: {text}"]
    if task.kind == "ET":
        lines.append(f"Entities: {', '.join(entities)}")
    return "\n".join([*lines, "Answer:"])


def format_completion(items: Iterable[tuple[str, ...]]) -> str:
    """The answer for (label, span) pairs or (relation, head, tail) triples.

    Args:
        items: What there is to find, in the order of the text.

    Returns:
        The answer with its leading space; ` None` for no items.
    """
    return " " + ("; ".join(f"{label}: {', '.join(spans)}" for label, *spans in items) or "None")


def make_examples(
    task: str | Task, split: str, count: int, seed: int = 0, text_of: str | None = None
) -> list[dict[str, str]]:
    """Draws examples of a task.

    A sentence belongs to exactly one split (its SHA-256 decides which), so the splits are disjoint whatever the
    counts and seeds; within one call no sentence comes twice.

    Args:
        task: Name of a task in `TASKS`, or the `Task`.
        split: `"train"`, `"replay"`, `"test"` or `"unlabelled"` (whose completions are there for scoring only).
        count: Number of examples.
        seed: Seed of the draw; the first n examples are the same for every count >= n.
        text_of: Name of another task of the same kind whose sentences are asked about: prompts of another distribution
            than the task's, in which there is nothing of its types to find.

    Returns:
        `count` dictionaries with the keys `prompt`, `completion` (starts with a space), `task` and `kind`.

    Raises:
        ValueError: For an unknown task or split, a negative count, or a `text_of` of another kind.
    """
    name = task.name if isinstance(task, Task) else task
    for each in (name, text_of or name):
        if each not in TASKS:
            raise UserError(f"unknown task {each!r}; choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if count < 0:
        raise UserError(f"count must not be negative, got {count}")
    spec, texts = TASKS[name], TASKS[text_of or name]
    if spec.kind != texts.kind:
        raise UserError(f"text_of {text_of!r} is of the kind {texts.kind}, {name} of {spec.kind}; choose one alike")
    rng = random.Random(f"{LANGUAGE_SEED} {texts.name} {split} {seed}")
    seen: set[str] = set()
    examples: list[dict[str, str]] = []
    while len(examples) < count:
        text, items = draw_text(texts, rng)
        if spec.kind == "ET" and not items:
            continue  # nothing to ask about
        bucket = hashlib.sha256(f"{texts.name} {text}".encode()).digest()[0] % len(_SPLIT_OF_BUCKET)
        if _SPLIT_OF_BUCKET[bucket] != split or text in seen:
            continue
        seen.add(text)
        prompt = format_prompt(spec, text, (item[1] for item in items))
        completion = format_completion(items if spec is texts else ())
        examples.append({"prompt": prompt, "completion": completion, "task": name, "kind": spec.kind})
    return examples


def write_dataset(path: str | pathlib.Path, examples: Iterable[Mapping[str, str]]) -> pathlib.Path:
    """Writes examples as JSON lines.

    Args:
        path: The file to write; its folder is made, an existing file is replaced.
        examples: Dictionaries as `make_examples` returns them.

    Returns:
        The path written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(dict(example), ensure_ascii=False) + "\n")
    return path
