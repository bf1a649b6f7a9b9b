"""Engine of one rank of a job that does not exist. The real code builds and runs its stage on tensors without memory.

`SimulatedPolicy` is the trainable engine without DeepSpeed. Its parameters are whole all the time, and nothing is
gathered or reduced, because `planning/zero3.py` does that by arithmetic. Everything else, megatron's schedule included,
is what a real rank runs.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Callable, Optional, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_ral.compat.deepspeed_early_reduction import EarlyReduction
from megatron_ral.engine.decoding_batch import DecodingBatch
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.engine.settings import EngineSettings, TrainingSettings
from megatron_ral.models.kv_cache import GroupKVCache
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.planning.fakes import Watched
from megatron_ral.planning.zero3 import SimulatedParameter


class _NamedCache(GroupKVCache):
    """KV cache whose tensors count as such from their creation."""

    def __init__(self, prompt_lengths: Tensor, group_size: int, watched: Watched):
        super().__init__(prompt_lengths, group_size)
        self.watched = watched

    def store_prompt(self, layer: int, key_BPkD: Tensor, value_BPkD: Tensor) -> None:
        with self.watched.kind("KV cache"):
            super().store_prompt(layer, key_BPkD, value_BPkD)

    def append(self, layer: int, step: Tensor, key_NkD: Tensor, value_NkD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self.watched.kind("KV cache") if layer not in self.response else nullcontext():
            return super().append(layer, step, key_NkD, value_NkD)

    def row_states(self, layer: int) -> tuple[Tensor, Tensor]:
        with self.watched.kind("KV cache") if layer not in self.continued else nullcontext():
            return super().row_states(layer)

    def _grown(self, held: Tensor) -> Tensor:
        with self.watched.kind("KV cache"):
            return super()._grown(held)


class SimulatedBatch(DecodingBatch):
    """Batch of responses of full length that can be set to any step of its generation."""

    @property
    def is_on_host(self) -> bool:
        """False, because a rehearsed launch runs on GPUs, whatever the tensors that stand for theirs are."""
        return False

    def count_cache(self, watched: Watched) -> None:
        """Count the cache as a KV cache. Called before the first pass."""
        assert self._cache is not None  # no response has finished before the first pass
        self._cache = _NamedCache(self._cache.prompt_lengths, self.settings.group_size, watched)

    def go_to_last_growth(self) -> None:
        """Go to the last step at which the cache grows, because memory is largest then."""
        cache, growths = cast(_NamedCache, self._cache), []
        for fed in range(max(self.settings.max_response_length - 1, 1)):
            before = cache.capacity
            if cache.reserve(fed):
                growths.append((fed, before))
        fed, cache.capacity = growths[-1]
        self._first_pass = False
        self.step, self._fed = fed + 1, torch.ones(len(self.rows), dtype=torch.int64, device=self.device)
        if cache.capacity:
            with cache.watched.kind("KV cache"):
                for layer, parts in cache.prompt.items():
                    key, value = (
                        part.new_empty(len(self.rows), part.shape[1], cache.capacity, part.shape[3]) for part in parts
                    )
                    cache.response[layer] = key, value

    def end(self) -> None:
        """Free what the batch holds, as its last step does."""
        self._forget_recorded()
        self._cache = self._fed = self._uniforms = None

    def go_to_the_next_step(self) -> None:
        """Go to a step at which nothing grows, as most are."""
        self.step += 1


class _SimulatedReduction:
    """Part of DeepSpeed's optimizer that `EarlyReduction` calls. A gradient that moves to the bucket is freed."""

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Accept the call without effect."""

    def reduce_independent_p_g_buckets_and_remove_grads(self, parameter: Parameter) -> None:
        """Free the gradient of a parameter."""
        parameter.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """Accept the call without effect, because the bucket is counted by arithmetic."""


class SimulatedPolicy(PolicyEngine):
    """Trainable engine of a simulated rank.

    Args:
        shape: model.
        process_groups: process groups of the simulated rank.
        settings: settings of the stage.
        training: settings of its training.
        watched: mode that counts its tensors.
    """

    def __init__(
        self,
        shape: ModelShape,
        process_groups: ProcessGroups,
        settings: EngineSettings,
        training: TrainingSettings,
        watched: Watched,
    ):
        self.shape, self.process_groups, self.layout = shape, process_groups, process_groups.layout
        self.watched = watched
        self.settings, self.training = replace(settings, overlap=False), training
        self._resident, self._ready = True, False
        self.deepspeed = SimpleNamespace(coalesce_grad_reduction=nullcontext)
        with process_groups.active():
            self.stage = MultimodalStage(
                shape,
                process_groups.layout,
                settings.torch_dtype,
                process_groups.device,
                settings.sequence_parallel,
                training.recompute or settings.gather == "layer",
            )
        for name, parameter in self.stage.named_parameters():
            parameter.requires_grad_(shape.is_trained(name, training.train_vision))
            if parameter.requires_grad:
                parameter.grad_dtype = torch.float32
                parameter.register_post_accumulate_grad_hook(lambda p: watched.call_it("gradients", p.grad))
        self._early = EarlyReduction(
            _SimulatedReduction(), self.stage.language.decoder.layers if settings.overlap else ()
        )
        self._trainable = {
            name: parameter for name, parameter in self.stage.named_parameters() if parameter.requires_grad
        }
        watched.call_it("parameters", *self.stage.parameters(), *self.stage.buffers())

    def parameters(self) -> list[SimulatedParameter]:
        """Return the parameters of the stage as ZeRO-3 sees them."""
        tied = self.shape.tie_word_embeddings and self.process_groups.embedding is not None
        layers = {
            id(parameter): layer.layer_number - 1 for layer in self.stage.layers for parameter in layer.parameters()
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


def kind_of(shape: ModelShape, layout: RankLayout) -> Callable[[Tensor], Optional[str]]:
    """Return a function that names the kind of a new tensor by its shape, or None where the shape tells nothing."""
    columns = shape.padded_vocab_size(layout.tensor_size) // layout.tensor_size
    patch = shape.patches.width

    def kind(tensor: Tensor) -> Optional[str]:
        if tensor.dim() == 2 and tensor.shape[-1] == patch and tensor.dtype == torch.float32:
            return "host"
        if tensor.dim() >= 2 and tensor.shape[-1] == columns and tensor.is_floating_point():
            return "logits"
        node = torch._C._current_autograd_node()
        return "attention rows" if node is not None and "RowDivergence" in node.name() else None

    return kind
