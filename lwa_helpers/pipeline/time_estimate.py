"""How long a run will take on this machine, before it has ever run here: the published run's times, scaled."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lwa_helpers import files

TIMES_FILE = "times.json"
SHAPE = 512, 576, 1536  # tokens of a batch, and the two sides of the largest matrix of SmolLM2-135M's layers
SECONDS = 0.3


def machine_speed() -> float:
    """Time matrix products like those of the default model's layers.

    Returns:
        Billions of operations a second: in bfloat16 where the processor has it, as `bf16: auto` does.
    """
    import torch

    from lwa_helpers.models.precision import has_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, inner, outer = SHAPE
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    left, right = (
        torch.ones(rows, inner, dtype=dtype, device=device),
        torch.ones(inner, outer, dtype=dtype, device=device),
    )
    (left @ right).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        (left @ right)[0, 0].item()  # waits for a GPU to be done
        count += 1
    return 2e-9 * rows * inner * outer * count / (time.perf_counter() - start)


def write_times(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write what each notebook of a published run took, and how fast its machine was (null where none computed)."""
    times = {
        "profile": records[0]["profile"],
        "speed": max((record["speed"] for record in records if record["speed"]), default=None),
        "seconds": {record["notebook"]: round(record["seconds"], 1) for record in records},
    }
    with files.atomic_write(folder / TIMES_FILE) as temporary:
        temporary.write_text(json.dumps(times, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def expected_seconds(folder: Path, profile: str) -> dict[str, float]:
    """Scale the published run's times to this machine.

    Args:
        folder: where the published times lie.
        profile: the profile that is to be run.

    Returns:
        Seconds of each notebook; none where no run of this profile is published that says how fast its machine was.
    """
    path = folder / TIMES_FILE
    times = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if times.get("profile") != profile or not times["speed"]:
        return {}
    scale = times["speed"] / machine_speed()
    return {name: scale * seconds for name, seconds in times["seconds"].items()}
