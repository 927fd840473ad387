"""Memory of common devices, and how many of them hold a model."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3
# the rest is left to activations, buffers of kernels and communication, and fragmentation
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Device:
    """A device: its memory in GiB (the number in its data sheet) and whether it multiplies in FP8."""

    name: str
    memory: int
    has_fp8: bool


@dataclass(frozen=True)
class DeviceCount:
    """How many equal devices are needed."""

    device: Device
    count: int


DEVICES = (
    Device("RTX 4090", 24, True),
    Device("RTX 5090", 32, True),
    Device("A100 40 GB", 40, False),
    Device("L40S", 48, True),
    Device("A100 80 GB", 80, False),
    Device("H100", 80, True),
    Device("RTX PRO 6000 Blackwell", 96, True),
    Device("H200", 141, True),
    Device("B200", 180, True),
    Device("MI300X", 192, True),
    Device("MI355X", 288, True),
    Device("CPU, 64 GiB of RAM", 64, False),
    Device("CPU, 256 GiB of RAM", 256, False),
    Device("CPU, 512 GiB of RAM", 512, False),
    Device("CPU, 1 TiB of RAM", 1024, False),
    Device("CPU, 2 TiB of RAM", 2048, False),
)


def count_devices(num_bytes: int) -> list[DeviceCount]:
    """Return for each device how many of them hold `num_bytes`, split evenly, each filled to 90% at most."""
    return [DeviceCount(device, -int(-num_bytes // (USABLE_SHARE * device.memory * GIB))) for device in DEVICES]
