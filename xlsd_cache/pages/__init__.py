"""Values -> self-contained HTML pages, with one look.

`render` fills the templates and inlines the script and the style; `server` serves pages and keeps
strangers out. `thumbnails` makes small pictures for pages, `lettering` lays out text in pictures.
`templates` has what pages share; `built` is made from web/ by `make web`.
"""
