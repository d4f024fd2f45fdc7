"""bfloat16 where the processor computes in it: where it is emulated, as on a CPU with AVX2 alone, float32 is far faster."""

from __future__ import annotations

import torch

from lwa_helpers.config import Bf16

CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products that torch makes use of.

    On a CPU its library oneDNN must use them too, which ONEDNN_MAX_CPU_ISA can forbid: products then take some 80 times as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in CPU_INSTRUCTIONS) and library_has_bf16()


def library_has_bf16() -> bool:
    """Whether torch has oneDNN, and it computes bfloat16 products on this CPU, if by emulation: what the variables leave it."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computes_in_bf16(setting: Bf16, device: torch.device) -> bool:
    """What a setting `bf16` means on a device: "auto" is bfloat16 where has_bf16, float32 elsewhere."""
    return has_bf16(device) if setting == "auto" else setting


def autocast(setting: Bf16, device: torch.device) -> torch.autocast:
    """A context whose matrix products run as the setting says on this device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_in_bf16(setting, device))
