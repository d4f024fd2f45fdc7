"""Teachers that rank a fixed candidate list: models served by Ollama, local models, and the fusion of several."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwa_helpers.teachers.answers import TeacherAnswers
    from lwa_helpers.teachers.availability import reachable_teachers, status_lines
    from lwa_helpers.teachers.local_teacher import LocalTeacher
    from lwa_helpers.teachers.ollama_teacher import OllamaTeacher
    from lwa_helpers.teachers.rank_fusion import fuse

_HOME = {
    "LocalTeacher": "local_teacher",
    "OllamaTeacher": "ollama_teacher",
    "TeacherAnswers": "answers",
    "fuse": "rank_fusion",
    "reachable_teachers": "availability",
    "status_lines": "availability",
}

__all__ = ["LocalTeacher", "OllamaTeacher", "TeacherAnswers", "fuse", "reachable_teachers", "status_lines"]


def __getattr__(name: str):
    """Import a name when it is first used: `lwa status` needs none of the heavy ones."""
    if name not in _HOME:
        raise AttributeError(f"module 'lwa_helpers.teachers' has no attribute {name!r}")
    return getattr(import_module(f"lwa_helpers.teachers.{_HOME[name]}"), name)
