"""The training run.

`loop` is the loop, on one page. `session` opens everything it needs with the help of `setup`,
`announce` says what is about to happen, `meter` measures steps, `pace` predicts the time.
"""
