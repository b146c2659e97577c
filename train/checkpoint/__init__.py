"""Checkpoints of a run: their layout on disk, how they are saved, and initial weights.

`directory` reads, writes and verifies checkpoints, `writer` saves them while training continues,
`start` names the weights that a run starts from, `init_from` reads them.
"""
