"""The commands of `xlsd-cache`, a module each, named as the command.

`build`, `captions`, `check`, `info`, `preview`, `report`, `export_index` and `import_latents`
(`import`). `finish` ends a build or an import: sums, snapshot, what was left out.
"""
