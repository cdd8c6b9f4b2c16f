"""A check that the operands of an operator are on one device."""

from __future__ import annotations

from torch import Tensor

from tinyexperts.errors import InputError


def check_one_device(operator: str, **operands: Tensor | None) -> None:
    """Raise InputError where operands are on several devices."""
    devices = {name: operand.device for name, operand in operands.items() if operand is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise InputError(f"the operands of {operator} must be on one device, got {where}")
