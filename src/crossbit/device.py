"""The --device option, checked before anything loads, and what computes then."""

from __future__ import annotations

import torch

from crossbit.errors import InputError
from crossbit.products import slow_dtypes


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


def computing_on(device: str) -> str:
    """What the last bits of sums depend on besides their terms: instructions and threads."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    slow = ", ".join(str(dtype).removeprefix("torch.") for dtype in slow_dtypes())
    without = f" without {slow}" if slow else ""
    return f"cpu ({capability}{without}), {threads} thread{'s' * (threads > 1)}"
