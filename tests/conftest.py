"""For all tests: how hypothesis runs."""

from __future__ import annotations

from hypothesis import settings

# A machine that is busy with something else makes nothing wrong.
settings.register_profile("crossbit", deadline=None)
settings.load_profile("crossbit")
