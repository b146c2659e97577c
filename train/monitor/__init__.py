"""Monitoring of a run; nothing here changes a weight.

`meter` reads the numbers of each step and logs them, `health` checks them, `history` is the log on
disk, `peak_flops` holds the peaks that MFU is computed with.
"""
