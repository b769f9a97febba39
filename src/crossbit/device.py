"""The --device option, checked before anything loads."""

from __future__ import annotations

import torch

from crossbit.errors import InputError


def check_device(device: str) -> None:
    """InputError unless ``device`` is "cpu", or "cuda" (or "cuda:N") and torch can see it."""
    if device == "cpu":
        return
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise InputError(f"--device {device}: give cpu or cuda")
    if not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device is visible to torch; use cpu")
    if colon and int(index) >= torch.cuda.device_count():
        raise InputError(
            f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices; "
            "give a lower number"
        )
