"""The checkout is dropped from `sys.path`: `kernels` and `scheduler` must be imported as installed.

The tests' own folder is added, for the helpers that several of them share.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
sys.path.append(str(ROOT / "tests"))
