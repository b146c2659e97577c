"""Observe a run: numbers of each step, spikes, the log, MFU. It decides no weight.

`meter` reads a step's numbers and logs them, `health` judges them, `history` is the log on disk,
`peak_flops` what MFU is measured against.
"""
