"""Objective of an optimizer step: a list of terms, called back by the engine on the stages that own their inputs.

Every loss is a *sum over rows, over denominators of the whole optimizer step*, so that adding up micro-batches, ranks
and stages gives the loss of the step, however it is cut. Metrics likewise are sums, or maxima.
"""

from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional, Sequence, cast

import torch
from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.packing import Packing
from megatron_ral.attention.types import QueryPosition
from megatron_ral.parallel.collectives import MAXIMUM

Metrics = Mapping[str, Tensor]
"""Sums by tag. `name:sum` and `name:count` are divided by `finish_metrics`; other values are means already. Of
`name:max`, which is never negative, the largest is taken in place of the sum."""


@dataclass(frozen=True)
class TokenOutputs:
    """Outputs of the last stage at the rows that predict the response tokens."""

    logprobs: Tensor
    """Log-probabilities of the response tokens, [B, G, R] float32, 0 at padding. They carry gradient in training."""
    entropy: Tensor
    """Entropy of the token distributions in nats, [B, G, R] float32, 0 at padding. It carries gradient in training."""
    logits: Optional[Tensor] = None
    """This rank's columns of the model's logits for the N response tokens without padding, [N, v], in training alone.
    They carry gradient."""
    packing: Optional[Packing] = None
    """Places of the N response tokens in [B, G, R]. None: no logits."""


class Term:
    """One summand of an objective, at its coefficient. A subclass overrides the losses that it has.

    Both losses are None where the term gives no gradient; its metrics are logged all the same.
    """

    name: str
    """Name by which `Objective.only` and `Objective.without` choose it."""
    has_token_loss: bool = False
    """True if the term reads the last stage's outputs."""

    @property
    def recorded_layers(self) -> frozenset[int]:
        """0-based layers whose attention rows the term reads."""
        return frozenset()

    @property
    def is_active(self) -> bool:
        """Say whether the term gives a gradient, rather than being only measured."""
        return True

    def token_loss(self, outputs: TokenOutputs, batch: Any) -> tuple[Optional[Tensor], Metrics]:
        """Return (loss, metrics) on the last stage."""
        return None, {}

    def attention_loss(self, layer: int, rows: AttentionRows, batch: Any) -> tuple[Optional[Tensor], Metrics]:
        """Return (loss, metrics) of one layer on the stage that owns it. Called for `recorded_layers` alone."""
        return None, {}


@dataclass(frozen=True)
class Objective:
    """Sum of terms."""

    terms: tuple[Term, ...]
    position: QueryPosition = QueryPosition.RESPONSE
    """Query position of the rows that the engine hands to the terms."""
    temperature: float = 1.0
    """Divisor of the logits, because the policy that is trained is the one that was sampled from."""
    total_tag: str = "loss/token"
    """Tag of the sum of all token losses."""

    @property
    def recorded_layers(self) -> frozenset[int]:
        """0-based layers whose attention rows some term reads."""
        return frozenset[int]().union(*(term.recorded_layers for term in self.terms))

    def only(self, *names: str) -> "Objective":
        """Return the objective of the named terms alone."""
        return replace(self, terms=tuple(term for term in self.terms if term.name in names))

    def without(self, *names: str) -> "Objective":
        """Return the objective without the named terms."""
        return replace(self, terms=tuple(term for term in self.terms if term.name not in names))

    def term(self, name: str) -> Any:
        """Return the term of a name. None: there is none."""
        return next((term for term in self.terms if term.name == name), None)

    def with_term(self, term: Term) -> "Objective":
        """Return the objective with a term in place of the one of the same name."""
        return replace(self, terms=tuple(term if old.name == term.name else old for old in self.terms))

    def token_loss(self, outputs: TokenOutputs, batch: Any) -> tuple[Tensor, Metrics]:
        """Return (sum of the token losses, metrics) on the last stage. The loss always has a gradient, maybe of 0."""
        total: Optional[Tensor] = None
        metrics: dict[str, Tensor] = {}
        for term in self.terms:
            if term.has_token_loss:
                loss, measured = term.token_loss(outputs, batch)
                metrics.update(measured)
                loss = torch.zeros_like(outputs.logprobs.detach().sum()) if loss is None else loss
                total = loss if total is None else total + loss
        if total is None:
            return 0.0 * outputs.logprobs.sum(), {}
        metrics[self.total_tag] = total.detach()
        return (total if total.requires_grad else total + 0.0 * outputs.logprobs.sum()), metrics

    def attention_loss(self, layer: int, rows: AttentionRows, batch: Any) -> tuple[Optional[Tensor], Metrics]:
        """Return (sum of the losses of one layer, metrics) on the stage that owns it. Loss None: metrics alone."""
        total: Optional[Tensor] = None
        metrics: dict[str, Tensor] = {}
        for term in self.terms:
            if layer in term.recorded_layers:
                loss, measured = term.attention_loss(layer, rows, batch)
                metrics.update(measured)
                if loss is not None and loss.requires_grad:
                    total = loss if total is None else total + loss
        return total, metrics


def sums_and_counts(names: Sequence[str], sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return metrics from a vector of sums and one of counts, which a GPU makes in two launches for all names."""
    tags = (f"{name}:{part}" for name in names for part in ("sum", "count"))
    return dict(zip(tags, (scalar for pair in zip(sums, counts) for scalar in pair)))


def add_metrics(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add metrics to others, those of one type in one operation. No gradient."""
    maxima = [name for name in more if name in total and name.endswith(MAXIMUM)]
    added = {name: value.detach() for name, value in more.items() if name in total and name not in maxima}
    total.update({name: torch.maximum(total[name], more[name].detach()) for name in maxima})
    total.update({name: value.detach() for name, value in more.items() if name not in total})
    for dtype in {value.dtype for value in added.values()}:
        names = [name for name, value in added.items() if value.dtype == dtype]
        values = cast(Any, torch)._foreach_add([total[name] for name in names], [added[name] for name in names])
        total.update(zip(names, values))


def mean_over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each finished metric over the updates that have it, of those named `.._max` the largest."""
    result: dict[str, float] = {}
    for name in sorted(set[str]().union(*updates)):
        values = [update[name] for update in updates if name in update]
        result[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return result


def finish_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide `name:sum` by `name:count` and drop those without a count. Other metrics are means or maxima already."""
    done = {name.removesuffix(MAXIMUM): value for name, value in sums.items() if not name.endswith((":sum", ":count"))}
    for name, value in sums.items():
        if name.endswith(":sum"):
            stem = name[: -len(":sum")]
            count = sums[f"{stem}:count"]
            if count:
                done[stem] = value / count
    return done
