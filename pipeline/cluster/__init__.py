"""Run tasks on Ray; where they run decides no byte.

`join` starts a local Ray or joins a cluster, `probe` checks that its nodes have the same versions
and files, `tasks` runs a bounded number of tasks and repeats those that a node lost.
"""
