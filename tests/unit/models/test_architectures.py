"""Every causal LM of transformers that can be made tiny: each step is exact, or refused by one clear error.

docs/architectures.md lists the outcomes, and the tests hold the code against it. Run in one process without xdist, this
file also writes the page anew, whether the outcomes have changed or not.
"""

import copy
import gc
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import kinds, tiny_model
from tiny_lm import TITLES, item_lm, reading_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lwa_helpers import FisherInformationCalculator, build_student, load_teacher
from lwa_helpers.errors import LwaError
from lwa_helpers.models.gguf_export import export_gguf
from lwa_helpers.models.layers import decoder_layers
from lwa_helpers.ranking.item_head import ItemRanker
from lwa_helpers.ranking.title_head import TitleRanker

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
STEPS = ("Fisher", "item head", "title head", "student", "save and load", "GGUF")
EXACT, REFUSED = "exact", "refused"
HISTORY, KEPT = [0, 2, 5], [0, 2]
ROWS, LENGTH = 2, 12
FEWEST = 130  # architectures that can be made tiny; the number may grow with transformers
HEAD = """# Architectures

What works with each causal language model of transformers {version} that can be made tiny ({count} of {all}). The test
`tests/unit/models/test_architectures.py` writes this page and holds the code against it; transformers cannot build the
others from sizes so small, or they need packages or inputs beyond text. *Exact* means: equal to an
independent computation. *Refused* means: one error, before any work, that names the model and the reason.

- **Fisher**: the trace of each layer against the gradients of autograd, row by row.
- **item head**, **title head**: the scores of a catalogue against plain forward passes.
- **student**: two of four layers against the whole model in which the other layers pass their input on.
- **save and load**: the logits of the student before and after.
- **GGUF**: the logits of the exported file, read by transformers.

"""


def tokens(lm):
    return torch.randint(3, len(lm.tokenizer), (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=torch.as_tensor(ids)).logits.float()


def close(got, expected):
    """Whether two arrays agree to the precision of float32 sums taken in another order."""
    got, expected = np.asarray(got, dtype=float), np.asarray(expected, dtype=float)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def fisher(lm, _folder):
    ids, model = tokens(lm), lm.model
    ours = FisherInformationCalculator().calculate(model, [{"input_ids": ids, "labels": ids}]).per_layer
    own = []
    for row in ids:
        model.zero_grad()
        cross_entropy(model(input_ids=row[None]).logits[0, :-1].float(), row[1:], reduction="sum").backward()
        own.append(
            [
                sum(p.grad.square().sum().item() for p in x.parameters() if p.grad is not None)
                for x in decoder_layers(model)
            ]
        )
    model.zero_grad()
    close(ours, np.mean(own, 0))


def item_head(lm, _folder):
    tuned = item_lm(lm=lm)
    reading = reading_of(tuned)
    expected = logits(tuned.model, [reading.prompt(HISTORY)])[0, -1, tuned.items.tokens]
    close(ItemRanker(tuned, reading).scores([HISTORY])[0], expected)


def title_head(lm, _folder):
    ranker = TitleRanker(lm.model, lm.tokenizer, "Seen:\n", TITLES)
    prompt, expected = ranker.prompt(HISTORY), []
    for title in ranker.tokens:
        steps = logits(lm.model, [prompt + title])[0].log_softmax(-1)
        expected.append(sum(steps[len(prompt) - 1 + place, token].item() for place, token in enumerate(title)))
    close(ranker.scores([HISTORY])[0], expected)


def student(lm, _folder):
    expected = copy.deepcopy(lm.model)
    for index, layer in enumerate(decoder_layers(expected)):
        if index not in KEPT:
            layer.forward = passing_on(layer.forward)
    ids = tokens(lm)
    close(logits(build_student(lm, len(KEPT), KEPT).model, ids), logits(expected, ids))


def passing_on(forward):
    """A forward that returns its first argument as its hidden states."""

    def pass_on(*args, **kwargs):
        states, found = args[0] if args else kwargs["hidden_states"], forward(*args, **kwargs)
        return (states, *found[1:]) if isinstance(found, tuple) else states

    return pass_on


def save_and_load(lm, folder):
    with suppress(LwaError):  # where there is no student, the whole model is saved
        lm = build_student(lm, len(KEPT), KEPT)
    lm.save(folder)
    close(logits(load_teacher(folder).model, tokens(lm)), logits(lm.model, tokens(lm)))


def export(lm, folder):
    path = export_gguf(lm, folder, dtype="f32")
    close(
        logits(AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name), tokens(lm)),
        logits(lm.model, tokens(lm)),
    )


CHECKS = dict(zip(STEPS, (fisher, item_head, title_head, student, save_and_load, export), strict=True))


def outcome(check, lm, folder):
    try:
        check(lm, folder)
    except LwaError:
        return REFUSED
    return EXACT


@cache
def documented():
    if not PAGE.exists():
        return {}
    rows = [
        line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"
    ]
    return {kind.strip("`"): cells for kind, _, *cells in rows}


@pytest.fixture(scope="module")
def rows(request):
    """The outcomes so far; the last test to end writes the page when this file runs alone in one process."""
    found = {}
    yield found
    alone = not hasattr(request.config, "workerinput") and len(found) >= FEWEST
    if alone:
        write_page(found)


def write_page(found):
    import transformers

    head = HEAD.format(version=transformers.__version__, count=len(found), all=len(kinds()))
    lines = ["| model type | class | " + " | ".join(STEPS) + " |", "|---" * (2 + len(STEPS)) + "|"]
    lines += [f"| `{kind}` | {name} | " + " | ".join(cells) + " |" for kind, (name, cells) in sorted(found.items())]
    PAGE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", kinds())
def test_every_step_is_exact_or_refused(kind, rows, tmp_path):
    try:
        lm = tiny_model(kind)
        logits(lm.model, tokens(lm))
    except Exception as error:  # whatever transformers raises for sizes that an architecture does not take
        pytest.skip(f"{kind} cannot be made tiny: {' '.join(str(error).split())[:100]}")
    cells = [outcome(check, lm, tmp_path / name.replace(" ", "_")) for name, check in CHECKS.items()]
    rows[kind] = type(lm.model).__name__, cells
    del lm
    gc.collect()
    if documented():
        assert cells == documented().get(kind), (
            f"not as in docs/architectures.md: run {Path(__file__).name} without xdist"
        )
