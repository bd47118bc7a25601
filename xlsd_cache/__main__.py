"""`python -m xlsd_cache` is `xlsd-cache`, for launchers that take a module."""

import sys

from xlsd_cache.cli import main

sys.exit(main())
