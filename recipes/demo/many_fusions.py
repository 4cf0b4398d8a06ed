"""One hypernetwork for many fusions of the embedded zoo: does it read the experts that it is given?

    python recipes/demo/many_fusions.py --preset paper --learning_rate 1e-3 --output_dir outputs/many_fusions

Source dropout and pretraining in one. Every step draws one to four source tasks, for each an expert of one of two
families, and their order; the batch is of the anchor's task and of those. One task is never drawn, and of another one
only one family's expert. The table then asks for each task with its source and without, with noise in the source's
place, and for what was never drawn. Results are in TRIALS.md; there is no free update and no RDM.
"""

import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

# what libraries warn of while they are imported must not stand beside an error
logging.getLogger().addHandler(logging.NullHandler())

import torch

from heterofusion import HeteroFusionModel, LoraAdapter, MethodConfig, load_adapter
from heterofusion.adapters.controls import control_sources
from heterofusion.cli import command, parse_arguments, set_up_logging
from heterofusion.zoo import TASKS, make_examples, zoo_path
from heterofusion.zoo.build import load_base, score_tasks
from heterofusion.zoo.training import collate, encode_example, train

ANCHOR = "ner_kitchen"
HELD_OUT = "et_stage"  # no expert of it is drawn
ONE_FAMILY = "re_market"  # only Qwen2's expert of it is drawn
DRAWN = [task for task in TASKS if task not in (ANCHOR, HELD_OUT)]
BATCH, EXAMPLES, FAMILIES = 24, 2000, ("qwen2", "mistral")


@dataclass
class ManyFusionsArguments:
    """How it is trained."""

    output_dir: str = field(metadata={"help": "Folder for scores.json."})
    preset: str = field(default="paper", metadata={"help": "Form of the hypernetworks: paper or compact."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps of 24 examples."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate, cosine after 10% warm-up."})
    extra_rank: int = field(default=40, metadata={"help": "Random rows more in every lora_A."})
    num_test: int = field(default=100, metadata={"help": "Test sentences of a task."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def fusions(
    model: HeteroFusionModel, tokenizer, experts: dict[tuple[str, str], LoraAdapter], seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches, each of another fusion: the model reads its sources from when the batch is drawn."""
    rng = random.Random(seed)
    rows = {
        task: [encode_example(tokenizer, example) for example in make_examples(task, "train", EXAMPLES, seed)]
        for task in (ANCHOR, *DRAWN)
    }
    while True:
        tasks = rng.sample(DRAWN, rng.randint(1, len(DRAWN)))
        families = [FAMILIES[0] if task == ONE_FAMILY else rng.choice(FAMILIES) for task in tasks]
        model.set_sources([experts[pair] for pair in zip(families, tasks, strict=True)])
        asked = [ANCHOR, *tasks]
        batch = [rng.choice(rows[asked[place % len(asked)]]) for place in range(BATCH)]
        yield collate(batch, tokenizer.pad_token_id)


def score(model: HeteroFusionModel, tokenizer, experts: dict[tuple[str, str], LoraAdapter], options) -> dict:
    """F1 by what is asked, and by task where it is asked of each of the four."""
    four = {task: experts[FAMILIES[task != ONE_FAMILY and index % 2], task] for index, task in enumerate(DRAWN)}

    def f1(sources: Sequence[LoraAdapter], *tasks: str) -> dict[str, float]:
        model.set_sources(sources)
        with torch.no_grad():
            return score_tasks(model, tokenizer, tasks, options.num_test, progress=False)

    def of_each(sources_for) -> dict[str, float]:
        return {task: f1(sources_for(task), task)[task] for task in DRAWN}

    def with_noise(chosen: str) -> list[LoraAdapter]:
        return [control_sources([a], "noise", options.seed)[0] if task == chosen else a for task, a in four.items()]

    sources, other = list(four.values()), experts[FAMILIES[1], ONE_FAMILY]
    return {
        "anchor's task, four sources": f1(sources, ANCHOR)[ANCHOR],
        "source tasks, four sources": f1(sources, *DRAWN),
        "each without its own source": of_each(lambda chosen: [a for task, a in four.items() if task != chosen]),
        "each with noise for its own source": of_each(with_noise),
        "each with its own source alone": of_each(lambda chosen: [four[chosen]]),
        f"{ONE_FAMILY} from the expert of the other family": f1(
            [other if task == ONE_FAMILY else a for task, a in four.items()], ONE_FAMILY
        )[ONE_FAMILY],
        f"{HELD_OUT} without a source of it": f1(sources, HELD_OUT)[HELD_OUT],
        **{
            f"{HELD_OUT} with {family}'s expert beside the four": f1([*sources, experts[family, HELD_OUT]], HELD_OUT)[
                HELD_OUT
            ]
            for family in FAMILIES
        },
    }


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((ManyFusionsArguments,), argv, __doc__)
    set_up_logging(logging.WARNING)  # every step aligns anew
    base, tokenizer = load_base(zoo_path("llama"), "llama")
    experts = {(family, task): load_adapter(zoo_path(family, task)) for family in FAMILIES for task in TASKS}
    method = MethodConfig(preset=options.preset, extra_rank=options.extra_rank)
    anchor, first = load_adapter(zoo_path("llama", ANCHOR)), experts[FAMILIES[0], DRAWN[0]]
    model = HeteroFusionModel.from_adapters(base, anchor, [first], method, seed=options.seed)
    train(
        model, fusions(model, tokenizer, experts, options.seed), options.max_steps, options.learning_rate, warmup=0.1
    )
    scores = score(model, tokenizer, experts, options)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({"settings": vars(options), "f1": scores}, indent=2) + "\n")
    print("| F1 | |\n|---|---|")
    for name, value in scores.items():
        print(f"| {name} | {mean(value.values()) if isinstance(value, dict) else value:.3f} |")
    print(f"written to {folder / 'scores.json'}")


if __name__ == "__main__":
    sys.exit(main())
