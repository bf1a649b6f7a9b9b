"""Simulation of one rank of a job that does not exist, through the phases of one step, without memory."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.targets.registry import TargetPass
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import PipelinedDecoder
from megatron_ral.models.shape import ModelShape
from megatron_ral.models.vision import encode_frames, frames_of
from megatron_ral.objectives.attention import AttentionTerm
from megatron_ral.objectives.base import Objective
from megatron_ral.objectives.policy_gradient import PolicyGradientTerm
from megatron_ral.objectives.supervised import supervised_objective
from megatron_ral.parallel.process_groups import simulate_rank
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.parallel.traffic import CountedTraffic, Traffic
from megatron_ral.planning.fakes import Seen, Watched, counted_graphs, counted_triton, fake_tensors, first_chunks
from megatron_ral.planning.gpu_work import replaced
from megatron_ral.planning.launch_plan import LaunchPlan
from megatron_ral.planning.simulated_policy import SimulatedBatch, SimulatedPolicy, kind_of
from megatron_ral.planning.workload import make_groups, make_prompt
from megatron_ral.planning.zero3 import SimulatedParameter
from megatron_ral.types import GroupBatch, RlBatch, SftBatch, StepTotals, TrainBatch


@dataclass
class Phase:
    """One phase of a rank, to be scaled from the units that were simulated to all of them."""

    name: str
    """Name of the phase."""
    count: float
    """Number of units of the phase in one step, e.g. micro-batches."""
    seen: Seen
    """Memory and arithmetic of the simulated units."""
    traffic: Traffic
    """Bytes sent by the simulated units."""
    simulated: float = 1.0
    """Number of units that were simulated."""
    held: int = 0
    """Bytes that each unit leaves in memory until the update."""


@dataclass
class SimulatedRank:
    """Results of one simulated rank."""

    layout: RankLayout
    """Place of the rank."""
    parameters: list[SimulatedParameter]
    """Parameters of the stage on this tensor rank."""
    phases: dict[str, Phase] = field(default_factory=dict)
    """Phases by name, in the order of a step."""
    cache_bytes: int = 0
    """Bytes of the KV cache of one batch at its largest."""
    recorded_bytes: int = 0
    """Bytes of the attention rows that decoding records, of all micro-batches but one."""

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class _WatchedObjective:
    """Objective whose attention part counts as attention rows."""

    inner: Objective
    watched: Watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch):
        with self.watched.kind("attention rows"):
            return self.inner.attention_loss(layer, rows, batch)


class _Simulator:
    """One rank that runs the phases of one step."""

    def __init__(self, engine: SimulatedPolicy, plan: LaunchPlan, result: SimulatedRank):
        self.engine, self.plan, self.work, self.result = engine, plan, plan.work, result
        groups = engine.process_groups
        self.process_groups = {"tensor": groups.tensor, "pipeline": groups.pipeline, "data": groups.data}
        self.objective = supervised_objective()
        if not plan.is_supervised:
            layers = frozenset(engine.shape.layer_indices(plan.loss.attention_layers))
            term = AttentionTerm(plan.loss, layers, plan.loss.attention_coef)
            self.objective = Objective((PolicyGradientTerm(plan.loss), term), term.position, plan.temperature)

    def phase(self, name: str, count: float, run: Callable[[], Any], simulated: float = 1.0) -> Any:
        """Run a phase and record what it did; returns what `run` returns."""
        with CountedTraffic(self.process_groups) as traffic, self.engine.watched.phase() as seen:
            value = run()
        self.result.phases[name] = Phase(name, count, seen, traffic, simulated)
        return value

    def batches(self, count: int) -> list[GroupBatch]:
        """Return micro-batches of the largest size."""
        engine = self.engine
        features = engine.layout.is_first_stage and not self.plan.is_supervised  # a supervised update encodes by itself
        batches = [make_groups(engine, self.work, self.work.micro_batch, features) for _ in range(count)]
        for batch in batches:
            engine.watched.call_it("visual features", *(batch.visual_embeds or ()))
        return batches

    def vision(self) -> None:
        """Encode the picture of one prompt. Tensor ranks share the pictures, of which each encodes whole ones."""
        engine, prompt = self.engine, make_prompt(self.engine.shape, self.work)
        frames, tower = frames_of(prompt.grid_thw), engine.stage.visual
        assert tower is not None, "only the first stage has a vision tower"
        with torch.no_grad():
            self.phase(
                "vision",
                self.work.num_prompts / engine.layout.tensor_size,
                lambda: encode_frames(tower, engine.shape.family, frames, prompt.patches),
            )

    def generation(self) -> None:
        """Run passes of one batch with traffic and sampling: the first, the one that takes most memory, and one of the
        many others."""
        engine, work = self.engine, self.work
        batch = make_groups(engine, work, work.generation_batch, engine.layout.is_first_stage)
        settings = SamplingSettings(work.group_size, work.response_length, 0, 0, self.plan.temperature, self.plan.top_p)
        engine.watched.call_it("visual features", *(batch.visual_embeds or ()))
        decoding = SimulatedBatch(batch.prompts, batch.visual_embeds, settings, engine.process_groups, ())
        decoding.count_cache(engine.watched)
        decoder, batches = PipelinedDecoder(engine), -(-work.num_prompts // work.generation_batch)
        with torch.no_grad(), engine.resident(), engine.stage.whole_sequences():
            self.phase("prefill", batches, lambda: decoder.start_pass(decoding))
            decoding.go_to_last_growth()
            count = batches * (work.response_length - 1)
            self.phase("token", count, lambda: decoder.start_pass(decoding))
            largest = self.result.phases["token"].seen.peak
            decoding.go_to_the_next_step()
            self.phase("token", count, lambda: decoder.start_pass(decoding))
            self.result.phases["token"].seen.peak = largest
        self.result.cache_bytes = engine.watched.live["KV cache"]
        decoding.end()

    def passes(self) -> Mapping[int, Any]:
        """Run the passes without gradient; returns the attention target of each recorded layer, empty without one."""
        engine, objective = self.engine, self.objective
        term: AttentionTerm = objective.term("attention")
        target: Mapping[int, Any] = {}

        def store(rows: AttentionRows, batch: GroupBatch) -> Any:
            with engine.watched.kind("attention rows"):
                return term.store(rows, batch)

        for name, is_recorded in self.plan.passes.items():
            batches, layers = self.batches(1), sorted(term.layers) if is_recorded else ()
            before = engine.watched.live["attention rows"]
            (output,) = self.phase(
                name,
                self.work.passes - (self.work.on_policy if name == "old" else 0),
                lambda batches=batches, layers=layers: engine.forward(
                    batches,
                    layers,
                    temperature=objective.temperature,
                    position=term.stored_position,
                    store=store,
                ),
            )
            if is_recorded:
                target = output.attention
                self.result.phases[name].held = engine.watched.live["attention rows"] - before
        return target if term.target_pass is not TargetPass.ROLLOUT else self._recorded(sorted(term.layers))

    def _recorded(self, layers: Sequence[int]) -> Mapping[int, Any]:
        """Return the rows of one micro-batch that decoding recorded in this stage's layers, and count the others."""
        work, before = self.work, self.engine.watched.live["attention rows"]
        shape = work.micro_batch, work.group_size, work.response_length, work.prompt_length + work.response_length
        with self.engine.watched.kind("attention rows"):
            device = self.engine.process_groups.device
            rows = {layer: torch.empty(shape, device=device) for layer in self.engine.local_layers(layers)}
        one = self.engine.watched.live["attention rows"] - before
        self.result.recorded_bytes = one * (work.passes - 1)
        return rows

    def update(self, target: Mapping[int, Any]) -> None:
        """Run as many micro-batches of an update as this stage holds at a time, and one more."""
        engine, work = self.engine, self.work
        simulated = min(work.micro_batches, engine.layout.pipeline_size - engine.layout.pipeline_rank + 1)
        device = engine.process_groups.device
        advantages = torch.empty(work.micro_batch, work.group_size, device=device)
        if target:
            term: AttentionTerm = self.objective.term("attention")
            target = {layer: term.target.combine(stored, advantages) for layer, stored in target.items()}
        tokens = torch.empty(work.micro_batch, work.group_size, work.response_length, device=device)
        last, totals = engine.layout.is_last_stage, StepTotals(1, 1, work.response_length)
        batches: list[TrainBatch] = []
        for groups in self.batches(simulated):
            if self.plan.is_supervised:
                batches.append(SftBatch(groups, totals))
                continue
            batches.append(
                RlBatch(
                    groups=groups,
                    totals=totals,
                    group_mask=torch.ones(work.micro_batch, dtype=torch.bool, device=device),
                    advantages=advantages,
                    attention_advantages=advantages,
                    rollout_logprobs=tokens,
                    from_teacher=torch.zeros(work.micro_batch, dtype=torch.bool, device=device),
                    is_on_policy=work.on_policy > 0,  # the first update records its own rows
                    compares_sampler=False,
                    old_logprobs=tokens if last else None,
                    ref_logprobs=tokens if last and self.plan.needs_reference else None,
                    target_attention=dict(target),
                )
            )
        engine.stage.train()
        objective: Any = _WatchedObjective(self.objective, engine.watched)
        count = work.micro_batches * work.num_updates
        self.phase("update", count, lambda: engine.accumulate(batches, objective), simulated)


@contextmanager
def _gpu_kernels(watched: Watched) -> Iterator[None]:
    with counted_triton(watched), counted_graphs(watched):
        yield


def simulate(
    shape: ModelShape, plan: LaunchPlan, layout: RankLayout, on_gpu: bool = True, vision: bool = True
) -> SimulatedRank:
    """Simulate one rank: vision, prefill, one token, passes without gradient and update, or a supervised update.

    Args:
        shape: model.
        plan: plan of the launch.
        layout: place of the rank.
        on_gpu: whether tensors lie on a CUDA device, so that the code takes the ways that it takes there.
        vision: whether the first stage runs the vision tower, which is the same in every layout.
    """
    with (
        simulate_rank(
            layout.rank,
            layout.world_size,
            tensor_size=layout.tensor_size,
            pipeline_size=layout.pipeline_size,
            on_gpu=on_gpu,
        ) as process_groups,
        fake_tensors(),
    ):
        watched = Watched(kind_of(shape, layout), on_gpu)
        engine = SimulatedPolicy(shape, process_groups, plan.engine, plan.training, watched)
        result = SimulatedRank(layout, engine.parameters())
        simulator = _Simulator(engine, plan, result)
        with watched, first_chunks(watched), _gpu_kernels(watched) if on_gpu else nullcontext():
            engine.stage.eval()
            if plan.is_supervised:
                simulator.update({})
            else:
                if vision and layout.is_first_stage and plan.work.visual_tokens:
                    simulator.vision()
                simulator.generation()
                simulator.update(simulator.passes())
        return result


def term_kernels(shape: ModelShape, plan: LaunchPlan, rank: SimulatedRank) -> dict[str, float]:
    """Return what the attention term adds to the kernels of a micro-batch, by operator.

    A number is negative where it saves some: a recorded layer is not recomputed. Simulates the rank again without it.

    Args:
        shape: model.
        plan: plan of the launch.
        rank: the rank with the term.
    """
    with replaced(AttentionTerm, "recorded_layers", frozenset()):
        without = simulate(shape, plan, rank.layout).phases["update"]
    update = rank.phases["update"]
    names = {*update.seen.kernels, *without.seen.kernels}
    return {name: (update.seen.kernels[name] - without.seen.kernels[name]) / update.simulated for name in names}
