"""The least time that FAVOR can take on a GPU: its operations and bytes, and the peak rates of GPUs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """The peak rates of a GPU per second, by its data sheet.

    Attributes:
        flops: Operations of the tensor cores, in dense bfloat16.
        bytes: Bytes to and from its memory.
        exponentials: float32 exponentials, 16 per multiprocessor and clock.
        source: The source of the rates.
    """

    flops: float
    bytes: float
    exponentials: float
    source: str


# By the whole name that the driver reports: a slice of a GPU, or another model of it, has other peaks.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12, 108 * 16 * 1.41e9, "NVIDIA A100 80GB SXM data sheet"),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12, 132 * 16 * 1.83e9, "NVIDIA H100 SXM data sheet"),
    "NVIDIA H200": Peak(989e12, 4.8e12, 132 * 16 * 1.83e9, "NVIDIA H200 SXM data sheet"),
    "NVIDIA B200": Peak(2250e12, 8.0e12, 148 * 16 * 1.85e9, "NVIDIA B200 data sheet"),
    "NVIDIA L4": Peak(121e12, 0.3e12, 58 * 16 * 2.04e9, "NVIDIA L4 data sheet"),
}


@dataclass(frozen=True)
class Shape:
    """The shape of one call without mask or segments."""

    batch: int
    heads: int
    length: int
    head_dim: int
    features: int


def floor_seconds(shape: Shape, peak: Peak, *, has_backward: bool) -> dict[str, float]:
    """Returns the seconds that products, memory and exponentials each take at the peak; the largest is the floor.

    Forward: two products for keys and two for queries, 8·L·M·d operations per head, and an exponential for each pair of
    a key or query and a feature. Backward: nine products, 18·L·M·d, and three exponentials. Memory: inputs and outputs
    once, in bfloat16 (the backward reads q and out_grad once more), and the states.
    """
    heads = shape.batch * shape.heads
    tokens = heads * shape.length
    one_product = 2.0 * tokens * shape.features * shape.head_dim
    row_bytes = 2.0 * tokens * shape.head_dim
    state_bytes = 2.0 * heads * shape.features * (shape.head_dim + 2)
    products, exponentials, rows, states = (13, 5, 14, 6) if has_backward else (4, 2, 4, 2)
    return {
        "products": products * one_product / peak.flops,
        "memory": (rows * row_bytes + states * state_bytes) / peak.bytes,
        "exponentials": exponentials * tokens * shape.features / peak.exponentials,
    }
