"""Latent stores -> batches on the device.

`mixture` joins weighted stores, `selection` filters samples by tag and holds some out, `captions`
chooses and tokenises captions (`caption_edits` shuffles and drops their tags, `caption_lengths`
counts tokens), `noise` draws noise and timesteps, `loader` prefetches batches.
"""
