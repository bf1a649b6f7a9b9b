"""Diagnosis of a skipped optimizer step: which input, term, micro-batch, sample and parameter is not finite.

The step's forward and backward passes run again on the same batches and weights while losses and gradients are watched.
Then each term runs alone, and each micro-batch alone.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Sequence

from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.types import QueryPosition
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.objectives.base import Objective, TokenOutputs
from megatron_ral.parallel.collectives import gather_from_all
from megatron_ral.types import TrainBatch

SHOWN = 5
"""Number of samples and parameters that one line names."""


def faulty_rows(tensor: Tensor) -> list[int]:
    """Return the indices along the first dimension with a value that is not finite."""
    return (~tensor.detach().isfinite()).flatten(1).any(dim=1).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Finding:
    """Value that is not finite, in one micro-batch on one data-parallel rank."""

    data_rank: int
    micro_batch: int
    what: str
    samples: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"data rank {self.data_rank}, micro-batch {self.micro_batch}: {self.what}, "
            f"sample{'s' if len(self.samples) > 1 else ''} {_some(self.samples)}"
        )


@dataclass
class WatchedObjective:
    """Objective that checks its inputs, its losses, and the gradients that it sends back."""

    inner: Objective
    batches: Sequence[TrainBatch]
    data_rank: int
    found: list[Finding] = field(default_factory=list)

    @property
    def recorded_layers(self) -> frozenset[int]:
        return self.inner.recorded_layers

    @property
    def position(self) -> QueryPosition:
        return self.inner.position

    @property
    def temperature(self) -> float:
        return self.inner.temperature

    def token_loss(self, outputs: TokenOutputs, batch: TrainBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        self._look("log-probabilities", outputs.logprobs, batch)
        self._look_later("gradient of the log-probabilities", outputs.logprobs, batch)
        loss, metrics = self.inner.token_loss(outputs, batch)
        self._look_at_losses(metrics, batch)
        return loss, metrics

    def attention_loss(
        self, layer: int, rows: AttentionRows, batch: TrainBatch
    ) -> tuple[Optional[Tensor], Mapping[str, Tensor]]:
        self._look(f"attention of layer {layer}", rows.attention, batch)
        self._look_later(f"gradient of the queries of layer {layer}", rows.record.query_BGRnD, batch)
        loss, metrics = self.inner.attention_loss(layer, rows, batch)
        self._look_at_losses(metrics, batch)
        return loss, metrics

    def _look_at_losses(self, metrics: Mapping[str, Tensor], batch: TrainBatch) -> None:
        for name, value in metrics.items():
            if not math.isfinite(float(value)):
                self._add(f"{name} = {float(value)}", batch, range(len(batch.groups)))

    def _look(self, what: str, tensor: Tensor, batch: TrainBatch) -> None:
        rows = faulty_rows(tensor)
        if rows:
            self._add(what, batch, rows)

    def _look_later(self, what: str, tensor: Tensor, batch: TrainBatch) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self._look(what, grad, batch))

    def _add(self, what: str, batch: TrainBatch, rows: Sequence[int]) -> None:
        names = batch.groups.prompts.identities
        index = next(index for index, own in enumerate(self.batches) if own.groups.prompts.identities == names)
        self.found.append(Finding(self.data_rank, index, what, tuple(names[row] for row in rows)))


@dataclass(frozen=True)
class Pass:
    """Result of a forward and backward pass over some of the micro-batches."""

    name: str
    losses: Mapping[str, float]
    grad_norm: float
    parameters: Sequence[str]
    """Parameters of all stages whose gradient is not finite."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.grad_norm) and all(map(math.isfinite, self.losses.values()))

    def __str__(self) -> str:
        losses = ", ".join(f"{name} = {value:.6g}" for name, value in self.losses.items())
        faulty = (
            f"; not finite in {len(self.parameters)} parameters: {_some(self.parameters)}" if self.parameters else ""
        )
        return f"{self.name}: {losses or 'no loss'}; norm of the gradient {self.grad_norm:.6g}{faulty}"


def run_again(
    policy: PolicyEngine, batches: Sequence[TrainBatch], tensors: Mapping[str, Tensor], objective: Objective
) -> tuple[bool, list[str], list[Pass]]:
    """Run a skipped step again. Every rank calls it.

    Args:
        policy: Policy with the weights of the skipped step.
        batches: Micro-batches of this rank.
        tensors: All saved tensors of them, by their place.
        objective: Loss of the step.

    Returns:
        (whether the loss or gradient is not finite again, findings as text, the passes made).
    """
    data_rank = policy.layout.data_rank
    findings = _unique(gather_from_all(_faulty_inputs(batches, tensors, data_rank)))
    lines = [f"in the batch: {finding}" for finding in findings]
    weights = _unique(
        gather_from_all([name for name, shard in policy.master_shards().items() if not bool(shard.isfinite().all())])
    )
    if weights:
        lines.append(f"weights that are not finite, {len(weights)}: {_some(weights)}")
    watched = WatchedObjective(objective, batches, data_rank)
    passes = [_one_pass("whole step", policy, batches, watched)]
    lines += [f"in the passes: {finding}" for finding in _unique(gather_from_all(watched.found))]
    passes += [
        _one_pass(f"term {term.name} alone", policy, batches, objective.only(term.name))
        for term in objective.terms
        if term.is_active and len(objective.terms) > 1
    ]
    if not passes[0].is_finite and len(batches) > 1:
        passes += [
            _one_pass(f"micro-batch {index} of every data rank alone", policy, [batch], objective)
            for index, batch in enumerate(batches)
        ]
    return not passes[0].is_finite, lines, passes


def _one_pass(name: str, policy: PolicyEngine, batches: Sequence[TrainBatch], objective: Any) -> Pass:
    sums = policy.forward_backward(batches, objective)
    return Pass(
        name,
        {key: value for key, value in sums.items() if key.startswith("loss")},
        policy.gradient_norm(policy.gradient_shards()),
        _unique(gather_from_all(policy.faulty_gradients())),
    )


def _faulty_inputs(batches: Sequence[TrainBatch], tensors: Mapping[str, Tensor], data_rank: int) -> list[Finding]:
    """Return the batch's tensors that are not finite, with their samples where the first dimension is the groups'."""
    found = []
    for place, tensor in tensors.items():
        index, _, what = place.partition(".")
        if not index.isdigit() or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            continue
        names = batches[int(index)].groups.prompts.identities
        parts = what.split(".")
        if len(tensor) == len(names) and "prompts" not in parts[-3:] and "visual_embeds" not in parts:
            names = tuple(names[row] for row in faulty_rows(tensor))
        elif len(parts) > 1 and (parts[-1].isdigit() or parts[-2].isdigit()):  # of one prompt
            names = (names[int(parts[-1] if parts[-1].isdigit() else parts[-2])],)
        found.append(Finding(data_rank, int(index), what, names))
    return found


def _unique(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """Return every item of the lists once, in order."""
    return list(dict.fromkeys(item for items in lists for item in items))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
