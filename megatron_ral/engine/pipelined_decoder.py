"""Generation of G responses per prompt on the pipeline stages, with a KV cache. A prompt is computed once per group.

As many batches of prompts are in flight as there are stages, and they take turns. While one batch is on the last stage,
the next is on the stage before it, so that every stage always has a batch to work on. A batch starts its next pass as
soon as its own tokens have come back from the last stage, whatever the other batches do. Once its last response has
finished, the next prompts take its turn. Prompts do not join a running batch, because all rows of a batch are at the
same step.

All ranks of the model take the same turns, because the turns follow from tokens that all of them know. Every transfer
between stages is complete before a batch is returned, so that the caller may use the stages for anything in between.
Nothing is sent over the data-parallel process group.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.engine.decoding_batch import DecodingBatch, SamplingSettings
from megatron_ral.engine.stage import StageEngine
from megatron_ral.models.host_decoding import HostDecoding
from megatron_ral.parallel.collectives import (
    all_reduce_sum_,
    broadcast_from_stage_,
    receive_from_stage,
    send_to_stage,
    wait,
)
from megatron_ral.runtime.progress import tick
from megatron_ral.types import Prompt, PromptBatch, ResponseBatch, pad_prompts


@dataclass(frozen=True)
class PromptResponses:
    """G responses to one prompt, its part of a ResponseBatch. The fields are described there."""

    response_ids: Tensor
    """[G, R] int64."""
    response_lengths: Tensor
    """[G] int64."""
    rollout_logprobs: Tensor
    """[G, R] float32."""
    finished: Tensor
    """[G] bool."""
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    """Layer -> [G, R, P + R] float32, P the length of the prompt."""

    @classmethod
    def split(cls, batch: ResponseBatch) -> list["PromptResponses"]:
        """Return copies of each prompt's part of a batch, in order."""
        parts = (batch.response_ids, batch.response_lengths, batch.rollout_logprobs, batch.finished)
        padded = batch.prompts.input_ids.shape[1]
        result = []
        for b, length in enumerate(batch.prompts.prompt_lengths.tolist()):
            attention = {
                layer: torch.cat([rows[b, ..., :length], rows[b, ..., padded:]], dim=-1)
                for layer, rows in batch.attention.items()
            }
            result.append(cls(*(part[b].clone() for part in parts), attention=attention))
        return result

    @staticmethod
    def join(prompts: PromptBatch, rows: Sequence["PromptResponses"], pad_token_id: int) -> ResponseBatch:
        """Join the responses of each prompt to one batch, the inverse of `split`. R is the longest response's length.

        Args:
            prompts: B prompts.
            rows: Responses of each prompt, in the same order.
            pad_token_id: Token that fills responses behind their end.
        """
        longest = max(int(row.response_lengths.max()) for row in rows)

        def pad(tensor: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=value)  # negative widths cut

        return ResponseBatch(
            prompts,
            torch.stack([pad(row.response_ids, pad_token_id) for row in rows]),
            torch.stack([row.response_lengths for row in rows]),
            torch.stack([pad(row.rollout_logprobs, 0.0) for row in rows]),
            torch.stack([row.finished for row in rows]),
            {layer: _join_attention(prompts, rows, layer, longest) for layer in rows[0].attention},
        )


def _join_attention(prompts: PromptBatch, rows: Sequence[PromptResponses], layer: int, longest: int) -> Tensor:
    """Return the rows of a layer of all prompts, [B, G, R, P + R], padded as `PromptResponses.join` pads."""
    P, parts = prompts.input_ids.shape[1], []
    for length, row in zip(prompts.prompt_lengths.tolist(), rows):
        own = row.attention[layer]
        kept = min(longest, own.shape[1])
        joined = own.new_zeros(own.shape[0], longest, P + longest)
        joined[:, :kept, :length] = own[:, :kept, :length]
        joined[:, :kept, P : P + kept] = own[:, :kept, length : length + kept]
        parts.append(joined)
    return torch.stack(parts)


def generate(
    engine: StageEngine,
    prompts: PromptBatch,
    visual_embeds: Optional[tuple[Tensor, ...]],
    settings: SamplingSettings,
    *identity: object,
) -> ResponseBatch:
    """Sample responses to one batch of prompts.

    Args:
        engine: Engine of the model that generates, resident for the whole call.
        prompts: B prompts.
        visual_embeds: Result of `StageEngine.encode_visual` on the first stage. Ignored elsewhere.
        settings: Settings of the sampling.
        identity: Key of the random streams, such as seed and step (see `DecodingBatch`).

    Returns:
        The responses, the same on every rank of the model (all stages, all tensor-parallel ranks). No gradient.
    """
    batch = DecodingBatch(prompts, visual_embeds, settings, engine.process_groups, identity)
    decoder = PipelinedDecoder(engine)
    with engine.resident():
        decoder.advance(iter([batch]))
    return decoder.result(batch)


def sample_responses(
    engine: StageEngine, prompts: Iterable[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
) -> Iterator[tuple[ResponseBatch, Optional[tuple[Tensor, ...]]]]:
    """Sample responses to all prompts, batch by batch in the order of the prompts.

    Args:
        engine: Engine of the model that generates. The caller holds it resident.
        prompts: Prompts, read as they are needed.
        settings: Settings of the sampling.
        batch_size: Largest number of prompts in one batch. With S pipeline stages S batches are in flight, and fewer
            than S batch_size prompts are spread over S batches. `settings.cache_tokens` is a further limit.
        identity: Key of the random streams, such as seed and step (see `DecodingBatch`).

    Yields:
        (responses of a batch, its visual embeddings). The embeddings are None on all but the first stage. No gradient.
    """
    remaining, stages = iter(prompts), engine.layout.pipeline_size

    def batches() -> Iterator[DecodingBatch]:
        while taken := list(islice(remaining, batch_size * stages)):
            size = min(batch_size, -(-len(taken) // stages))
            while taken:
                together = _fitting(taken[:size], settings)
                batch, taken = pad_prompts(taken[:together], settings.pad_token_id), taken[together:]
                yield DecodingBatch(batch, engine.encode_visual(batch), settings, engine.process_groups, identity)

    decoder, waiting = PipelinedDecoder(engine), batches()
    while (batch := decoder.advance(waiting)) is not None:
        yield decoder.result(batch), batch.visual_embeds


def _fitting(prompts: Sequence[Prompt], settings: SamplingSettings) -> int:
    """Return how many of the first prompts, at least 1, the cache of one batch holds."""
    longest = 0
    for count, prompt in enumerate(prompts):
        longest = max(longest, len(prompt.input_ids))
        if count and settings.prompts_together(longest) <= count:
            return count
    return len(prompts)


@dataclass(frozen=True)
class _Pass:
    """Pass of a batch over this stage whose transfers are under way."""

    batch: DecodingBatch
    token: Tensor
    """Token ids [N] int64, sampled here or on their way from the last stage."""
    transfers: list
    """Handles of the transfers to wait for."""
    sent: Tensor
    """Tensor that is being sent. The reference holds its memory until the transfer is complete."""


class PipelinedDecoder:
    """Decoder of the batches that are in flight on this stage.

    Args:
        engine: Engine of the model that generates.
    """

    def __init__(self, engine: StageEngine):
        self.engine, self.process_groups, self.layout = engine, engine.process_groups, engine.layout
        self._turns: deque[DecodingBatch] = deque()
        """Batches in the order in which they make their next pass."""
        self._unfinished: deque[DecodingBatch] = deque()
        """Batches in the order of their prompts."""
        self._under_way: deque[_Pass] = deque()
        """Passes whose tokens their batches have not received yet, the oldest first."""
        self._fits_host = HostDecoding.fits(engine.stage)
        self._on_host: Optional[HostDecoding] = None
        """Decoding step on the CPU, made for the first one. The weights stay as they are until the last."""

    @torch.no_grad()
    def advance(self, waiting: Iterator[DecodingBatch]) -> Optional[DecodingBatch]:
        """Decode until the next batch in the order of the prompts is finished and no transfer is under way.

        Args:
            waiting: Batches that start as turns become free.

        Returns:
            The finished batch. None: all batches were returned before.
        """
        with self.engine.resident(), self.engine.stage.whole_sequences():
            while not (self._unfinished and self._unfinished[0].is_finished):
                while len(self._turns) < self.layout.pipeline_size and (batch := next(waiting, None)) is not None:
                    self._unfinished.append(batch)
                    self.start_pass(batch)
                if not self._turns:
                    return None
                batch = self._turns.popleft()
                while any(item.batch is batch for item in self._under_way):
                    self._end_oldest_pass()
                if not batch.is_finished:
                    self.start_pass(batch)
            while self._under_way:
                self._end_oldest_pass()
        return self._unfinished.popleft()

    def result(self, batch: DecodingBatch) -> ResponseBatch:
        """Return the responses of a finished batch on every rank of the model. All stages must call this together."""
        for rows in batch.attention.values():
            all_reduce_sum_(rows, self.process_groups.tensor)
        return batch.result(broadcast_from_stage_(batch.logprobs, -1, self.process_groups))

    def start_pass(self, batch: DecodingBatch) -> None:
        """Compute this stage's part of a batch's next pass and start to send its result.

        The receive of the sampled tokens starts right after the send of the hidden states, because two ranks must start
        the transfers between them in the same order. NCCL processes them in that order.
        """
        tick(batch.prompts.identities)
        stage, own_rank, last_rank = self.engine.stage, self.layout.pipeline_rank, self.layout.pipeline_size - 1
        if own_rank > 0:
            hidden = batch.input_buffer(self.engine.shape.hidden_size, stage.dtype)
            wait(receive_from_stage(hidden, own_rank - 1, self.process_groups))
            stage.set_input_tensor(hidden)
        if self._on_host is None and self._fits_host and batch.decodes_on_host:
            self._on_host = HostDecoding(stage)
        output = batch.run_pass(stage, self.process_groups, self.engine.shape.visual_token_ids, self._on_host)
        if own_rank == last_rank:
            token = output
            transfers = [send_to_stage(token, other, self.process_groups) for other in range(last_rank)]
        else:
            token = torch.empty(len(batch.rows), dtype=torch.int64, device=self.process_groups.device)
            output = output.contiguous()
            transfers = [
                send_to_stage(output, own_rank + 1, self.process_groups),
                receive_from_stage(token, last_rank, self.process_groups),
            ]
        self._under_way.append(_Pass(batch, token, transfers, output))
        self._turns.append(batch)

    def _end_oldest_pass(self) -> None:
        """Wait for the transfers of the oldest pass and give its tokens to its batch."""
        oldest = self._under_way.popleft()
        for transfer in oldest.transfers:
            wait(transfer)
        oldest.batch.take(oldest.token)
