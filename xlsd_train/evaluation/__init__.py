"""Evaluation: validation losses, sample images, image scores.

`validator` measures held-out losses. `sampler` generates samples during training from `prompts`;
`images` generates and saves one image, `sample_files` reads them back. `clip` and `image_metrics`
compute CLIP score and CMMD.
"""
