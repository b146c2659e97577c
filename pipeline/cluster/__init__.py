"""Run tasks on Ray. Where they run decides no byte.

`join` starts a local Ray or joins a cluster, `probe` checks that all nodes have the same versions,
code and files, `tasks` runs a bounded number of tasks at a time and retries them.
"""
