"""The model in memory.

`loading` loads the UNet, text encoder, VAE and tokenizer into a `bundle`, which says what trains.
`text_encoder` has longer contexts and clip skip, `latent_scaling` the scale and shift of latents,
`reinit` fresh random weights for chosen layers.
"""
