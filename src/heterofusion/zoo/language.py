"""The invented language of the zoo: its lexicon, its six extraction tasks, and chores unlike them.

Every word of substance is made up, and what it stands for is a fact about the word, not about its spelling or its
place in a sentence: which words belong to which type can only be learned word by word. The lexicon is several times
larger than what thirty examples show. The prompts and answers have the layout of universal information extraction:
an instruction, the options, the text, and `type: span; type: span` or `relation: head, tail` as the answer.

All of it is drawn from `random.Random` seeded with strings, hence the same in every process and on every machine.
"""

import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
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
    """One extraction task."""

    name: str  # key in `TASKS`, and name of its adapters' folder
    kind: str  # NER (entities and their types), RE (relations with head and tail) or ET (types of given entities)
    labels: tuple[str, ...]  # types or relations, in the order of the prompt's options


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
    """Words of the language."""

    words: Mapping[str, Mapping[str, tuple[str, ...]]]  # task to label to its words (cue words for the relations)
    other: Mapping[str, tuple[str, ...]]  # task to words of its sentences that belong to no type of it
    names: tuple[str, ...]  # persons, the heads and tails of all relations


@functools.cache
def lexicon() -> Lexicon:
    """The lexicon of the language, the same on every call; no word occurs twice in it."""
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
    """A text of a task, and its (label, span) pairs or (relation, head, tail) triples in the order of the text."""
    return _verb_text(task, rng) if task.kind == "RE" else _noun_text(task, rng)


def format_prompt(task: Task, text: str, entities: Iterable[str] = ()) -> str:
    """The prompt of one example, which ends in `Answer:`; of the kind ET it names the entities."""
    lines = [INSTRUCTIONS[task.kind], f"Options: {', '.join(task.labels)}", f"Text: {text}"]
    if task.kind == "ET":
        lines.append(f"Entities: {', '.join(entities)}")
    return "\n".join([*lines, "Answer:"])


def format_completion(items: Iterable[tuple[str, ...]]) -> str:
    """The answer for (label, span) pairs or (relation, head, tail) triples; ` None` for no items."""
    return " " + ("; ".join(f"{label}: {', '.join(spans)}" for label, *spans in items) or "None")


def make_examples(
    task: str | Task, split: str, count: int, seed: int = 0, text_of: str | None = None
) -> list[dict[str, str]]:
    """Draws examples of a task: `prompt`, `completion` (starts with a space), `task` and `kind`.

    A sentence belongs to exactly one split (its SHA-256 decides which), so the splits are disjoint whatever the
    counts and seeds; within one call no sentence comes twice. The first n examples are the same for every count >= n.
    `text_of` names another task of the same kind whose sentences are asked about: nothing of `task` is in them.
    """
    name = task.name if isinstance(task, Task) else task
    for each in (name, text_of or name):
        if each not in TASKS:
            raise UserError(f"unknown task {each!r}; choose one of {', '.join(TASKS)}")
    spec, texts = TASKS[name], TASKS[text_of or name]
    if split not in SPLITS or spec.kind != texts.kind:
        raise ValueError(f"{split!r} is none of {SPLITS}, or {text_of!r} is of another kind than {name}")
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


# ---- chores: what an expert may know that is irrelevant to the six tasks --------------------------------------------

# Instruction, and the answer given the words of a text.
CHORES: Mapping[str, tuple[str, Callable[[list[str]], str]]] = MappingProxyType(
    {
        "repeat": ("Repeat the text.", " ".join),
        "reverse": ("Write the words in the opposite order.", lambda words: " ".join(reversed(words))),
        "last": ("Write the last word.", lambda words: words[-1]),
        "halve": ("Write every second word.", lambda words: " ".join(words[::2])),
    }
)


def make_chores(name: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Draws examples of a chore, on sentences of all six tasks: `prompt`, `completion` and `task`."""
    instruction, answer = CHORES[name]
    rng = random.Random(f"{LANGUAGE_SEED} chore {name} {seed}")
    examples = []
    for _ in range(count):
        text, _ = draw_text(rng.choice(list(TASKS.values())), rng)
        words = text.removesuffix(" .").split()
        prompt = f"{instruction}\nText: {text}\nAnswer:"
        examples.append({"prompt": prompt, "completion": f" {answer(words)}", "task": name})
    return examples
