"""Where the zoo's files lie, and which there are."""

from __future__ import annotations

import pathlib

from heterofusion.runtime.errors import UserError
from heterofusion.zoo.language import TASKS

FAMILIES = ("llama", "qwen2", "mistral")
# The fusion that `make demo` shows: target and sources as (family, task), each task once.
DEMO_ANCHOR = ("llama", "ner_kitchen")
DEMO_SOURCES = (
    ("qwen2", "ner_garden"),
    ("qwen2", "re_town"),
    ("qwen2", "et_harbor"),
    ("mistral", "re_market"),
    ("mistral", "et_stage"),
)
DATA = pathlib.Path(__file__).parent / "data"


def zoo_path(family: str, task: str | None = None) -> pathlib.Path:
    """The folder of a base or of an expert, as `from_pretrained` takes it.

    Args:
        family: One of `FAMILIES`.
        task: A key of `TASKS` for the LoRA expert of that task; None for the base with its tokenizer.

    Returns:
        The folder.

    Raises:
        ValueError: For an unknown family or task.
        FileNotFoundError: If the folder is not there, which a complete installation has.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if task is not None and task not in TASKS:
        raise UserError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    path = DATA / family / (task or "base")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing; build the zoo with recipes/build_zoo.py")
    return path


def list_experts() -> list[tuple[str, str]]:
    """The (family, task) pairs of all experts that are installed.

    Returns:
        The pairs, in the order of `FAMILIES` and `TASKS`; each is good for `zoo_path`.
    """
    return [(f, t) for f in FAMILIES for t in TASKS if (DATA / f / t / "adapter_model.safetensors").is_file()]
