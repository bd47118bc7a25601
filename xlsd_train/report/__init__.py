"""Runs -> one HTML page.

`page` writes it, `charts` makes plotly's figures, `tables` lists settings and facts, `ranking`
compares runs by held-out loss. No module loads torch.
"""
