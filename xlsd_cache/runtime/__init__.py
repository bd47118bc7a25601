"""Files, signals, threads and devices, for both programs.

`atomic` writes files and folders atomically, `bounded_files` and `arrow_files` read untrusted files
safely, `own_files` recognises files that these programs wrote, `disk` measures free space.
`signals` handles SIGINT and SIGTERM, `threads` maps a function over a stream, `device` chooses
device and precision, `gpu_memory` recognises out-of-memory errors.
"""
