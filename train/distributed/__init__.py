"""The processes of a run and the devices they compute on.

`devices` chooses device and process count, `torchrun` starts the processes, `rendezvous` joins them
in a group, `world` is that group as one process sees it, `interrupt` stops all ranks at one step.
"""
