"""Sampling of tokens where the vocabulary is split over tensor ranks: one gather, one broadcast, one wait of the host.

Every rank contributes its largest logits and sums of exponentials. They are enough where the draw falls on one of these
candidates. The pure half is `functional/sampling.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ral.errors import UserError
from megatron_ral.functional.sampling import likeliest_on_host, sample_candidates, sample_tokens
from megatron_ral.parallel.collectives import gather_shards


class Draw(NamedTuple):
    """Tokens drawn for X rows, equal on all ranks of the tensor-parallel group."""

    token: Tensor
    """[X] int64 ids in the whole vocabulary, on the device of the logits."""
    logprob: Tensor
    """[X] float32 log-probabilities under softmax(logits / temperature) over all tokens, at temperature 1 where the
    draw is greedy."""
    token_on_host: Tensor
    """The same ids in host memory."""


@dataclass(frozen=True)
class PendingDraw:
    """Draw whose tokens the host has not read."""

    token: Tensor
    """[X] int64, -1 where the candidates do not decide."""
    logprob: Tensor
    """[X] float32, without meaning where the token is -1."""
    logits: Tensor
    """[X, v] float32 logits of this rank, -inf for tokens that may not be drawn."""
    uniform: Tensor
    """[X] float64."""
    every: "_Sums"
    """Sums over the logits of all tokens."""
    temperature: float
    top_p: float
    group: dist.ProcessGroup
    on_host: bool

    @torch.no_grad()
    def finish(self) -> Draw:
        """Read the tokens, and draw those that are open from the whole vocabulary.

        Raises:
            UserError: logits are not a number.
        """
        token, logprob, on_host = self.token, self.logprob, self.token.cpu()
        rows = (on_host < 0).nonzero()[:, 0]
        if len(rows):
            token, logprob, rows = token.clone(), logprob.clone(), rows.to(token.device)
            whole = torch.cat(gather_shards(self.logits[rows], self.group), dim=-1)
            if bool(whole.isnan().any()):
                raise UserError(
                    "model.path",
                    None,
                    "gives logits that are not a number, from which no token can be drawn; the weights or what they "
                    "compute overflow: resume from an earlier checkpoint with a lower optimizer.learning_rate",
                )
            token[rows] = sample_tokens(whole, self.uniform[rows], self.temperature, self.top_p, self.on_host)
            _agree_(token, self.group)
            logit = whole.gather(-1, token[rows, None])[:, 0].double()
            largest, total = (part[rows] for part in self.every)
            logprob[rows] = ((logit - largest) / self.temperature - total.log()).float()
            on_host = token.cpu()
        return Draw(token, logprob, on_host)


class _Sums(NamedTuple):
    """Largest logit, and the sum of exp((logit - largest) / temperature), of each row. Float64."""

    largest: Tensor
    total: Tensor

    @classmethod
    def over(cls, logits: Tensor, temperature: float) -> "_Sums":
        largest = logits.amax(dim=-1).double().clamp(min=torch.finfo(torch.float32).min)  # finite where none is allowed
        shifted = logits.double().sub_(largest[:, None])
        return cls(largest, (shifted if temperature == 1.0 else shifted.div_(temperature)).exp_().sum(dim=-1))

    @classmethod
    def joined(cls, largest_TX: Tensor, total_TX: Tensor, temperature: float) -> "_Sums":
        largest = largest_TX.amax(dim=0)
        return cls(largest, (total_TX * ((largest_TX - largest) / temperature).exp()).sum(dim=0))


@torch.no_grad()
def begin_draw(
    logits_Xv: Tensor,
    uniform_X: Tensor,
    temperature: float,
    top_p: float,
    group: dist.ProcessGroup,
    *,
    num_tokens: int = 0,
    forbidden: Sequence[int] = (),
    num_candidates: int = 512,
    on_host: bool = False,
) -> PendingDraw:
    """Begin to sample one token for each row from the whole vocabulary, like `functional.sampling.sample_tokens`.

    The host does not wait here. `PendingDraw.finish` gathers the whole vocabulary for rows that the candidates do not
    decide: those with a flat distribution or a draw from the tail.

    Args:
        logits_Xv: [X, v] this rank's columns of the logits.
        uniform_X: [X] uniform numbers in [0, 1), equal on all ranks.
        temperature: Divisor of the logits; 0 takes the most likely token, the lowest id among equals.
        top_p: Mass of the most likely tokens to sample from.
        group: Tensor-parallel group. Rank i holds columns [i v, (i + 1) v).
        num_tokens: Number of ids, from the first, that may be drawn; 0 allows all.
        forbidden: Ids that are never drawn, at any temperature.
        num_candidates: Number of candidates per rank. It does not change the result.
        on_host: True to choose and order candidates with NumPy, for logits in host memory. It does not change the
            result.
    """
    start, scale = logits_Xv.shape[-1] * dist.get_rank(group), temperature or 1.0
    logits = _allowed_logits(logits_Xv, start, num_tokens, forbidden)
    allowed = _Sums.over(logits, scale)
    every = allowed if logits is logits_Xv else _Sums.over(logits_Xv.float(), scale)
    if temperature == 0:
        ids = logits.max(dim=-1, keepdim=True).indices
    elif num_candidates < logits.shape[-1] and on_host:
        ids = likeliest_on_host(logits, num_candidates)
    elif num_candidates < logits.shape[-1]:
        ids = logits.topk(num_candidates, dim=-1, sorted=False).indices.sort(dim=-1).values  # of equals the lower first
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    candidates, count = logits.gather(-1, ids), ids.shape[-1]
    bound = candidates.amin(dim=-1)  # on the logits that this rank does not contribute
    least = bound.double() if count < logits.shape[-1] else torch.full_like(every.total, float("-inf"))
    numbers = torch.stack([least, *allowed, *every], dim=-1)
    shares = torch.stack(gather_shards(torch.cat([candidates.double(), (ids + start).double(), numbers], -1), group))
    candidates, ids, numbers = shares.split([count, count, 5], dim=-1)
    candidates, ids = (part.transpose(0, 1).flatten(1) for part in (candidates.float(), ids.long()))
    least, *sums = numbers.unbind(-1)
    allowed, every = _Sums.joined(sums[0], sums[1], scale), _Sums.joined(sums[2], sums[3], scale)
    if temperature == 0:
        token = ids.gather(-1, candidates.argmax(dim=-1, keepdim=True))[:, 0]
    else:
        token, settled = sample_candidates(
            candidates,
            ids,
            least.amax(dim=0),
            allowed.largest,
            allowed.total,
            uniform_X.to(allowed.total),
            temperature,
            top_p,
            on_host,
        )
        token = torch.where(settled, token, -1)
    _agree_(token, group)
    logit = candidates.double().masked_fill(ids != token[:, None], float("-inf")).amax(dim=-1)
    logprob = ((logit - every.largest) / scale - every.total.log()).float()
    return PendingDraw(token, logprob, logits, uniform_X.to(every.total), every, temperature, top_p, group, on_host)


def _agree_(token: Tensor, group: dist.ProcessGroup) -> None:
    """Take the first rank's tokens, because ranks may round differently."""
    if group.size() > 1:
        dist.broadcast(token, src=dist.get_process_group_ranks(group)[0], group=group)


def _allowed_logits(logits_Xv: Tensor, start: int, num_tokens: int, forbidden: Sequence[int]) -> Tensor:
    """Return the logits in float32, those of tokens that may not be drawn at -inf. The given tensor stays as it is."""
    logits, width = logits_Xv.float(), logits_Xv.shape[-1]
    if num_tokens and start + width > num_tokens:
        columns = torch.arange(start, start + width, device=logits.device)
        logits = logits.masked_fill(columns >= num_tokens, float("-inf"))
    own = [token - start for token in forbidden if start <= token < start + width]
    if own and logits is logits_Xv:
        logits = logits.clone()
    for column in own:  # one by one, because a list of columns would be copied to the device at every step
        logits[:, column] = float("-inf")
    return logits
