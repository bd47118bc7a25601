"""The memory plan: how to run a batch so that it fits the card, and fast.

`planner` chooses among the plans, `meta_step` runs the step on tensors without data, `tracker`
counts its bytes, FLOPs and traffic, `gpus` lists what cards can do.
"""
