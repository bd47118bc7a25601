"""A store -> batches for any training loop.

`dataset` is a torch map-style dataset over a store, `sampler` its batch sampler. `batch_order`
gives batch n as a pure function of (seed, n), by the random numbers of `rng`.
"""
