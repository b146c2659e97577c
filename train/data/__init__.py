"""Tokens to batches: which window is sample i, who computes it, and the loader.

`order` permutes the windows, `phases`, `mixture` and `mixed_order` mix those of several sources,
`split` shares a global batch among processes and micro-steps,
`loader` reads them ahead of the step.
"""
