"""Teachers and students inside wrappers, and language models inside multimodal ones."""

import copy

import numpy as np
import pytest
import torch
from architectures import tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_lm import language_model
from torch import nn
from transformers import AutoModelForCausalLM

from lwa_helpers import DistillationTrainer
from lwa_helpers.configs.students import LossConfig
from lwa_helpers.distillation.teacher_cache import TeacherOutputs
from lwa_helpers.errors import LwaError

WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


def batch(window=False):
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    more = {"window": torch.arange(2)} if window else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} | more


def lora(model, **options):
    own = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}
    torch.manual_seed(4)
    return get_peft_model(model, LoraConfig(**own | options))


def trained(teacher, student):
    """The student's weights after three batches."""
    torch.manual_seed(0)
    trainer = DistillationTrainer(teacher, student, strategy="uniform")
    trainer.args.learning_rate = 1e-2
    trainer.train([batch()] * 3, 1)
    return trainer


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_pair_trains_as_the_plain_one_does(kind):
    plain, wrapped = (language_model(layers=2, seed=1).model for _ in range(2))
    trained(language_model(hidden=48).model, plain)
    teacher, student = language_model(hidden=48), language_model(layers=2)
    teacher.model, student.model = WRAPPERS[kind](teacher.model), WRAPPERS[kind](wrapped)
    trainer = trained(teacher, student)
    want, got = plain.state_dict(), wrapped.state_dict()
    assert trainer.model is wrapped and got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_teacher_with_an_adapter_teaches_what_it_says_with_it(tmp_path):
    """Independent oracle: the adapter merged into the weights."""
    model = language_model().model
    wrapped = lora(model)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    student, data = language_model(layers=2, seed=1).model, batch(window=True)
    want = DistillationTrainer(merged, student, strategy="uniform").compute_loss(student, data).item()
    for source in (wrapped, TeacherOutputs.compute(wrapped, [data], [2, 4], tmp_path / "outputs", bf16=False)):
        got = DistillationTrainer(source, student, strategy="uniform").compute_loss(student, data).item()
        assert got == pytest.approx(want, rel=2e-3)


@pytest.mark.filterwarnings("ignore:.*checkpointing")
def test_of_a_student_with_an_adapter_the_adapter_is_trained_and_saved_merged(tmp_path):
    lm = language_model(layers=2, seed=1)
    lm.model = wrapped = lora(lm.model)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    trainer = trained(language_model(), lm)
    changed = {name for name, value in wrapped.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)
    trainer.save_model(str(tmp_path / "student"))
    lm.save(tmp_path / "lm")
    ids = batch()["input_ids"]
    for folder in ("student", "lm"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, wrapped.eval()(ids).logits, rtol=1e-4, atol=1e-5)
        assert not any("lora" in name for name in again.state_dict())


def test_adapters_that_cannot_teach_or_learn_here_are_named():
    student = language_model(layers=2).model
    prompts = get_peft_model(language_model().model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(LwaError, match="computes something outside its layers"):
        DistillationTrainer(prompts, student, strategy="uniform")
    frozen = lora(student, inference_mode=True)
    with pytest.raises(LwaError, match="no weight of LlamaForCausalLM is trained"):
        DistillationTrainer(language_model(), frozen, strategy="uniform")


@pytest.mark.parametrize("stored", [True, False])
def test_a_multimodal_pair_is_distilled_on_its_text_models(tmp_path, stored):
    """Of 16 and of 32 dimensions: the width stands in the text config alone."""
    teacher, student = (tiny_model("gemma3").model for _ in range(2))
    data, source = batch(window=True), teacher
    if stored:
        source = TeacherOutputs.compute(teacher, [data], [1, 2, 3, 4], tmp_path / "outputs", bf16=False)
        assert source.hidden_size == 16 and source.n_layers == 4
    loss = LossConfig(alpha=0.5, temperature=1.0, beta=1.0)
    trainer = DistillationTrainer(source, student, strategy="uniform", loss=loss)
    assert trainer.map == [1, 2, 3, 4] and trainer.projections is None
    want = 0.5 * student(**batch()).loss.item()  # it is its own teacher: only the labels are left
    assert trainer.compute_loss(student, data).item() == pytest.approx(want, rel=1e-2)
    other = DistillationTrainer(source, language_model(layers=2), strategy="uniform")
    assert other.projections["0"].weight.shape == (16, 32)
    before = [p.clone() for p in student.parameters()]
    trainer.train([data], 1)
    assert np.any([not torch.equal(p, was) for p, was in zip(student.parameters(), before)])
