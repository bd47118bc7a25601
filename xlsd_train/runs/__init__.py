"""A run's folder on the disk, read without torch.

`layout` has its paths, `record` its config.json, `metrics` the numbers of a step, `history` its
logs (`downsample` thins them), `validation_log` the held-out losses, `bootstrap` their confidence
intervals. `tracked` names what trackers show. `json_files` and `links` guard against files of
strangers.
"""
