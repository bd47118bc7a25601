"""Metadata tables (parquet, Arrow, CSV, JSON) -> the caption and the image of each row.

`rows` reads any format through `text_tables` and `arrow_tables`, `columns` knows what columns mean.
`matching` finds the image that a row is about by `names`, `row_outcomes` counts what became of
every row.
"""
