"""Sources that change for weeks -> a store that follows them.

`watcher` is the loop: look, wait until enough is new, plan, encode. `quiet` finds the files that
are still being written, `changes` compares a scan with the log and holds those back, `wake` hears
of changes at once. `status` is what is told: a file, and by `server` a page and `metrics`.
"""
