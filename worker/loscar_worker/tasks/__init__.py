"""The built-in tasks, and what it takes to write one's own (docs/tasks.md).

`load_task` turns a name into a `Task`; `loscar_worker.tasks.partition` decides which worker trains on what.
Importing this package imports torch and nothing that a particular task needs.
"""

from loscar_worker.tasks.base import ArrayDataset, Batch, Evaluation, Task, parameter_count
from loscar_worker.tasks.files import resolve_data_dir
from loscar_worker.tasks.registry import load_task, task_names

__all__ = [
    "ArrayDataset",
    "Batch",
    "Evaluation",
    "Task",
    "load_task",
    "parameter_count",
    "resolve_data_dir",
    "task_names",
]
