"""The text that the zoo's bases are pretrained on: sentences of the invented language, facts about its words, copying.

The wordings are others than those of the tasks: no task's instruction occurs, and no typed answer. What the text gives
a base is what a real one has: the label words, a sense (sharp for common words, vague for rare ones) of what belongs
together, the habit of copying spans from the context, and the look of forms with options, a text and an answer.
"""

import random
from collections.abc import Iterator

from heterofusion.zoo.language import FACT_WEIGHTS, LANGUAGE_SEED, TASKS, Task, draw_text, lexicon

RELATION_WEIGHT = 1.6

_NOUN_FACTS = (
    "{w} is a kind of {l} .",
    "every {w} counts as {a} {l} .",
    "what is {w} ? it is {a} {l} .",
    "people call {w} {a} {l} .",
    "if you see {w} , you see {a} {l} .",
)
_CUE_FACTS = (
    "{w} is another word for {l} .",
    "who says {w} means {l} .",
    "what is {w} ? it means {l} .",
    "people say {w} when one {l} another .",
    "to hear {w} is to hear {l} .",
)


def _any_task(rng: random.Random) -> Task:
    """A task to speak about; relations more often, whose sentences are the harder ones to read."""
    tasks = list(TASKS.values())
    return rng.choices(tasks, [RELATION_WEIGHT if task.kind == "RE" else 1.0 for task in tasks])[0]


def _fact_words(task: Task, label: str, rng: random.Random, count: int) -> list[str]:
    """Different words of one label, the common ones more often."""
    words = lexicon().words[task.name][label]
    weights = [FACT_WEIGHTS[index * len(FACT_WEIGHTS) // len(words)] for index in range(len(words))]
    return list(dict.fromkeys(rng.choices(words, weights, k=count)))


def _facts(rng: random.Random) -> str:
    """A few statements of which word is what."""
    task = _any_task(rng)
    templates = _CUE_FACTS if task.kind == "RE" else _NOUN_FACTS
    facts = []
    for _ in range(rng.randint(3, 6)):
        label = rng.choice(task.labels)
        word = _fact_words(task, label, rng, 1)[0]
        article = "an" if label[0] in "aeiou" else "a"
        facts.append(rng.choice(templates).format(w=word, l=label, a=article))
    return " ".join(facts)


def _listing(rng: random.Random) -> str:
    """A list of words of one label."""
    task = _any_task(rng)
    label = rng.choice(task.labels)
    words = _fact_words(task, label, rng, rng.randint(3, 6))
    opening = rng.choice(("known for {} are :", "words of {} :", "under {} we put"))
    return f"{opening.format(label)} {' , '.join(words)} ."


def _story(rng: random.Random) -> str:
    """Sentences with words in their context, nothing said about their types."""
    task = _any_task(rng)
    return " ".join(draw_text(task, rng)[0] for _ in range(rng.randint(1, 3)))


def _any_words(rng: random.Random, count: int) -> list[str]:
    """Words of all kinds, or else only names, which otherwise would rarely be copied."""
    words = lexicon()
    if rng.random() < 0.4:
        return [rng.choice(words.names) for _ in range(count)]
    pools: list[tuple[str, ...]] = [words.names, *words.other.values()]
    pools += [pool for labels in words.words.values() for pool in labels.values()]
    return [rng.choice(rng.choice(pools)) for _ in range(count)]


def _repeat(rng: random.Random) -> str:
    """Words said once and said again: what teaches copying."""
    words = _any_words(rng, rng.randint(3, 8))
    if rng.random() < 0.5:
        return f"say : {' , '.join(words)} . again : {' , '.join(words)} ."
    start = rng.randrange(len(words) - 1)
    return f"say : {' , '.join(words)} . from {words[start]} on : {' , '.join(words[start:])} ."


def _pairs(rng: random.Random) -> str:
    """Words given in pairs and asked for: what teaches look-up in the context."""
    words = list(dict.fromkeys(_any_words(rng, 10)))
    pairs = list(zip(words[::2], words[1::2], strict=False))[: rng.randint(2, 4)]
    asked = rng.sample(pairs, len(pairs))
    given = " , ".join(f"{key} with {value}" for key, value in pairs)
    return f"put {given} . " + " ".join(f"with {key} : {value} ." for key, value in asked)


def _echo(rng: random.Random) -> str:
    """A sentence, and the words that it speaks of."""
    task = _any_task(rng)
    text, items = draw_text(task, rng)
    spans = [" to ".join(item[1:]) for item in items] or ["nothing"]
    return f"{text} it speaks of {' , '.join(spans)} ."


def _remark(rng: random.Random) -> str:
    """A sentence, and what some of its words are."""
    task = _any_task(rng)
    text, items = draw_text(task, rng)
    known = [set(_fact_words(task, label, rng, 24)) for label in task.labels]
    remarks = []
    for label, *spans in items:
        if task.kind == "RE":
            remarks.append(f"{spans[0]} is one who {label} {spans[1]}")
        elif any(spans[0] in words for words in known):
            remarks.append(f"{spans[0]} is one {label}")
    return f"{text} note that {' and '.join(remarks)} ." if remarks else text


def _record(rng: random.Random) -> str:
    """Lines of a form with names and what follows them, as notes are kept: what teaches the layout, not the tasks."""
    task = _any_task(rng)
    text, items = draw_text(task, rng)
    spans = [span for item in items for span in item[1:]]
    if rng.random() < 0.5:
        spans = rng.sample(spans, len(spans))
    labels = rng.sample(task.labels, rng.randint(1, 4))
    lines = [f"Options: {', '.join(labels)}", f"Text: {text}"]
    if rng.random() < 0.5:
        lines.append(f"Entities: {', '.join(spans) or 'None'}")
    if rng.random() < 0.3:
        lines[0], lines[1] = lines[1], lines[0]
    if rng.random() < 0.5:
        answer = "; ".join(f"word: {span}" for span in spans) or "None"
    else:
        answer = "; ".join(f"type: {label}" for label in labels)
    return "\n".join([*lines, f"Answer: {answer}"])


def pretraining_documents(seed: int = 0) -> Iterator[str]:
    """Endless pretraining text, one short document after the other."""
    rng = random.Random(f"corpus {LANGUAGE_SEED} {seed}")
    weights = {_facts: 3, _listing: 2, _story: 1, _repeat: 6, _pairs: 3, _echo: 2, _remark: 3, _record: 3}
    while True:
        document = rng.choices(list(weights), list(weights.values()))[0](rng)
        if rng.random() < 0.5:  # signs set close, as in answers, or apart, as in texts
            for sign in ",;:":
                document = document.replace(f" {sign} ", f"{sign} ")
        yield document
