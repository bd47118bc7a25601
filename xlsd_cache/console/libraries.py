"""Libraries that print between our lines, quietened."""

import logging
import os
import sys
import warnings


def quiet() -> None:
    """No notices of Pillow's between ours, where torch and diffusers are not wanted.

    In a log file our own bars are renewed every ten seconds instead of ten times a second.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # tqdm reads it when it is imported
    # What Pillow stumbles over in files that it does not name: they get a reason where it matters.
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def quiet_libraries() -> None:
    """The same, and no bars and notices of diffusers; their errors still raise. Takes seconds."""
    quiet()
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
