"""A batch -> one optimizer step.

`objective` corrupts latents and weighs the loss, `layers` lists the networks layer by layer, `step`
runs a batch whole or in micro-batches, `sliced` layer by layer. `distributed` shares gradients
among processes.
"""
