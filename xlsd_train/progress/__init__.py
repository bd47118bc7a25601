"""What a run tells its user.

`announce` logs what is about to run. `status` shows what goes on, and tells results to the log, to
--json and to `events`, which runs --on-event and rewrites the report. `wandb_run` logs to W&B.
`pace` and `time_left` predict the time.
"""
