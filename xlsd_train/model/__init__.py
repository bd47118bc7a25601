"""The model as training has it.

`bundle` loads UNet, text encoder, VAE and tokenizer and says what trains, `text_encoder` longer
contexts and clip-skip, `latent_scaling` the scale and shift of latents, `reinit` layers that start
from fresh random weights.
"""
