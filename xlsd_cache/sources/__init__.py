"""Folders, archives and tables -> one table of images and one of captions, sorted by key.

`scan` merges all sources, `records` reads one of any kind as a stream. `filters` applies --only
and --exclude, `masks` recognises mask images, `allowed_folders` limits which files a table may
point to.
"""
