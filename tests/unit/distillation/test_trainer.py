"""The distillation loss term by term against formulas written out, and that training lowers it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_lm import READINGS, TITLES, item_lm, language_model, windows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig

from lwa_helpers import DistillationTrainer, build_student
from lwa_helpers.config import load_config
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.distillation.losses import output_losses
from lwa_helpers.distillation.teacher_cache import TeacherOutputs
from lwa_helpers.distillation.weighting import matched_layers
from lwa_helpers.errors import LwaError
from lwa_helpers.ranking import outputs
from lwa_helpers.ranking.outputs import label_outputs
from lwa_helpers.ranking.training import training_arguments, window_loader

LOSS = LossConfig(alpha=0.3, temperature=2.0, beta=0.7)


@pytest.fixture
def pair():
    """A teacher, a student of other weights and half its layers, and the teacher as a LanguageModel."""
    lm = item_lm()
    return lm.model, item_lm(layers=2, seed=1).model, lm


@pytest.mark.parametrize("reading", READINGS)
def test_loss_is_the_formula(reading):
    """At the position before each target, over all tokens of the vocabulary."""
    lm, student = item_lm(reading), item_lm(reading, layers=2, seed=1).model
    teacher, batch = lm.model, next(iter(window_loader(windows(lm), 999, 0, 0, shuffle=False)))
    weights = np.array([0.5, 1.5])
    trainer = DistillationTrainer(teacher, student, weights, loss=LOSS)
    got = trainer.compute_loss(student, batch)
    with torch.no_grad():
        at = (batch["labels"] != -100).roll(-1, 1)
        y = batch["labels"][batch["labels"] != -100]
        ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_hidden_states": True}
        hs, ht = (m.model(**ids).hidden_states for m in (student, teacher))
        zs, zt = student.lm_head(hs[-1][at]), teacher.lm_head(ht[-1][at])
        ce = -zs.log_softmax(-1)[torch.arange(len(y)), y].mean()
        ps, pt = (zs / 2).softmax(-1), (zt / 2).softmax(-1)
        kl = 4 * (pt * (pt / ps).log()).sum(-1).mean()
        d = [(1 - F.cosine_similarity(hs[s][at], ht[t][at], dim=-1)).mean() for s, t in ((1, 2), (2, 4))]
        want = 0.7 * ce + 0.3 * kl + 0.7 * (0.5 * d[0] + 1.5 * d[1]) / 2
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_the_hidden_term_is_a_mean_over_the_layers_that_are_matched():
    """Layers 1 and 2 of three, weights 1 and 3: (1 d_1 + 3 d_2) / 4, whatever layer 3 says."""
    loss = LossConfig(alpha=0.0, temperature=1.0, beta=1.0, match="no_last")
    trainer = DistillationTrainer(item_lm(), item_lm(layers=3, seed=1), np.array([1.0, 3, 5]), loss=loss)
    a, b = torch.eye(4)[:1], torch.eye(4)[1:2]
    got = trainer.hidden_term([a, a, a], [a, b, a + b])
    assert got.item() == pytest.approx((1 * 0 + 3 * 1) / 4)


@pytest.mark.parametrize(
    ("match", "n_layers", "expected"),
    [
        ("all", 3, [1, 1, 1]),
        ("no_last", 3, [1, 1, 0]),
        ("no_last_two", 4, [1, 1, 0, 0]),
        ("last", 3, [0, 0, 1]),
        ("lower", 4, [1, 1, 0, 0]),
        ("upper", 4, [0, 0, 1, 1]),
        ("middle", 8, [0, 0, 1, 1, 1, 1, 0, 0]),
        ("lower", 3, [1, 0, 0]),
        ("upper", 3, [0, 1, 1]),
        ("middle", 3, [0, 1, 0]),
        ("middle", 1, [1]),
    ],
)
def test_matched_layers(match, n_layers, expected):
    assert matched_layers(n_layers, match).tolist() == [bool(x) for x in expected]


def test_a_match_that_leaves_nothing_is_named():
    with pytest.raises(LwaError, match="leaves none of the student's 2 layers"):
        matched_layers(2, "no_last_two")
    with pytest.raises(LwaError, match="choose one of all"):
        matched_layers(2, "some")


def test_a_perfect_student_has_no_distance(pair):
    teacher, _, lm = pair
    batch = next(iter(window_loader(windows(lm), 999, 0, 0, shuffle=False)))
    loss = LossConfig(alpha=1.0, temperature=1.0, beta=1.0)
    trainer = DistillationTrainer(teacher, teacher, strategy="uniform", loss=loss)
    assert trainer.compute_loss(teacher, batch).item() == pytest.approx(0, abs=1e-5)


def test_cached_signals_equal_the_teachers(pair, tmp_path):
    teacher, student, lm = pair
    data = windows(lm)
    ordered = window_loader(data, 40, 0, 0, shuffle=False)
    cache = TeacherOutputs.compute(teacher, ordered, [2, 4], tmp_path / "outputs", bf16=False)
    live = DistillationTrainer(teacher, student, strategy="uniform", loss=LOSS)
    cached = DistillationTrainer(cache, student, strategy="uniform", loss=LOSS)
    for batch in window_loader(data, 60, 0, seed=3):
        want = live.compute_loss(student, batch).item()
        assert cached.compute_loss(student, batch).item() == pytest.approx(want, rel=2e-3)
    shared = TeacherOutputs.compute(teacher, ordered, [1, 2, 3, 4], tmp_path / "shared", bf16=False)  # any depth's
    both = (DistillationTrainer(said, student, strategy="linear", loss=LOSS) for said in (cache, shared))
    one, other = (trainer.compute_loss(student, next(iter(ordered))).item() for trainer in both)
    assert one == other
    with pytest.raises(LwaError, match="in order"):
        TeacherOutputs.compute(teacher, window_loader(data * 3, 60, 0, seed=1), [2, 4], tmp_path / "other", bf16=False)


def ce(out):
    """The cross-entropy of a model's outputs with their targets."""
    return output_losses(out, None, 1.0)[0].item()


class Largest(TorchDispatchMode):
    """The most positions of logits in one tensor, forward and backward; a head's gradient (d, V) is none."""

    def __init__(self, width, n_outputs):
        super().__init__()
        self.width, self.n_outputs, self.rows = width, n_outputs, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            shape = value.shape if isinstance(value, torch.Tensor) else ()
            if len(shape) > 1 and shape[-1] == self.n_outputs and shape[-2] != self.width:
                self.rows = max(self.rows, shape[:-1].numel())
        return out


@pytest.mark.parametrize(("kind", "top_k"), [("live", None), ("live", 20), ("cached", 20)])
def test_logits_in_parts_give_the_same_loss_and_gradients(monkeypatch, tmp_path, kind, top_k):
    """Independent oracle: all at once. With 3 positions at a time no tensor holds more logits, whoever's they are."""
    teacher, student = item_lm(), item_lm(layers=2, seed=1).model
    loss = LOSS.model_copy(update={"top_k": top_k})
    batch = next(iter(window_loader(windows(teacher), 999, 0, 0, shuffle=False)))
    n_outputs = teacher.model.config.vocab_size
    results = []
    for at_once in (10**9, 3 * n_outputs):
        monkeypatch.setattr(outputs, "LOGITS_AT_ONCE", at_once)
        source = teacher
        student.zero_grad()
        with Largest(teacher.model.config.hidden_size, n_outputs) as seen:
            if kind == "cached":
                folder = tmp_path / str(at_once)
                source = TeacherOutputs.compute(teacher.model, [batch], [2, 4], folder, False, top_k, LOSS.temperature)
            value = DistillationTrainer(source, student, strategy="uniform", loss=loss).compute_loss(student, batch)
            value.backward()
        results.append((value.item(), [p.grad.clone() for p in student.parameters()], seen.rows))
    (whole, gradients, rows), (parts, others, few) = results
    assert parts == pytest.approx(whole, rel=1e-5) and (rows, few) == (5, 3)
    for got, want in zip(others, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_every_trained_weight_has_its_gradient(pair):
    """Autocast keeps the weights that it has cast: a head asked without gradients before would never learn."""
    teacher, student, lm = pair
    batch = next(iter(window_loader(windows(lm), 999, 0, 0, shuffle=False)))
    trainer = DistillationTrainer(teacher, student, strategy="uniform", loss=LOSS)
    found = []
    for enabled in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled):
            trainer.compute_loss(student, batch).backward()
        found.append({name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()})
    assert found[0] == found[1] >= {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("kind", ["items", "text"])
def test_student_and_live_teacher_compute_in_the_precision_that_is_asked_for(pair, kind, bf16):
    teacher, student, lm = pair
    if kind == "text":
        lm = language_model()
        teacher, student = lm.model, language_model(layers=2, seed=1).model
    seen = set()
    for model in (teacher, student):
        for name in ("gate_proj", "lm_head"):
            for module in (m for n, m in model.named_modules() if n.endswith(name)):
                who = model is student, name
                module.register_forward_hook(lambda _m, _i, out, who=who: seen.add((*who, out.dtype)))
    loader = window_loader(windows(lm), 60, 0, seed=3)
    arguments = training_arguments(load_config("smoke").ablation.model_copy(update={"bf16": bf16}), 2, 0)
    DistillationTrainer(teacher, student, strategy="uniform", loss=LOSS, args=arguments, loader=loader).train()
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert seen == {(who, name, dtype) for who in (True, False) for name in ("gate_proj", "lm_head")}


def test_labels_alone_need_no_teacher(pair):
    teacher, student, lm = pair
    batch = next(iter(window_loader(windows(lm), 60, 0, seed=3)))
    trainer = DistillationTrainer(teacher, student, strategy="labels", loss=LOSS)
    teacher.forward = None  # cannot be called
    asked = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    assert trainer.compute_loss(student, batch).item() == pytest.approx(student(**asked).loss.item())


def test_plain_causal_lms_of_other_widths_train():
    """The bare public call: next-token labels, another width, and the loss falls."""
    teacher, student = language_model(hidden=48), language_model(layers=2, seed=1)
    ids = [teacher.tokenizer(f"{a}\n{b}\n")["input_ids"] for a in TITLES[:3] for b in TITLES[3:6]]
    length = max(map(len, ids))
    rows = [
        {
            "input_ids": torch.tensor(row + [0] * (length - len(row))),
            "attention_mask": torch.tensor([1] * len(row) + [0] * (length - len(row))),
            "labels": torch.tensor(row + [-100] * (length - len(row))),
        }
        for row in ids
    ]
    loader = DataLoader(rows, batch_size=3)
    trainer = DistillationTrainer(teacher_model=teacher, student_model=student, strategy="linear")
    first = trainer.compute_loss(student.model, next(iter(loader))).item()
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    trainer.train(loader, num_epochs=8)
    assert trainer.compute_loss(student.model, next(iter(loader))).item() < first - 0.05
    assert not any("projections" in name for name in student.model.state_dict())
    assert trainer.state.global_step == 24
    assert all(torch.equal(p, before[name]) for name, p in teacher.model.named_parameters())


def test_signals_of_a_causal_lm_stand_where_the_next_token_is_a_label():
    lm = language_model()
    batch = {"input_ids": torch.randint(1, 300, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    batch["labels"] = torch.tensor([[-100, -100, 7, 8, -100, 9], [-100] * 6])
    out = label_outputs(lm.model, batch, hidden=True)
    assert out.logits.shape[0] == 3 and len(out.hidden) == 4 and label_outputs(lm.model, batch).hidden == []
    with torch.no_grad():
        full = lm.model(batch["input_ids"]).logits[0, [1, 2, 4]]
    torch.testing.assert_close(out.logits, full, rtol=1e-4, atol=1e-5)
    assert out.targets.tolist() == [7, 8, 9]
    assert ce(out) == pytest.approx(-full.log_softmax(-1)[range(3), [7, 8, 9]].mean().item(), rel=1e-4)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 340,
}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.1),
        GraniteConfig(**SMALL, logits_scaling=4.0),
    ],
    ids=["capped", "scaled"],
)
def test_a_causal_lm_that_transforms_its_logits_is_read_as_it_speaks(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 300, (2, 6))
    with torch.no_grad():
        want = model(ids, labels=ids)
        for _ in range(2):  # the first time this is found out, the second it is known
            out = label_outputs(model, {"input_ids": ids, "labels": ids})
            torch.testing.assert_close(out.logits, want.logits[:, :-1].flatten(0, 1))
            assert ce(out) == pytest.approx(want.loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_padded_on_the_left_says_what_it_says_alone(kind):
    """gpt2 counts positions, so padding must not move them; the first real token is no target of padding."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=340, n_positions=64)
    model = language_model(config=config if kind == "gpt2" else None).model
    ids = torch.randint(1, 300, (1, 5))
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([pad, torch.ones_like(ids)], 1)}
    padded["labels"] = torch.cat([pad - 100, ids], 1)
    with torch.no_grad():
        out, alone = label_outputs(model, padded, hidden=True), model(ids, labels=ids, output_hidden_states=True)
        assert ce(out) == pytest.approx(alone.loss.item(), rel=1e-5)
        torch.testing.assert_close(out.logits, alone.logits[0, :-1], rtol=1e-4, atol=1e-5)
    for state, want in zip(out.hidden, alone.hidden_states[1:], strict=True):
        torch.testing.assert_close(state, want[0, :-1], rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_counts_for_nothing(pair):
    """With item tokens or without the loss is 0, no weight has a gradient but 0, and the log stays free of it."""
    teacher, student, lm = pair
    items = next(iter(window_loader(windows(lm), 999, 0, 0, shuffle=False)))
    items["labels"] = torch.full_like(items["labels"], -100)
    ids = torch.randint(1, 300, (2, 6))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    plain = language_model(layers=2, seed=1).model
    for big, small, batch in ((teacher, student, items), (language_model(), plain, tokens)):
        trainer = DistillationTrainer(big, small, strategy="uniform", loss=LOSS)
        loss = trainer.compute_loss(small.train(), batch)
        loss.backward()
        assert loss.item() == 0 and not trainer.parts
        assert all(not p.grad.any() for p in small.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("given", [list, iter])
def test_batches_in_a_list_or_generator_train_as_a_loader_of_them_does(given):
    """Independent oracle: a DataLoader over the rows that makes the same batches."""
    ids = torch.randint(1, 300, (6, 5), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    loader = DataLoader(rows, batch_size=2)
    students = [language_model(layers=2, seed=1) for _ in range(2)]
    for student, batches in zip(students, (loader, given(list(loader)))):
        trainer = DistillationTrainer(language_model(), student, strategy="uniform")
        trainer.train(batches, num_epochs=2)
        assert trainer.state.global_step == 6
    with pytest.raises(LwaError, match="no batch: a generator"):
        trainer.train(iter([]))
    got, want = (student.model.state_dict() for student in students)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_bfloat16_student_of_another_width_trains_and_holds_no_projections_but_then():
    student = language_model(layers=2, seed=1).model.bfloat16()
    names = set(student.state_dict())
    trainer = DistillationTrainer(language_model(hidden=48), student, strategy="uniform")
    assert set(student.state_dict()) == names
    ids = torch.randint(1, 300, (2, 5))
    before = trainer.projections["0"].weight.clone()
    trainer.train([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}], num_epochs=1)
    assert set(student.state_dict()) == names and not torch.equal(trainer.projections["0"].weight, before)


def test_a_student_of_another_vocabulary_is_named():
    teacher = language_model()
    student = build_student(teacher, 2, "first", texts=TITLES[:2])
    ids = torch.tensor([student.tokenizer(TITLES[0])["input_ids"]])
    trainer = DistillationTrainer(teacher, student, strategy="uniform")
    with pytest.raises(LwaError, match="cut the teacher's with trim_vocabulary"):
        trainer.compute_loss(student.model, {"input_ids": ids, "labels": ids})
