"""Settings of XLA under which compiling takes a fifth of its time, for programs that run a few
times each.

As a program: print them, as they stand in XLA_FLAGS.
"""

import os
import subprocess
import sys

SETTINGS = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def starts(settings: dict[str, str]) -> bool:
    """Tell whether XLA starts with settings: one that it does not know ends the process, hence a
    child.
    """
    texts = [f"--{name}={value}" for name, value in settings.items()]
    environment = os.environ | {"XLA_FLAGS": " ".join(texts)}
    command = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"]
    return not subprocess.run(command, env=environment, capture_output=True).returncode


def flags() -> str:
    """Give the XLA_FLAGS of the environment, with those of SETTINGS that they do not speak of."""
    given = os.environ.get("XLA_FLAGS", "")
    missing = {name: value for name, value in SETTINGS.items() if name not in given}
    if missing and not starts(missing):
        missing = {name: value for name, value in missing.items() if starts({name: value})}
    return " ".join([given, *(f"--{name}={value}" for name, value in missing.items())]).strip()


if __name__ == "__main__":
    print(flags())
