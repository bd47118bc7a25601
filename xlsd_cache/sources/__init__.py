"""Folders, archives and tables -> one table of images and one of captions, sorted by key.

`scan` merges all sources, `records` streams the images of one, `sidecars` reads the files next to
them. `filters` applies --only and --exclude, `masks` recognises mask images, `allowed_folders`
limits the files that a table may name.
"""
