"""The command line: checks what is typed, and prints help, results and the log.

`suggestions` checks the words typed and suggests corrections, with `aliases` for the option names
of other trainers. `option_checks` checks values against their bounds. `help` makes the help pages.
`terminal` prints and logs text safely, `progress` shows bars, lines or JSON events while a command
works, `libraries` silences other packages.
"""
