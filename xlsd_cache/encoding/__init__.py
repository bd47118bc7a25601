"""Planned images -> latents in committed shards.

`vae` loads the VAE (`hub` fetches it, `network_config` checks its config, `finite` its weights),
`encoder` turns uint8 pixels into raw latents, `pipeline` overlaps decoding, encoding and writing.
`kept_batch` keeps a GPU's batch size in the store. `compatibility` says which VAEs fit a store.
"""
