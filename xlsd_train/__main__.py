"""`python -m xlsd_train` is `xlsd-train`, for launchers that take a module."""

import sys

from xlsd_train.cli import main

sys.exit(main())
