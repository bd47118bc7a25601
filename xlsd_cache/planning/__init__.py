"""Scan and journal -> the next generation: which image goes to which bucket and row.

`log_state` folds the journal, `unchanged` and `probe` find what changed, `assign` gives bucket,
crop and row, `caption_diff` compares captions, `plan` puts it all together. `disk_space` refuses
what would not fit, `sessions` joins builders that run at the same time.
"""
