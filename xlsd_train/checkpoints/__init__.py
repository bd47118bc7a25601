"""Checkpoints of a run, and how it resumes bit-exactly.

`run_folder` opens and locks the folder and logs to it and, by `board`, to TensorBoard. `checkpoint`
saves and loads weights and optimizer state, `disk_space` checks that they fit. `resume` and
`comparison` compare settings with those of the run, `environment` records what else decides the
bits, `complete` finds finished runs.
"""
