"""A store is built in three steps, which any engine may call from any process.

`plan` scans the sources and writes the next generation (`plan_log` logs what it found), `settings`
is what it leaves for `worker`, which encodes units of the plan, and `finish` writes what is derived
from the log. `ray` has workers on a cluster; `shared_files` checks that they see the same files.
"""
