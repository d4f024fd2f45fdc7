"""What a served model said in one answer, and why an answer cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

import ollama

from lwa_helpers.teachers.readable import readable
from lwa_helpers.teachers.repair import UnreadableAnswer


@dataclass
class Said:
    """The parts of an answer so far.

    Attributes:
        content: the answer.
        thinking: what the server has marked as thinking.
        tools: whether the model called a tool.
    """

    content: str = ""
    thinking: str = ""
    tools: bool = False

    def add(self, message: ollama.Message) -> None:
        """Add the next part."""
        self.content += message.content or ""
        self.thinking += message.thinking or ""
        self.tools |= bool(message.tool_calls)

    def unreadable(self, error: UnreadableAnswer, done_reason: str | None, num_predict: int) -> str:
        """Return why the answer cannot be read, and what to do if its tokens ran out.

        Args:
            error: what was wrong with the text.
            done_reason: why the model stopped, as the server says.
            num_predict: the most tokens that it was allowed.
        """
        answer = readable(self.content).strip()
        thought = bool(self.thinking.strip()) or answer != self.content.strip()
        if done_reason == "length":
            spent = "the answer, which was cut" if answer else "thinking, and no answer came"
            less = "`think: low` or " if thought or not answer else ""
            return (
                f"all {num_predict} tokens of num_predict were spent on {spent} (done_reason length): give the model "
                f"{less}a larger `num_predict` in model_config.yaml, or ask with fewer candidates"
            )
        if answer:
            return f"the answer is outside the schema, {error}"
        if self.tools:
            return "the answer is empty: the model called a tool instead"
        if thought:
            return "the answer is empty, the model only thought: give it `think: low` in model_config.yaml"
        return f"the answer is empty (done_reason {done_reason})"
