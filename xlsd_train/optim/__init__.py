"""Gradients -> weights.

`lion` has Lion and D-Lion, `factory` makes any optimizer and its state, `lr_scheduler` gives the
rate of a step, `plateau` finds where D-Lion's d stops growing. `ema` averages weights by the
profiles of `ema_profiles`.
"""
