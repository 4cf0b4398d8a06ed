"""From data sets as they are published to the files of an experiment: replay, train, validation and test.

`uie` reads the InstructUIE layout and `glue` the GLUE data sets; both give a `SourceTask`. `make_splits` draws the
samples and keeps every text in one split, `write_tasks` writes what it gave, with a manifest.
"""

from heterofusion.preparation.glue import read_glue_task
from heterofusion.preparation.output import check_output, summary_table, write_tasks
from heterofusion.preparation.splits import Example, PreparedTask, Sizes, SourceTask, make_splits
from heterofusion.preparation.uie import TaskFolder, find_tasks, read_task, select_tasks

__all__ = [
    "Example",
    "PreparedTask",
    "Sizes",
    "SourceTask",
    "TaskFolder",
    "check_output",
    "find_tasks",
    "make_splits",
    "read_glue_task",
    "read_task",
    "select_tasks",
    "summary_table",
    "write_tasks",
]
