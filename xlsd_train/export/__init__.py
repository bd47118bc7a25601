"""A run or model -> files that other programs load.

`export` writes a folder or a single file, `swap` exchanges the VAE, `model_card` and `ldm_config`
describe the model, `other_programs` says what they must be told, `staging` lets files appear whole.
"""
