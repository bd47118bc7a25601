"""What the model has learned: losses, samples, scores.

`validator` measures held-out losses, `sampler` draws samples during training from `prompts`,
`images` draws and saves one picture, `sample_files` reads them back. `clip` and `image_metrics`
give CLIP score and CMMD.
"""
