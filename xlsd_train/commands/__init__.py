"""Further commands of `xlsd-train`, a module each, named as the command.

`plan`, `sweep`, `sample` (`sample_page` writes its page), `score`, `tags`, `ema`. Training itself
is in `training`, `report` and `export` have rooms of their own.
"""
