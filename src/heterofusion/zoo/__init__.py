"""The embedded zoo: three tiny model families with LoRA experts for six extraction tasks of an invented language."""

from heterofusion.zoo.files import (
    DEMO_ANCHOR,
    DEMO_SOURCES,
    FAMILIES,
    write_chores,
    write_dataset,
    write_splits,
    write_unlabelled,
    zoo_path,
)
from heterofusion.zoo.language import CHORES, SPLITS, TASKS, Task, make_chores, make_examples

__all__ = [
    "CHORES",
    "DEMO_ANCHOR",
    "DEMO_SOURCES",
    "FAMILIES",
    "SPLITS",
    "TASKS",
    "Task",
    "make_chores",
    "make_examples",
    "write_chores",
    "write_dataset",
    "write_splits",
    "write_unlabelled",
    "zoo_path",
]
