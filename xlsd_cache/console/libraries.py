"""Silences the notices and progress bars of libraries."""

import gc
import logging
import os
import sys
import warnings


def quiet() -> None:
    """Silence Pillow, without loading torch or diffusers.

    If stderr is not a terminal, progress bars are redrawn every ten seconds.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # tqdm reads it when it is imported
    # Pillow logs problems without a file name; our own log names the file and the reason.
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def quiet_libraries() -> None:
    """Also silence diffusers and transformers, which takes seconds to load them."""
    quiet()
    gc.disable()  # modules make many objects and free few: collecting takes a fifth of the time
    import diffusers.utils.logging
    import transformers.utils.logging

    gc.enable()
    gc.freeze()
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
