"""Plan a run before renting anything: does it fit, how long, what price.

`estimate` makes the plan, from `memory`, `step_time`, `corpus_size` and the data sheets in
`accelerators`; `bench_report` shows what `python -m train.bench` measured beside it.
"""
