"""The train stage's command: check a run, claim devices, start torchrun.

It decides no byte of a run. `stage` is what DVC runs, `device_slots` shares a machine among runs,
`adopt` continues a run whose code has changed.
"""
