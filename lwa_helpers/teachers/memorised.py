"""Does a language model know the titles of a catalogue by heart? Its ranking of them then says little of taste."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.ranking.item_head import pad_right

BATCH = 32


@torch.no_grad()
def completed(lm: LanguageModel, beginnings: Sequence[str], ends: Sequence[str]) -> np.ndarray:
    """Return whether each token of each end is the most probable one after the text before it, (n,) bool.

    Args:
        lm: the model.
        beginnings: what it reads.
        ends: what follows, each with its leading space.
    """
    prompts = [lm.tokenizer(text)["input_ids"] for text in beginnings]
    wanted = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ends]
    out = np.zeros(len(prompts), bool)
    for start in range(0, len(prompts), BATCH):
        rows = range(start, min(start + BATCH, len(prompts)))
        ids, mask = (part.to(lm.model.device) for part in pad_right([prompts[i] + wanted[i] for i in rows]))
        best = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.argmax(-1)
        for row, i in enumerate(rows):
            first, n = len(prompts[i]), len(wanted[i])
            out[i] = bool((best[row, first - 1 : first - 1 + n] == ids[row, first : first + n]).all())
    return out


def memorised(lm: LanguageModel, titles: Sequence[str], header: str, seed: int) -> dict[str, np.ndarray]:
    """Ask a model to finish titles, each from the first half of its words.

    Args:
        lm: the model, before tuning.
        titles: the titles; those of one word are left out.
        header: the text before each title.
        seed: of the draw of the control.

    Returns:
        Whether each was finished word for word, (n,) bool: "title", the title's own second half; "control", that of
        another title, which nobody can have memorised; "year", the year in brackets, for titles that end with one.
    """
    split = [(words, (len(words) + 1) // 2) for words in map(str.split, titles) if len(words) > 1]
    starts = [header + " ".join(words[:half]) for words, half in split]
    ends = [" " + " ".join(words[half:]) + "\n" for words, half in split]
    order = np.random.default_rng(seed).permutation(len(ends))
    donor = dict(zip(order, np.roll(order, 1)))
    dated = [match.groups() for title in titles if (match := re.fullmatch(r"(.+ )(\(\d{4}\))", title))]
    return {
        "title": completed(lm, starts, ends),
        "control": completed(lm, starts, [ends[donor[i]] for i in range(len(ends))]),
        "year": completed(lm, [header + name + "(" for name, _ in dated], [year[1:] for _, year in dated]),
    }
