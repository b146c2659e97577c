"""The store: finished pieces of work, addressed by content. It decides no byte of them.

`store` finds, makes, locks and publishes pieces, `atomic` writes files that appear complete or not
at all, `code_key` hashes the code of a stage.
"""
