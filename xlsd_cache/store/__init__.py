"""The latent store on the disk: a zarr v3 group of shards, and its journal.

Written: `shard` (latents), `commit` (one shard's record), `manifest` (the journal),
`zarr_metadata`, `live_rows`. Read: `index` folds the journal into one snapshot, `reader` opens it
as `LatentStore`, `tag_index` finds samples by tag. `identity` says what the latents are valid for.
"""
