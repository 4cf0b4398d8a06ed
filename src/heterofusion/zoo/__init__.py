"""The embedded zoo: three tiny model families with LoRA experts for six extraction tasks of an invented language."""

from heterofusion.zoo.catalog import DEMO_ANCHOR, DEMO_SOURCES, FAMILIES, list_experts, zoo_path
from heterofusion.zoo.language import SPLITS, TASKS, Task, make_examples, write_dataset, write_splits

__all__ = [
    "DEMO_ANCHOR",
    "DEMO_SOURCES",
    "FAMILIES",
    "SPLITS",
    "TASKS",
    "Task",
    "list_experts",
    "make_examples",
    "write_dataset",
    "write_splits",
    "zoo_path",
]
