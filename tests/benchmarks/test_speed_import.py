"""How long importing takes, in fresh processes: `make bench`."""

import subprocess
import sys

from rounds import interleaved, report

STATEMENTS = {
    "import deepseek_lab; .model": "import deepseek_lab; deepseek_lab.model",
    "import torch": "import torch",
    "import deepseek_lab": "import deepseek_lab",
    "python alone": "pass",
}


def test_import():
    runs = {
        name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True)
        for name, code in STATEMENTS.items()
    }
    report(interleaved(runs, rounds=7))
