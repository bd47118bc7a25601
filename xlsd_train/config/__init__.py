"""Options of every command of `xlsd-train`.

`train` holds a run's options, `run_options` and `model_options` those of the other commands.
`recipes` reads recipes (TOML, in `recipes/`), `adapt` fits defaults to small data,
`weight_patterns` reads patterns of parameter names, `aliases` knows other trainers' names, `sd15`
SD1.5's shapes.
"""
