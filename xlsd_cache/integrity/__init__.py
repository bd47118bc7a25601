"""A store -> what is missing or damaged in it, and repairs.

`accounting` sums the outcome of every input, `shard_check` reads one shard back, `verify` a whole
store, `repair` rebuilds what checksums prove. `statistics` measures latents and captions.
"""
