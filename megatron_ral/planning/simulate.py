"""One rank of a job that is not there, with its stage built and run by the real code on tensors without memory.

`SimulatedPolicy` is the trainable engine without DeepSpeed: its parameters are whole all the time, nothing is gathered or
reduced (`planning/zero3.py` knows that by arithmetic), everything between, megatron's schedule included, is what a real rank
runs. `play` takes it through the phases of one RL step.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Mapping, Optional

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_ral.compat.deepspeed_early_reduction import EarlyReduction
from megatron_ral.config import RunConfig
from megatron_ral.engine.pipelined_decoder import PipelinedDecoder
from megatron_ral.engine.decoding_batch import DecodingBatch, SamplingSettings
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.engine.stage import DTYPES
from megatron_ral.attention.targets.success import success_target
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.attention.group_layout import AttentionRecord
from megatron_ral.models.kv_cache import GroupKVCache
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.process_groups import ProcessGroups, simulate_rank
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.parallel.traffic import CountedTraffic, Traffic
from megatron_ral.planning.fakes import Seen, Watched, fake_tensors, first_pieces
from megatron_ral.objectives.attention import ROLLOUT_POLICY
from megatron_ral.objectives.objective import RalObjective, SftObjective
from megatron_ral.planning.workload import Workload, make_groups, make_prompt
from megatron_ral.types import GroupBatch, StepTotals, TrainBatch, pad_prompts


@dataclass
class Phase:
    """What one phase of a rank does, scaled to `count` times what was run."""

    name: str
    count: int
    seen: Seen
    traffic: Traffic
    played: float = 1.0
    """How many of `count` were run."""
    held: int = 0
    """Bytes that each leaves behind until the update."""


@dataclass
class SimulatedRank:
    """Everything that was seen of one rank."""

    layout: RankLayout
    parameters: list["SimulatedParameter"]
    """Of the stage on this tensor rank."""
    phases: dict[str, Phase] = field(default_factory=dict)
    cache_bytes: int = 0

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class SimulatedParameter:
    """One parameter as ZeRO-3 sees it."""

    numel: int
    trained: bool
    layer: Optional[int]
    """0-based layer it belongs to."""
    partial: bool
    """Its gradient is summed over tensor ranks."""
    tied: bool
    """Its gradient is summed over the first and last stage."""
    embedding: bool
    """Word embeddings: looked up, not read as a whole."""


class _NamedCache(GroupKVCache):
    """The cache, counted as such from the moment it is made."""

    def __init__(self, prompt_lengths: Tensor, group_size: int, watched: Watched):
        super().__init__(prompt_lengths, group_size)
        self.watched = watched

    def store_prompt(self, layer: int, key_BPkD: Tensor, value_BPkD: Tensor) -> None:
        with self.watched.kind("KV cache"):
            super().store_prompt(layer, key_BPkD, value_BPkD)

    def _grown(self, held: Optional[Tensor], new: Tensor) -> Tensor:
        with self.watched.kind("KV cache"):
            return super()._grown(held, new)


class _SimulatedBatch(DecodingBatch):
    """A batch that can be put at any step of its responses, where nobody has ended."""

    def count_cache(self, watched: Watched) -> None:
        """Before the first pass: its cache is counted as one."""
        self._cache = _NamedCache(self._cache.prompt_lengths, self.settings.group_size, watched)

    def go_to_last_growth(self) -> None:
        """To the last step at which the cache grows, which is when it takes most."""
        held = max(self.settings.max_response_length - 2, 0) // GroupKVCache.BLOCK * GroupKVCache.BLOCK
        self.step, self._fed = held + 1, torch.ones(len(self.rows), dtype=torch.int64, device=self.device)
        if held:
            with self._cache.watched.kind("KV cache"):
                for layer, parts in self._cache.prompt.items():
                    self._cache.response[layer] = tuple(
                        part.new_empty(len(self.rows), part.shape[1], held, part.shape[3]) for part in parts
                    )


class _SimulatedReduction:
    """Of DeepSpeed's optimizer what `EarlyReduction` calls: a gradient that leaves for the bucket is gone."""

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Nothing to know here."""

    def reduce_independent_p_g_buckets_and_remove_grads(self, parameter: Parameter) -> None:
        parameter.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """The bucket is arithmetic."""


class SimulatedPolicy(PolicyEngine):
    """The engine of a played rank.

    Args:
        shape, groups, config: as for PolicyEngine.
        watched: what follows its tensors.
        on_gpu: take the ways that real code takes on a GPU.
    """

    def __init__(
        self, shape: ModelShape, process_groups: ProcessGroups, config: RunConfig, watched: Watched, on_gpu: bool = True
    ):
        self.shape, self.process_groups, self.layout, self.config, self.watched = (
            shape,
            process_groups,
            process_groups.layout,
            config,
            watched,
        )
        self._resident, self._ready, self._gather, self._overlap = True, False, config.parallel.gather, False
        self.deepspeed = SimpleNamespace(coalesce_grad_reduction=nullcontext)
        with process_groups.active():
            self.stage = MultimodalStage(
                shape,
                process_groups.layout,
                DTYPES[config.model.dtype],
                process_groups.device,
                config.parallel.sequence_parallel,
                config.parallel.recompute_activations or config.parallel.gather == "layer",
            )
        for layer in self.stage.language.decoder.layers:
            layer.self_attention.core_attention.equal_heads_with_mask = True if on_gpu else None
        for name, parameter in self.stage.named_parameters():
            parameter.requires_grad_(config.model.train_vision or not name.startswith("visual."))
            if parameter.requires_grad:
                parameter.grad_dtype = torch.float32
                parameter.register_post_accumulate_grad_hook(lambda p: watched.call_it("gradients", p.grad))
        self._early = EarlyReduction(
            _SimulatedReduction(), self.stage.language.decoder.layers if config.parallel.overlap_communication else ()
        )
        self._trainable = {
            name: parameter for name, parameter in self.stage.named_parameters() if parameter.requires_grad
        }
        watched.call_it("parameters", *self.stage.parameters(), *self.stage.buffers())

    def parameters(self) -> list[SimulatedParameter]:
        """What ZeRO-3 cuts."""
        tied = self.shape.tie_word_embeddings and self.process_groups.embedding is not None
        layers = {
            id(parameter): layer.layer_number - 1
            for layer in self.stage.language.decoder.layers
            for parameter in layer.parameters()
        }
        return [
            SimulatedParameter(
                parameter.numel(),
                parameter.requires_grad,
                layers.get(id(parameter)),
                self.layout.tensor_size > 1 and getattr(parameter, "partial_over_tensor_ranks", False),
                tied and self._is_embedding(parameter),
                "word_embeddings" in name,
            )
            for name, parameter in self.stage.named_parameters()
        ]

    def attention_rows(self, record: AttentionRecord, pass_: AttentionPass, kind: str) -> AttentionRows:
        with self.watched.kind("attention rows"):
            return super().attention_rows(record, pass_, kind)


@dataclass(frozen=True)
class _WatchedObjective:
    """An objective whose attention part is counted as attention rows."""

    inner: RalObjective | SftObjective
    watched: Watched

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def attention_loss(self, layer: int, rows: AttentionRows, batch: TrainBatch):
        with self.watched.kind("attention rows"):
            return self.inner.attention_loss(layer, rows, batch)


def _kind_of(shape: ModelShape, layout: RankLayout):
    columns = shape.padded_vocab_size(layout.tensor_size) // layout.tensor_size
    patch = 3 * shape.vision.temporal_patch_size * shape.vision.patch_size**2

    def kind(tensor: Tensor) -> Optional[str]:
        if tensor.dim() == 2 and tensor.shape[-1] == patch and tensor.dtype == torch.float32:
            return "host"
        if tensor.dim() >= 2 and tensor.shape[-1] == columns and tensor.is_floating_point():
            return "logits"
        node = torch._C._current_autograd_node()
        return "attention rows" if node is not None and "RowDivergence" in node.name() else None

    return kind


class _Simulator:
    """One rank on its way through the phases."""

    def __init__(self, engine: SimulatedPolicy, work: Workload, config: RunConfig, result: SimulatedRank):
        self.engine, self.work, self.config, self.result = engine, work, config, result
        process_groups = engine.process_groups
        self.process_groups = {
            "tensor": process_groups.tensor,
            "pipeline": process_groups.pipeline,
            "data": process_groups.data,
        }
        if config.train.algorithm == "sft":
            self.objective: RalObjective | SftObjective = SftObjective()
            return
        self.objective = RalObjective(
            config.loss,
            frozenset(engine.shape.layer_indices(config.loss.attention_layers)),
            config.loss.attention_coef,
            config.rollout.temperature,
        )

    def phase(self, name: str, count: float, run) -> Any:
        watched = self.engine.watched
        with CountedTraffic(self.process_groups) as traffic, watched.phase() as seen:
            value = run()
        self.result.phases[name] = Phase(name, count, seen, traffic)
        return value

    def batches(self, count: int) -> list[GroupBatch]:
        engine = self.engine
        features = engine.layout.is_first_stage and self.config.train.algorithm != "sft"  # which encodes in the update
        batches = [
            make_groups(engine.shape, self.work, self.work.micro_batch, features, engine.stage.dtype)
            for _ in range(count)
        ]
        for batch in batches:
            engine.watched.call_it("visual features", *(batch.visual_embeds or ()))
        return batches

    def vision(self) -> None:
        """One prompt: the tower reads pictures one after the other, batches of them add up."""
        prompts = pad_prompts([make_prompt(self.engine.shape, self.work)], 0)
        self.phase("vision", self.work.num_prompts, lambda: self.engine.encode_visual(prompts))

    def generation(self) -> None:
        """One batch of those in flight: its first pass, and the one that takes most memory, with what they send and draw."""
        engine, work = self.engine, self.work
        batch = make_groups(engine.shape, work, work.generation_batch, engine.layout.is_first_stage, engine.stage.dtype)
        settings = SamplingSettings(
            work.group_size, work.response_length, 0, 0, self.config.rollout.temperature, self.config.rollout.top_p
        )
        engine.watched.call_it("visual features", *(batch.visual_embeds or ()))
        playing = _SimulatedBatch(batch.prompts, batch.visual_embeds, settings, engine.process_groups, ())
        playing.count_cache(engine.watched)
        line, batches = PipelinedDecoder(engine), -(-work.num_prompts // work.generation_batch)
        with torch.no_grad(), engine.resident(), engine.stage.whole_sequences():
            self.phase("prefill", batches, lambda: line.start_pass(playing))
            playing.go_to_last_growth()
            self.phase("token", batches * (work.response_length - 1), lambda: line.start_pass(playing))
        self.result.cache_bytes = engine.watched.live["KV cache"]

    def passes(self) -> Optional[Mapping[int, Any]]:
        """Passes without gradient; returns what the attention is compared with."""
        engine, target, layers = self.engine, self.config.loss.attention_target, sorted(self.objective.term_layers)
        sources = {"old": target in ROLLOUT_POLICY} if self.work.passes > self.work.on_policy else {}
        if self.config.needs_reference:
            sources["reference"] = target == "reference"
        if target == "ema":
            sources["average"] = True
        kept: Optional[Mapping[int, Any]] = None
        for name, recorded in sources.items():
            batches = self.batches(1)

            def keep(rows: AttentionRows, batch: GroupBatch):
                with engine.watched.kind("attention rows"):
                    return self.objective.term.keep(rows, batch)

            before = engine.watched.live["attention rows"]
            count = self.work.passes - (self.work.on_policy if name == "old" else 0)
            (output,) = self.phase(
                name,
                count,
                lambda: engine.forward(
                    batches,
                    layers if recorded else (),
                    temperature=self.objective.temperature,
                    row_kind=self.config.loss.attention_row,
                    keep=keep,
                ),
            )
            if recorded:
                kept = output.attention
                self.result.phases[name].held = engine.watched.live["attention rows"] - before
        return kept

    def update(self, kept: Optional[Mapping[int, Any]]) -> None:
        engine, work = self.engine, self.work
        played = min(work.micro_batches, engine.layout.pipeline_size - engine.layout.pipeline_rank + 1)
        advantages = torch.empty(work.micro_batch, work.group_size)
        if kept and self.config.loss.attention_target in ("group", "hindsight"):
            kept = {layer: success_target(rows, advantages) for layer, rows in kept.items()}
        tokens = torch.empty(work.micro_batch, work.group_size, work.response_length)
        last = engine.layout.is_last_stage
        batches = [
            TrainBatch(
                groups=groups,
                totals=StepTotals(1, 1, work.response_length),
                advantages=advantages,
                old_logprobs=tokens if last else None,
                ref_logprobs=tokens if last and self.config.needs_reference else None,
                target_attention=dict(kept or {}),
                attention_advantages=advantages,
                on_policy=work.on_policy > 0,  # the first update forms rows of its own
                group_mask=torch.ones(work.micro_batch, dtype=torch.bool),
            )
            for groups in self.batches(played)
        ]
        engine.stage.train()
        self.phase(
            "update",
            work.micro_batches * work.num_updates,
            lambda: engine.accumulate(batches, _WatchedObjective(self.objective, engine.watched)),
        )
        self.result.phases["update"].played = played


def simulate(
    shape: ModelShape, config: RunConfig, layout: RankLayout, work: Workload, on_gpu: bool = True, vision: bool = True
) -> SimulatedRank:
    """One rank through the phases of an RL step: vision, prefill, one token, passes without gradient, update; of a
    supervised step: the update.

    Args:
        shape: model.
        config: of the run.
        layout: this rank's place.
        work: sizes.
        on_gpu: take the ways that real code takes on a GPU.
        vision: run the tower (first stage); it is the same in every layout.
    """
    with (
        simulate_rank(
            layout.rank, layout.world_size, tensor_size=layout.tensor_size, pipeline_size=layout.pipeline_size
        ) as process_groups,
        fake_tensors(),
    ):
        watched = Watched(_kind_of(shape, layout))
        engine = SimulatedPolicy(shape, process_groups, config, watched, on_gpu)
        result = SimulatedRank(layout, engine.parameters())
        player = _Simulator(engine, work, config, result)
        with watched, first_pieces(watched):
            engine.stage.eval()
            if vision and layout.is_first_stage and work.visual_tokens and config.train.algorithm != "sft":
                player.vision()
            if config.train.algorithm == "sft":
                player.update(None)
            else:
                player.generation()
                player.update(player.passes())
        return result
