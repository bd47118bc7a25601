"""A batch -> one optimizer step.

`objective` adds noise to latents and weights the loss, `layers` lists the networks layer by layer,
`blocks` has their forward pass, with `attention` in IEEE fp32 and memory-bound functions, which
`compile` fuses. `step` runs a batch whole or in micro-batches, `sliced` layer by layer, on a
`backend`. `distributed` has the run's processes, `sharing` sums their gradients.
"""
