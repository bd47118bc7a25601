"""Runs -> one HTML page.

`page` writes it, `charts` draws curves, `tables` lists settings and facts, `ranking` compares runs
by held-out loss.
"""
