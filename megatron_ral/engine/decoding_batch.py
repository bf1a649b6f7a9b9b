"""Batch of prompts whose responses are being decoded, as one stage sees it: rows, KV cache and finished responses.

A row is one of the B G responses, fed with one token per decoding step. Every rank of the model derives the same state
from the same tokens. All ranks therefore decide alike, and none of the state has to be sent.

Finished rows are not dropped at once, because dropping them copies the cache of the rows that remain. Copying a row's
keys costs about as much as one step of attention, which reads them. The batch therefore counts the steps spent on
finished rows since the last drop (k finished rows add k per step), and drops these rows once the count reaches the
number of running rows. Neither finished rows nor copies can then cost much more than the cheaper of the two would have.

Prompts whose responses have all finished are counted separately, because their keys are the larger part to copy.

A pass over one token of each row reads and writes the same tensors until rows are dropped or the cache grows, and asks
the host nothing. On a GPU it is therefore recorded once (`engine/decode_graph.py`) and started with one launch. The
only wait of a step is that for its tokens.

With exploration the prompt's last token is fed again as the first token of each row. Its row predicts the first
response token, and without this all responses of a prompt would share it, whatever their noise.
"""

import sys
from dataclasses import dataclass, field
from typing import Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.attention.exploration import AttentionNoise, ExplorationSettings
from megatron_ral.attention.group_layout import GroupLayout
from megatron_ral.engine.decode_graph import Recorded, can_record
from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.host_decoding import HostDecoding
from megatron_ral.models.kv_cache import GroupKVCache
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.parallel.vocab_sampling import PendingDraw, begin_draw
from megatron_ral.types import PromptBatch, ResponseBatch, to_device


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the sampling of responses."""

    group_size: int
    """Number G of responses per prompt."""
    max_response_length: int
    """Number of tokens after which a response is cut off."""
    end_token_id: int
    """Token that finishes a response."""
    pad_token_id: int
    """Token that fills responses behind their end."""
    temperature: float = 1.0
    """Divisor of the logits. 0 samples greedily."""
    top_p: float = 1.0
    """Probability mass of the nucleus that tokens are sampled from. 1 samples from the whole vocabulary."""
    num_tokens: int = 0
    """Number of token ids, counted from 0, that may be sampled. 0 allows all. Models of one tokenizer may pad their
    vocabulary differently."""
    exploration: ExplorationSettings = field(default_factory=ExplorationSettings)
    """Noise on the attention of each response, and layers whose attention rows are recorded."""
    cache_tokens: int = 0
    """Largest number of tokens in the KV cache of one batch, see `prompts_together`. 0: no limit."""

    def prompts_together(self, longest_prompt: int) -> int:
        """Return how many prompts the limit of the cache allows in one batch, at least 1.

        Args:
            longest_prompt: Tokens of the longest of them.
        """
        if not self.cache_tokens:
            return sys.maxsize
        return max(self.cache_tokens // (longest_prompt + self.group_size * self.max_response_length), 1)


class DecodingBatch:
    """B prompts with G responses each, of which N rows are still fed.

    Args:
        prompts: Prompts in host memory.
        visual_embeds: Outputs of the vision tower per prompt on the first stage. None elsewhere.
        settings: Settings of the sampling.
        process_groups: This rank's process groups.
        identity: Key of the random streams, such as seed and step. Each response has a stream of its own, whose key
            ends with the prompt's identity and the response's number.
    """

    def __init__(
        self,
        prompts: PromptBatch,
        visual_embeds: tuple[Tensor, ...] | None,
        settings: SamplingSettings,
        process_groups: ProcessGroups,
        identity: tuple[object, ...],
    ):
        self.prompts, self.visual_embeds, self.settings, self.device = (
            prompts,
            visual_embeds,
            settings,
            process_groups.device,
        )
        count, R = len(prompts) * settings.group_size, settings.max_response_length
        self.step = 0
        """0-based index of the response token that the next pass predicts."""
        self.is_finished = False
        """Say whether every response has finished or reached the length limit."""
        inputs: PromptBatch = to_device(prompts, self.device)
        self._inputs: Optional[PromptBatch] = inputs
        self._fed: Optional[Tensor] = None
        self._next_position = inputs.next_position.repeat_interleave(settings.group_size)
        self._first_pass, self._feeds_prompt_end = True, settings.exploration.is_on
        self._cache: Optional[GroupKVCache] = GroupKVCache(
            inputs.prompt_lengths, settings.group_size, self._feeds_prompt_end
        )
        self._device_step = torch.zeros(1, dtype=torch.int64, device=self.device)
        """Step of the cache that the pass under way appends, [1] int64."""
        self._recorded: Optional[Recorded[Tensor | PendingDraw]] = None
        self._runs_like_the_last = False
        """Say whether a pass ran with the tensors as they are now, after which it can be recorded."""
        if settings.exploration.is_noisy:
            noise = AttentionNoise.draw(prompts, settings.group_size, settings.exploration, *identity)
            self._cache.noise = to_device(noise, self.device)
        self._prompt_end = (inputs.prompt_lengths - 1).repeat_interleave(settings.group_size)
        """Place of the last prompt token of each response, [B G] int64."""
        self.attention: dict[int, Tensor] = {}
        """0-based recorded layer of this stage -> attention rows that predict each response token, [B G, R, P + R]
        float32: over the prompt, then over the response. They are summed over this rank's heads alone."""
        self._set_rows(torch.arange(count))
        self._rows_wasted = self._prompts_wasted = 0
        self.tokens = torch.full((count, R), settings.pad_token_id)
        """Token ids of the responses, [B G, R] int64 in host memory."""
        self.lengths = torch.zeros(count, dtype=torch.int64)
        """Lengths of the responses with the end token, [B G] int64 in host memory."""
        self.finished = torch.zeros(count, dtype=torch.bool)
        """Mask of the responses that ended with the end token, [B G] bool in host memory."""
        self.logprobs = torch.zeros(count, R, device=self.device)
        """Log-probabilities [B G, R] float32 of the sampled tokens, also of those behind a response's end. Zeros on all
        but the last stage, which samples."""
        self._drawn: Optional[Tensor] = None
        """Tokens of the pass under way in host memory, on the stage that drew them."""
        self.hidden: Optional[Tensor] = None
        """Hidden states from the stage before, [1, N, H], that decoding passes read. None on the first stage."""
        self._uniforms = None
        if process_groups.layout.is_last_stage:
            self._uniforms = torch.stack(
                [
                    uniform_stream(R, *identity, key, response)
                    for key in prompts.identities
                    for response in range(settings.group_size)
                ]
            ).to(self.device)

    def _set_rows(self, rows: Tensor) -> None:
        self.rows = rows
        """Ascending indices of the responses that are fed, [N] int64 in host memory."""
        self._device_rows = rows.to(self.device)
        self.hidden = None
        self._forget_recorded()

    def _forget_recorded(self) -> None:
        self._recorded, self._runs_like_the_last = None, False

    @property
    def boundary_shape(self) -> tuple[int, int]:
        """Sequence length and batch size of the hidden states that the next pass sends between stages: (P, B) in the
        pass over the prompts, (1, N) in later ones."""
        B, P = self.prompts.input_ids.shape
        return (P, B) if self._first_pass else (1, len(self.rows))

    def input_buffer(self, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """Return the memory for the hidden states that the next pass reads from the stage before."""
        if self._first_pass:
            return torch.empty(*self.boundary_shape, hidden_size, dtype=dtype, device=self.device)
        if self.hidden is None:
            self.hidden = torch.empty(1, len(self.rows), hidden_size, dtype=dtype, device=self.device)
        return self.hidden

    @property
    def decodes_on_host(self) -> bool:
        """True if the next pass is over one token of each row, on a device where `HostDecoding` is the faster step."""
        return not self._first_pass and self.is_on_host

    @property
    def is_on_host(self) -> bool:
        """True if passes run on the CPU and are not recorded."""
        return self.device.type == "cpu" and not can_record(self.device)

    def run_pass(
        self,
        stage: MultimodalStage,
        process_groups: ProcessGroups,
        forbidden: Sequence[int] = (),
        on_host: Optional[HostDecoding] = None,
    ) -> Tensor:
        """Run this stage's part of a pass: the first one over the prompts, each later one over one token of each row.

        Args:
            stage: Stage, whose input is set.
            process_groups: This rank's process groups.
            forbidden: Token ids that are never drawn.
            on_host: Decoding step of the stage to use in place of its modules, where `decodes_on_host`.

        Returns:
            Hidden states [*boundary_shape, H], or on the last stage the tokens that it drew, [N] int64, the same on
            every tensor-parallel rank. The next pass may overwrite them.
        """
        assert self._cache is not None, "every response has finished"
        if self._first_pass:
            result = self._prefill(stage, process_groups, forbidden)
        else:
            fed = self.step - 1 + int(self._feeds_prompt_end)
            if self._cache.reserve(fed):
                self._forget_recorded()
            self._device_step.fill_(fed)
            if self._recorded is None and self._runs_like_the_last and can_record(self.device):
                self._recorded = Recorded(lambda: self._step_pass(stage, process_groups, forbidden, None))
            result = self._recorded() if self._recorded else self._step_pass(stage, process_groups, forbidden, on_host)
            self._runs_like_the_last = True
        return self._finish(result) if isinstance(result, PendingDraw) else result

    def _prefill(
        self, stage: MultimodalStage, process_groups: ProcessGroups, forbidden: Sequence[int]
    ) -> Tensor | PendingDraw:
        assert self._inputs is not None
        output, self._inputs = stage.prefill(self._inputs, self.visual_embeds, self._attention()), None
        if not stage.layout.is_last_stage:
            return output
        if self._feeds_prompt_end:
            return self._prompt_ends().to(self.device)
        return self._draw(output.repeat_interleave(self.settings.group_size, 0), process_groups, forbidden)

    def _step_pass(
        self,
        stage: MultimodalStage,
        process_groups: ProcessGroups,
        forbidden: Sequence[int],
        on_host: Optional[HostDecoding],
    ) -> Tensor | PendingDraw:
        """Run a pass over one token of each row, with tensors of fixed places and without waiting for the device."""
        assert self._cache is not None and self._fed is not None
        self._cache.start_step(self._device_step)
        attention = self._attention()
        attention.decode_step = self._device_step
        positions = self._next_position[self._device_rows] + self._device_step - int(self._feeds_prompt_end)
        output = (on_host or stage.decode)(self._fed, positions, attention)
        for layer, rows in attention.decoded_rows.items():
            self._record(layer, *rows)
        return self._draw(output, process_groups, forbidden) if stage.layout.is_last_stage else output

    def _attention(self) -> AttentionPass:
        assert self._cache is not None
        lengths = self._cache.prompt_lengths
        no_responses = torch.zeros(len(lengths), 0, dtype=torch.int64, device=self.device)
        return AttentionPass(
            GroupLayout(lengths, no_responses, self.prompts.input_ids.shape[1], 0),
            self.settings.exploration.recorded_layers,
            cache=self._cache,
        )

    def _draw(self, logits_Nv: Tensor, process_groups: ProcessGroups, forbidden: Sequence[int]) -> PendingDraw:
        """Begin to draw the next token of each row, on the last stage."""
        settings = self.settings
        assert self._uniforms is not None, "only the last stage samples"
        if self._first_pass:
            uniform = self._uniforms[:, 0]
        else:
            uniform = self._uniforms[self._device_rows].index_select(1, self._predicted())[:, 0]
        return begin_draw(
            logits_Nv,
            uniform,
            settings.temperature,
            settings.top_p,
            process_groups.tensor,
            num_tokens=settings.num_tokens,
            forbidden=forbidden,
            on_host=self.is_on_host,
        )

    def _finish(self, pending: PendingDraw) -> Tensor:
        """Store the log-probabilities of a draw and return its tokens.

        Log-probabilities are those under softmax(logits / temperature), before top-p and with forbidden tokens, as the
        update computes them. For greedy sampling they are those at temperature 1.
        """
        draw = pending.finish()
        self.logprobs[self._device_rows, self.step] = draw.logprob
        self._drawn = draw.token_on_host
        return draw.token

    def take(self, token_N: Tensor) -> None:
        """Store the tokens of the last pass, mark the responses that they finish, and drop finished rows where it pays.

        Args:
            token_N: Token ids [N] int64 of the rows that were fed.
        """
        if self._first_pass:
            self._first_pass = False
            if self._feeds_prompt_end:
                assert self._cache is not None
                self._cache.hide_last_prompt_token()
                self._fed = token_N.clone()
                return
        tokens, running = token_N.cpu() if self._drawn is None else self._drawn, ~self.finished[self.rows]
        self._drawn = None
        rows, tokens = self.rows[running], tokens[running]
        self.tokens[rows, self.step] = tokens
        self.lengths[rows] += 1
        self.finished[rows] = tokens == self.settings.end_token_id
        self.step += 1
        running = ~self.finished[self.rows]
        self._fed = token_N.clone() if self._fed is None else self._fed.copy_(token_N)
        if self.step == self.settings.max_response_length or not bool(running.any()):
            self.is_finished, self._cache, self._fed, self._uniforms = True, None, None, None
            self._forget_recorded()
        else:
            self._drop_finished(running)

    def _prompt_ends(self) -> Tensor:
        """Return the last token of each row's prompt, [B G] int64 in host memory."""
        ends = self.prompts.input_ids.gather(1, self.prompts.prompt_lengths[:, None] - 1)[:, 0]
        return ends.repeat_interleave(self.settings.group_size)

    def _predicted(self) -> Tensor:
        """Return the index of the response token that a decoding pass predicts, `step` as the device knows it, [1]."""
        return self._device_step + 1 - int(self._feeds_prompt_end)

    def _record(self, layer: int, over_prompt_NP: Tensor, over_own_NS: Tensor) -> None:
        """Store the rows that predict the token of this step.

        Args:
            layer: 0-based layer.
            over_prompt_NP: Attention of the fed tokens over the prompt without its last token.
            over_own_NS: Attention over the tokens that were fed: the prompt's last one, then the response, then zeros.
        """
        P, R = self.prompts.input_ids.shape[1], self.settings.max_response_length
        if layer not in self.attention:
            self.attention[layer] = torch.zeros(len(self.lengths), R, P + R, device=self.device)
        row = torch.zeros(len(over_own_NS), P + R, device=self.device)
        row[:, : over_prompt_NP.shape[1]] = over_prompt_NP
        row.scatter_(1, self._prompt_end[self._device_rows, None], over_own_NS[:, :1])
        over_response = over_own_NS[:, 1 : R + 1]
        row[:, P : P + over_response.shape[1]] = over_response
        self.attention[layer].index_put_((self._device_rows, self._predicted()), row)

    def _drop_finished(self, running_N: Tensor) -> None:
        """Drop finished rows and prompts once they have cost as much as the copy would (see the module's docstring).

        Args:
            running_N: Mask of the fed rows whose responses still run, [N] bool in host memory.
        """
        cache, rows = self._cache, running_N.nonzero()[:, 0]
        assert cache is not None and self._fed is not None
        prompts = cache.row_prompt[rows].unique()
        self._rows_wasted += len(running_N) - len(rows)
        self._prompts_wasted += len(cache.prompt_lengths) - len(prompts)
        drops_prompts = self._prompts_wasted >= len(prompts)
        if self._rows_wasted < len(rows) and not drops_prompts:
            return
        if self._recorded is not None and 4 * len(rows) > 3 * len(running_N):
            return  # a pass would have to be recorded again
        cache.select(rows, prompts if drops_prompts else None)
        self._fed = self._fed[rows.to(self.device)]
        self._set_rows(self.rows[rows])
        self._rows_wasted = 0
        if drops_prompts:
            self._prompts_wasted = 0

    def result(self, logprobs: Tensor) -> ResponseBatch:
        """Return the responses, padded to the longest. Log-probabilities behind a response's end are 0.

        Args:
            logprobs: Log-probabilities [B G, R] of the last stage.
        """
        longest, shape = int(self.lengths.max()), (len(self.prompts), self.settings.group_size)
        P = self.prompts.input_ids.shape[1]
        is_response = torch.arange(longest) < self.lengths[:, None]
        logprobs = logprobs[:, :longest].cpu().masked_fill(~is_response, 0.0)
        return ResponseBatch(
            self.prompts,
            self.tokens[:, :longest].reshape(*shape, longest),
            self.lengths.view(shape),
            logprobs.view(*shape, longest),
            self.finished.view(shape),
            {
                layer: rows[:, :longest, : P + longest].reshape(*shape, longest, P + longest)
                for layer, rows in self.attention.items()
            },
        )
