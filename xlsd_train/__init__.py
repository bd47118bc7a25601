"""Train: latents and captions from the store in, an XLSD UNet and text encoder out, in fp32."""
