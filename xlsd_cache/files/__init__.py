"""A source URI -> bytes; a caption file -> text.

`folders` walks a directory tree and finds its images. `uri` reads a source: a file, a member of an
archive (`inflate` and `gzip_index` for compressed ones) or a cell of a table (`table_cells`).
`captions` and `text` decode caption and list files.
"""
