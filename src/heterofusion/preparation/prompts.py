"""Prompts and answers of information extraction: an instruction, the options, the text, `type: span; type: span`."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from heterofusion.preparation.splits import stable_number

_ENTITIES = '"type1: word1; type2: word2"'
_RELATIONS = '"relation1: head1, tail1; relation2: head2, tail2"'

# Several for each kind, so that an expert learns the task and not one wording of it.
INSTRUCTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "NER": (
            f"Which words of the text are entities of the listed types? Answer in the form {_ENTITIES}, or None.",
            f"Go through the text and write down each entity with its type, as {_ENTITIES}; write None without any.",
            f"Name all entities in the text that fit one of the options. Use the form {_ENTITIES}, or None.",
        ),
        "RE": (
            f"Which pairs in the text stand in one of the listed relations? Answer in the form {_RELATIONS}, or None.",
            f"Go through the text and write down each related pair, as {_RELATIONS}; write None without any.",
            f"Name every relation of the options that the text states, with its pair. Use the form {_RELATIONS}, "
            "or None.",
        ),
        "ET": (
            f"Which of the listed types does each of the given entities have? Answer in the form {_ENTITIES}.",
            f"Put every entity of the list under one of the options, as {_ENTITIES}.",
            f"Decide what type the given entities are in this text. Use the form {_ENTITIES}.",
        ),
    }
)

Item = tuple[str, ...]  # (type, span), or (relation, head, tail)


def write_prompt(kind: str, labels: Sequence[str], text: str, items: Iterable[Item], salt: str) -> str:
    """The prompt of one record.

    Args:
        kind: NER, RE or ET.
        labels: The options.
        text: The sentence.
        items: What there is to find; of the kind ET the prompt gives the spans.
        salt: Seed and task, which choose one of the wordings for every text.

    Returns:
        The prompt, which ends in `Answer:` without a space.
    """
    wordings = INSTRUCTIONS[kind]
    instruction = wordings[stable_number(f"{salt} wording", text) % len(wordings)]
    lines = [instruction, f"Option: {', '.join(labels)}", f"Text: {text}"]
    if kind == "ET":
        lines.append(f"Entities: {', '.join(dict.fromkeys(item[1] for item in items))}")
    return "\n".join([*lines, "Answer:"])


def write_answer(items: Iterable[Item]) -> str:
    """The answer of one record.

    Args:
        items: What there is to find, in order.

    Returns:
        The answer with its leading space; ` None` without items.
    """
    return " " + ("; ".join(f"{label}: {', '.join(spans)}" for label, *spans in items) or "None")
