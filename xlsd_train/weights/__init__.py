"""A model's name -> its networks' tensors.

`locate` resolves --model: hub id (`hub`), folder, single file (`ldm_file`, `ldm_keys`), run or
checkpoint. `network` holds one network's config and tensors, `lazy_tensors` reads them one at a
time. `identify` names foreign files, `prediction_type` finds what a model predicts, `vae_fold`
folds latent scaling into a VAE.
"""
