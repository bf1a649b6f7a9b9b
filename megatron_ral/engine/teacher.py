"""A frozen teacher in a layout of its own: it reads what its student's ranks hold, and hands back what a loss needs.

What crosses between the layouts, for each micro-batch of the student:
- to the teacher: samples as they stand in the shard (encoded pictures) and token ids; the prompt is made anew;
- back: head-averaged attention of the asked layers to the student's stages that own theirs, and what the teacher's LM head
  reads, [B, G, R, H], to the student's last stage. There a copy of that head, cut like the student's vocabulary, makes
  the teacher's logits of one micro-batch at a time. H numbers per row travel instead of the whole vocabulary's, and the
  divergence stays exact whatever the two layouts are.
What is where it is needed already is not sent; in one common layout that is everything, but for layers that a teacher of
another depth has on another stage, and for prompts that ranks ask unequal numbers of.
"""

from dataclasses import dataclass, replace
from typing import Any, Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.frozen import FrozenEngine
from megatron_ral.engine.pipelined_decoder import PromptResponses, SamplingSettings, sample_responses
from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.engine.stage import DTYPES
from megatron_ral.weights.conversion import open_weights
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.collectives import gather_objects
from megatron_ral.parallel.exchange import Assignment, Item, carry_objects, carry_tensors
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.types import GroupBatch, Prompt, Sample, pad_prompts


@dataclass(frozen=True)
class SentGroups:
    """A GroupBatch as it travels."""

    samples: tuple[Sample, ...]
    response_ids: Tensor
    response_lengths: Tensor


class TeacherHead:
    """The teacher's LM head as one tensor rank of the student sees it: the student's columns of the vocabulary.

    Args:
        shape: the teacher.
        path: its folder.
        student_shape: decides the cut.
        student: the student's groups; this rank's place.
        dtype: "float32" or "bfloat16".
    """

    def __init__(self, shape: ModelShape, path: str, student_shape: ModelShape, student: ProcessGroups, dtype: str):
        layout = student.layout
        columns = student_shape.padded_vocab_size(layout.tensor_size) // layout.tensor_size
        self.start = columns * layout.tensor_rank
        self.num_common = min(shape.vocab_size, student_shape.vocab_size)
        """Tokens that both models have; a vocabulary may be padded further in one of them."""
        name = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
        stop = min(self.start + columns, shape.vocab_size)
        weight = torch.zeros(columns, shape.hidden_size, dtype=DTYPES[dtype])
        if stop > self.start:
            weight[: stop - self.start] = open_weights(path).part(name, 0, self.start, stop).to(weight.dtype)
        self.weight = weight.to(student.device)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[B, G, R, H] -> [B, G, R, v] of this rank's columns."""
        return self.mask(F.linear(hidden.flatten(0, -2)[:, None], self.weight).view(*hidden.shape[:-1], -1))

    def mask(self, logits: Tensor) -> Tensor:
        """Columns that only one of the models has, set to -1e9."""
        common = max(self.num_common - self.start, 0)
        if common >= logits.shape[-1]:
            return logits
        outside = torch.arange(logits.shape[-1], device=logits.device) >= common
        return logits.masked_fill(outside, -1e9)


class TeacherEngine(FrozenEngine):
    """Frozen teacher of one rank.

    Args:
        shape, groups, dtype, path, sequence_parallel, cpu_offload: of the teacher, as for StageEngine.
        student: groups of the student, over the same ranks.
        student_shape: model of the student.
        processor: makes prompts of samples; teacher and student agree on it.
    """

    def __init__(
        self,
        shape: ModelShape,
        process_groups: ProcessGroups,
        dtype: str,
        path: str,
        *,
        student: ProcessGroups,
        student_shape: ModelShape,
        processor: PromptProcessor,
        sequence_parallel: bool = False,
        cpu_offload: bool = False,
    ):
        super().__init__(shape, process_groups, dtype, path, sequence_parallel, cpu_offload)
        self.student, self.student_shape, self.processor = student, student_shape, processor
        self.head = TeacherHead(shape, path, student_shape, student, dtype) if student.layout.is_last_stage else None

    def matching_layer(self, student_layer: int) -> int:
        """The teacher's layer at the same relative depth: both ends of a layer's share of the depth are rounded up, so
        that last goes with last."""
        return -(-(student_layer + 1) * self.shape.num_layers // self.student_shape.num_layers) - 1

    def read(
        self,
        batches: Sequence[GroupBatch],
        layers: Sequence[int],
        *,
        row_kind: str = "token",
        keep: Callable[[AttentionRows, GroupBatch], Tensor],
        hidden_states: bool = True,
    ) -> list[ForwardOutput]:
        """The teacher's view of the student's micro-batches.

        Args:
            batches: this rank's, in the student's layout.
            layers: 0-based layers of the student whose counterparts' rows are wanted.
            row_kind: `token` or `predictor`.
            keep: rows -> [B, G, R, S] float32.
            hidden_states: whether what the LM head reads is wanted.

        Returns:
            One ForwardOutput per batch: `attention` by the *student's* layers on the stage of the student that owns them,
            in the host's memory (all layers of a long rollout are more than a device holds); `hidden` on the student's
            last stage. No gradient.
        """
        match = {layer: self.matching_layer(layer) for layer in layers}
        work = self._assignment(len(batches))
        received, taken = self._receive_groups(work, batches), work.taken()
        results: list[ForwardOutput] = []
        with self.resident():
            if taken:  # ranks may ask for fewer micro-batches than there are replicas
                results = self.forward(
                    [received[item] for item in taken],
                    sorted(set(match.values())),
                    row_kind=row_kind,
                    hidden_states=True,  # never its logits
                    keep=lambda rows, groups: keep(rows, groups).cpu(),
                )
        return self._hand_back(work, batches, match, dict(zip(taken, results)), hidden_states)

    def answer(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
    ) -> list[PromptResponses]:
        """The teacher's own responses to the student's prompts (each rank's in the student's layout, as many as it
        likes), on every rank of the replica that asked."""
        work, rank = self._assignment(len(prompts)), self.layout.rank
        mine = {(self.student.layout.data_rank, index): prompt for index, prompt in enumerate(prompts)}
        sent = carry_objects(
            work.inputs(), rank, {item: prompt.sample for item, prompt in mine.items()}, self.process_groups.device
        )
        taken = work.taken()
        own = [mine[item] if item in mine else self.processor(sent[item]) for item in taken]
        rows: list[PromptResponses] = []
        with self.resident():
            for responses, _ in sample_responses(self, own, settings, batch_size, *identity):
                rows += PromptResponses.split(responses)
        returned = carry_objects(work.answers(), rank, dict(zip(taken, rows)), self.process_groups.device)
        return [returned[item] for item in sorted(mine)]

    def _assignment(self, count: int) -> Assignment:
        return Assignment(self.student.layout, self.layout, tuple(gather_objects(count, self.student.data)))

    def _receive_groups(self, work: Assignment, batches: Sequence[GroupBatch]) -> dict[Item, GroupBatch]:
        """The micro-batches this rank's replica takes, without the student's visual embeddings."""
        home = self.student.layout.data_rank
        mine = {(home, index): batch for index, batch in enumerate(batches)}
        packed = {
            item: SentGroups(
                tuple(prompt.sample for prompt in batch.prompts.prompts),
                batch.response_ids.clone(),
                batch.response_lengths.clone(),
            )
            for item, batch in mine.items()
        }
        sent = carry_objects(work.inputs(), self.layout.rank, packed, self.process_groups.device)
        return {
            item: replace(mine[item], visual_embeds=None) if item in mine else self._unpack(sent[item])
            for item in work.taken()
        }

    def _unpack(self, sent: SentGroups) -> GroupBatch:
        prompts = pad_prompts([self.processor(sample) for sample in sent.samples], self.processor.pad_token_id)
        return GroupBatch(prompts, sent.response_ids, sent.response_lengths)

    def _hand_back(
        self,
        work: Assignment,
        batches: Sequence[GroupBatch],
        match: Mapping[int, int],
        outputs: Mapping[Item, ForwardOutput],
        hidden_states: bool,
    ) -> list[ForwardOutput]:
        home, device = self.student.layout, self.process_groups.device
        names = [
            (
                layer,
                self.layout.stage_of_layer(match[layer], self.shape.num_layers),
                home.stage_of_layer(layer, self.student_shape.num_layers),
            )
            for layer in match
        ]
        if hidden_states:
            names.append(("hidden", self.layout.pipeline_size - 1, home.pipeline_size - 1))

        def empty(what: Any) -> Tensor:
            (_, index), name = what
            B, G, R = batches[index].response_ids.shape
            if name == "hidden":
                return torch.empty(B, G, R, self.shape.hidden_size, dtype=self.stage.dtype, device=device)
            return torch.empty(B, G, R, batches[index].prompts.input_ids.shape[1] + R, device=device)

        results = [ForwardOutput(attention={}) for _ in batches]
        for index, name, away_stage, home_stage in (
            (index, *name) for index in range(max(work.counts)) for name in names
        ):
            # one map of every home at a time, so that a device holds no more of them
            transfers = [
                transfer
                for transfer in work.stage_results(name, away_stage, home_stage)
                if transfer.what[0][1] == index
            ]
            have = {
                (item, name): output.hidden if name == "hidden" else output.attention[match[name]].to(device)
                for item, output in outputs.items()
                if item[1] == index and self.layout.pipeline_rank == away_stage
            }
            for _, arrived in carry_tensors(transfers, self.layout.rank, have, empty).items():
                if name == "hidden":
                    results[index] = replace(results[index], hidden=arrived)
                else:
                    results[index].attention[name] = arrived.cpu()
        return results
