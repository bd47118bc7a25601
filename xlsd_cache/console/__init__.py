"""The command lines' side: what the terminal shows and what is typed.

`terminal` prints and logs text safely, `libraries` silences other packages. `option_checks` checks
options against their bounds, `suggestions` answers misspelt words, `aliases` knows the option names
of other trainers.
"""
