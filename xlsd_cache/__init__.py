"""Encode images and captions once into a zarr store of raw VAE latents."""

__version__ = "0.1.0"
