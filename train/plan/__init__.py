"""Plan of a run, before any hardware is rented: memory, time and price.

`estimate` computes the plan from `memory`, `step_time`, `corpus_size` and the data sheets in
`accelerators`; `bench_report` compares it with what `python -m train.bench` measured.
"""
