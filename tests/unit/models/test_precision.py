"""bfloat16 by a setting and a device."""

import os
import subprocess
import sys

import pytest
import torch

from lwa_helpers.config import load_config
from lwa_helpers.errors import LwaError
from lwa_helpers.models import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("found", "expected"),
    [({"avx2": True}, False), ({"avx512_f": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True),
     ({"amx_bf16": True}, True), ({"neon": True, "bf16": True}, True), ({}, False)],
)  # fmt: skip
def test_auto_follows_the_instructions_of_the_cpu(monkeypatch, found, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(precision, "library_has_bf16", lambda: True)
    assert precision.has_bf16(CPU) is precision.computes_in_bf16("auto", CPU) is expected


def test_no_bf16_where_torch_has_no_library_that_would_use_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not precision.has_bf16(CPU)


def test_no_bf16_where_the_library_is_kept_from_it():
    code = "import torch; from lwa_helpers.models.precision import has_bf16; print(has_bf16(torch.device('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("has", [True, False])
def test_true_and_false_are_taken_at_their_word(monkeypatch, has):
    monkeypatch.setattr(precision, "has_bf16", lambda device: has)
    x = torch.randn(4, 4)
    for setting, dtype in (
        (True, torch.bfloat16),
        (False, torch.float32),
        ("auto", torch.bfloat16 if has else torch.float32),
    ):
        with precision.autocast(setting, CPU):
            assert (x @ x).dtype == dtype


def test_every_profile_leaves_it_to_the_processor():
    for profile in ("smoke", "quick", "paper"):
        config = load_config(profile)
        assert {s.bf16 for s in (config.teacher, config.ablation, config.distillation, config.evaluation)} == {"auto"}
    assert load_config("smoke", {"teacher.bf16": True}).teacher.bf16 is True
    with pytest.raises(LwaError, match="teacher.bf16"):
        load_config("smoke", {"teacher.bf16": "yes"})
