"""FuseLLM's fused labels: per example the distributions of the best teacher, in the target's tokens.

MinCE picks, per example, the model of lowest cross-entropy on the answer. The target itself is one of them, as it is
before the distillation: where it wins, its own first distributions are what it is held to. Cross-entropies are of the
answer as a whole, in nats: all models predict the same text, so that they can be compared whatever the tokenizer (a
mean over each model's own tokens, which FuseLLM's published code takes, would favour the finer tokenizer).

They come into the target's tokens as soft labels do (`heterofusion.experts.token_alignment`).

Origin: FuseLLM, arXiv 2401.10491, sections 3.2 and 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from heterofusion.experts.soft_labels import SoftLabels, Teacher
from heterofusion.experts.token_alignment import Source, add_aligned


@dataclass(frozen=True)
class FusionReport:
    """How the labels came about."""

    picked: list[int]  # per model, the target first: how many examples MinCE gave it
    mean_cross_entropy: list[float]  # per model, nats per answer
    one_to_one: float  # share of the answers' tokens that DTW aligns one to one; all, where the target was picked
    soft: float  # share of the answers' tokens whose label is a model's distribution and no single token
    seconds: float  # of all models, maps and alignment; what came from disk counts as long as it once took


def fuse_labels(models: Sequence[Teacher], labels: Sequence[SoftLabels], folder: Path) -> tuple[Dataset, FusionReport]:
    """Give the target's examples the soft labels of the model that MinCE picks; the first of equals.

    They are memory-mapped and kept in a folder. All ranks together: the main one makes them, and all must see it.
    """
    choice = np.argmin(np.stack([item.cross_entropy for item in labels]), axis=0)  # (examples,)
    sources = [
        Source(model.expert.name, folder, item.identity, model.expert.tokenizer)
        for model, item in zip(models, labels, strict=True)
    ]
    answers = [(sources[index], example) for example, index in enumerate(choice.tolist())]
    examples, record = add_aligned(models[0].examples, models[0].expert.tokenizer, answers, folder)
    report = FusionReport(
        picked=np.bincount(choice, minlength=len(models)).tolist(),
        mean_cross_entropy=[float(item.cross_entropy.mean()) for item in labels],
        one_to_one=record["one_to_one"],
        soft=record["soft"],
        seconds=sum(item.seconds for item in labels) + record["seconds"],
    )
    return examples, report
