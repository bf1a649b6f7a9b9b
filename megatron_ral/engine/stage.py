"""What policy and frozen models share: a ZeRO-3-sharded stage that can be made resident and run forward.

Between uses each data-parallel rank holds 1/DP of its stage. `resident()` gathers the whole stage with one coalesced
all-gather and releases it after; inside, a pass sends nothing over the data-parallel group however many micro-batches it
has (DeepSpeed's per-module hooks are removed). `ready()` is what a pass needs: the same, or with
`gather="layer"` everything but the layers, which then are gathered one by one.
"""

import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping, Optional, Sequence

import deepspeed
import torch
from torch import Tensor

from megatron_ral.compat.deepspeed_module_hooks import remove_module_hooks
from megatron_ral.compat.deepspeed_topology import MegatronTopology
from megatron_ral.engine.gather import ArrivingWeights, Gather, LayerWeights, release_parameters
from megatron_ral.attention.layer_rows import AttentionRows, Heads
from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.objectives.base import TokenOutputs
from megatron_ral.engine.schedule import run_schedule
from megatron_ral.attention.rows import chosen_path
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.shape import ModelShape
from megatron_ral.errors import CheckpointError
from megatron_ral.weights.stage_weights import load_stage
from megatron_ral.parallel.collectives import raise_together
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.parallel.vocab import vocab_parallel_logprobs
from megatron_ral.runtime.progress import tick
from megatron_ral.types import GroupBatch, PromptBatch, to_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def zero3_config(
    stage: MultimodalStage,
    *,
    clip_grad_norm: float = 0.0,
    cpu_offload: bool = False,
    offload_optimizer: bool = False,
    overlap: bool = False,
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived: nothing in it is set by a user directly.

    `gradient_accumulation_steps` is 1 because losses are sums over a global denominator already, and the persistence
    threshold 0 because `StageEngine.resident` decides what stays.
    """
    numel = sum(parameter.numel() for parameter in stage.parameters())
    largest = max(parameter.numel() for parameter in stage.parameters())
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_grad_norm,
        "bf16": {"enabled": stage.dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": overlap,
            "contiguous_gradients": True,
            # several, that something can be reduced while the rest is computed
            "reduce_bucket_size": max(largest, min(numel // 4 if overlap else numel, 200_000_000)),
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            **({"offload_param": host} if cpu_offload else {}),
            **({"offload_optimizer": host} if offload_optimizer else {}),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as exact on the host as elsewhere
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def group_layout(groups: GroupBatch) -> GroupLayout:
    return GroupLayout(
        groups.prompts.prompt_lengths,
        groups.response_lengths,
        groups.prompts.input_ids.shape[1],
        groups.response_ids.shape[2],
    )


class StageEngine:
    """One rank's stage of one model.

    Args:
        shape: model.
        groups: process groups.
        dtype: "float32" or "bfloat16".
        path: Hugging Face folder with the weights.
        optimizer: function from the trainable parameters to a torch optimizer; None: frozen.
        train_vision: whether the vision tower is trainable.
        clip_grad_norm: 0: no clipping.
        sequence_parallel: cut the sequence over tensor ranks outside attention.
        cpu_offload: keep the shards of parameters in the host's memory between uses.
        offload_optimizer: keep master weights, gradients and moments there.
        recompute: compute activations of layers that are not recorded again in the backward pass.
        gather: "stage" or "layer", what a pass has whole at a time; "layer" recomputes.
        overlap: gather and reduce while passes compute.
    """

    def __init__(
        self,
        shape: ModelShape,
        process_groups: ProcessGroups,
        dtype: str,
        path: str,
        *,
        optimizer=None,
        train_vision: bool = False,
        clip_grad_norm: float = 0.0,
        sequence_parallel: bool = False,
        cpu_offload: bool = False,
        offload_optimizer: bool = False,
        recompute: bool = False,
        gather: str = "stage",
        overlap: bool = False,
    ):
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.shape, self.process_groups, self.layout = shape, process_groups, process_groups.layout
        self._resident, self._ready, self._gather, self._overlap = False, False, gather, overlap
        with process_groups.active():
            self.stage = MultimodalStage(
                shape,
                process_groups.layout,
                DTYPES[dtype],
                process_groups.device,
                sequence_parallel,
                recompute or gather == "layer",
            )
            problem = None
            try:
                load_stage(self.stage, path)
            except CheckpointError as error:
                problem = error
            raise_together(problem)
            for name, parameter in self.stage.named_parameters():
                parameter.requires_grad_(optimizer is not None and (train_vision or not name.startswith("visual.")))
            trainable = [parameter for parameter in self.stage.parameters() if parameter.requires_grad]
            self.stage.train(optimizer is not None)
            self.deepspeed, *_ = deepspeed.initialize(
                model=self.stage,
                optimizer=optimizer(trainable) if optimizer else None,
                config=zero3_config(
                    self.stage,
                    clip_grad_norm=clip_grad_norm,
                    cpu_offload=cpu_offload,
                    offload_optimizer=offload_optimizer,
                    overlap=overlap,
                ),
                mpu=MegatronTopology(process_groups),
                dist_init_required=False,
            )
        remove_module_hooks(self.stage)
        self._parameters = list(self.stage.parameters())

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Hold the whole stage while inside: one all-gather in, nothing out. megatron-core works in this engine's layout
        meanwhile. May be nested."""
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
        """What a training pass sends over the data-parallel group, in words."""
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

    def _passing(self, recorded: Collection[int]) -> list[torch.nn.Module]:
        """Layers that a pass gathers one by one."""
        layers = self.stage.language.decoder.layers if self._gather == "layer" else ()
        return [layer for layer in layers if layer.layer_number - 1 not in recorded]

    @contextmanager
    def ready(self, recorded: Collection[int] = ()) -> Iterator[None]:
        """What a pass over micro-batches needs: `resident`, or with gather = "layer" all but the layers that are not in
        `recorded` (a recorded layer is not recomputed, so that its weights stay). With overlap layers arrive while the pass
        is on its way to them. May be nested: several passes around which it stands gather once."""
        if self._ready:
            yield
            return
        if self._resident or (self._gather == "stage" and not self._overlap):
            with self.resident():
                yield
            return
        layers = self.stage.language.decoder.layers if self._gather == "stage" else self._passing(recorded)
        theirs = {id(parameter) for layer in layers for parameter in layer.parameters()}
        rest = Gather([parameter for parameter in self._parameters if id(parameter) not in theirs])
        self._ready = True
        for layer in layers:
            layer.weights = (ArrivingWeights if self._gather == "stage" else LayerWeights)(layer)
        if self._gather == "layer" and self._overlap:
            for layer, following in zip(layers, layers[1:]):
                layer.weights.next_forward, following.weights.next_backward = following.weights, layer.weights
        try:
            rest.wait()
            with self.process_groups.active():
                yield
        finally:
            self._ready = False
            for layer in layers:
                layer.weights.settle()
                layer.weights = None
            release_parameters(self._parameters)

    def local_layers(self, layers: Sequence[int]) -> list[int]:
        """Those of `layers` that live on this stage."""
        mine = self.layout.stage_layers(self.shape.num_layers)
        return [layer for layer in layers if layer in mine]

    @torch.no_grad()
    def encode_visual(self, prompts: PromptBatch) -> Optional[tuple[Tensor, ...]]:
        """Visual features of each prompt from the frozen tower; None on all but the first stage."""
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
        row_kind: str = "token",
        hidden_states: bool = False,
        keep: Callable[[AttentionRows, GroupBatch], Any] = lambda rows, batch: rows.policy(),
    ) -> list[ForwardOutput]:
        """Pass without gradient through megatron's schedule.

        Args:
            batches: micro-batches.
            layers: 0-based layers whose attention rows are wanted.
            temperature: logits are divided by it before the log-probabilities.
            row_kind: which rows, one of `ROW_KINDS`.
            hidden_states: return what the LM head would read in place of log-probabilities; no logits are formed.
            keep: what is kept of each layer's rows (a map of [B, G, R, S] floats); the attention policy by default.

        Returns:
            One ForwardOutput per micro-batch: tokens or hidden states on the last stage, rows on each layer's owner.
        """
        recorded = frozenset(self.local_layers(layers))
        attention: list[Mapping[int, Any]] = []
        last_stage: list[Any] = []

        def forward_step(iterator, stage):
            batch = to_device(next(iterator), self.process_groups.device)
            pass_ = AttentionPass(group_layout(batch), recorded, hidden_states=hidden_states)
            output = stage(batch, pass_)
            attention.append(
                {
                    layer: keep(self.attention_rows(pass_.records.pop(layer), pass_, row_kind), batch)
                    for layer in sorted(recorded)
                }
            )

            def collect(output, non_loss_data=True):
                last_stage.append(
                    output if hidden_states else replace(self.token_outputs(output, batch, temperature), logits=None)
                )
                return None

            return output, collect

        with self.ready(recorded):
            self.run_schedule(forward_step, batches, forward_only=True)
        name = "hidden" if hidden_states else "tokens"
        return [
            ForwardOutput(attention=rows, **({name: last_stage[index]} if last_stage else {}))
            for index, rows in enumerate(attention)
        ]

    def run_schedule(self, forward_step, batches: Sequence[Any], *, forward_only: bool) -> None:
        """megatron-core's pipeline schedule over micro-batches."""

        def taken() -> Iterator[Any]:
            for batch in batches:
                tick(getattr(batch, "groups", batch).prompts.identities)
                yield batch

        layouts = [group_layout(getattr(batch, "groups", batch)) for batch in batches]
        run_schedule(
            forward_step,
            taken(),
            self.stage,
            [self.stage.boundary_shape(layout.sequence_length, layout.B) for layout in layouts],
            forward_only=forward_only,
        )

    def token_outputs(self, logits: Tensor, batch: GroupBatch, temperature: float) -> TokenOutputs:
        """Log-probabilities of the responses under softmax(logits / temperature), the distribution sampled from."""
        scaled = logits if temperature == 1.0 else logits.float() / temperature
        return TokenOutputs(*vocab_parallel_logprobs(scaled, batch.response_ids, self.process_groups.tensor), logits)

    @property
    def row_path(self) -> str:
        """What forms attention rows here, in words."""
        return chosen_path(self.process_groups.device, self.stage.dtype, self.shape.kv_channels)[1]

    def attention_rows(self, record: AttentionRecord, pass_: AttentionPass, kind: str) -> AttentionRows:
        """Rows of a kind of `ROW_KINDS` of one layer."""
        heads = Heads(self.shape.kv_channels**-0.5, self.shape.num_attention_heads, self.process_groups.tensor)
        return AttentionRows.form(record, pass_.layout, kind, heads)

    def shard_bytes(self) -> dict[str, int]:
        """Bytes this rank holds between steps, on the device and in the host's memory: parameter shards, and of what is
        trained float32 gradient shards, master weights and AdamW's moments."""
        parameters = list(self.stage.parameters())
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
