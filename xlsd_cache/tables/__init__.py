"""Metadata tables (parquet, Arrow, CSV, JSON) -> the caption and the image of each row.

`rows` reads any format through `text_tables` and `arrow_tables`, `columns` knows what columns mean.
`matching` finds each row's image by `names`, `row_outcomes` has the matches and sums them up.
"""
