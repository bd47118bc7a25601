"""Latent caches of other trainers -> this store.

`cache_files` finds them, `formats` reads them, `pairing` finds the image of each, `items` joins
both (`crops`: SimpleTuner's crop table). `plausibility`, `thumbnails` and `latent_check` compare
latents with images, `transfer` writes what passed.
"""
