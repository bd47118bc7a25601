"""Gradients -> weights.

`lion` has Lion and D-Lion; `streamed` keeps their state in CPU memory that is `pinned`. `factory`
makes any optimizer and its state, `lr_scheduler` gives each step's learning rate, `plateau` finds
where D-Lion's d stops growing. `ema` averages weights with the profiles of `ema_profiles`.
"""
