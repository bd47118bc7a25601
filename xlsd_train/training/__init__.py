"""The training run.

`loop` is the training loop, on one page. `session` opens what it needs, with `setup_data`,
`setup_model` and `setup_step`; `agreement` compares what its processes have. `due` decides what
follows a step, `meter` measures steps, `results` ends a run.
"""
