"""The machine on which a study runs: its runs are compared, and their speed depends on it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

from pipeline.runtime.errors import StageFailed
from pipeline.runtime.machine import Machine, usable_cores

# Settings that change the time of a step.
_SPEED = {
    *("cores", "processes", "device", "compile", "micro_batch", "attention", "overlap"),
    *("checkpoint_activations", "loss_chunk"),
}
# In a process of its own, which gives back the memory of the GPU.
_PRINT = """
import json, sys, torch
from train import numerics
from train.distributed.devices import device_type
print(json.dumps(numerics.environment(torch.device(device_type(sys.argv[1])))))
"""


@lru_cache
def environment(device: str) -> dict[str, str]:
    """Return the device of training, and the versions and settings that its rounding depends on.

    Args:
        device: That of machine.yaml.
    """
    command = (sys.executable, "-c", _PRINT, device)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip() or "failed").splitlines()[-1]
        raise StageFailed(f"device (machine.yaml, GPT2_DEVICE): {reason}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def speed_settings(machine: Machine) -> dict[str, Any]:
    """Return all that a measured speed depends on, in addition to the run's parameters."""
    settings = machine.model_dump(mode="json", include=_SPEED)
    return {**environment(machine.device), **settings, "usable_cores": usable_cores()}
