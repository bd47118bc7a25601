"""A run or model -> files that other programs load.

`export` writes a folder or a single file (`ldm_file`), `conversions` folds latent scaling and clip
skip into the weights, `swap` replaces the VAE. `model_card` and `ldm_config` describe the model,
`other_programs` says how to set programs up for it, `sidecars` writes the small files next to it.
"""
