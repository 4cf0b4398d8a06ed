"""F1 for universal information extraction: `type: span; type: span` and `relation: head, tail; ...` answers.

An answer is the set of its items, the strings between semicolons. Before they are compared, white space is collapsed,
spaces around punctuation are dropped and letters are lowercased. `None` (or nothing at all) stands for the empty set.
Named entities (NER), entity types (ET) and relations (RE) are scored alike; only what breaks the format differs.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence

from heterofusion.runtime.errors import UserError

KINDS = ("NER", "RE", "ET")


def normalize(text: str) -> str:
    """An answer in the form in which items are compared."""
    joined = ""
    for word in unicodedata.normalize("NFKC", text).lower().split():
        apart = joined and not _is_punctuation(joined[-1]) and not _is_punctuation(word[0])
        joined += f" {word}" if apart else word
    return joined


def _is_punctuation(char: str) -> bool:
    """Whether a character is punctuation: ASCII signs such as `$` and `+` count, letters of any script do not."""
    return unicodedata.category(char)[0] == "P" or (char.isascii() and not char.isalnum() and not char.isspace())


def parse_items(text: str) -> frozenset[str]:
    """The set of items in an answer: a semicolon always ends one, and its type ends at its first colon."""
    return frozenset(normalize(text).split(";")) - {"", "none"}


def _well_formed(text: str, kind: str | None) -> bool:
    """Whether an answer is `None` or made of `type: span` items only, of the kind RE `relation: head, tail` items."""
    whole = normalize(text)
    parts = [item.partition(":") for item in whole.split(";") if item]
    formed = bool(parts) and all(all(part) for part in parts)
    with_heads = kind != "RE" or all(all(span.partition(",")) for _, _, span in parts)
    return whole == "none" or (formed and with_heads)


def _f1(true_positives: int, predicted: int, expected: int) -> float:
    return 2 * true_positives / (predicted + expected) if predicted + expected else 0.0


def score_answers(
    predictions: Sequence[str], references: Sequence[str], kind: str | None = None
) -> dict[str, float | int]:
    """Scores of answers; what `UIEF1().compute` returns. What has a denominator of 0 is 0.

    `precision`, `recall`, `f1` over all items (micro); `macro_f1`, the mean over the types that occur; `sample_f1`,
    the mean over the examples (1 where both sides are empty); `format_failure_rate`, the share of predictions that
    hold something else than `type: span` items, with a head and a tail in the kind `"RE"`; and the counts.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"{kind!r} is no kind of extraction; choose one of {', '.join(KINDS)}, or none of them")
    check_answers(predictions, references)
    hits: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    sample_scores: list[float] = []
    failures = 0
    for prediction, reference in zip(predictions, references, strict=True):
        found, wanted = parse_items(prediction), parse_items(reference)
        for counter, items in ((hits, found & wanted), (predicted, found), (expected, wanted)):
            counter.update(item.partition(":")[0] for item in items)
        sample_scores.append(_f1(len(found & wanted), len(found), len(wanted)) if found or wanted else 1.0)
        failures += not _well_formed(prediction, kind)
    tp, num_predicted, num_expected = hits.total(), predicted.total(), expected.total()
    types = sorted(predicted.keys() | expected.keys())
    per_type = [_f1(hits[name], predicted[name], expected[name]) for name in types]
    return {
        "precision": tp / num_predicted if num_predicted else 0.0,
        "recall": tp / num_expected if num_expected else 0.0,
        "f1": _f1(tp, num_predicted, num_expected),
        "macro_f1": sum(per_type) / len(per_type) if per_type else 0.0,
        "sample_f1": sum(sample_scores) / len(sample_scores),
        "format_failure_rate": failures / len(predictions),
        "true_positives": tp,
        "num_predicted": num_predicted,
        "num_expected": num_expected,
    }


def check_answers(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Refuse answers that cannot be scored."""
    if len(predictions) != len(references) or not predictions:
        raise UserError(f"got {len(predictions)} predictions for {len(references)} references; give one for each")
    if not all(isinstance(answer, str) for answer in (*predictions, *references)):
        raise UserError("some predictions or references are no strings; give '' where there is no answer")
