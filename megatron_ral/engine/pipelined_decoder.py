"""Generation of G responses per prompt on the pipeline stages, prompt computed once per group, with a KV cache.

As many batches of prompts are in flight as there are stages. They take turns: while one batch is on the last stage the
next is on the stage before it, so that every stage always has a batch to work on. A batch goes on as soon as its own
tokens are back from the last stage, whatever the others do, and when its last response has ended the next prompts take
its turn. (Prompts do not join a batch that runs: its rows share the step they are at.)

All ranks of the model take the same turns, because these follow from tokens that all of them know. Everything sent
between stages has arrived before a batch is handed to the caller, who may use the stages for anything in between.
Nothing is sent over the data-parallel group.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Iterable, Iterator, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.engine.decoding_batch import DecodingBatch, SamplingSettings
from megatron_ral.engine.stage import StageEngine
from megatron_ral.parallel.collectives import broadcast_from_stage_, receive_from_stage, send_to_stage, wait
from megatron_ral.runtime.progress import tick
from megatron_ral.types import Prompt, PromptBatch, ResponseBatch, pad_prompts


@dataclass(frozen=True)
class PromptResponses:
    """G responses to one prompt: its part of a ResponseBatch."""

    response_ids: Tensor
    """[G, R]"""
    response_lengths: Tensor
    """[G]"""
    rollout_logprobs: Tensor
    """[G, R]"""
    finished: Tensor
    """[G]"""

    @classmethod
    def split(cls, batch: ResponseBatch) -> list["PromptResponses"]:
        parts = (batch.response_ids, batch.response_lengths, batch.rollout_logprobs, batch.finished)
        return [cls(*(part[b].clone() for part in parts)) for b in range(len(batch.prompts))]

    @staticmethod
    def join(prompts: PromptBatch, rows: Sequence["PromptResponses"], pad_token_id: int) -> ResponseBatch:
        """Inverse of `split`; R is the longest response's."""
        longest = max(int(row.response_lengths.max()) for row in rows)

        def pad(tensor: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=value)  # or cut

        return ResponseBatch(
            prompts,
            torch.stack([pad(row.response_ids, pad_token_id) for row in rows]),
            torch.stack([row.response_lengths for row in rows]),
            torch.stack([pad(row.rollout_logprobs, 0.0) for row in rows]),
            torch.stack([row.finished for row in rows]),
        )


def generate(
    engine: StageEngine,
    prompts: PromptBatch,
    visual_embeds: Optional[tuple[Tensor, ...]],
    settings: SamplingSettings,
    *identity: object,
) -> ResponseBatch:
    """Sample responses in one batch; every rank of the model (all stages, all tensor ranks) returns the same.

    Args:
        engine: policy, made resident for the whole call.
        prompts: B prompts.
        visual_embeds: of the first stage (`StageEngine.encode_visual`); ignored elsewhere.
        settings: how to draw.
        identity: what the random stream belongs to (seed, step); prompt key and response number are added.
    """
    batch = DecodingBatch(prompts, visual_embeds, settings, engine.process_groups, identity)
    line = PipelinedDecoder(engine)
    with engine.resident():
        line.advance(iter([batch]))
    return line.result(batch)


def sample_responses(
    engine: StageEngine, prompts: Iterable[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
) -> Iterator[tuple[ResponseBatch, Optional[tuple[Tensor, ...]]]]:
    """Generate for all prompts; the caller keeps the engine resident. Yields responses with their visual embeddings
    (first stage only), batch by batch in the order of the prompts.

    Args:
        prompts: taken as they are needed.
        batch_size: most prompts in one batch. With S pipeline stages S batches are in flight, and fewer prompts than
            S batch_size are spread over S batches.
    """
    remaining, stages = iter(prompts), engine.layout.pipeline_size

    def batches() -> Iterator[DecodingBatch]:
        while taken := list(islice(remaining, batch_size * stages)):
            size = min(batch_size, -(-len(taken) // stages))
            for start in range(0, len(taken), size):
                batch = pad_prompts(taken[start : start + size], settings.pad_token_id)
                yield DecodingBatch(batch, engine.encode_visual(batch), settings, engine.process_groups, identity)

    line, waiting = PipelinedDecoder(engine), batches()
    while (batch := line.advance(waiting)) is not None:
        yield line.result(batch), batch.visual_embeds


@dataclass(frozen=True)
class _Pass:
    """What one pass of a batch over this stage has under way."""

    batch: DecodingBatch
    token: Tensor
    """[N] int64, drawn here or to arrive from the last stage."""
    works: list
    sent: Tensor
    """Kept until it has left."""


class PipelinedDecoder:
    """The batches in flight on this stage."""

    def __init__(self, engine: StageEngine):
        self.engine, self.process_groups, self.layout = engine, engine.process_groups, engine.layout
        self._turns: deque[DecodingBatch] = deque()
        """Batches in the order in which they make their next pass."""
        self._unfinished: deque[DecodingBatch] = deque()
        """Batches in the order of their prompts."""
        self._under_way: deque[_Pass] = deque()
        """Passes whose tokens were not taken yet, the oldest first."""

    @torch.no_grad()
    def advance(self, waiting: Iterator[DecodingBatch]) -> Optional[DecodingBatch]:
        """Work until the next batch in the order of the prompts is over and nothing is under way. None: no more.

        Args:
            waiting: batches that start as turns become free.
        """
        with self.engine.resident(), self.engine.stage.whole_sequences():
            while not (self._unfinished and self._unfinished[0].over):
                while len(self._turns) < self.layout.pipeline_size and (batch := next(waiting, None)) is not None:
                    self._unfinished.append(batch)
                    self.start_pass(batch)
                if not self._turns:
                    return None
                batch = self._turns.popleft()
                while any(item.batch is batch for item in self._under_way):
                    self._end_oldest_pass()
                if not batch.over:
                    self.start_pass(batch)
            while self._under_way:
                self._end_oldest_pass()
        return self._unfinished.popleft()

    def result(self, batch: DecodingBatch) -> ResponseBatch:
        """The responses of a batch that is over, on every rank of the model."""
        return batch.result(broadcast_from_stage_(batch.logprobs, -1, self.process_groups))

    def start_pass(self, batch: DecodingBatch) -> None:
        """Compute this stage's part and start to send. The tokens' way back is opened right after the hidden states
        have left: two ranks must start what passes between them in one order (NCCL works it off in that order)."""
        tick(batch.prompts.identities)
        stage, here, last = self.engine.stage, self.layout.pipeline_rank, self.layout.pipeline_size - 1
        if here > 0:
            hidden = torch.empty(
                *batch.boundary_shape,
                self.engine.shape.hidden_size,
                dtype=stage.dtype,
                device=self.process_groups.device,
            )
            wait(receive_from_stage(hidden, here - 1, self.process_groups))
            stage.set_input_tensor(hidden)
        output = batch.forward(stage)
        if here == last:
            token = output = batch.draw(output, self.process_groups)
            works = [send_to_stage(token, other, self.process_groups) for other in range(last)]
        else:
            token = torch.empty(len(batch.rows), dtype=torch.int64, device=self.process_groups.device)
            output = output.contiguous()
            works = [
                send_to_stage(output, here + 1, self.process_groups),
                receive_from_stage(token, last, self.process_groups),
            ]
        self._under_way.append(_Pass(batch, token, works, output))
        self._turns.append(batch)

    def _end_oldest_pass(self) -> None:
        oldest = self._under_way.popleft()
        for work in oldest.works:
            wait(work)
        oldest.batch.take(oldest.token)
