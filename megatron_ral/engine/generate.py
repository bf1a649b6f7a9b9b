"""Generation of G responses per prompt on the pipeline stages, prompt computed once per group, with a KV cache."""

from dataclasses import dataclass
from itertools import islice
from typing import Iterable, Iterator, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.engine.stage import StageEngine
from megatron_ral.functional.sampling import sample_tokens, uniform_stream
from megatron_ral.models.group_layout import AttentionPass, GroupKVCache, GroupLayout
from megatron_ral.parallel.collectives import (
    broadcast_from_stage_, gather_shards, receive_from_previous_stage, send_to_next_stage)
from megatron_ral.types import Prompt, PromptBatch, ResponseBatch, pad_prompts, to_device


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn."""

    group_size: int
    max_response_length: int
    end_token_id: int
    pad_token_id: int
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    num_tokens: int = 0
    """Only the first so many ids are drawn; 0: all. (Models of one tokenizer may pad their vocabulary differently.)"""


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
        """Inverse of `split`, for rows of different R."""
        longest = max(row.response_ids.shape[1] for row in rows)

        def pad(tensor: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=value)

        return ResponseBatch(
            prompts, torch.stack([pad(row.response_ids, pad_token_id) for row in rows]),
            torch.stack([row.response_lengths for row in rows]),
            torch.stack([pad(row.rollout_logprobs, 0.0) for row in rows]), torch.stack([row.finished for row in rows]))


@torch.no_grad()
def generate(engine: StageEngine, prompts: PromptBatch, visual_embeds: Optional[tuple[Tensor, ...]],
             settings: SamplingSettings, *identity: object) -> ResponseBatch:
    """Sample responses; every rank of the model (all stages, all tensor ranks) returns the same batch.

    Args:
        engine: policy, made resident for the whole call.
        prompts: B prompts.
        visual_embeds: of the first stage (`StageEngine.encode_visual`); ignored elsewhere.
        settings: how to draw.
        identity: what the random stream belongs to (seed, step); prompt key and response number are added.
    """
    B, G, R = len(prompts), settings.group_size, settings.max_response_length
    uniforms = torch.stack([torch.stack([uniform_stream(R, *identity, key, response) for response in range(G)])
                            for key in prompts.identities])
    tokens = torch.full((B, G, R), settings.pad_token_id)
    logprobs = torch.zeros(B, G, R)
    lengths = torch.zeros(B, G, dtype=torch.int64)
    finished = torch.zeros(B, G, dtype=torch.bool)
    decoder = _Decoder(engine, prompts, settings)
    with engine.resident(), engine.stage.whole_sequences():
        for step in range(R):
            logits = decoder.prefill(visual_embeds) if step == 0 else decoder.advance(tokens[:, :, step - 1], step - 1)
            token, logprob = decoder.draw(logits, uniforms[:, :, step])
            alive = ~finished
            tokens[:, :, step] = torch.where(alive, token, settings.pad_token_id)
            logprobs[:, :, step] = torch.where(alive, logprob, 0.0)
            lengths += alive
            finished |= token == settings.end_token_id
            if bool(finished.all()):
                break
    longest = int(lengths.max())
    return ResponseBatch(prompts, tokens[:, :, :longest].contiguous(), lengths, logprobs[:, :, :longest].contiguous(),
                         finished)


def sample_responses(engine: StageEngine, prompts: Iterable[Prompt], settings: SamplingSettings, batch_size: int,
                     *identity: object) -> Iterator[tuple[ResponseBatch, Optional[tuple[Tensor, ...]]]]:
    """Generate for all prompts, `batch_size` at a time; the caller keeps the engine resident. Yields responses with their
    visual embeddings (first stage only)."""
    remaining = iter(prompts)
    while taken := list(islice(remaining, batch_size)):
        batch = pad_prompts(taken, settings.pad_token_id)
        embeds = engine.encode_visual(batch)
        yield generate(engine, batch, embeds, settings, *identity), embeds


class _Decoder:
    """One rollout's cache and the passing of hidden states between stages."""

    def __init__(self, engine: StageEngine, prompts: PromptBatch, settings: SamplingSettings):
        self.engine, self.settings, self.device = engine, settings, engine.groups.device
        self.prompts = to_device(prompts, self.device)
        self.cache = GroupKVCache(settings.max_response_length)
        self.B, self.G, self.P = len(prompts), settings.group_size, prompts.input_ids.shape[1]

    def prefill(self, visual_embeds: Optional[tuple[Tensor, ...]]) -> Optional[Tensor]:
        """Logits [B, G, v] for the first token on the last stage, None elsewhere."""
        layout = GroupLayout(self.prompts.prompt_lengths, self._lengths(0), self.P, 0)
        attention = AttentionPass(layout, cache=self.cache)
        self._receive(self.P)
        output = self.engine.stage.prefill(self.prompts, visual_embeds, attention)
        logits = self._hand_on(output)
        return None if logits is None else logits[:, None].expand(-1, self.G, -1)

    def advance(self, tokens_BG: Tensor, step: int) -> Optional[Tensor]:
        """Feed the tokens of `step`; logits [B, G, v] for the next on the last stage, None elsewhere."""
        layout = GroupLayout(self.prompts.prompt_lengths, self._lengths(self.G), self.P,
                             self.settings.max_response_length)
        attention = AttentionPass(layout, cache=self.cache, decode_step=step)
        positions = (self.prompts.next_position + step)[:, None].expand(-1, self.G)
        self._receive(self.G)
        return self._hand_on(self.engine.stage.decode(tokens_BG.to(self.device), positions, attention))

    def draw(self, logits: Optional[Tensor], uniform_BG: Tensor) -> tuple[Tensor, Tensor]:
        """Sample on the last stage, tell the others. Returns tokens [B, G] and their log-probabilities under
        softmax(logits / temperature), before top-p."""
        message = torch.zeros(2, self.B, self.G, dtype=torch.float64)
        if logits is not None:
            logits = torch.cat(gather_shards(logits.float(), self.engine.groups.tensor), dim=-1).cpu()
            drawn = logits[..., : self.settings.num_tokens] if self.settings.num_tokens else logits
            token = sample_tokens(drawn.flatten(0, 1), uniform_BG.flatten(), self.settings.temperature,
                                  self.settings.top_p).view(self.B, self.G)
            message[0] = token
            logits = logits / (self.settings.temperature or 1.0)
            message[1] = torch.log_softmax(logits, dim=-1).gather(-1, token[..., None])[..., 0]
        message = broadcast_from_stage_(message.to(self.device), -1, self.engine.groups).cpu()
        return message[0].long(), message[1].float()

    def _lengths(self, G: int) -> Tensor:
        """Response lengths play no part while generating: what a row sees is what the cache holds."""
        return torch.zeros(self.B, G, dtype=torch.int64, device=self.device)

    def _receive(self, length: int) -> None:
        engine = self.engine
        if not engine.layout.is_first_stage:
            hidden = torch.empty(length, self.B, engine.shape.hidden_size, dtype=engine.stage.dtype,
                                 device=self.device)
            engine.stage.set_input_tensor(receive_from_previous_stage(hidden, engine.groups))

    def _hand_on(self, output: Tensor) -> Optional[Tensor]:
        if self.engine.layout.is_last_stage:
            return output
        send_to_next_stage(output, self.engine.groups)
        return None
