"""What code the operators run on a device, in words."""

from __future__ import annotations

import torch

from tinyexperts.ops.cpu.compile import CPU_KERNELS_RUN
from tinyexperts.ops.gpu.dispatch import triton_version, why_not
from tinyexperts.ops.kernels_setting import SETTING, VARIABLE


def kernels_on(device: torch.device) -> str:
    """Return a phrase on the code that the operators run on a device.

    A kernel of Triton's that fails the check at its first use is replaced by plain torch after that, and told then.

    Args:
        device (torch.device): the device of the operands.

    Returns:
        "numba kernels", "Triton 3.7.1 kernels" or "plain torch" with the reason.
    """
    if SETTING == "portable":
        return f"plain torch ({VARIABLE}=portable)"
    if device.type == "cpu":
        return "numba kernels" if CPU_KERNELS_RUN else "plain torch (NUMBA_DISABLE_JIT)"
    if device.type != "cuda":
        return f"plain torch (no kernels for {device.type})"
    reason = why_not(device)
    return f"Triton {triton_version()} kernels" if reason is None else f"plain torch ({reason})"
