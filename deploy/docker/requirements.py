"""Prints what the project needs, one requirement a line: always, and for the extras that are named.

usage: requirements.py [EXTRA …]     (beside pyproject.toml)
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
