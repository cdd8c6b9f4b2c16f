"""Devices for which runs are planned: their memory and speeds, those of an H100 by default."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tinyexperts.errors import InputError

# An H100 SXM: bf16 without sparsity and HBM3 by its data sheet; of NVLink's 450 GB/s each way 400 (assumption); and a
# 400 Gb/s adapter to other nodes.
H100_TFLOPS = 989.0
H100_MEMORY_GB_PER_SECOND = 3350.0
H100_LINK_GB_PER_SECOND = 400.0
H100_NODE_LINK_GB_PER_SECOND = 50.0

# The share of a device's arithmetic that large matrix products reach in training (assumption).
UTILIZATION = 0.4


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Equal devices on equal nodes; speeds are each device's."""

    count: int
    per_node: int
    memory_bytes: float
    flops: float
    """Peak FLOP/s."""
    memory_speed: float
    """Bytes a second between a device and its memory."""
    link_speed: float
    """Bytes a second that a device sends to others of its node."""
    node_link_speed: float
    """Bytes a second that a device sends to those of other nodes."""

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        per_node: int = 8,
        tflops: float = H100_TFLOPS,
        memory_gb_per_second: float = H100_MEMORY_GB_PER_SECOND,
        link_gb_per_second: float = H100_LINK_GB_PER_SECOND,
        node_link_gb_per_second: float = H100_NODE_LINK_GB_PER_SECOND,
    ) -> Devices:
        """Return the devices of a text like "8x80GB".

        Args:
            text (str): the number of devices and the memory of each.
            per_node (int): devices of a node.
            tflops (float): peak TFLOP/s of a device.
            memory_gb_per_second (float): speed between a device and its memory.
            link_gb_per_second (float): speed at which a device sends to others of its node.
            node_link_gb_per_second (float): speed at which a device sends to those of other nodes.

        Raises:
            InputError: another form, nodes that are not equal, or a speed that is not positive.
        """
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)GB", text)
        if match is None or int(match[1]) < 1 or not float(match[2]) > 0:
            raise InputError(f"devices must be a number and the memory of each, as 8x80GB, got {text!r}")
        count = int(match[1])
        if per_node < 1 or (count > per_node and count % per_node):
            raise InputError(f"devices_per_node must divide the {count} devices, got {per_node}")
        speeds = (tflops, memory_gb_per_second, link_gb_per_second, node_link_gb_per_second)
        if not min(speeds) > 0:
            raise InputError(f"speeds must be positive, got {', '.join(f'{speed:g}' for speed in speeds)}")
        return cls(
            count=count,
            per_node=per_node,
            memory_bytes=float(match[2]) * 1e9,
            flops=tflops * 1e12,
            memory_speed=memory_gb_per_second * 1e9,
            link_speed=link_gb_per_second * 1e9,
            node_link_speed=node_link_gb_per_second * 1e9,
        )

    def speed_among(self, num_ranks: int) -> float:
        """Return the speed of an exchange among this many adjacent ranks: the inter-node speed if they span nodes."""
        within = self.count <= self.per_node or self.per_node % num_ranks == 0
        return self.link_speed if within else self.node_link_speed
