"""bfloat16 where the processor computes in it.

Where bfloat16 is emulated, as on a CPU with AVX2 alone, float32 is far faster.
"""

from __future__ import annotations

import torch

from lwa_helpers.configs.students import Bf16

CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16 products that torch uses.

    On a CPU torch's library oneDNN must use them too, which ONEDNN_MAX_CPU_ISA can forbid. Products then take some 80
    times as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in CPU_INSTRUCTIONS) and library_has_bf16()


def library_has_bf16() -> bool:
    """Return whether torch has oneDNN and it computes bfloat16 products on this CPU, possibly by emulation.

    Environment variables such as ONEDNN_MAX_CPU_ISA can forbid it.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computes_in_bf16(setting: Bf16, device: torch.device) -> bool:
    """Return what a setting `bf16` means on a device: "auto" is bfloat16 where has_bf16 is true, float32 elsewhere."""
    return has_bf16(device) if setting == "auto" else setting


def autocast(setting: Bf16, device: torch.device) -> torch.autocast:
    """Return a context in which matrix products run on this device as the setting says."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_in_bf16(setting, device))
