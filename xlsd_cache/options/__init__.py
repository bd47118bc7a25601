"""What is typed after a command -> a frozen dataclass of its options, checked when it is made.

The command line, its help pages and the reference are generated from them. Groups of options:
`sources`, `captions`, `store` and `work`. Commands: `build` (`plan`, `encode` and `finish` too),
`watch`, `captions`, `import_latents`, and those that read a store in `inspection`.
"""
