"""Do the sources matter? Fusions with and without their labels, with N replay examples a task, beside their controls.

    python recipes/demo/prepare.py --output_dir outputs/sources/data --seed 1
    python recipes/sources.py --config recipes/demo/sources.yaml --jobs 2

The published method, the recommended one and direct tuning run on the replay alone, and with what the source experts
answered to the prompts in unlabelled/TASK.jsonl. Controls have everything but what the sources know. Hyper-parameters
are searched in the case --search_examples, with equal budgets. Runs that are finished are skipped.
"""

import sys
from pathlib import Path

from _sources import Labels, SourcesArguments, replay_of
from heterofusion.experiments.comparison import Comparison, Method
from heterofusion.experiments.tables import Gain
from heterofusion.runtime.program import command, parse_arguments, set_up_logging

CONTROLLED = ("N=10", "N=30")  # cases of the controls
WITHOUT, WITH = "Without source labels", "With labels of the source experts"
NO_KNOWLEDGE, NEEDS = "Controls (without what the sources know)", "What the labels need"
BEST, NOISE = "recommended + labels", {"source_control": "noise"}
OWN = "recommended, labels of its own task"
OTHERS = [f"labels of {name}" for name in ("bases", "shuffled experts", "the anchor")]


def add_methods(table: Comparison, options: SourcesArguments, labels: Labels, with_replay: list[str]) -> None:
    """Direct tuning and fusions, without and with the labels."""
    expanded = {"train_only": "lora_B", "extra_rank": 40, "extra_basis": "activations"}
    forms = {
        "direct r": ("expert", {}, options.tuning_rates, "the anchor's lora_A and lora_B are tuned"),
        "direct r+k": ("expert", expanded, options.expanded_rates, "lora_B alone, with 40 rows of lora_A more"),
        "published": ("train", {"preset": "paper"}, options.published_rates, "the preset paper"),
        "recommended": ("train", {"preset": "recommended"}, options.expanded_rates, "the preset recommended"),
    }
    for end, group in (("", WITHOUT), (" + labels", WITH)):
        for name, (recipe, own, rates, about) in forms.items():
            factor = options.label_rate_factor if end and name != "published" else 1.0
            fixed = {**(options.fusion if recipe == "train" else options.tuning), **own}

            def flags(*at, fixed: dict = fixed, end: str = end) -> dict:
                return {**fixed, **replay_of(options, at), "seed": at[1], "source_labels": labels(at) if end else None}

            search = {"learning_rate": [round(rate * factor, 10) for rate in rates]}
            table.add(Method(name + end, group, about, recipe, flags, search, cases=() if end else with_replay))


def add_variants(table: Comparison, options: SourcesArguments, labels: Labels, cases: list[str]) -> None:
    """Controls, and what the labels need: each like a method above but for a few flags."""

    def add(name: str, group: str, about: str, flags, like: str = BEST) -> None:
        table.add(Method(name, group, about, flags=flags, like=like, cases=cases))

    add("recommended, noise sources", NO_KNOWLEDGE, "noise for the matrices", lambda *_: NOISE, like="recommended")
    add(OWN, NO_KNOWLEDGE, "the anchor labels its own task, and nobody the others",
        lambda *at: {"source_labels": labels(at, routing=labels.own), "replay_fraction": 0.875})  # fmt: skip
    for name, control in zip(OTHERS, ("bases", "shuffle", "anchor"), strict=True):

        def controlled(*at, control: str = control) -> dict:
            seed = at[1] if control == "shuffle" else None
            made = labels(at, routing=labels.routing, control=control, seed=seed)
            return {"source_labels": made, "keep_malformed": True}

        add(name, NO_KNOWLEDGE, f"--control {control} of recipes/label.py", controlled)
    add(f"{BEST}, noise sources", NEEDS, "real labels, but noise for the matrices", lambda *_: NOISE)
    for count in (30, 100):
        flags = {"source_labels_max_examples": count}
        add(f"{count} prompts a task", NEEDS, f"{count} labels of each task", lambda *_, flags=flags: flags)
    if Path(options.files("foreign")[0]).is_file():
        add("prompts of another distribution", NEEDS, "the prompts ask about sentences of another task",
            lambda *at: {"source_labels": labels(at, "foreign", routing=labels.routing)})  # fmt: skip
    if labels.irrelevant():
        add("irrelevant experts", NEEDS, "more sources, of other tasks; routing has to leave them out",
            lambda *at: {"source_adapters": [*options.source_adapters, *labels.irrelevant()],
                         "source_labels": labels(at, more=True)})  # fmt: skip
    if options.same_time_steps:
        add("direct r+k + labels, same time", WITH, f"{options.same_time_steps} steps, as long as the fusion takes",
            lambda *_: {"max_steps": options.same_time_steps}, like="direct r+k + labels")  # fmt: skip


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((SourcesArguments,), argv, __doc__)
    set_up_logging()
    seeds = {f"N={count}": options.seeds[: 2 if count in options.few_seeds else None] for count in options.examples}
    table = options.comparison(seeds, f"N={options.search_examples}")
    labels = Labels(table, options)
    add_methods(table, options, labels, [case for case in seeds if case != "N=0"])
    add_variants(table, options, labels, [case for case in seeds if case in CONTROLLED])
    controls = ["recommended", "recommended, noise sources", OWN, *OTHERS]
    gains = [
        Gain("source gain", BEST, controls, at_least=0.15, cases=["N=30"]),
        Gain("source gain", BEST, controls, at_least=0.35, cases=["N=10"]),
        Gain("matrices alone", "recommended", "recommended, noise sources"),
        Gain("matrices beside labels", BEST, f"{BEST}, noise sources"),
        Gain("over direct tuning with the same labels", BEST, "direct r+k + labels", at_least=0.0, above=-0.005),
        Gain("over direct tuning for the same time", BEST, "direct r+k + labels, same time", at_least=0, above=-0.005),
        Gain("over the published form with the same labels", BEST, "published + labels"),
        Gain("on the anchor's own task", BEST, "anchor", options.target_task, at_least=-0.01, above=-1.0),
        Gain("with irrelevant experts", "irrelevant experts", BEST, at_least=-0.02, above=-1.0),
    ]  # fmt: skip
    table.report(options.title, gains, "source experts")


if __name__ == "__main__":
    sys.exit(main())
