"""For all tests: how hypothesis runs, and how many threads torch has."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# A machine that is busy with something else makes nothing wrong.
settings.register_profile("crossbit", deadline=None)
settings.load_profile("crossbit")

# Test processes side by side share the CPUs: more threads than CPUs are slower than one each.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))
