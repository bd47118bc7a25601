"""What a run writes so that it can continue to the bit.

`run_folder` opens and locks the folder and logs to it, `checkpoint` saves and loads weights and
optimizer state, `resume` compares settings, `complete` says whether anything is left to do,
`disk_space` whether it will fit.
"""
