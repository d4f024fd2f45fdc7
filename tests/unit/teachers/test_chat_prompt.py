"""Chat templates of local models: used as they are, mended where they refuse or drop a message, else one error."""

from __future__ import annotations

from dataclasses import replace

import pytest
from teacher_questions import CANDIDATES, HISTORY
from tiny_lm import language_model, tokenizer

from lwa_helpers.errors import LwaError
from lwa_helpers.teachers.answers import ranking_messages
from lwa_helpers.teachers.chat_prompt import chat_prompt
from lwa_helpers.teachers.local_teacher import LocalTeacher

MESSAGES = ranking_messages(HISTORY, ["Se7en", 'Up <b> "2"'])
SYSTEM, USER = (message["content"] for message in MESSAGES)
EACH = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<answer>"
APART = f"<system>{SYSTEM}\n<user>{USER}\n<answer>"
TOGETHER = f"<user>{SYSTEM}\n\n{USER}\n<answer>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
MISTRAL = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}\n{% endfor %}{% endfor %}<answer>"
)
USERS_ONLY = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<answer>"


def asked(template):
    reader = tokenizer()
    reader.chat_template = template
    return chat_prompt(reader, MESSAGES, "mine")


MENDED = {
    "as it is": (EACH, APART),
    "no system role": (NO_SYSTEM + EACH, TOGETHER),
    "roles must alternate": (MISTRAL + EACH, TOGETHER),
    "an assertion of its own": ("{{ 1 // 0 if messages[0].role == 'system' }}" + EACH, TOGETHER),
    "system dropped": (USERS_ONLY, TOGETHER),
    "only the last message": ("<user>{{ messages[-1].content }}\n<answer>", TOGETHER),
    "no first token": ("{{ '' + bos_token }}" + EACH, APART),
    "no first token and no system role": ("{{ '' + bos_token }}" + NO_SYSTEM + EACH, TOGETHER),
    "tools": ("{{ tools | length }}" + EACH, "0" + APART),
    "documents": ("{% for d in documents %}{{ d }}{% endfor %}" + EACH, APART),
    "parts": (PARTS, APART),
    "parts without a system role": (NO_SYSTEM + PARTS, TOGETHER),
}  # fmt: skip


@pytest.mark.parametrize(("template", "prompt"), MENDED.values(), ids=MENDED)
def test_the_whole_question_is_asked(template, prompt):
    assert asked(template) == prompt


@pytest.mark.parametrize("change", ["trim", "tojson"])
def test_a_template_may_strip_and_escape(change):
    assert asked(EACH.replace("m.content", f"m.content | {change}")).startswith("<system>")


BROKEN = {
    "refuses all": ("{{ raise_exception('Only tools may speak') }}", "Only tools may speak"),
    "a field of nothing": ("{{ settings.mode.name }}" + EACH, "undefined"),
    "not a template": ("{% for m in messages %}", "Unexpected end"),
    "says nothing": ("", "drops the question"),
    "white space": ("  \n", "drops the question"),
    "another text": (EACH.replace("m.content", "m.content | upper"), "drops the question"),
    "half the question": ("{{ messages[-1].content[:40] }}", "drops the question"),
    "the parts as Python prints them": ("{{ messages[-1].content if messages[-1].content is not string }}", "drops"),
    "dangerous": ("{{ messages.__class__.__mro__[1].__subclasses__() }}" + EACH, ""),
}


@pytest.mark.parametrize(("template", "cause"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_mended_is_one_error_with_model_cause_and_remedy(template, cause):
    with pytest.raises(LwaError, match=f"'mine'.*template.*{cause}.*prompt: plain"):
        asked(template)


def test_a_refused_system_message_is_ranked_with_and_a_base_model_reads_plain_text():
    lm = language_model(layers=2, vocabulary=340, rope_theta=1e4)
    lm.model.config.max_position_embeddings = 4096
    for template, style in ((NO_SYSTEM + EACH, None), (None, None), ("{{ raise_exception('no') }}", "plain")):
        lm.tokenizer.chat_template = template
        answers = LocalTeacher(replace(lm, prompt=style), "generate").rank([HISTORY], [CANDIDATES])
        assert sorted(answers.order[0]) == [0, 1, 2]


def test_a_chat_without_a_template_is_an_error():
    with pytest.raises(LwaError, match="'tiny' has no chat template"):
        LocalTeacher(replace(language_model(layers=1), prompt="chat"), "generate").rank([HISTORY], [CANDIDATES])
