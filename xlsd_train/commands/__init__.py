"""Further commands of `xlsd-train`, one module per command, of the same name.

`plan`, `sweep`, `sample`, `score`, `tags`, `ema`. The commands
`train`, `report` and `export` have rooms of their own.
"""
