"""One pipeline stage of the multimodal model: vision tower on the first, language layers on all, logits on the last.

The forward pass reads a `GroupBatch` (or one token per response, when decoding) and an `AttentionPass`. It returns the
hidden states for the next stage. The last stage returns logits of the rows that predict response tokens: the prompt's
last row predicts the first response token, and response row r - 1 predicts token r. A pass over groups has no padding
(`attention/group_layout.py`); prompts that are generated from, and single tokens, are batches.

Under sequence parallelism the sequence is padded to a multiple of the tensor ranks, and hidden states outside attention
are cut over them. Visual embeddings are inserted before the cut, and rows are chosen after the parts are gathered.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Sequence, cast

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_ral.compat.megatron_rotary import use_prepared_rotation
from megatron_ral.functional.positions import rotary_angles, rotary_axes
from megatron_ral.models.attention_pass import AttentionPass, VisualFeatures
from megatron_ral.models.families import build_tower
from megatron_ral.models.language import StageLayer, build_language_stage
from megatron_ral.models.packed_attention import upload
from megatron_ral.models.shape import ModelShape
from megatron_ral.models.vision import encode_frames, frames_of, share
from megatron_ral.parallel.collectives import gather_rows
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.types import GroupBatch, PromptBatch


class MultimodalStage(torch.nn.Module):
    """Stage of one rank, with uninitialised weights.

    Args:
        shape: Shape of the model.
        layout: This rank's place.
        dtype: Type of parameters and activations.
        device: Device on which the stage is built.
        sequence_parallel: True to cut the sequence over tensor ranks outside attention; no effect on one tensor rank.
        recompute: True to save only the inputs of layers that are not recorded for the backward pass.
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
        use_prepared_rotation()
        axes = rotary_axes(shape.mrope_section, shape.family.interleaved_rotary)
        self.register_buffer("rotary_axes", axes.to(device), persistent=False)
        for layer in self.layers:
            layer.recompute = recompute
        self.visual = None
        if layout.is_first_stage:
            with torch.device(device):
                self.visual = build_tower(shape.vision, dtype)
            for parameter in self.visual.parameters():  # each tensor rank encodes other frames
                cast(Any, parameter).partial_over_tensor_ranks = True

    @property
    def layers(self) -> Sequence[StageLayer]:
        """Layers of this stage."""
        return cast(Sequence[StageLayer], self.language.decoder.layers)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Set the hidden states from the previous stage. megatron-core's schedule calls this."""
        self.language.set_input_tensor(cast(Any, input_tensor))

    def padded_length(self, length: int) -> int:
        """Return the next length, from `length` on, that can be cut over tensor ranks."""
        return -(-length // self._parts) * self._parts

    def boundary_shape(self, length: int, size: int) -> tuple[int, int, int]:
        """Return the shape of the hidden states sent to the next stage, for `size` sequences of `length` tokens."""
        return self.padded_length(length) // self._parts, size, self.shape.hidden_size

    @property
    def _parts(self) -> int:
        return self.layout.tensor_size if self.config.sequence_parallel else 1

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Switch sequence parallelism off inside a `with` block, for generation.

        A generating pass may have fewer tokens than there are tensor ranks.
        """
        switched: list[Any] = [
            part for part in (self.config, *self.modules()) if getattr(part, "sequence_parallel", False)
        ]
        for part in switched:
            part.sequence_parallel = False
        try:
            yield
        finally:
            for part in switched:
                part.sequence_parallel = True

    def forward(self, groups: GroupBatch, attention: AttentionPass) -> Tensor:
        """Run the stage over whole groups.

        Args:
            groups: Micro-batch.
            attention: Pass that tells which layers to record, and receives what they record.

        Returns:
            [T, 1, H] hidden states, of which each rank has its part of the padded T under sequence parallelism. The
            last stage returns logits [N, v] of this rank's part of the vocabulary, for the N response tokens in the
            order of groups, or their hidden states [N, H] if `attention.hidden_states` is set. All carry gradient.
        """
        packed, hidden = attention.layout.packed, None
        assert packed is not None
        length = packed.num_tokens
        padding = self.padded_length(length) - length
        if self.layout.is_first_stage:
            embeds = groups.visual_embeds if groups.visual_embeds is not None else self.encode_visual(groups.prompts)
            hidden = self._embed(packed.token_ids(groups)[None], _packed_places(groups.prompts), embeds, attention)
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, padding)))
        position_ids = torch.nn.functional.pad(packed.position_ids(groups), (0, padding))
        hidden = self._decode_layers(hidden, position_ids[:, None], attention)
        if not self.layout.is_last_stage:
            return hidden
        if self.config.sequence_parallel:
            # The output layer already sums the gradient over tensor ranks, so that it must only be cut here.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = packed.predicting_rows(self._read_rows(hidden, attention)[:, 0])
        return rows if attention.hidden_states else self._logits(rows)

    def prefill(
        self, prompts: PromptBatch, visual_embeds: tuple[Tensor, ...] | None, attention: AttentionPass
    ) -> Tensor:
        """Run the stage over prompts and fill the cache of `attention`.

        Returns:
            [P, B, H] hidden states, or on the last stage logits [B, v] of each prompt's last row.
        """
        hidden = None
        if self.layout.is_first_stage:
            assert visual_embeds is not None
            hidden = self._embed(prompts.input_ids, _padded_places(prompts), visual_embeds, attention)
        hidden = self._decode_layers(hidden, prompts.position_ids, attention)
        if not self.layout.is_last_stage:
            return hidden
        return self._logits(self._read_rows(hidden, attention)[0])

    def decode(self, token_N: Tensor, positions_N: Tensor, attention: AttentionPass) -> Tensor:
        """Run the stage over one token for each row of the cache.

        Args:
            token_N: [N] int64 tokens.
            positions_N: [N] int64 positions of text, equal on all three rotary axes.
            attention: Pass with the cache and the decoding step.

        Returns:
            [1, N, H] hidden states, or on the last stage logits [N, v].
        """
        hidden = self.language.embed_words(token_N[:, None]) if self.layout.is_first_stage else None
        hidden = self._decode_layers(hidden, positions_N[None, :, None].expand(3, -1, -1), attention)
        return self._logits(hidden[0]) if self.layout.is_last_stage else hidden

    def encode_visual(self, prompts: PromptBatch) -> tuple[Tensor, ...]:
        """Return the features of each prompt's images and videos.

        Tensor ranks have the same prompts. Each encodes its share of the frames, in calls of bounded size, and the
        features are gathered. The number of calls may differ between ranks, because the tower's parameters are whole
        meanwhile and nothing is sent inside the tower.

        Returns:
            [visual tokens, 1 + D, H] for each prompt: replacements of the word embeddings, then the features that each
            of the first D layers adds (D = 0 without DeepStack). They carry gradient to the tower.
        """
        assert self.visual is not None, "only the first stage has a vision tower"
        parts = [part for prompt in prompts.prompts for part in prompt.patches]
        shares = share(frames_of(torch.cat([prompt.grid_thw for prompt in prompts.prompts])), self.layout.tensor_size)
        patches = [sum(frame.patches for frame in frames) for frames in shares]
        rank, merge = self.layout.tensor_rank, cast(int, self.visual.spatial_merge_size)
        features = encode_frames(self.visual, self.shape.family, shares[rank], parts, first=sum(patches[:rank]))
        if self.layout.tensor_size > 1:
            tokens = [count // merge**2 for count in patches]
            features = gather_rows(features, tokens, cast(Any, parallel_state.get_tensor_model_parallel_group()))
        return features.split([int(prompt.visual_mask.sum()) for prompt in prompts.prompts])

    def _embed(
        self, token_ids: Tensor, places: Tensor, visual_embeds: tuple[Tensor, ...], attention: AttentionPass
    ) -> Tensor:
        """Return word embeddings [S, B, H] with visual embeddings at the visual tokens.

        Features for deeper layers are stored in `attention.deepstack`.

        Args:
            token_ids: [B, S] int64.
            places: Visual tokens in the order of their features, as rows of [S B, H]; in host memory.
            visual_embeds: Features of each prompt.
            attention: Pass.
        """
        hidden = self.language.embed_words(token_ids)
        features, device = torch.cat(list(visual_embeds)).to(hidden.dtype), hidden.device
        assert len(places) == len(features), "numbers of visual tokens and features differ, which the processor checks"
        rows = upload(places, device)
        hidden = hidden.flatten(0, 1).index_copy(0, rows, features[:, 0]).view_as(hidden)
        if features.shape[1] > 1:
            added = features[:, 1:]
            if self.config.sequence_parallel:
                # Each rank adds the features of its own tokens, so that gradients are parts of a sum.
                added = copy_to_tensor_model_parallel_region(added)
                part = self.padded_length(hidden.shape[0]) // self.layout.tensor_size * hidden.shape[1]
                start = self.layout.tensor_rank * part
                mine = ((places >= start) & (places < start + part)).nonzero()[:, 0]
                rows, added = upload(places[mine] - start, device), added.index_select(0, upload(mine, device))
            for layer in range(added.shape[1]):
                attention.deepstack[layer] = VisualFeatures(rows, added[:, layer])
        return hidden

    def _decode_layers(self, hidden: Tensor | None, position_ids: Tensor, attention: AttentionPass) -> Tensor:
        rotation = self.rotation(position_ids)
        return self.language.decoder(hidden_states=hidden, attention_mask=attention, rotary_pos_emb=rotation)

    def _read_rows(self, hidden: Tensor, attention: AttentionPass) -> Tensor:
        """Return the rows of the last layer's output that the LM head reads."""
        return hidden if self.layers[-1].returns_read_rows(attention) else attention.read_rows(hidden)

    def rotation(self, position_ids: Tensor) -> Tensor:
        """Return cosines and sines of positions [3, B, S], [2, S, B, 1, D], formed once for all layers."""
        angles = rotary_angles(position_ids, self.language.rotary_pos_emb.inv_freq, cast(Tensor, self.rotary_axes))
        return torch.stack([angles.cos(), angles.sin()]).to(self.dtype)

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the output layer's weight, [v, H], on the last stage."""
        if self.language.share_embeddings_and_output_weights:
            return self.language.shared_embedding_or_output_weight()
        return cast(Tensor, self.language.output_layer.weight)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.head_weight() if self.language.share_embeddings_and_output_weights else None
        logits, _ = self.language.output_layer(hidden.flatten(0, -2)[:, None], weight=weight)
        return self.without_padding(logits.view(*hidden.shape[:-1], -1))

    def without_padding(self, logits: Tensor) -> Tensor:
        """Return logits [..., v] of this rank with those of padded rows of the vocabulary out of reach."""
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


def _visual_tokens(prompts: PromptBatch) -> list[Tensor]:
    """Return the visual tokens of each prompt.

    The prompts are in host memory, so that the host does not wait for their number.
    """
    return [prompt.visual_mask.nonzero()[:, 0] for prompt in prompts.prompts]


def _packed_places(prompts: PromptBatch) -> Tensor:
    """Return the visual tokens of prompts that stand one after the other."""
    places, start = [], 0
    for prompt, own in zip(prompts.prompts, _visual_tokens(prompts)):
        places.append(own + start)
        start += len(prompt.input_ids)
    return torch.cat(places)


def _padded_places(prompts: PromptBatch) -> Tensor:
    """Return the visual tokens of padded prompts [B, P] as rows of [P B]."""
    found = _visual_tokens(prompts)
    return torch.cat([own * len(found) + batch for batch, own in enumerate(found)])
