"""Common behaviour of all commands: parameters, machine settings, exit status, progress.

`command` sets the exit status, `errors` defines the exceptions that need no traceback,
`params_file` reads sections of params.yaml, `machine` reads machine.yaml and the environment,
`progress` reports long work.
"""
