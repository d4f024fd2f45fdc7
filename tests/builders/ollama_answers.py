"""What the models of the local Ollama server say: functions (messages, schema) -> tokens or an object.

`by_score` ranks the candidates of the question by a score; `written_by` is a real model that decodes greedily under the
schema. Log-probabilities are as Ollama gives them: of the model's own softmax, before the schema forbids tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex


@dataclass(frozen=True)
class Token:
    """A piece of text, its log-probability, and what else could have stood there.

    top: (text, log-probability) of each, the most probable first.
    """

    text: str
    log_p: float = 0.0
    top: tuple[tuple[str, float], ...] = ()


Messages = list[dict[str, str]]
Answer = Callable[[Messages, dict[str, Any]], Any]


def by_score(score: Callable[[Sequence[str], str], float]) -> Answer:
    """An answer that orders the candidates by score(history, title), or names the best.

    The best is named by its label, with p(label) = softmax of the scores.
    """

    def answer(messages: Messages, schema: dict[str, Any]) -> Any:
        if not messages[-1]["content"].startswith("{"):
            return "Hello."
        asked = json.loads(messages[-1]["content"])
        ranked = sorted(asked["candidates"], key=lambda c: -score(asked["history"], c["title"]))
        if "best" not in schema.get("properties", {}):
            return {"ranking": [candidate["number"] for candidate in ranked]}
        scores = [score(asked["history"], candidate["title"]) for candidate in ranked]
        total = math.log(sum(math.exp(x - scores[0]) for x in scores)) + scores[0]
        top = tuple((candidate["label"], x - total) for candidate, x in zip(ranked, scores))
        return [Token('{"best": "', 0.0, (('{"best": "', 0.0),)), Token(*top[0], top), Token('"}', 0.0, (('"}', 0.0),))]

    return answer


def pattern_of(schema: dict[str, Any]) -> str:
    """A regular expression of the JSON texts that a schema of enumerations, integers, arrays and objects allows."""
    if "enum" in schema:
        return "(?:" + "|".join(re.escape(json.dumps(value)) for value in schema["enum"]) + ")"
    if schema["type"] == "integer":
        return "(?:" + "|".join(map(str, range(schema["minimum"], schema["maximum"] + 1))) + ")"
    if schema["type"] == "array":
        item, least, most = pattern_of(schema["items"]), schema["minItems"], schema["maxItems"]
        return rf"\[{item}(?:, ?{item}){{{least - 1},{most - 1}}}\]"
    fields = [rf'"{name}": ?{pattern_of(field)}' for name, field in schema["properties"].items()]
    return r"\{" + ", ?".join(fields) + r"\}"


def written_by(model: Any) -> Answer:
    """The greedy answer of a real LanguageModel (lwa_helpers.models.loading) among the texts that the schema allows."""
    import torch

    tokenizer = model.tokenizer
    pieces = [tokenizer.decode(i) for i in range(len(tokenizer))]

    def answer(messages: Messages, schema: dict[str, Any]) -> list[Token]:
        grammar = regex.compile(pattern_of(schema))
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids, past, text, tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"], None, "", []
        while not grammar.fullmatch(text):
            with torch.no_grad():
                out = model.model(input_ids=torch.tensor([ids]), past_key_values=past, use_cache=True)
            past, log_p = out.past_key_values, out.logits[0, -1].double().log_softmax(-1)
            order = log_p.argsort(descending=True).tolist()
            chosen = next(i for i in order if pieces[i] and grammar.fullmatch(text + pieces[i], partial=True))
            top = tuple((pieces[i], log_p[i].item()) for i in order[:20])
            tokens.append(Token(pieces[chosen], log_p[chosen].item(), top))
            ids, text = [chosen], text + pieces[chosen]
        return tokens

    return answer
