"""Description of the machine that a measurement ran on."""

import os
import platform
from pathlib import Path


def name() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def processor() -> str:
    """Name the processor, the number of cores and the load."""
    return f"{name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
