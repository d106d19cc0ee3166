"""How answers are judged, a module for each task. A user's own is `module:NAME`, where NAME is a `Task`."""

import difflib

from ftray.errors import UserError
from ftray.plugins import is_plugin, load_plugin
from ftray.tasks.exact_match import EXACT_MATCH
from ftray.tasks.protocol import Question, Task

TASKS: dict[str, Task] = {"exact_match": EXACT_MATCH}


def find_task(name: str, *, key: str = "task") -> Task:
    """By its name, or `module:NAME`. Raises `UserError`."""
    if is_plugin(name):
        return load_plugin(name, Task, key=key)
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}, and module:NAME"
        raise UserError(f"{key}: {name!r} is no task; {hint}")
    return TASKS[name]


__all__ = ["EXACT_MATCH", "TASKS", "Question", "Task", "find_task"]
