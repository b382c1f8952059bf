"""What devices can do at most, from their data sheets, and how many threads are of use beside them."""

from collections.abc import Mapping
from typing import Any

import torch

from curriq import parallel

PEAKS: dict[str, tuple[float, float]] = {
    # Name as torch gives it, the longest match counts → dense bfloat16 and float32 without TF32, TFLOP/s.
    "B200": (2250, 75),
    "GH200": (989, 67),
    "H200": (989, 67),
    "H100": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H800": (989, 67),
    "H20": (148, 44),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165, 10.3),
    "A10": (125, 31.2),
    "A10G": (70, 35),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "RTX 3090": (71, 35.6),
    "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8),
    "RTX A6000": (154.8, 38.7),
    "RTX 6000 Ada": (364, 91.1),
    "MI300X": (1307, 163.4),
    "MI250X": (383, 47.9),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that the device can do at most in this precision, a multiply-add counted as two;
    None for a CPU and for a device that is not in the table."""
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device), precision)


def named_peak(name: str, precision: str) -> float | None:
    """The same by the device's name."""
    words = name.replace("-", " ").split()
    known = [key for key in PEAKS if set(key.split()) <= set(words)]
    if not known:
        return None
    bf16, fp32 = PEAKS[max(known, key=len)]
    return 1e12 * (bf16 if precision == "bf16" else fp32)


def cpu_threads(device: torch.device, processes: int = 1) -> int:
    """CPU threads of torch for one of so many processes on this machine, where nobody has set them: its share
    of the cores, or one beside a GPU.

    There the CPU works on small tensors only, and many threads meet for longer than they work.
    """
    return max(1, parallel.cores() // processes) if device.type == "cpu" else 1


BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")
"""Names that torch has for bfloat16 products of a CPU: of x86, and of ARM."""


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; False where torch cannot tell."""
    capabilities = _cpu_capabilities()
    return any(capabilities.get(name) for name in BF16_PRODUCTS)


def physical_cores() -> int | None:
    """Cores of this machine without hyperthreads; None where torch cannot tell."""
    return _cpu_capabilities().get("num_physical_cores")


def _cpu_capabilities() -> Mapping[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # a recent addition
