"""A tar or zip file -> its members, read in place.

`reader` yields the members of one archive in order. `tar` and `zip` parse the two formats,
`members` decides which of them count: the last of each name, without hidden ones.
"""
