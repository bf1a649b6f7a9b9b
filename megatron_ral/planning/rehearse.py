"""Rehearsal of a launch: simulation of every distinct rank, and memory, traffic and seconds of one step from it."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import Iterator, Optional

from megatron_ral.models.shape import ModelShape, read_shape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.hardware import Hardware
from megatron_ral.planning.launch_plan import LaunchPlan
from megatron_ral.planning.memory import BYTES, HeldBytes, head_bytes, teacher_bytes
from megatron_ral.planning.parameters import stage_parameters
from megatron_ral.planning.simulate import Phase, SimulatedRank, simulate
from megatron_ral.planning.zero3 import StageBytes

PASSES = ("old", "reference")
"""Passes without gradient, in the order of a step."""


@dataclass
class RankReport:
    """One rank that represents all ranks of `stages`."""

    rank: SimulatedRank
    """Results of the simulated rank."""
    zero: StageBytes
    """Arithmetic of ZeRO-3 for its stage."""
    stages: list[int]
    """Stages that are alike."""
    memory: dict[str, Counter] = field(default_factory=dict)
    """Bytes on the device by kind at the peak of each phase, by phase."""
    sent: dict[str, Counter] = field(default_factory=dict)
    """Bytes by (process group, collective) of each phase of one step, by phase."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of this rank's own work in each phase of one step, without waiting for other stages, by phase."""
    update_share: float = 0.0
    """Bytes of an optimizer step over data-parallel ranks, as a multiple of one gather and one reduce-scatter."""

    @property
    def peak(self) -> tuple[str, int]:
        """Phase with the largest memory, and its bytes."""
        return max(((name, sum(kinds.values())) for name, kinds in self.memory.items()), key=lambda item: item[1])


@dataclass
class Rehearsal:
    """Memory, traffic and time of a launch."""

    plan: LaunchPlan
    """Settings of the launch."""
    hardware: Hardware
    """Machines of the launch."""
    ranks: list[RankReport]
    """Distinct ranks."""
    total_parameters: int
    """Parameters of the model, every one counted once."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase of one step, with bubbles and waiting, by phase."""

    @property
    def peak_bytes(self) -> int:
        """Bytes of the rank that takes most memory."""
        return max(report.peak[1] for report in self.ranks)

    @property
    def fits(self) -> bool:
        """True if the launch fits into the memory of its GPUs."""
        return self.peak_bytes <= self.hardware.usable_bytes

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return sum(self.seconds.values())

    @property
    def prompts_per_day(self) -> float:
        """Prompts that all ranks train on in a day."""
        return self.plan.work.num_prompts * self.plan.layout.data_size * 86400 / self.step_seconds

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of master weights and moments of all ranks."""
        per_data_rank = sum(12 * report.zero.trained_numel * len(report.stages) for report in self.ranks)
        return per_data_rank * self.plan.layout.tensor_size * self.plan.layout.data_size


def _recorded(plan: LaunchPlan, shape: ModelShape) -> set[int]:
    """Return the 0-based layers whose attention an update records."""
    return set() if plan.is_supervised else set(shape.layer_indices(plan.loss.attention_layers))


def distinct_stages(plan: LaunchPlan, shape: ModelShape) -> list[list[int]]:
    """Return the stages grouped by likeness. The first of each group holds most micro-batches at a time."""
    recorded, layout = _recorded(plan, shape), plan.layout
    found: dict[tuple, list[int]] = {}
    for stage in range(layout.pipeline_size):
        place = layout.with_rank(layout.rank_of(0, 0, stage))
        layers = place.stage_layers(shape.num_layers)
        key = place.is_first_stage, place.is_last_stage, len(layers), len(recorded & set(layers))
        found.setdefault(key, []).append(stage)
    return list(found.values())


def check_possible(plan: LaunchPlan, shape: ModelShape) -> None:
    """Check that the layout divides the model, and that the recorded layers exist.

    Raises:
        ConfigError: the model cannot be run with this plan.
    """
    shape.check_layout(plan.layout.tensor_size, plan.layout.pipeline_size)
    shape.layer_indices(plan.loss.attention_layers)


_towers: dict[tuple, Phase] = {}
"""Simulated vision towers by (model, grid, dtype), because they are the same in every layout."""


def rehearse(
    plan: LaunchPlan, shape: ModelShape, hardware: Optional[Hardware] = None, *, on_gpu: bool = True
) -> Rehearsal:
    """Simulate every distinct rank and return the totals.

    Args:
        plan: plan of the launch.
        shape: model of the run.
        hardware: machines of the launch; None for the defaults of `Hardware`.
        on_gpu: whether the code takes the ways that it takes on a GPU. False for a comparison with a run on CPUs.

    Raises:
        ConfigError: the layout cannot work.
    """
    check_possible(plan, shape)
    hardware, layout, work = hardware or Hardware(), plan.layout, plan.work
    teacher = _teacher_bytes(plan, shape)
    reports = []
    for stages in distinct_stages(plan, shape):
        place = layout.with_rank(layout.rank_of(0, 0, stages[0]))
        tower = (shape.path, work.grid, plan.dtype)
        simulated = simulate(shape, plan, place, on_gpu, vision=tower not in _towers)
        if place.is_first_stage and work.visual_tokens and not plan.is_supervised:
            if tower not in _towers:
                _towers[tower] = simulated.phases["vision"]
            simulated.phases["vision"] = replace(_towers[tower], count=work.num_prompts / layout.tensor_size)
        zero = StageBytes(
            simulated.parameters,
            layout.data_size,
            BYTES[plan.dtype],
            plan.parallel.gather,
            _recorded(plan, shape),
            plan.parallel.offload_parameters,
            plan.parallel.overlap_communication,
        )
        report = RankReport(simulated, zero, stages)
        _count_memory(report, plan, shape, teacher)
        _count_traffic(report, plan)
        _count_seconds(report, plan, hardware)
        reports.append(report)
    total = sum(stage.unique for stage in stage_parameters(shape, layout))
    result = Rehearsal(plan, hardware, reports, total)
    result.seconds = dict(_step_seconds(result))
    return result


def _teacher_bytes(plan: LaunchPlan, shape: ModelShape) -> HeldBytes:
    """Return the bytes of the teacher: shards, gathered stage and a copy of its head. Its passes are not simulated."""
    if plan.teacher is None:
        return HeldBytes(0, 0)
    settings, tensor = plan.teacher, plan.layout.tensor_size
    teacher = read_shape(settings.path, "teacher.path")
    teacher.check_layout(settings.tensor_size, settings.pipeline_size, section="teacher")
    held = teacher_bytes(settings, teacher, plan.layout.world_size, settings.cpu_offload)
    head = head_bytes(settings, teacher, shape, tensor)
    return replace(held, shard=head + (0 if settings.cpu_offload else held.shard))


def _teacher_seconds(rehearsal: Rehearsal) -> float:
    """Return the seconds of one pass over every sequence, by the products with the teacher's parameters alone."""
    plan = rehearsal.plan
    assert plan.teacher is not None
    work, layout, settings = plan.work, plan.layout, plan.teacher
    theirs = RankLayout(0, layout.world_size, settings.tensor_size, settings.pipeline_size)
    numel = sum(stage.unique for stage in stage_parameters(read_shape(settings.path, "teacher.path"), theirs))
    tokens = work.num_prompts * layout.data_size * (work.prompt_length + work.group_size * work.response_length)
    return rehearsal.hardware.compute_seconds(2.0 * numel * tokens / layout.world_size, 0, 0) * plan.num_epochs


def _without(kinds: Counter, *left_out: str) -> Counter:
    return Counter({kind: size for kind, size in kinds.items() if kind not in left_out and size > 0})


def _count_memory(report: RankReport, plan: LaunchPlan, shape: ModelShape, teacher: HeldBytes) -> None:
    """Fill in the bytes of every phase."""
    zero, phases, work = report.zero, report.rank.phases, plan.work
    offload = plan.parallel.offload_optimizer
    between = {**zero.held(offload, plan.holds_reference), "teacher": teacher.shard}
    held = Counter({kind: size for kind, size in between.items() if size})
    features = (
        work.visual_tokens * (1 + shape.num_deepstack_layers) * shape.hidden_size * zero.itemsize
        if report.rank.layout.is_first_stage and work.in_flight
        else 0
    )  # a supervised step makes them in the update
    rows = sum(int(phase.held * (phase.count - 1)) for name, phase in phases.items() if name in PASSES)
    rows += report.rank.recorded_bytes
    waiting = Counter({"visual features": features * work.num_prompts, "attention rows": rows})

    def memory(name: str, gathered: int, phase: Optional[Phase] = None, *more: Counter, scale: int = 1) -> None:
        kinds = held + Counter({"gathered stage": gathered}) + sum(more, Counter())
        if phase is not None:
            peak = _without(phase.seen.peak, "parameters", "host", "visual features")
            kinds += Counter({kind: size * scale for kind, size in peak.items()})
        report.memory[name] = _without(kinds)

    memory("gather", 2 * zero.whole)
    others = Counter({"KV cache": (work.in_flight - 1) * report.rank.cache_bytes})
    encoded = Counter({"visual features": waiting["visual features"]})
    if "vision" in phases:  # while the other batches are generated
        pictures = work.pictures_per_call(plan.layout.tensor_size, shape.patches.merge_size)
        memory("vision", zero.whole, phases["vision"], encoded, others, scale=pictures)
    if "token" in phases:
        generating = max((phases["prefill"], phases["token"]), key=lambda phase: phase.seen.peak_bytes)
        memory("generation", zero.whole, generating, encoded, others)
    for name in PASSES:
        if name in phases:
            memory(name, zero.in_pass, phases[name], waiting)
    if plan.teacher is not None:
        memory("teacher", 2 * teacher.gathered, None, waiting)
    num_copies = 0 if plan.is_supervised else 2 if plan.loss.attention_grad_ratio > 0 else int(plan.ratio_interval > 0)
    copies = Counter({"gradients": 4 * zero.trained_numel * num_copies})
    memory("update", zero.in_pass, phases["update"], waiting, copies)
    whole_gradient = 4 * sum(
        parameter.numel for parameter in zero.trained if parameter.layer is None or not zero.overlap
    )  # gradients of layers were reduced before
    # Bytes that move to the bucket, and that are arranged there for the collective, leave the gradients.
    bucket = Counter({"gradients": whole_gradient + zero.bucket // zero.data_size})
    memory("reduce", zero.in_pass, None, waiting, copies, bucket)
    largest = max((-(-parameter.numel // zero.data_size) for parameter in zero.trained), default=0)
    memory("optimizer", 0, None, waiting, Counter({"gradients": 16 * largest}))
    memory("checkpoint", 0, None, Counter({"optimizer state": 0 if offload else 12 * zero.trained_numel}))


def _count_traffic(report: RankReport, plan: LaunchPlan) -> None:
    """Fill in the bytes sent in every phase."""
    zero, phases, work = report.zero, report.rank.phases, plan.work
    for name, phase in phases.items():
        sent = Counter({key: size * phase.count / phase.simulated for key, size in phase.traffic.sent_bytes.items()})
        report.sent[name] = Counter(
            {
                ("pipeline" if group == "other" and kind in ("send", "receive") else group, kind): size
                for (group, kind), size in sent.items()
            }
        )
    gather = ("data", "all-gather")
    if zero.data_size > 1 and "prefill" in phases:
        report.sent["prefill"][gather] += zero.whole
        for name in PASSES:
            if name in phases:
                count = int(phases[name].count)
                report.sent[name][gather] += zero.sent(count)[gather] - sum(zero.passing.values()) * count
    report.update_share = zero.sent_per_update(work.micro_batches) / max(zero.sent_share, 1)
    for key, size in zero.sent(work.micro_batches).items():
        report.sent["update"][key] += size * work.num_updates if zero.data_size > 1 or key[0] != "data" else 0


def _count_seconds(report: RankReport, plan: LaunchPlan, hardware: Hardware) -> None:
    """Fill in the seconds of every phase."""
    layout, zero = report.rank.layout, report.zero
    spans = {
        "tensor": (layout.tensor_size, layout.tensor_size),
        "data": (layout.data_size, layout.tensor_size * (layout.data_size - 1) + 1),
        "pipeline": (layout.pipeline_size, layout.tensor_size * layout.data_size + 1),
        "embedding": (2, layout.world_size),
        "other": (layout.world_size, layout.world_size),
    }
    read = zero.itemsize * sum(
        parameter.numel
        for parameter in zero.parameters
        if parameter.layer is not None or not (parameter.embedding or not parameter.trained)
    )
    for name, phase in report.rank.phases.items():
        repeats = phase.count / phase.simulated
        seen = phase.seen
        own = hardware.compute_seconds(seen.flops, seen.wide_flops, _start_seconds(phase, hardware))
        if name == "token":
            own = max(own, hardware.memory_seconds(read + report.rank.cache_bytes))
        sending: dict[str, float] = defaultdict(float)
        for (group, kind), size in report.sent[name].items():
            sending[group] += hardware.collective_seconds(kind, size, *spans[group])
        hidden = 0.0
        if plan.parallel.overlap_communication and name not in ("prefill", "token"):
            hidden = min(sending["data"], own * repeats)
        report.seconds[name] = own * repeats + sum(sending.values()) - hidden
    moved = hardware.host_seconds if plan.parallel.offload_optimizer else hardware.memory_seconds
    # Gradients, master weights and moments are read. All but gradients are written, and the shards in model precision.
    report.seconds["optimizer"] = plan.work.num_updates * moved(zero.trained_numel * (7 * 4 + zero.itemsize))
    ranks_per_node = min(hardware.gpus_per_node, layout.world_size)
    report.seconds["checkpoint"] = 12 * zero.trained_numel * ranks_per_node / (hardware.disk_gbps_per_node * 1e9)


def _start_seconds(phase: Phase, hardware: Hardware) -> float:
    """Return the seconds to start what a phase runs. Where it is recorded, so are its collectives over tensor ranks."""
    seen, calls = phase.seen, phase.traffic.calls
    recorded = sum(count for (group, _), count in calls.items() if group == "tensor") if seen.recorded else 0
    return hardware.start_seconds(seen.kernels.total(), calls.total() - recorded) + hardware.recorded_seconds(
        seen.recorded.total(), recorded
    )


def _step_seconds(rehearsal: Rehearsal) -> Iterator[tuple[str, float]]:
    """Yield the seconds of each phase. Batches in flight and micro-batches fill a pipeline."""
    plan, ranks = rehearsal.plan, rehearsal.ranks
    work, stages = plan.work, plan.layout.pipeline_size

    def slowest(name: str) -> float:
        return max(report.seconds.get(name, 0.0) for report in ranks)

    def by_turns(name: str) -> float:
        """Return the seconds of passes by turns: a batch waits for all stages, and a stage does one pass at a time."""
        every = sum(report.seconds.get(name, 0.0) * len(report.stages) for report in ranks)
        return max(every / max(work.in_flight, 1), slowest(name))

    if work.in_flight:
        yield "vision", slowest("vision")
        yield "generation", by_turns("prefill") + by_turns("token")
    for name in PASSES:
        if slowest(name):
            count = ranks[0].rank.phases[name].count
            yield name, slowest(name) * (count + stages - 1) / count
    if plan.teacher is not None:
        yield "teacher", _teacher_seconds(rehearsal)
    bubbles = (work.micro_batches + stages - 1) / work.micro_batches
    extra = 1 / (plan.ratio_interval * work.num_updates) if plan.ratio_interval else 0.0
    if not plan.is_supervised and plan.loss.attention_grad_ratio > 0:
        extra = 1.0
    yield "update", slowest("update") * bubbles * (1 + extra)
    yield "optimizer", slowest("optimizer")
    yield "checkpoint", slowest("checkpoint") / plan.checkpoint_interval if plan.checkpoint_interval else 0.0
