"""The training run.

`loop` is the training loop, on one page. `session` opens what it needs, with `setup_data`,
`setup_model` and `setup_step`, and `announce` logs it. `due` decides what follows a step, `meter`
measures steps, `pace` and `time_left` predict the time. `status` shows what goes on, and tells
results to the log, to --json and to `events`, which runs --on-event; `results` ends a run.
"""
