"""Image file bytes -> upright sRGB pixels of the bucket's size, or the reason for rejecting it.

`buckets` chooses the aspect-ratio bucket and the crop. `header` opens a file and gives its size,
`decode` reads, rotates, crops and resizes, `color` converts every colour space to sRGB. `sandbox`
runs decoders in child processes (`child`), so that a hostile file fails one call and not the run.
"""
