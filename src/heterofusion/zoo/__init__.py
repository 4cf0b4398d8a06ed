"""The embedded zoo: three tiny model families with LoRA experts for six extraction tasks of an invented language."""

from heterofusion.zoo.catalog import DEMO_ANCHOR, DEMO_SOURCES, FAMILIES, list_experts, zoo_path
from heterofusion.zoo.chores import CHORES, make_chores
from heterofusion.zoo.language import SPLITS, TASKS, Task, make_examples, write_dataset
from heterofusion.zoo.splits import write_chores, write_splits, write_unlabelled

__all__ = [
    "CHORES",
    "DEMO_ANCHOR",
    "DEMO_SOURCES",
    "FAMILIES",
    "SPLITS",
    "TASKS",
    "Task",
    "list_experts",
    "make_chores",
    "make_examples",
    "write_chores",
    "write_dataset",
    "write_splits",
    "write_unlabelled",
    "zoo_path",
]
