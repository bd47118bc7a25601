"""A run's folder as it lies on the disk, read without torch.

`layout` knows the file names, `record` reads config.json, `history` the step metrics (`downsample`
thins them), `validation_log` the held-out losses, `bootstrap` their confidence intervals.
`json_files` and `links` guard against files that somebody else made.
"""
