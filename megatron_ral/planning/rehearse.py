"""A rehearsed launch: every distinct rank is played, and what was seen becomes memory, traffic and seconds of one RL step."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Iterator, Optional

from megatron_ral.config import RunConfig, check_layout
from megatron_ral.models.shape import ModelShape, read_shape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.hardware import Hardware
from megatron_ral.planning.memory import HeldBytes, frozen_bytes
from megatron_ral.planning.parameters import stage_parameters
from megatron_ral.planning.simulate import Phase, SimulatedRank, simulate
from megatron_ral.planning.workload import Workload
from megatron_ral.planning.zero3 import ITEMSIZE, StageBytes

PASSES = ("old", "reference", "average")


@dataclass
class RankReport:
    """One rank that stands for `stages` stages."""

    rank: SimulatedRank
    zero: StageBytes
    stages: list[int]
    memory: dict[str, Counter] = field(default_factory=dict)
    """Phase -> bytes on the device by kind when most are taken."""
    sent: dict[str, Counter] = field(default_factory=dict)
    """Phase -> bytes by (group, kind), of the whole phase of one RL step."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds of this rank's own work in one RL step, without waiting for other stages."""
    update_share: float = 0.0
    """Bytes of an optimizer step over data-parallel ranks, as multiple of one gather and one reduce-scatter; 0: none."""

    @property
    def peak(self) -> tuple[str, int]:
        """(phase, bytes)."""
        return max(((name, sum(kinds.values())) for name, kinds in self.memory.items()), key=lambda item: item[1])


@dataclass
class Rehearsal:
    """What a launch would take."""

    config: RunConfig
    layout: RankLayout
    work: Workload
    hardware: Hardware
    ranks: list[RankReport]
    total_parameters: int
    """Of the model, every one counted once."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds of one RL step, bubbles and waiting included."""

    @property
    def peak_bytes(self) -> int:
        return max(report.peak[1] for report in self.ranks)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.hardware.usable_bytes

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def prompts_per_day(self) -> float:
        return self.work.num_prompts * self.layout.data_size * 86400 / self.step_seconds

    @property
    def checkpoint_bytes(self) -> int:
        """Of all ranks: master weights and moments."""
        per_data_rank = sum(12 * report.zero.trained_numel * len(report.stages) for report in self.ranks)
        return per_data_rank * self.layout.tensor_size * self.layout.data_size


def _recorded(config: RunConfig, shape: ModelShape) -> set[int]:
    """0-based layers whose attention an update records."""
    return set(shape.layer_indices(config.loss.attention_layers)) if config.train.algorithm == "ral" else set()


def distinct_stages(config: RunConfig, shape: ModelShape, layout: RankLayout) -> list[list[int]]:
    """Stages that are alike, together; the first of each holds most micro-batches at a time."""
    recorded = _recorded(config, shape)
    found: dict[tuple, list[int]] = {}
    for stage in range(layout.pipeline_size):
        place = layout.with_rank(layout.rank_of(0, 0, stage))
        layers = place.stage_layers(shape.num_layers)
        key = place.is_first_stage, place.is_last_stage, len(layers), len(recorded & set(layers))
        found.setdefault(key, []).append(stage)
    return list(found.values())


def check_possible(config: RunConfig, shape: ModelShape, world_size: int) -> RankLayout:
    """The layout of the job.

    Raises:
        ConfigError: it cannot be run by so many ranks, or does not divide the model.
    """
    check_layout(config, world_size)
    parallel = config.parallel
    shape.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    shape.layer_indices(config.loss.attention_layers)
    return RankLayout(0, world_size, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)


_towers: dict[tuple, Phase] = {}


def rehearse(
    config: RunConfig,
    shape: ModelShape,
    world_size: int,
    hardware: Hardware = Hardware(),
    *,
    visual_tokens: int = -1,
    on_gpu: bool = True,
) -> Rehearsal:
    """Play every distinct rank and add up.

    Args:
        config: of the run.
        shape: its model.
        world_size: ranks of the job.
        hardware: what they run on.
        visual_tokens: of each prompt; negative: as many as the limits allow.
        on_gpu: take the ways that real code takes on a GPU (False: to compare with a run on CPUs).

    Raises:
        ConfigError: the layout cannot work.
    """
    layout = check_possible(config, shape, world_size)
    work = Workload.of(config, layout.data_size, layout.pipeline_size, visual_tokens)
    recorded = _recorded(config, shape)
    teacher = _teacher_bytes(config, shape, world_size)
    reports = []
    for stages in distinct_stages(config, shape, layout):
        place = layout.with_rank(layout.rank_of(0, 0, stages[0]))
        tower = (shape.path, work.grid, config.model.dtype)
        played = simulate(shape, config, place, work, on_gpu, vision=tower not in _towers)
        if place.is_first_stage and work.visual_tokens and config.train.algorithm == "ral":
            played.phases["vision"] = _towers.setdefault(tower, played.phases.get("vision"))
            played.phases["vision"] = replace(played.phases["vision"], count=work.num_prompts)
        zero = StageBytes(
            played.parameters,
            layout.data_size,
            ITEMSIZE[config.model.dtype],
            config.parallel.gather,
            recorded,
            config.parallel.offload_parameters,
            config.parallel.overlap_communication,
        )
        reports.append(_report(RankReport(played, zero, stages), config, shape, work, hardware, teacher))
    total = sum(stage.unique for stage in stage_parameters(shape, layout))
    result = Rehearsal(config, layout, work, hardware, reports, total)
    result.seconds = dict(_step_seconds(result))
    return result


def _without(kinds: Counter, *left_out: str) -> Counter:
    return Counter({kind: size for kind, size in kinds.items() if kind not in left_out and size > 0})


def _teacher_bytes(config: RunConfig, shape: ModelShape, world_size: int) -> HeldBytes:
    """Of the teacher, whose passes are not played: its shards and the copy of its head, and its stage while it reads."""
    if not config.distills:
        return HeldBytes(0, 0)
    teacher, tensor = read_shape(config.teacher.path, "teacher.path"), config.parallel.tensor_model_parallel_size
    teacher.check_layout(*config.teacher_layout, section="teacher")
    moved = config.teacher.cpu_offload
    held = frozen_bytes(teacher, *config.teacher_layout, world_size, config.teacher.dtype, moved)
    head = shape.padded_vocab_size(tensor) // tensor * teacher.hidden_size * ITEMSIZE[config.teacher.dtype]
    return replace(held, shard=head + (0 if moved else held.shard))


def _teacher_seconds(rehearsal: Rehearsal) -> float:
    """One reading of every sequence of the rollout, by the products with the teacher's parameters alone."""
    config, work, hardware = rehearsal.config, rehearsal.work, rehearsal.hardware
    teacher, layout = read_shape(config.teacher.path, "teacher.path"), rehearsal.layout
    theirs = RankLayout(0, layout.world_size, *config.teacher_layout)
    numel = sum(stage.unique for stage in stage_parameters(teacher, theirs))
    tokens = work.num_prompts * layout.data_size * (work.prompt_length + work.group_size * work.response_length)
    return hardware.compute_seconds(2.0 * numel * tokens / layout.world_size, 0, 0) * config.rollout.num_epochs


def _report(
    report: RankReport, config: RunConfig, shape: ModelShape, work: Workload, hardware: Hardware, teacher: HeldBytes
) -> RankReport:
    played, zero = report.rank, report.zero
    held = Counter({kind: size for kind, size in {**zero.held(config), "teacher": teacher.shard}.items() if size})
    features = (
        work.visual_tokens * (1 + shape.num_deepstack_layers) * shape.hidden_size * zero.itemsize
        if played.layout.is_first_stage and work.in_flight
        else 0
    )  # a supervised step forms them in the update
    kept = sum(int(phase.held * (phase.count - 1)) for name, phase in played.phases.items() if name in PASSES)
    waiting = Counter({"visual features": features * work.num_prompts, "attention rows": kept})

    def memory(name: str, gathered: int, seen: Optional[Phase] = None, *more: Counter, scale: int = 1) -> None:
        kinds = held + Counter({"gathered stage": gathered}) + sum(more, Counter())
        if seen is not None:
            kinds += Counter(
                {
                    kind: size * scale
                    for kind, size in _without(seen.seen.peak, "parameters", "host", "visual features").items()
                }
            )
        report.memory[name] = _without(kinds)

    phases = played.phases
    memory("gather", 2 * zero.whole)
    others = Counter({"KV cache": (work.in_flight - 1) * played.cache_bytes})
    features_kept = Counter({"visual features": waiting["visual features"]})
    if "vision" in phases:  # while the other batches run
        memory("vision", zero.whole, phases["vision"], features_kept, others, scale=work.generation_batch)
    if "token" in phases:
        generating = max((phases["prefill"], phases["token"]), key=lambda phase: phase.seen.peak_bytes)
        memory("generation", zero.whole, generating, features_kept, others)
    for name in PASSES:
        if name in phases:
            memory(name, zero.in_pass, phases[name], waiting)
    if config.distills:
        memory("teacher", 2 * teacher.gathered, None, waiting)
    learns = config.train.algorithm == "ral"
    ratio = learns and config.logging.gradient_ratio_interval > 0 and config.attention_acts
    num_copies = 2 if learns and config.loss.attention_grad_ratio > 0 else int(ratio)
    copies = Counter({"gradients": 4 * zero.trained_numel * num_copies})
    memory("update", zero.in_pass, phases["update"], waiting, copies)
    whole_gradient = 4 * sum(
        parameter.numel for parameter in zero.trained if parameter.layer is None or not zero.overlap
    )  # layers' went before
    # What moves to the bucket and is laid out for the collective there leaves the gradients.
    memory(
        "reduce",
        zero.in_pass,
        None,
        waiting,
        copies,
        Counter({"gradients": whole_gradient + zero.bucket // zero.data_size}),
    )
    largest = max((-(-parameter.numel // zero.data_size) for parameter in zero.trained), default=0)
    memory("optimizer", 0, None, waiting, Counter({"gradients": 16 * largest}))
    memory(
        "checkpoint",
        0,
        None,
        Counter({"optimizer state": 12 * zero.trained_numel if not config.parallel.offload_optimizer else 0}),
    )
    _count_traffic(report, config, work)
    _count_seconds(report, config, work, hardware)
    return report


def _count_traffic(report: RankReport, config: RunConfig, work: Workload) -> None:
    zero, phases = report.zero, report.rank.phases
    for name, phase in phases.items():
        sent = Counter({key: size * phase.count / phase.played for key, size in phase.traffic.sent_bytes.items()})
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


def _count_seconds(report: RankReport, config: RunConfig, work: Workload, hardware: Hardware) -> None:
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
        repeats = phase.count / phase.played
        seen = phase.seen
        own = hardware.compute_seconds(seen.flops, seen.wide_flops, seen.calls)
        if name == "token":
            cache = report.rank.cache_bytes
            own = max(own, hardware.memory_seconds(read + cache))
        sending = Counter()
        for (group, kind), size in report.sent[name].items():
            sending[group] += hardware.collective_seconds(kind, size, *spans[group])
        hidden = 0.0
        if config.parallel.overlap_communication and name not in ("prefill", "token"):
            hidden = min(sending["data"], own * repeats)
        report.seconds[name] = own * repeats + sum(sending.values()) - hidden
    moved = hardware.host_seconds if config.parallel.offload_optimizer else hardware.memory_seconds
    # gradients, master weights and moments are read, all but gradients written, and the shards in the model's precision
    report.seconds["optimizer"] = work.num_updates * moved(zero.trained_numel * (7 * 4 + zero.itemsize))
    ranks_per_node = min(hardware.gpus_per_node, layout.world_size)
    report.seconds["checkpoint"] = 12 * zero.trained_numel * ranks_per_node / (hardware.disk_gbps_per_node * 1e9)


def _step_seconds(rehearsal: Rehearsal) -> Iterator[tuple[str, float]]:
    """Batches in flight and micro-batches fill a pipeline."""
    work, stages, ranks = rehearsal.work, rehearsal.layout.pipeline_size, rehearsal.ranks

    def by_turns(name: str) -> float:
        """A batch makes its next pass when it has been through all stages, and a stage does one pass at a time."""
        every = sum(report.seconds.get(name, 0.0) * len(report.stages) for report in ranks)
        return max(every / max(work.in_flight, 1), slowest(name))

    def slowest(name: str) -> float:
        return max(report.seconds.get(name, 0.0) for report in ranks)

    if work.in_flight:
        yield "vision", slowest("vision")
        yield "generation", by_turns("prefill") + by_turns("token")
    for name in PASSES:
        if slowest(name):
            count = ranks[0].rank.phases[name].count
            yield name, slowest(name) * (count + stages - 1) / count
    if rehearsal.config.distills:
        yield "teacher", _teacher_seconds(rehearsal)
    bubbles = (work.micro_batches + stages - 1) / work.micro_batches
    interval = rehearsal.config.logging.gradient_ratio_interval
    extra = (
        1 / (interval * work.num_updates) if interval and work.in_flight and rehearsal.config.attention_acts else 0.0
    )
    if work.in_flight and rehearsal.config.loss.attention_grad_ratio > 0:
        extra = 1.0
    yield "update", slowest("update") * bubbles * (1 + extra)
    yield "optimizer", slowest("optimizer")
    every = rehearsal.config.train.checkpoint_interval
    yield "checkpoint", slowest("checkpoint") / every if every else 0.0
