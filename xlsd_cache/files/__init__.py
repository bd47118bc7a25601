"""A source URI -> bytes; a caption's file -> text.

`folders` walks a directory tree and finds its images. `uri` opens a source:
a file, a member of an archive (`inflate`, `gzip_index` for compressed ones) or a table's cell
(`table_cells`). `captions` and `text` decode caption and list files.
"""
