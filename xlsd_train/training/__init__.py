"""The training run.

`loop` is the training loop, on one page. `session` opens what it needs, with `setup_data`,
`setup_model` and `setup_step`, and `announce` logs it. `due` decides what follows a step, `meter`
measures steps, `pace` predicts the time.
"""
