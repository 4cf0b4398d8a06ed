"""All methods in one table under the same conditions: baselines, controls, upper bounds and the fusion itself.

    python recipes/demo/prepare.py
    python recipes/compare.py --config recipes/demo/compare.yaml [--jobs 2] [--dry_run true]

Every method with hyper-parameters gets --search_budget runs that are scored on validation data; then all methods run
once per seed with what was best, and are scored on the test data. Runs that are finished are skipped, so the same
command goes on after an interruption. Merges, and the upper bound of experts on the target's own base, need
--target_experts. Writes report.md, scores.csv and pictures to --output_dir.
"""

import sys
from dataclasses import dataclass

from heterofusion.experiments.comparison import Comparison, ComparisonArguments, Method
from heterofusion.experiments.tables import Gain
from heterofusion.runtime.flags import flag
from heterofusion.runtime.program import command, parse_arguments, set_up_logging

MERGES: dict[str, tuple[str, dict[str, list[float]]]] = {
    "weight average": ("average", {}),
    "Task Arithmetic": ("task_arithmetic", {"merge_lambda": [0.1, 0.2, 0.3, 0.4, 0.6, 1.0]}),
    "TIES": ("ties", {"merge_lambda": [0.3, 0.6, 1.0], "density": [0.2, 1.0]}),
    "DARE": ("dare", {"merge_lambda": [0.2, 0.3, 0.6], "drop_rate": [0.1, 0.5]}),
    "DARE-TIES": ("dare_ties", {"merge_lambda": [0.3, 0.6, 1.0], "drop_rate": [0.1, 0.5]}),
    "DELLA": ("della", {"merge_lambda": [0.3, 0.6, 1.1], "drop_rate": [0.1, 0.3]}),
    "Breadcrumbs": ("breadcrumbs", {"merge_lambda": [0.2, 0.4, 0.8], "density": [0.2, 0.8]}),
    "KnOTS-TIES": ("knots_ties", {"merge_lambda": [0.3, 0.6, 1.0], "density": [0.2, 1.0]}),
    "KnOTS-DARE": ("knots_dare", {"merge_lambda": [0.2, 0.3, 0.6], "drop_rate": [0.1, 0.5]}),
}
RANDOM_MERGES = ("dare", "dare_ties", "della", "knots_dare")
CONTROLS = {
    "noise sources": ("noise", "every source matrix keeps its norm and spectrum, but its directions are random"),
    "shuffled sources": ("shuffle", "the sources' matrices, each in another module"),
    "zero sources": ("zero", "all source matrices are zero"),
}
MERGING = "Merging (needs experts on the target's own base)"
TUNED = "Tuned on the replay (experts of any base; one adapter)"
CONTROLLED = "Controls of HeteroFusion (without what the sources know)"


@dataclass
class CompareArguments(ComparisonArguments):
    """What is compared."""

    target_experts: str = flag("", help="Folder with an expert TASK of each task on the target's base, for merges.")
    learning_rates: list[float] = flag(
        default_factory=lambda: [2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3], help="Those that a fusion tries."
    )
    tuning_learning_rates: list[float] = flag(
        default_factory=lambda: [3e-5, 1e-4, 2e-4, 5e-4, 1e-3, 3e-3], help="Those that tuning tries."
    )


def add_merges(table: Comparison, options: CompareArguments) -> None:
    """The upper bound of experts of the target's own family, and merges of them."""
    experts = [f"{options.target_experts}/{task}" for task in options.tasks]
    about = "the upper bound (SFT): experts on the target's base, each asked about its own task alone"
    scored = {"adapters": experts, "adapter_per_dataset": True}
    table.add(Method("target experts", "References", about, scored=lambda _: [scored]))
    for name, (method, search) in MERGES.items():
        flags = {"model_name_or_path": options.model_name_or_path, "adapters": experts, "method": method}

        def seeded(_: str, seed: int, flags: dict = flags) -> dict:
            return {**flags, "seed": seed if flags["method"] in RANDOM_MERGES else None}

        table.add(Method(name, MERGING, recipe="merge", flags=seeded, search=search))
    emr = {"model_name_or_path": options.model_name_or_path, "adapters": experts, "method": "emr"}
    about = "one adapter per task, so it has to be told which task a prompt is of"
    table.add(
        Method(
            "EMR", MERGING, about, "merge", lambda *_: emr,
            scored=lambda made: [{**scored, "adapters": [made / task for task in options.tasks]}],
        )
    )  # fmt: skip


def add_ensembles(table: Comparison, options: CompareArguments) -> None:
    """All experts run at inference."""
    adapters = [options.target_adapter, *options.source_adapters]
    models = [options.model_name_or_path, *options.source_models]
    for name in ("GaC", "UniTE"):
        flags = {"ensemble": name.lower(), "adapters": adapters, "ensemble_models": models}
        about = "the anchor and the sources decode together"
        table.add(
            Method(name, "Ensembles (all experts run at inference)", about, scored=lambda _, flags=flags: [flags])
        )


def add_tuned(table: Comparison, options: CompareArguments) -> None:
    """What is trained on the replay, and the controls of the fusion."""
    replay = {"dataset_name": options.files("replay")}

    def tuning(_: str, seed: int) -> dict:
        return {**options.tuning, **replay, "dataset_seed": seed, "seed": seed}

    def distilling(case: str, seed: int) -> dict:
        teachers = {"teacher_models": options.source_models, "teacher_adapters": options.source_adapters}
        return {**tuning(case, seed), **teachers, "logits_cache": f"{options.output_dir}/soft_labels"}

    def fusing(_: str, seed: int) -> dict:
        return {**options.fusion, **replay, "dataset_seed": seed, "seed": seed}

    rates = {"learning_rate": options.tuning_learning_rates}
    about = "the anchor's lora_B is tuned on the replay; no source is looked at"
    only_b = {"train_only": "lora_B"}
    table.add(Method("direct tuning of B", TUNED, about, "expert", lambda *where: {**tuning(*where), **only_b}, rates))
    table.add(Method("direct tuning of A and B", TUNED, "the same of lora_A and lora_B", "expert", tuning, rates))
    about = "the anchor is tuned on the replay and on the sources' token distributions there"
    table.add(Method("FuseLLM", TUNED, about, "distill", distilling, rates))
    rates = {"learning_rate": options.learning_rates}
    table.add(Method("HeteroFusion", TUNED, "the fusion as --fuse_config has it", "train", fusing, rates))
    for name, (control, about) in CONTROLS.items():
        flags = {"source_control": control}
        table.add(Method(name, CONTROLLED, about, flags=lambda *_, flags=flags: flags, like="HeteroFusion"))


@command
def main(argv: list[str]) -> None:
    (options,) = parse_arguments((CompareArguments,), argv, __doc__)
    set_up_logging()
    table = options.comparison({"": options.seeds})
    base = [{"adapters": ["none"]}]
    table.add(Method("base", "References", "the target's base model without an adapter", scored=lambda _: base))
    if options.target_experts:
        add_merges(table, options)
    add_ensembles(table, options)
    add_tuned(table, options)
    over = [*CONTROLS, "direct tuning of B", "direct tuning of A and B"]
    gains = [Gain(f"gain over {name}", "HeteroFusion", name) for name in over]
    table.report(options.title, gains, "target experts" if options.target_experts else "source experts")


if __name__ == "__main__":
    sys.exit(main())
