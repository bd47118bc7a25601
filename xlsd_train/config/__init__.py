"""Options of every command of `xlsd-train`.

`train` composes a run's options of groups from `inputs` and `optimization`; `run_options` and
`model_options` have those of the other commands. `recipes` reads recipes (TOML, in `recipes/`),
`adapt` fits defaults to small data, `weight_patterns` selects parameters by name, `aliases` maps
other trainers' option names, `sd15` has SD1.5's configs.
"""
