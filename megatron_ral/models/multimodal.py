"""One pipeline stage of the multimodal model: vision tower on the first, language layers on all, logits on the last.

The forward pass reads a `GroupBatch` (or, decoding, one token per response) and an `AttentionPass`. It returns the
hidden states for the next stage, or on the last stage the logits of the rows that predict response tokens: the first
response token is predicted by the prompt's last row, token r by response row r - 1.
"""

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megatron_ral.models.group_layout import AttentionPass
from megatron_ral.models.language import build_language_stage
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.layout import ParallelLayout
from megatron_ral.types import GroupBatch, PromptBatch


class MultimodalStage(torch.nn.Module):
    """Stage of one rank.

    Args:
        shape: model.
        layout: this rank's place.
        dtype: of parameters and activations.
        device: where to build.
    """

    def __init__(self, shape: ModelShape, layout: ParallelLayout, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.shape, self.layout, self.dtype = shape, layout, dtype
        self.language = build_language_stage(shape, layout, dtype, device)
        self.config, self.model_type = self.language.config, self.language.model_type
        self.visual = None
        if layout.is_first_stage:
            with torch.device(device):
                self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(shape.vision, dtype=dtype)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states from the previous stage (called by megatron's schedule)."""
        self.language.set_input_tensor(input_tensor)

    def forward(self, groups: GroupBatch, attention: AttentionPass) -> Tensor:
        """Whole group layout.

        Returns:
            [S, B, H] hidden states, or on the last stage logits [B, G, R, v] (this rank's share of the vocabulary).
        """
        hidden = self._embed(groups) if self.layout.is_first_stage else None
        hidden = self._decode_layers(hidden, groups.position_ids, attention)
        if not self.layout.is_last_stage:
            return hidden
        return self._logits(self._predicting_rows(hidden, attention))

    def prefill(self, prompts: PromptBatch, visual_embeds: tuple[Tensor, ...] | None,
                attention: AttentionPass) -> Tensor:
        """Prompts alone, filling the cache. Returns hidden states, or on the last stage logits [B, v] of each
        prompt's last row."""
        hidden = None
        if self.layout.is_first_stage:
            hidden = self._place_visual(self._word_embeddings(prompts.input_ids), prompts, visual_embeds)
        hidden = self._decode_layers(hidden, prompts.position_ids, attention)
        if not self.layout.is_last_stage:
            return hidden
        last = attention.layout.prompt_lengths - 1
        return self._logits(hidden[last, torch.arange(len(last), device=last.device)])

    def decode(self, token_BG: Tensor, positions_BG: Tensor, attention: AttentionPass) -> Tensor:
        """One token per response. Returns [G, B, H] hidden states, or on the last stage logits [B, G, v]."""
        hidden = self._word_embeddings(token_BG) if self.layout.is_first_stage else None
        hidden = self._decode_layers(hidden, positions_BG[None].expand(3, -1, -1), attention)
        return self._logits(hidden.transpose(0, 1)) if self.layout.is_last_stage else hidden

    def encode_images(self, prompts: PromptBatch) -> tuple[Tensor, ...]:
        """Visual embeddings of each prompt, [visual tokens, H]; one call of the tower for the whole batch.

        The tower runs even where no prompt has an image (on one blank patch group, result unused): under ZeRO-3 every
        rank must use every module equally often.
        """
        pixels = torch.cat([prompt.pixel_values for prompt in prompts.prompts])
        grids = torch.cat([prompt.image_grid_thw for prompt in prompts.prompts])
        counts = [int(prompt.visual_mask.sum()) for prompt in prompts.prompts]
        merge = self.visual.spatial_merge_size
        blank = len(grids) == 0
        if blank:
            pixels, grids = pixels.new_zeros(merge * merge, pixels.shape[1]), grids.new_tensor([[1, merge, merge]])
        device = next(self.visual.parameters()).device
        features = self.visual(pixels.to(device, self.dtype), grid_thw=grids.to(device)).pooler_output
        if blank:
            features = features[:0] + 0.0 * features.sum()  # no rows, but still in the graph: zero gradient, not none
        return features.split(counts)

    def _word_embeddings(self, token_ids: Tensor) -> Tensor:
        return self.language.embedding(input_ids=token_ids, position_ids=None)

    def _embed(self, groups: GroupBatch) -> Tensor:
        embeds = groups.visual_embeds
        if embeds is None:
            embeds = self.encode_images(groups.prompts)
        return self._place_visual(self._word_embeddings(groups.input_ids), groups.prompts, embeds)

    def _place_visual(self, hidden: Tensor, prompts: PromptBatch, visual_embeds: tuple[Tensor, ...]) -> Tensor:
        """Put visual embeddings at their tokens of [S, B, H] hidden states."""
        where = torch.nn.functional.pad(prompts.visual_mask, (0, hidden.shape[0] - prompts.visual_mask.shape[1]))
        features = torch.cat(list(visual_embeds)).to(hidden.dtype)
        assert int(where.sum()) == len(features), "visual tokens and features differ; the processor should have seen it"
        # [B, S] order, because features come prompt by prompt.
        hidden = hidden.transpose(0, 1).masked_scatter(where[..., None].to(hidden.device), features)
        return hidden.transpose(0, 1).contiguous()

    def _decode_layers(self, hidden: Tensor | None, position_ids: Tensor, attention: AttentionPass) -> Tensor:
        rotary = self.language.rotary_pos_emb(position_ids, list(self.shape.mrope_section))
        return self.language.decoder(hidden_states=hidden, attention_mask=attention, rotary_pos_emb=rotary)

    def _predicting_rows(self, hidden: Tensor, attention: AttentionPass) -> Tensor:
        """[S, B, H] -> [B, G, R, H]: the rows whose logits predict response tokens 0..R-1."""
        layout = attention.layout
        batch = torch.arange(layout.B, device=hidden.device)
        last_prompt = hidden[layout.prompt_lengths - 1, batch]
        responses = hidden[layout.P:].transpose(0, 1).unflatten(1, (layout.G, layout.R))
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
            logits = torch.cat([logits[..., : max(columns - padding, 0)],
                                torch.full_like(logits[..., max(columns - padding, 0):], -1e9)], dim=-1)
        return logits
