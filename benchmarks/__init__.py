"""What is measured, and the small real model that demo, tests and benchmarks run on.

- `throughput.py`: the training step with and without the store; `card.py`: all questions to a GPU.
- `same.py`: that two checkouts write the same bytes; `startup.py`: how fast they start.
- `cache/`: `build` (images/s), `decode` (formats, DCT scaling, sandbox), `store` (random reads
  against other formats), `captions` (planning and captions), `ray_cluster` (nodes are killed),
  `watch` (a busy folder, kills, memory).
- `train/`: `equal` (gradients of the memory plans), `max_batch` (largest batch), `export` (memory),
  `overtrain` (validation), `lion` (against lion-pytorch). Each takes `--json FILE` (`card.py`:
  `--out`); outputs are kept in `results/`.
"""
