"""Bytes of an image file -> upright sRGB pixels at a bucket's size, or a reason why not.

`buckets` chooses the aspect-ratio bucket and the crop, `decode` reads, rotates, crops and resizes,
`color` converts every colour space to sRGB. `sandbox` runs all that in child processes, so that a
hostile file costs one call and never the run.
"""
