"""What a benchmark says of the machine that it ran on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor as Linux tells it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names: list[Any] = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return str(names[0]) if names else platform.machine()


def machine(*libraries: str) -> str:
    """Processor, cores, how many processes wanted one before, and the versions that matter."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    python = platform.python_version()
    return f"{cpu_name()}, {os.cpu_count()} cores{load}; Python {python}, {versions}"
