"""Evaluation tasks, and the published curve that a run is compared with.

`task_files` finds and reads tasks, `likelihood` scores continuations, `hellaswag` and `lambada` are
the tasks, `reference_curve` is the published validation loss.
"""
