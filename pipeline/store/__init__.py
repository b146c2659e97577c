"""The store of finished pieces, addressed by content; it decides no byte of them.

`store` finds, makes, locks and publishes pieces, `atomic` writes files that appear complete or not
at all, `code_key` says which code made a piece.
"""
