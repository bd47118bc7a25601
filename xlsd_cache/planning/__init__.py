"""Scan and log -> the next generation: which image goes to which bucket and row.

`log_state` folds the log, `unchanged` and `probe` find what changed, `assign` gives bucket, crop
and row, `caption_diff` compares captions, `plan` combines them. `disk_space` refuses what would not
fit, `generation` writes the plan, `sessions` joins builds that run at the same time.
"""
