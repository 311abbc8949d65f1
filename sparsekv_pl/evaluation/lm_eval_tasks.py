"""Finding lm_eval's tasks by name, and the local files that they use."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv_pl.storage.fingerprint import path_digest
from sparsekv_pl.storage.given_paths import named_by

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def task_manager(tasks: list[str], include_path: Path | None) -> "TaskManager":
    """Index the tasks in ``include_path``, and lm_eval's own (10 s) only if ``tasks`` needs them.

    Raises ``ValueError`` for a task in neither.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        local = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(local.all_tasks):
            return local
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(task, manager.all_tasks)) or "see `lm_eval ls tasks`"
            raise ValueError(
                f"task {task!r} is neither lm_eval's nor in include_path={str(include_path)!r}; similar: {near}"
            )
    return manager


def named_files(manager: "TaskManager", task: str) -> list[str]:
    """Digests of all files and folders named in the settings of a task, or of a group's tasks."""
    entry = manager.task_index.get(task)
    left: list[Any] = [entry.cfg if entry is not None else None]
    found = []
    while left:
        value = left.pop()
        if isinstance(value, dict):
            members = value.get("task")
            left += value.values()
            if isinstance(members, list):
                found += [digest for one in members if isinstance(one, str) for digest in named_files(manager, one)]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and (path := named_by(value, home=False)) is not None:
            found.append(path_digest(path))
    return sorted(found)
