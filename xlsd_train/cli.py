"""The command line `xlsd-train`, generated from the dataclass in config.py."""

import sys
from collections.abc import Sequence

import tyro

from xlsd_cache import UserError
from xlsd_cache.cli import quiet_libraries
from xlsd_train.config import TrainConfig


def main(args: Sequence[str] | None = None) -> int:
    """Train; returns the exit code. A user's mistake is one sentence, without a traceback."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] == ["run"]:  # `xlsd-train run ...` says the same
        given = given[1:]
    try:
        if given[:1] == ["tags"]:
            from xlsd_train.tags import TagsConfig, tags

            tags(tyro.cli(TagsConfig, prog="xlsd-train tags", args=given[1:]))
            return 0
        config = tyro.cli(TrainConfig, prog="xlsd-train", args=given)
        quiet_libraries()
        from xlsd_train.loop import train

        train(config, ["xlsd-train", *given])
        return 0
    except UserError as error:
        print(f"xlsd-train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("xlsd-train: stopped at once; the last checkpoint stands", file=sys.stderr)
        return 130
