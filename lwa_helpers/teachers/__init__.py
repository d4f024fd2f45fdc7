"""Teachers that rank a fixed candidate list: models served by Ollama, local models, and the fusion of several."""

from __future__ import annotations

from lwa_helpers.teachers.answers import TeacherAnswers
from lwa_helpers.teachers.availability import reachable_teachers, status_lines
from lwa_helpers.teachers.fusion import fuse
from lwa_helpers.teachers.local_teacher import LocalTeacher
from lwa_helpers.teachers.ollama_teacher import OllamaTeacher

__all__ = ["LocalTeacher", "OllamaTeacher", "TeacherAnswers", "fuse", "reachable_teachers", "status_lines"]
