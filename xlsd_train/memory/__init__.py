"""The memory plan: how to run a batch so that it fits the card, and fast.

`choose` takes the best of the plans that `planner` predicts. `meta_step` runs the step on meta
tensors, `tracker` logs its bytes, FLOPs and memory traffic as a `footprint`, `gpus` lists the peak
throughput of GPUs, `several_cards` adds the cost of sharing gradients. `measure` times the best
plans with real steps, which `trials` takes in a process of its own; `plan_cache` remembers them.
"""
