"""How a command runs: parameters, machine settings, exit status, progress.

`command` ends a command with the right status, `errors` are the ends that need no traceback,
`params_file` reads sections of params.yaml, `machine` machine.yaml and the environment, `progress`
shows long work.
"""
