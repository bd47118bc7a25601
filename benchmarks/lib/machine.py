"""The description of the machine that a benchmark ran on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The name of the processor from /proc/cpuinfo, or from Python if that file is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names: list[Any] = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return str(names[0]) if names else platform.machine()


def machine(*libraries: str) -> str:
    """Processor, cores, load average, and the versions of Python and of these libraries."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    python = platform.python_version()
    return f"{cpu_name()}, {os.cpu_count()} cores{load}; Python {python}, {versions}"
