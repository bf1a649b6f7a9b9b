"""The machines a rehearsal is for, as stated numbers, and how long work takes on them.

Defaults are an H100 SXM node: NVIDIA's data sheet for arithmetic, HBM and NVLink (989 TFLOP/s dense bfloat16, 67 TFLOP/s
float32, 3.35 TB/s, 900 GB/s both ways), one 400 Gb/s InfiniBand port per GPU. Shares of them that are reached, the cost of
starting a kernel and what a disk takes are assumptions, and so is every second that is derived from them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Per GPU unless said otherwise."""

    gpu_memory_gib: float = 79.1
    """What torch reports of an 80 GB card."""
    reserved_gib: float = 4.0
    """CUDA context, NCCL and cuBLAS buffers, fragmentation: assumed."""
    gpus_per_node: int = 8
    peak_tflops: float = 989.0
    """Dense bfloat16."""
    wide_tflops: float = 67.0
    """float32 without tensor cores."""
    utilisation: float = 0.4
    """Share of both that training reaches: assumed (Megatron-LM reports 0.41 to 0.48 of an H100 for whole models)."""
    hbm_gbps: float = 3350.0
    """GB/s."""
    nvlink_gbps: float = 450.0
    """GB/s one way, inside a node."""
    network_gbps: float = 50.0
    """GB/s one way, between nodes."""
    host_gbps: float = 50.0
    """GB/s between GPU and host: what is offloaded."""
    link_share: float = 0.8
    """Share of all bandwidths that is reached: assumed."""
    launch_microseconds: float = 6.0
    """Of one kernel, not hidden where kernels are small: assumed."""
    disk_gbps_per_node: float = 2.0
    """GB/s written to the shared disk: assumed."""

    @property
    def usable_bytes(self) -> float:
        return (self.gpu_memory_gib - self.reserved_gib) * 2**30

    def compute_seconds(self, flops: float, wide_flops: float, calls: float) -> float:
        """Arithmetic, or starting it where that takes longer."""
        working = (flops / self.peak_tflops + wide_flops / self.wide_tflops) / (1e12 * self.utilisation)
        return max(working, calls * self.launch_microseconds * 1e-6)

    def memory_seconds(self, size: float) -> float:
        """Reading or writing bytes of HBM."""
        return size / (self.hbm_gbps * self.link_share * 1e9)

    def host_seconds(self, size: float) -> float:
        """Bytes between GPU and host."""
        return size / (self.host_gbps * self.link_share * 1e9)

    def collective_seconds(self, kind: str, size: float, ranks: int, span: int) -> float:
        """A ring over `ranks`, whole buffers of `size` bytes.

        Args:
            span: ranks from the group's first to its last, both counted; a group in one node uses NVLink.
        """
        if ranks < 2 or kind == "receive":  # counted where it is sent
            return 0.0
        share = {
            "all-reduce": 2 * (ranks - 1) / ranks,
            "all-gather": (ranks - 1) / ranks,
            "reduce-scatter": (ranks - 1) / ranks,
        }.get(kind, 1.0)
        speed = self.nvlink_gbps if span <= self.gpus_per_node else self.network_gbps
        return share * size / (speed * self.link_share * 1e9)
