"""Programs in a process of their own."""

import os
import subprocess
import sys


def run(script: str, **environment: str) -> str:
    """Return what a script prints with compiled kernels; what went wrong in it fails the test."""
    paths = os.pathsep.join(sys.path)
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths, "LAB_KERNELS": "numba", **environment})  # fmt: skip
    assert made.returncode == 0, made.stderr
    return made.stdout
