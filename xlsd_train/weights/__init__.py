"""A model's name -> its networks' configs and lazy tensors.

`parts` reads a model: hub id (`hub`), folder, single file (`ldm_keys`), run or checkpoint; `locate`
replaces parts of it. `network` holds one network's config and tensors, which `lazy_tensors` and
`pickles` read. `identify` recognises other models' files, `prediction_type` finds what a model
predicts, `vae_fold` folds latent scaling into a VAE.
"""
