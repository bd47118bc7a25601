"""What both programs stand on: files, signals, devices.

`atomic` writes files whole or not at all, `bounded_files` and `arrow_files` read files that
strangers made, `own_files` recognises what these programs wrote, `disk` measures free space.
`signals` turns SIGINT and its kind into a question, `threads` maps a function over a stream,
`device` sets device and precision, `gpu_memory` recognises a full card.
"""
