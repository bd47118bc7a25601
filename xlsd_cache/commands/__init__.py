"""The commands of `xlsd-cache`, a module each, named as the command.

`build` (and `plan`), `encode`, `watch`, `captions`, `check`, `info`, `preview`, `report`,
`export_index` and `import_latents` (`import`). `finish` is `xlsd_cache.building.finish`.
"""
