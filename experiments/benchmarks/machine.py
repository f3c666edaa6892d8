"""What a measurement says of the machine that it ran on."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """What the machine calls its processor, its cores, and how busy it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
