"""Checkpoints on disk, their writer, and what a run starts from.

`directory` is the layout of a checkpoint and of a run's checkpoints, `writer` saves beside the
training, `init_from` reads the weights that a run starts from.
"""
