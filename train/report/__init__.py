"""The report of a run: one page that needs no network.

`page` collects and renders it, `compare` does so for several runs; `run_charts` and `charts` draw,
`model_probe` looks inside the model, `run_log` reads the log, `html` renders `pages/`.
"""
