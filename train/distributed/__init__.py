"""The processes of a run: devices, rendezvous, collectives, signals, torchrun.

`world` is the group as one process sees it; `rendezvous` makes it; `devices` says what a process
computes on; `interrupt` stops all ranks at one step; `torchrun` starts them.
"""
