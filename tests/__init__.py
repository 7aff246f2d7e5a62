"""The tests, one file for each file of the package where that makes sense."""

import os
from pathlib import Path

# Where there is no GPU, Triton's kernels are interpreted; that must be known before torch imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
