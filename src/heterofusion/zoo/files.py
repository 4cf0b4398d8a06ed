"""The zoo's files: where its models lie, and its examples as JSON Lines for demo and experiments."""

import json
import pathlib
from collections.abc import Iterable, Mapping

from heterofusion.runtime.errors import UserError
from heterofusion.zoo.language import CHORES, TASKS, make_chores, make_examples

FAMILIES = ("llama", "qwen2", "mistral")
# The fusion that `make demo` shows: target and sources as (family, task), each task once.
DEMO_ANCHOR = ("llama", "ner_kitchen")
DEMO_SOURCES = (
    *(("qwen2", task) for task in ("ner_garden", "re_town", "et_harbor")),
    *(("mistral", task) for task in ("re_market", "et_stage")),
)
DATA = pathlib.Path(__file__).parent / "data"


def zoo_path(family: str, task: str | None = None) -> pathlib.Path:
    """The folder of a base with its tokenizer, or of the LoRA expert of a task, as `from_pretrained` takes it."""
    for kind, name, known in (("family", family, FAMILIES), ("task", task, (None, *TASKS))):
        if name not in known:
            raise UserError(f"unknown {kind} {name!r}; choose one of {', '.join(filter(None, known))}")
    path = DATA / family / (task or "base")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing; build the zoo with recipes/build_zoo.py")
    return path


def write_dataset(path: str | pathlib.Path, examples: Iterable[Mapping[str, str]]) -> pathlib.Path:
    """Writes examples as JSON Lines, over what is there; gives the path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(dict(example), ensure_ascii=False) + "\n")
    return path


def write_splits(folder: str | pathlib.Path, num_replay: int, num_validation: int, num_test: int, seed: int) -> None:
    """Writes folder/{replay,validation,test}/<task>.jsonl for every task; no sentence is in two of them.

    Validation examples are of the replay split, too: what the experts were trained on would flatter them.
    """
    for task in TASKS:
        records = make_examples(task, "replay", num_replay + num_validation, seed)
        parts = {"replay": records[:num_replay], "validation": records[num_replay:]}
        parts["test"] = make_examples(task, "test", num_test, seed)
        for split, examples in parts.items():
            write_dataset(pathlib.Path(folder) / split / f"{task}.jsonl", examples)


def write_unlabelled(folder: str | pathlib.Path, num_prompts: int, seed: int) -> None:
    """Writes prompts for experts to label, as folder/{unlabelled,foreign}/<task>.jsonl, with answers for scoring only.

    `foreign` asks about the sentences of the other task of the same kind: prompts of another distribution than the
    test's.
    """
    for task in TASKS.values():
        other = next(each for each in TASKS.values() if each.kind == task.kind and each is not task)
        for split, text_of in (("unlabelled", None), ("foreign", other.name)):
            prompts = make_examples(task, "unlabelled", num_prompts, seed, text_of)
            write_dataset(pathlib.Path(folder) / split / f"{task.name}.jsonl", prompts)


def write_chores(folder: str | pathlib.Path, count: int, seed: int) -> None:
    """Writes training data of irrelevant experts, as folder/chores/<name>.jsonl."""
    for name in CHORES:
        write_dataset(pathlib.Path(folder) / "chores" / f"{name}.jsonl", make_chores(name, count, seed))
