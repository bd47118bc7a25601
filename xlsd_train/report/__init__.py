"""Runs -> one HTML page.

`page` fills `templates`. `summary` is the first screen, `trend` says whether the held-out loss
still falls, `pace` when the run ends, `ranking` compares runs. `curves`, `changes` and `pictures`
are what is drawn, `tables` the settings and facts. `comparison` is the page of `sample`. No module
loads torch.
"""
