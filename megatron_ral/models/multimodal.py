"""One pipeline stage of the multimodal model: vision tower on the first, language layers on all, logits on the last.

The forward pass reads a `GroupBatch` (or, decoding, one token per response) and an `AttentionPass`. It returns the
hidden states for the next stage, or on the last stage the logits of the rows that predict response tokens: the first
response token is predicted by the prompt's last row, token r by response row r - 1.

Under sequence parallelism hidden states outside attention are cut over tensor ranks along the sequence, padded to a
multiple of their number; visual embeddings are placed before the cut, and rows are chosen after the pieces are gathered.
"""

from contextlib import contextmanager
from typing import Iterator

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_ral.functional.positions import rotary_angles
from megatron_ral.models.attention_pass import AttentionPass, VisualFeatures
from megatron_ral.models.families import build_tower
from megatron_ral.models.language import build_language_stage
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.types import GroupBatch, PromptBatch


class MultimodalStage(torch.nn.Module):
    """Stage of one rank.

    Args:
        shape: model.
        layout: this rank's place.
        dtype: of parameters and activations.
        device: where to build.
        sequence_parallel: cut the sequence over tensor ranks outside attention; without effect on one tensor rank.
        recompute: keep only the inputs of layers that are not recorded for the backward pass.
    """

    def __init__(
        self,
        shape: ModelShape,
        layout: RankLayout,
        dtype: torch.dtype,
        device: torch.device,
        sequence_parallel: bool = False,
        recompute: bool = False,
    ):
        super().__init__()
        self.shape, self.layout, self.dtype = shape, layout, dtype
        sequence_parallel = sequence_parallel and layout.tensor_size > 1
        self.language = build_language_stage(shape, layout, dtype, device, sequence_parallel)
        self.config, self.model_type = self.language.config, self.language.model_type
        for layer in self.language.decoder.layers:
            layer.recompute = recompute
        self.visual = None
        if layout.is_first_stage:
            with torch.device(device):
                self.visual = build_tower(shape.vision, dtype)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states from the previous stage (called by megatron's schedule)."""
        self.language.set_input_tensor(input_tensor)

    def padded_length(self, length: int) -> int:
        """Length of a sequence that can be cut over tensor ranks."""
        return -(-length // self._parts) * self._parts

    def boundary_shape(self, length: int, size: int) -> tuple[int, int, int]:
        """Shape of the hidden states that stages hand on of `size` sequences."""
        return self.padded_length(length) // self._parts, size, self.shape.hidden_size

    @property
    def _parts(self) -> int:
        return self.layout.tensor_size if self.config.sequence_parallel else 1

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """No sequence parallelism inside (generation, where a pass may be shorter than there are tensor ranks)."""
        switched = [part for part in (self.config, *self.modules()) if getattr(part, "sequence_parallel", False)]
        for part in switched:
            part.sequence_parallel = False
        try:
            yield
        finally:
            for part in switched:
                part.sequence_parallel = True

    def forward(self, groups: GroupBatch, attention: AttentionPass) -> Tensor:
        """Whole group layout.

        Returns:
            [S, B, H] hidden states (under sequence parallelism this rank's part of the padded S), or on the last stage
            logits [B, G, R, v] (this rank's share of the vocabulary), or with `attention.hidden_states` [B, G, R, H].
        """
        hidden, position_ids = None, groups.position_ids
        length = position_ids.shape[-1]
        padding = self.padded_length(length) - length
        if self.layout.is_first_stage:
            embeds = groups.visual_embeds if groups.visual_embeds is not None else self.encode_visual(groups.prompts)
            hidden = self._embed(groups.input_ids, groups.prompts, embeds, attention)
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, padding)))
        hidden = self._decode_layers(hidden, torch.nn.functional.pad(position_ids, (0, padding)), attention)
        if not self.layout.is_last_stage:
            return hidden
        if self.config.sequence_parallel:
            # The output layer sums the gradient over tensor ranks, so that here it is only cut.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)[:length]
        rows = self._predicting_rows(hidden, attention)
        return rows if attention.hidden_states else self._logits(rows)

    def prefill(
        self, prompts: PromptBatch, visual_embeds: tuple[Tensor, ...] | None, attention: AttentionPass
    ) -> Tensor:
        """Prompts alone, filling the cache. Returns hidden states, or on the last stage logits [B, v] of each
        prompt's last row."""
        hidden = None
        if self.layout.is_first_stage:
            hidden = self._embed(prompts.input_ids, prompts, visual_embeds, attention)
        hidden = self._decode_layers(hidden, prompts.position_ids, attention)
        if not self.layout.is_last_stage:
            return hidden
        last = attention.layout.prompt_lengths - 1
        return self._logits(hidden[last, torch.arange(len(last), device=last.device)])

    def decode(self, token_N: Tensor, positions_N: Tensor, attention: AttentionPass) -> Tensor:
        """One token for each row of the cache. Returns [1, N, H] hidden states, or on the last stage logits [N, v]."""
        hidden = self.language.embed_words(token_N[:, None]) if self.layout.is_first_stage else None
        hidden = self._decode_layers(hidden, positions_N[None, :, None].expand(3, -1, -1), attention)
        return self._logits(hidden[0]) if self.layout.is_last_stage else hidden

    def encode_visual(self, prompts: PromptBatch) -> tuple[Tensor, ...]:
        """Features of each prompt's images and videos, [visual tokens, 1 + D, H]: what takes the place of the word
        embedding, then what each of the first D layers adds (D = 0 but for DeepStack). One call of the tower for the
        whole batch.

        The tower runs even where no prompt has an image (on one blank patch group, result unused), so that every rank
        does the same.
        """
        pixels = torch.cat([prompt.pixel_values for prompt in prompts.prompts])
        grids = torch.cat([prompt.grid_thw for prompt in prompts.prompts])
        counts = [int(prompt.visual_mask.sum()) for prompt in prompts.prompts]
        merge = self.visual.spatial_merge_size
        blank = len(grids) == 0
        if blank:
            pixels, grids = pixels.new_zeros(merge * merge, pixels.shape[1]), grids.new_tensor([[1, merge, merge]])
        device = next(self.visual.parameters()).device
        output = self.visual(pixels.to(device, self.dtype), grid_thw=grids.to(device))
        features = torch.stack([output.pooler_output, *getattr(output, "deepstack_features", ())], dim=1)
        if blank:
            features = features[:0] + 0.0 * features.sum()  # no rows, but still in the graph: zero gradient, not none
        return features.split(counts)

    def _embed(
        self, token_ids: Tensor, prompts: PromptBatch, visual_embeds: tuple[Tensor, ...], attention: AttentionPass
    ) -> Tensor:
        """Word embeddings [S, B, H] with visual embeddings at their tokens; what deeper layers add goes into the
        pass."""
        hidden = self.language.embed_words(token_ids).transpose(0, 1)  # [B, S, H]: features come prompt by prompt
        where = torch.nn.functional.pad(prompts.visual_mask, (0, hidden.shape[1] - prompts.visual_mask.shape[1]))
        features = torch.cat(list(visual_embeds)).to(hidden.dtype)
        assert int(where.sum()) == len(features), "visual tokens and features differ; the processor should have seen it"
        hidden = hidden.masked_scatter(where[..., None].to(hidden.device), features[:, 0])
        if features.shape[1] > 1:
            batch, sequence = where.to(hidden.device).nonzero(as_tuple=True)
            added = features[:, 1:]
            if self.config.sequence_parallel:  # each rank adds other tokens', so that gradients are parts of a sum
                added = copy_to_tensor_model_parallel_region(added)
            for layer in range(added.shape[1]):
                deeper = VisualFeatures(sequence, batch, added[:, layer])
                if self.config.sequence_parallel:
                    part = self.padded_length(hidden.shape[1]) // self.layout.tensor_size
                    deeper = deeper.part(self.layout.tensor_rank * part, (self.layout.tensor_rank + 1) * part)
                attention.deepstack[layer] = deeper
        return hidden.transpose(0, 1).contiguous()

    def _decode_layers(self, hidden: Tensor | None, position_ids: Tensor, attention: AttentionPass) -> Tensor:
        angles = rotary_angles(
            position_ids,
            self.language.rotary_pos_emb.inv_freq,
            self.shape.mrope_section,
            self.shape.family.interleaved_rotary,
        )
        return self.language.decoder(hidden_states=hidden, attention_mask=attention, rotary_pos_emb=angles)

    def _predicting_rows(self, hidden: Tensor, attention: AttentionPass) -> Tensor:
        """[S, B, H] -> [B, G, R, H]: the rows whose logits predict response tokens 0..R-1."""
        layout = attention.layout
        batch = torch.arange(layout.B, device=hidden.device)
        last_prompt = hidden[layout.prompt_lengths - 1, batch]
        responses = hidden[layout.P :].transpose(0, 1).unflatten(1, (layout.G, layout.R))
        first = last_prompt[:, None, None].expand(-1, layout.G, 1, -1)
        return torch.cat([first, responses[:, :, :-1]], dim=2)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = None
        if self.language.share_embeddings_and_output_weights:
            weight = self.language.shared_embedding_or_output_weight()
        logits, _ = self.language.output_layer(hidden.flatten(0, -2)[:, None], weight=weight)
        logits = logits.view(*hidden.shape[:-1], -1)
        columns = logits.shape[-1]
        padding = columns * (self.layout.tensor_rank + 1) - self.shape.vocab_size
        if padding > 0:  # finite, so that 0 * logit stays 0 in an entropy
            logits = torch.cat(
                [
                    logits[..., : max(columns - padding, 0)],
                    torch.full_like(logits[..., max(columns - padding, 0) :], -1e9),
                ],
                dim=-1,
            )
        return logits
