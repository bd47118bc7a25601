"""A batch -> one optimizer step.

`objective` adds noise to latents and weights the loss, `layers` lists the networks layer by layer,
`attention` multiplies in IEEE fp32. `step` runs a batch whole or in micro-batches, `sliced` layer
by layer, on a `backend`. `distributed` has the run's processes.
"""
