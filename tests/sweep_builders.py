"""Sweeps of real recipes for tests."""

from pathlib import Path

from heterofusion.zoo import make_examples, write_dataset, zoo_path


def tiny_sweep(folder: Path, steps: int) -> dict:
    """Sections of a sweep of one fusion of the zoo and its scores; the data goes into the folder."""
    for split, count in (("replay", 4), ("test", 3)):
        write_dataset(folder / f"{split}.jsonl", make_examples("re_town", split, count))
    base = str(zoo_path("llama"))
    return {
        "sweep": {"seed": [0]},
        "train": {
            "model_name_or_path": base, "target_adapter": str(zoo_path("llama", "ner_kitchen")),
            "source_adapters": [str(zoo_path("mistral", "re_town"))], "max_steps": steps, "use_cpu": True,
            "dataset_name": [str(folder / "replay.jsonl")], "seed": "{seed}", "save_strategy": "no",
        },
        "eval": {
            "model_name_or_path": base, "dataset_name": [str(folder / "test.jsonl")], "max_new_tokens": 4,
            "use_cpu": True,
        },
    }  # fmt: skip
