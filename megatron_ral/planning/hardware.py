"""Machines of a rehearsal as stated numbers, and the time that work takes on them.

Defaults are an H100 SXM node. Arithmetic, HBM and NVLink follow NVIDIA's data sheet (989 TFLOP/s dense bfloat16,
67 TFLOP/s float32, 3.35 TB/s, 900 GB/s both ways), with one 400 Gb/s InfiniBand port per GPU. The shares of them that
are reached, the cost of a kernel start and the speed of a disk are assumptions, and so is every second derived from
them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Speeds and sizes, per GPU unless stated otherwise."""

    gpu_memory_gib: float = 79.1
    """Memory in GiB; the default is the value that torch reports for an 80 GB card."""
    reserved_gib: float = 4.0
    """Memory in GiB of CUDA context, NCCL and cuBLAS buffers, and fragmentation (assumed)."""
    gpus_per_node: int = 8
    """GPUs of one node."""
    peak_tflops: float = 989.0
    """TFLOP/s of dense bfloat16."""
    wide_tflops: float = 67.0
    """TFLOP/s of float32 without tensor cores."""
    utilisation: float = 0.4
    """Share of both that training reaches (assumed; Megatron-LM reports 0.41 to 0.48 of an H100 for whole models)."""
    hbm_gbps: float = 3350.0
    """Bandwidth of the GPU's memory in GB/s."""
    nvlink_gbps: float = 450.0
    """Bandwidth inside a node in GB/s, one way."""
    network_gbps: float = 50.0
    """Bandwidth between nodes in GB/s, one way."""
    host_gbps: float = 50.0
    """Bandwidth between GPU and host in GB/s, for offloaded tensors."""
    link_share: float = 0.8
    """Share of all bandwidths that is reached (assumed)."""
    launch_microseconds: float = 10.0
    """Time of the host to start one kernel from Python in microseconds, not hidden where kernels are small (5.7 us per
    dispatched operation were measured on a CPU; about half of them are kernels)."""
    collective_microseconds: float = 30.0
    """Time of the host to start one collective in microseconds (assumed)."""
    recorded_microseconds: float = 1.5
    """Time of one small kernel in a recorded pass in microseconds (assumed)."""
    recorded_collective_microseconds: float = 17.0
    """Time of one small collective in a recorded pass in microseconds (assumed)."""
    disk_gbps_per_node: float = 2.0
    """Bandwidth of writing to the shared disk in GB/s per node (assumed)."""

    @property
    def usable_bytes(self) -> float:
        """Bytes of GPU memory that a rank may take."""
        return (self.gpu_memory_gib - self.reserved_gib) * 2**30

    def compute_seconds(self, flops: float, wide_flops: float, started: float) -> float:
        """Return the seconds of arithmetic, or of starting it where that takes longer.

        Args:
            flops: FLOPs in 16 bits.
            wide_flops: FLOPs in float32.
            started: seconds to start kernels and collectives.
        """
        working = (flops / self.peak_tflops + wide_flops / self.wide_tflops) / (1e12 * self.utilisation)
        return max(working, started)

    def start_seconds(self, kernels: float, collectives: float) -> float:
        """Return the seconds of the host to start kernels and collectives one by one."""
        return (kernels * self.launch_microseconds + collectives * self.collective_microseconds) * 1e-6

    def recorded_seconds(self, kernels: float, collectives: float) -> float:
        """Return the seconds between small kernels and collectives that a graph starts."""
        recorded = kernels * self.recorded_microseconds + collectives * self.recorded_collective_microseconds
        return recorded * 1e-6

    def memory_seconds(self, size: float) -> float:
        """Return the seconds to read or write bytes of the GPU's memory."""
        return size / (self.hbm_gbps * self.link_share * 1e9)

    def host_seconds(self, size: float) -> float:
        """Return the seconds to move bytes between GPU and host."""
        return size / (self.host_gbps * self.link_share * 1e9)

    def collective_seconds(self, kind: str, size: float, ranks: int, span: int) -> float:
        """Return the seconds of a collective in a ring.

        Args:
            kind: all-reduce, all-gather, reduce-scatter, send or receive.
            size: bytes of the whole buffer.
            ranks: number of ranks of the process group.
            span: number of ranks from the group's first to its last, both counted. A group inside one node uses NVLink.
        """
        if ranks < 2 or kind == "receive":  # counted where the bytes are sent
            return 0.0
        share = {
            "all-reduce": 2 * (ranks - 1) / ranks,
            "all-gather": (ranks - 1) / ranks,
            "reduce-scatter": (ranks - 1) / ranks,
        }.get(kind, 1.0)
        speed = self.nvlink_gbps if span <= self.gpus_per_node else self.network_gbps
        return share * size / (speed * self.link_share * 1e9)
