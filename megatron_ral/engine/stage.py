"""Engine of one pipeline stage, trained or frozen: a ZeRO-3-sharded stage that is gathered for use and runs passes.

Between uses each data-parallel rank holds 1/DP of its stage. `resident()` gathers the whole stage with one coalesced
all-gather and releases it afterwards. Passes inside send nothing over the data-parallel group, however many
micro-batches they have (DeepSpeed's per-module hooks are removed). `ready()` does the same for a training pass, or with
gather = "layer" gathers all but the layers, which the pass then gathers one by one.
"""

import itertools
import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping, Optional, Sequence, cast

import deepspeed
import torch
from torch import Tensor

from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.attention.layer_rows import AttentionRows, HeadSettings
from megatron_ral.attention.rows import choose_backend
from megatron_ral.attention.types import QueryPosition
from megatron_ral.compat.deepspeed_module_hooks import remove_module_hooks
from megatron_ral.compat.deepspeed_topology import MegatronTopology
from megatron_ral.engine.gather import ArrivingWeights, Gather, LayerWeights, release_parameters
from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.engine.schedule import run_schedule
from megatron_ral.engine.settings import EngineSettings, TrainingSettings
from megatron_ral.engine.zero3_config import zero3_config
from megatron_ral.errors import CheckpointError, ConfigError
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.language import StageLayer
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.shape import ModelShape
from megatron_ral.objectives.base import TokenOutputs
from megatron_ral.parallel.collectives import raise_together
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.parallel.vocab import vocab_parallel_logprobs
from megatron_ral.runtime.progress import tick
from megatron_ral.types import GroupBatch, PromptBatch, to_device
from megatron_ral.weights.adapter_weights import load_adapters
from megatron_ral.weights.stage_weights import load_stage


class StageEngine:
    """One rank's stage of one model.

    Args:
        shape: Shape of the model.
        process_groups: This rank's process groups.
        settings: Where the weights come from and how they are held.
        training: How they are trained. None: the model is frozen.

    Raises:
        AgreedError: Some rank cannot load its weights.
    """

    def __init__(
        self,
        shape: ModelShape,
        process_groups: ProcessGroups,
        settings: EngineSettings,
        training: Optional[TrainingSettings] = None,
    ):
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.shape, self.process_groups, self.layout = shape, process_groups, process_groups.layout
        self.settings = settings
        self._resident, self._ready = False, False
        recompute = settings.gather == "layer" or (training is not None and training.recompute)
        with process_groups.active():
            self.stage = MultimodalStage(
                shape,
                process_groups.layout,
                settings.torch_dtype,
                process_groups.device,
                settings.sequence_parallel,
                recompute,
            )
            problem = None
            try:
                load_stage(self.stage, settings.path, settings.require_finite)
                load_adapters(self.stage, settings.adapter_path, settings.adapter_seed, settings.require_finite)
            except (CheckpointError, ConfigError) as error:
                problem = error
            raise_together(problem)
            for name, parameter in self.stage.named_parameters():
                parameter.requires_grad_(training is not None and shape.is_trained(name, training.train_vision))
            trainable = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
            self.stage.train(training is not None)
            self.deepspeed: Any
            self.deepspeed, *_ = deepspeed.initialize(
                model=self.stage,
                optimizer=training.make_optimizer(process_groups.device)(trainable) if training else None,
                config=zero3_config(
                    self.stage,
                    clip_grad_norm=training.optimizer.clip_grad_norm if training else 0.0,
                    offload_parameters=settings.offload_parameters,
                    offload_optimizer=training.offload_optimizer if training else False,
                    overlap=settings.overlap,
                ),
                mpu=MegatronTopology(process_groups),
                dist_init_required=False,
            )
        remove_module_hooks(self.stage)
        self._parameters: list[Any] = list(self.stage.parameters())

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Hold the whole stage inside the context, by one all-gather at its start. May be nested.

        megatron-core works in this engine's layout meanwhile.
        """
        if self._resident:
            with self.process_groups.active():
                yield
            return
        assert not self._ready, "a pass is under way"
        Gather(self._parameters).wait()
        self._resident = True
        try:
            with self.process_groups.active():
                yield
        finally:
            self._resident = False
            release_parameters(self._parameters)

    def traffic(self, recorded: Collection[int]) -> str:
        """Return a description of the bytes that a training pass sends over the data-parallel group."""
        size = self.layout.data_size

        def sent(parameters: Iterable[Any], itemsize: int = 0) -> int:
            return sum(p.ds_tensor.numel() * size * (itemsize or p.element_size()) for p in parameters)

        passing = [parameter for layer in self._passing(recorded) for parameter in layer.parameters()]
        whole, layers = sent(self.stage.parameters()), sent(passing)
        gathered = f"gathers {whole - layers:,} bytes once"
        if layers:
            gathered += f" and {layers:,} bytes of {len(self._passing(recorded))} layers twice per micro-batch"
        trained = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
        return f"{gathered}, reduces {sent(trained, 4):,} bytes of gradients once"

    def _passing(self, recorded: Collection[int]) -> list[StageLayer]:
        """Return the layers that a pass gathers one by one."""
        layers = self.stage.layers if self.settings.gather == "layer" else ()
        return [layer for layer in layers if layer.layer_number - 1 not in recorded]

    @contextmanager
    def ready(self, recorded: Collection[int] = ()) -> Iterator[None]:
        """Hold the parameters that a pass over micro-batches needs. May be nested: all passes inside gather once.

        With gather = "stage" this is the whole stage. With gather = "layer" the layers are left out, but for those in
        `recorded`, whose weights stay because a recorded layer is not recomputed. With overlap a layer's gather may
        still be under way when the pass begins.

        Args:
            recorded: 0-based layers whose attention is recorded.
        """
        if self._ready:
            yield
            return
        if self._resident or (self.settings.gather == "stage" and not self.settings.overlap):
            with self.resident():
                yield
            return
        layers = self.stage.layers if self.settings.gather == "stage" else self._passing(recorded)
        theirs = {id(parameter) for layer in layers for parameter in layer.parameters()}
        rest = Gather([parameter for parameter in self._parameters if id(parameter) not in theirs])
        self._ready = True
        if self.settings.gather == "stage":
            gathered = [ArrivingWeights(layer) for layer in layers]
        else:
            gathered = [LayerWeights(layer) for layer in layers]
            if self.settings.overlap:
                for weights, following in itertools.pairwise(gathered):
                    weights.next_forward, following.next_backward = following, weights
        for layer, weights in zip(layers, gathered):
            layer.weights = weights
        try:
            rest.wait()
            with self.process_groups.active():
                yield
        finally:
            self._ready = False
            for layer, weights in zip(layers, gathered):
                weights.settle()
                layer.weights = None
            release_parameters(self._parameters)

    def local_layers(self, layers: Sequence[int]) -> list[int]:
        """Return which of `layers` live on this stage."""
        mine = self.layout.stage_layers(self.shape.num_layers)
        return [layer for layer in layers if layer in mine]

    @torch.no_grad()
    def encode_visual(self, prompts: PromptBatch) -> Optional[tuple[Tensor, ...]]:
        """Return the visual features of each prompt from the frozen tower. None on all but the first stage."""
        if not self.layout.is_first_stage:
            return None
        with self.resident():
            return self.stage.encode_visual(prompts)

    @torch.no_grad()
    def forward(
        self,
        batches: Sequence[GroupBatch],
        layers: Sequence[int] = (),
        *,
        temperature: float = 1.0,
        position: QueryPosition = QueryPosition.RESPONSE,
        hidden_states: bool = False,
        store: Callable[[AttentionRows, GroupBatch], Any] = lambda rows, batch: rows.distribution(),
    ) -> list[ForwardOutput]:
        """Run a pass without gradient through megatron's schedule.

        Args:
            batches: Micro-batches.
            layers: 0-based layers whose attention rows are wanted.
            temperature: Divisor of the logits before log-probabilities are formed.
            position: Query position of the rows.
            hidden_states: Return the inputs of the LM head in place of log-probabilities. No logits are formed then.
            store: Function from a layer's rows to the value that is returned of them, by default their attention
                distributions [B, G, R, S].

        Returns:
            One ForwardOutput per micro-batch: tokens or hidden states on the last stage, rows on each layer's owner.
        """
        recorded = frozenset(self.local_layers(layers))
        attention: list[Mapping[int, Any]] = []
        last_stage: list[Any] = []

        def forward_step(iterator, stage):
            batch, layout = self.arrive(next(iterator))
            pass_ = AttentionPass(layout, recorded, hidden_states=hidden_states)
            output = stage(batch, pass_)
            attention.append(
                {
                    layer: store(self.attention_rows(pass_.records.pop(layer), pass_, position), batch)
                    for layer in sorted(recorded)
                }
            )

            def collect(output, non_loss_data=True):
                last_stage.append(
                    output
                    if hidden_states
                    else replace(self.token_outputs(output, batch, layout, temperature), logits=None)
                )
                return

            return output, collect

        with self.ready(recorded):
            self.run_schedule(forward_step, batches, forward_only=True)
        name = "hidden" if hidden_states else "tokens"
        return [
            ForwardOutput(attention=rows, **({name: last_stage[index]} if last_stage else {}))
            for index, rows in enumerate(attention)
        ]

    def run_schedule(self, forward_step, batches: Sequence[Any], *, forward_only: bool) -> None:
        """Run megatron-core's pipeline schedule over micro-batches."""

        def taken() -> Iterator[Any]:
            for batch in batches:
                tick(getattr(batch, "groups", batch).prompts.identities)
                yield batch

        run_schedule(
            forward_step,
            taken(),
            self.stage,
            [self.stage.boundary_shape(getattr(batch, "groups", batch).num_tokens, 1) for batch in batches],
            forward_only=forward_only,
        )

    def arrive(self, batch: Any) -> tuple[Any, GroupLayout]:
        """Return a micro-batch and its layout on this rank's device."""
        device = self.process_groups.device
        return to_device(batch, device), to_device(GroupLayout.of(getattr(batch, "groups", batch)), device)

    def token_outputs(self, logits: Tensor, batch: GroupBatch, layout: GroupLayout, temperature: float) -> TokenOutputs:
        """Return log-probabilities of the responses under softmax(logits / temperature), which is sampled from.

        Args:
            logits: [N, v] this rank's columns of the logits of all response tokens.
            batch: Micro-batch.
            layout: Its layout.
            temperature: Divisor of the logits.
        """
        assert layout.packed is not None
        responses = layout.packed.responses
        scaled = logits if temperature == 1.0 else logits.float() / temperature
        targets = responses.pack(batch.response_ids)
        logprobs, entropy = vocab_parallel_logprobs(scaled, targets, self.process_groups.tensor)
        return TokenOutputs(responses.pad(logprobs), responses.pad(entropy), logits, responses)

    @property
    def row_path(self) -> str:
        """Description of the backend that forms attention rows."""
        return choose_backend(self.process_groups.device, self.stage.dtype, self.shape.kv_channels)[1]

    def attention_rows(self, record: AttentionRecord, pass_: AttentionPass, position: QueryPosition) -> AttentionRows:
        """Return the rows of one layer at a query position."""
        heads = HeadSettings(self.shape.kv_channels**-0.5, self.shape.num_attention_heads, self.process_groups.tensor)
        return AttentionRows(record, pass_.layout, position, heads)

    def shard_bytes(self) -> dict[str, int]:
        """Return the bytes that this rank holds between steps, on the device and in host memory.

        These are parameter shards and, for trained parameters, float32 gradient shards, master weights and AdamW's
        moments.
        """
        parameters = cast(list[Any], list(self.stage.parameters()))
        held = {"parameters": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters)}
        zero = self.deepspeed.optimizer
        flat = getattr(zero, "fp32_partitioned_groups_flat", None)
        if flat is not None:
            held["gradients"] = (
                zero.grad_partitions_flat_buffer.numel() * zero.grad_partitions_flat_buffer.element_size()
            )
            held["master weights"] = sum(tensor.numel() * tensor.element_size() for tensor in flat)
            held["optimizer state"] = sum(
                value.numel() * value.element_size()
                for state in zero.optimizer.state.values()
                for value in state.values()
                if torch.is_tensor(value)
            )
        held["whole stage"] = sum(p.ds_numel * p.ds_tensor.element_size() for p in parameters)
        return held
