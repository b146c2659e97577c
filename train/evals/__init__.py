"""Evaluation: benchmark tasks, and comparison with a published validation curve.

`task_files` reads tasks, `likelihood` scores continuations, `hellaswag` and `lambada` are the
benchmarks, `reference_curve` is the published curve.
"""
