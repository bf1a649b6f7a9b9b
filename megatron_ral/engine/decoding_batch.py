"""A batch of prompts whose responses are in the making, as one stage sees it: rows, cache, and who has ended.

Every rank of the model keeps the same books from the same tokens, so that all decide alike and nothing about them has
to be sent. Rows that ended are fed on until they have cost as much as letting them go would: the row-steps spent on them
since rows last left are counted, and once there are as many as rows that still run (a copy of a row's keys costs about
what one step of attention reads of it) the batch is cut to the running rows. So neither ended rows nor copies ever take
much more than the better of the two would have. Prompts whose responses have all ended are counted apart, as their keys
are the larger part to copy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ral.functional.sampling import uniform_stream
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.attention.group_layout import GroupLayout
from megatron_ral.models.kv_cache import GroupKVCache
from megatron_ral.models.multimodal import MultimodalStage
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.parallel.vocab import vocab_parallel_logprobs, vocab_parallel_sample
from megatron_ral.types import PromptBatch, ResponseBatch, to_device


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


class DecodingBatch:
    """B prompts, G responses each, of which N rows are still fed.

    Args:
        prompts: on the host.
        visual_embeds: of the first stage; None elsewhere.
        settings: how to draw.
        groups: this rank's place.
        identity: what the random stream belongs to; prompt key and response number are added.
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
        """Number of the token that the next pass predicts."""
        self.over = False
        """No response runs any more."""
        self._inputs = to_device(prompts, self.device)
        self._next_position = self._inputs.next_position.repeat_interleave(settings.group_size)
        self._cache = GroupKVCache(self._inputs.prompt_lengths, settings.group_size)
        self._set_rows(torch.arange(count))
        self._rows_wasted = self._prompts_wasted = 0
        self.tokens = torch.full((count, R), settings.pad_token_id)
        self.lengths = torch.zeros(count, dtype=torch.int64)
        self.finished = torch.zeros(count, dtype=torch.bool)
        self.logprobs = torch.zeros(count, R, device=self.device)
        """[B G, R] on the last stage, which draws; also of tokens after the end. Zeros elsewhere."""
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
        """[N] int64 on the host, ascending: which of the B G responses are fed."""
        self._rows_there = rows.to(self.device)

    @property
    def boundary_shape(self) -> tuple[int, int]:
        """Length and width of the hidden states that stages hand on in the next pass."""
        return self.prompts.input_ids.shape[::-1] if self.step == 0 else (1, len(self.rows))

    def forward(self, stage: MultimodalStage) -> Tensor:
        """One pass: the prompts, or one token of each row. Returns hidden states, on the last stage logits [N, v]."""
        lengths = self._cache.prompt_lengths
        nobody = torch.zeros(len(lengths), 0, dtype=torch.int64, device=self.device)
        attention = AttentionPass(GroupLayout(lengths, nobody, self.prompts.input_ids.shape[1], 0), cache=self._cache)
        if self.step > 0:
            attention.decode_step = self.step - 1
            return stage.decode(self._fed, self._next_position[self._rows_there] + attention.decode_step, attention)
        output, self._inputs = stage.prefill(self._inputs, self.visual_embeds, attention), None
        return output.repeat_interleave(self.settings.group_size, 0) if stage.layout.is_last_stage else output

    def draw(self, logits_Nv: Tensor, process_groups: ProcessGroups) -> Tensor:
        """The tokens [N] that the last stage draws; notes their log-probabilities under softmax(logits / temperature),
        before top-p."""
        settings = self.settings
        token = vocab_parallel_sample(
            logits_Nv,
            self._uniforms[self._rows_there, self.step],
            settings.temperature,
            settings.top_p,
            process_groups.tensor,
            num_tokens=settings.num_tokens,
        )
        scaled = logits_Nv.float() / (settings.temperature or 1.0)
        self.logprobs[self._rows_there, self.step] = vocab_parallel_logprobs(scaled, token, process_groups.tensor)[0]
        return token

    def take(self, token_N: Tensor) -> None:
        """The tokens of the pass that was made last: write them down, see who has ended."""
        tokens, runs = token_N.cpu(), ~self.finished[self.rows]
        rows, tokens = self.rows[runs], tokens[runs]
        self.tokens[rows, self.step] = tokens
        self.lengths[rows] += 1
        self.finished[rows] = tokens == self.settings.end_token_id
        self.step += 1
        runs = ~self.finished[self.rows]
        self._fed = token_N
        if self.step == self.settings.max_response_length or not bool(runs.any()):
            self.over, self._cache, self._fed, self._uniforms = True, None, None, None
        else:
            self._let_go(runs)

    def _let_go(self, runs_N: Tensor) -> None:
        """Drop rows and prompts that ended, where it pays (see above)."""
        cache, rows = self._cache, runs_N.nonzero()[:, 0]
        prompts = cache.row_prompt[rows].unique()
        self._rows_wasted += len(runs_N) - len(rows)
        self._prompts_wasted += len(cache.prompt_lengths) - len(prompts)
        drops_prompts = self._prompts_wasted >= len(prompts)
        if self._rows_wasted < len(rows) and not drops_prompts:
            return
        cache.select(rows, prompts if drops_prompts else None)
        self._fed = self._fed[rows.to(self.device)]
        self._set_rows(self.rows[rows])
        self._rows_wasted = 0
        if drops_prompts:
            self._prompts_wasted = 0

    def result(self, logprobs: Tensor) -> ResponseBatch:
        """The responses, padded to the longest.

        Args:
            logprobs: those of the last stage.
        """
        longest, shape = int(self.lengths.max()), (len(self.prompts), self.settings.group_size)
        written = torch.arange(longest) < self.lengths[:, None]
        logprobs = logprobs[:, :longest].cpu().masked_fill(~written, 0.0)
        return ResponseBatch(
            self.prompts,
            self.tokens[:, :longest].reshape(*shape, longest),
            self.lengths.view(shape),
            logprobs.view(*shape, longest),
            self.finished.view(shape),
        )
