"""The machine on which a study runs: its runs are compared, and their speed depends on it."""

from __future__ import annotations

from typing import Any

from pipeline.runtime.machine import Machine, usable_cores

# Settings that change the time of a step.
_SPEED = (
    *("cores", "processes", "device", "compile", "micro_batch", "attention", "overlap"),
    *("checkpoint_activations", "loss_chunk"),
)


def environment(machine: Machine) -> dict[str, str]:
    """Return the device of training, and the versions and settings that its rounding depends on."""
    import torch  # seconds, which a study of tokens does not need before it runs

    from train import numerics
    from train.distributed.devices import device_type

    return numerics.environment(torch.device(device_type(machine.device)))


def speed_settings(machine: Machine) -> dict[str, Any]:
    """Return all that a measured speed depends on, in addition to the run's parameters."""
    settings = machine.model_dump(mode="json", include=set(_SPEED))
    return {**environment(machine), **settings, "usable_cores": usable_cores()}
