"""Progress bars on stderr, which command lines show and library calls do not."""

from typing import Any

from xlsd_cache.errors import UserError


def progress_bar(*args: Any, disable: bool | None = False, **options: Any) -> Any:
    """Tqdm's bar, disabled unless a command line runs."""
    from tqdm import tqdm  # late: the command line sets first how often bars are written

    return tqdm(*args, disable=disable if UserError.names_flags else True, **options)
