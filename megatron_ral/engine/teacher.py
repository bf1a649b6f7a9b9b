"""Frozen teacher in a layout of its own. It reads the student's micro-batches and returns the inputs of the losses.

The following crosses between the two layouts for each micro-batch of the student:

- To the teacher: samples in the form of the shard (encoded pictures) and token ids. The teacher's rank makes the
  prompt.
- To the student's stages that own the chosen layers: head-averaged attention of the teacher's matching layers.
- To the student's last stage: inputs of the teacher's LM head, [B, G, R, H]. A copy of that head, cut like the
  student's vocabulary, forms the teacher's logits there, one micro-batch at a time. H numbers per row are sent instead
  of one per token of the vocabulary, and the divergence is exact for any two layouts.

A value is not sent where it already is on the rank that needs it. Where both models have the same layout, only two
things are sent: attention of layers that a teacher of another depth has on another stage, and prompts where ranks pass
unequal numbers.
"""

from dataclasses import dataclass, replace
from typing import Any, Callable, Literal, Mapping, Optional, Sequence, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.types import QueryPosition
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.frozen import FrozenEngine
from megatron_ral.engine.outputs import ForwardOutput
from megatron_ral.engine.pipelined_decoder import PromptResponses, sample_responses
from megatron_ral.engine.settings import EngineSettings
from megatron_ral.models.shape import ModelShape
from megatron_ral.parallel.collectives import gather_objects
from megatron_ral.parallel.exchange import Assignment, Item, carry_objects, carry_tensors
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.types import GroupBatch, Prompt, Sample, pad_prompts
from megatron_ral.weights.conversion import open_weights


@dataclass(frozen=True)
class SentGroups:
    """GroupBatch in the form that travels between ranks."""

    samples: tuple[Sample, ...]
    response_ids: Tensor
    response_lengths: Tensor


class TeacherHead:
    """Columns of the teacher's LM head that one tensor-parallel rank of the student needs.

    Args:
        shape: Shape of the teacher.
        path: Folder of the teacher.
        student_shape: Shape of the student, which decides the cut of the vocabulary.
        student: Process groups of the student.
        dtype: Precision of the weights.
    """

    def __init__(
        self, shape: ModelShape, path: str, student_shape: ModelShape, student: ProcessGroups, dtype: torch.dtype
    ):
        layout = student.layout
        columns = student_shape.padded_vocab_size(layout.tensor_size) // layout.tensor_size
        self.start = columns * layout.tensor_rank
        self.num_common = min(shape.vocab_size, student_shape.vocab_size)
        """Number of tokens that both models have. One of them may pad its vocabulary further."""
        name = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
        stop = min(self.start + columns, shape.vocab_size)
        weight = torch.zeros(columns, shape.hidden_size, dtype=dtype)
        if stop > self.start:
            weight[: stop - self.start] = open_weights(path).part(name, 0, self.start, stop).to(weight.dtype)
        self.weight = weight.to(student.device)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's columns of the logits, [B, G, R, H] -> [B, G, R, v]."""
        return self.mask(F.linear(hidden.flatten(0, -2)[:, None], self.weight).view(*hidden.shape[:-1], -1))

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits with the columns that only one of the models has set to -1e9."""
        common = max(self.num_common - self.start, 0)
        if common >= logits.shape[-1]:
            return logits
        outside = torch.arange(logits.shape[-1], device=logits.device) >= common
        return logits.masked_fill(outside, -1e9)


class TeacherEngine(FrozenEngine):
    """Frozen teacher of one rank.

    Args:
        shape, process_groups, settings: Shape, process groups and settings of the teacher, as for StageEngine.
        student: Process groups of the student, over the same ranks.
        student_shape: Shape of the student.
        processor: Maker of prompts from samples. Teacher and student agree on it.
    """

    def __init__(
        self,
        shape: ModelShape,
        process_groups: ProcessGroups,
        settings: EngineSettings,
        *,
        student: ProcessGroups,
        student_shape: ModelShape,
        processor: PromptProcessor,
    ):
        super().__init__(shape, process_groups, settings)
        self.student, self.student_shape, self.processor = student, student_shape, processor
        self.head: Optional[TeacherHead] = None
        if student.layout.is_last_stage:
            self.head = TeacherHead(shape, settings.path, student_shape, student, settings.torch_dtype)

    def matching_layer(self, student_layer: int) -> int:
        """Return the teacher's layer at the same relative depth, rounded up, so that last goes with last.

        Depth is counted in layers with softmax attention, because no other has an attention distribution.
        """
        ours, theirs = self.student_shape.softmax_layers, self.shape.softmax_layers
        return theirs[-(-(ours.index(student_layer) + 1) * len(theirs) // len(ours)) - 1]

    def read(
        self,
        batches: Sequence[GroupBatch],
        layers: Sequence[int],
        *,
        position: QueryPosition = QueryPosition.RESPONSE,
        store: Callable[[AttentionRows, GroupBatch], Tensor],
        hidden_states: bool = True,
    ) -> list[ForwardOutput]:
        """Run the teacher over the student's micro-batches.

        Args:
            batches: Micro-batches of this rank in the student's layout.
            layers: 0-based layers of the student whose counterparts' rows are wanted.
            position: Query position of the rows, `RESPONSE` or `PREDICTING`.
            store: Function from rows to the tensor [B, G, R, S] float32 that is returned of them.
            hidden_states: Whether the inputs of the LM head are wanted.

        Returns:
            One ForwardOutput per batch, without gradient. `attention` is keyed by the *student's* layers, on the stage
            of the student that owns them. It is in host memory, because all layers of a long rollout do not fit on a
            device. `hidden` is on the student's last stage.
        """
        match = {layer: self.matching_layer(layer) for layer in layers}
        work = self._assignment(len(batches))
        received, taken = self._receive_groups(work, batches), work.taken()
        results: list[ForwardOutput] = []
        with self.resident():
            if taken:  # a replica has none where ranks pass fewer micro-batches than there are replicas
                results = self.forward(
                    [received[item] for item in taken],
                    sorted(set(match.values())),
                    position=position,
                    hidden_states=True,  # the teacher's own stages never form logits
                    store=lambda rows, groups: store(rows, groups).cpu(),
                )
        return self._return_outputs(work, batches, match, dict(zip(taken, results)), hidden_states)

    def answer(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
    ) -> list[PromptResponses]:
        """Sample the teacher's own responses to the student's prompts.

        All ranks call this together. A replica is the set of ranks that hold one copy of a model.

        Args:
            prompts: Prompts of this rank in the student's layout, the same on all ranks of the student's replica.
                Replicas may pass unequal numbers, also none.
            settings: Settings of the sampling.
            batch_size: Largest number of prompts in one batch (see `sample_responses`).
            identity: Key of the random streams, such as seed and step.

        Returns:
            Responses to each of `prompts` in order, the same on all ranks of the student's replica. No gradient.
        """
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
        """Return which replica of the teacher takes which item, from this rank's number of items."""
        return Assignment(self.student.layout, self.layout, tuple(gather_objects(count, self.student.data)))

    def _receive_groups(self, work: Assignment, batches: Sequence[GroupBatch]) -> dict[Item, GroupBatch]:
        """Return the micro-batches that this rank's replica of the teacher takes.

        They are without the student's visual embeddings.
        """
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
        """Return a micro-batch with prompts made from its samples."""
        prompts = pad_prompts([self.processor(sample) for sample in sent.samples], self.processor.pad_token_id)
        return GroupBatch(prompts, sent.response_ids, sent.response_lengths)

    def _return_outputs(
        self,
        work: Assignment,
        batches: Sequence[GroupBatch],
        match: Mapping[int, int],
        outputs: Mapping[Item, ForwardOutput],
        hidden_states: bool,
    ) -> list[ForwardOutput]:
        """Carry the teacher's outputs to the ranks of the student that need them.

        Args:
            work: Assignment of micro-batches to replicas of the teacher.
            batches: Micro-batches of this rank in the student's layout.
            match: Layer of the student -> layer of the teacher.
            outputs: Outputs of the micro-batches that this rank's replica of the teacher took.
            hidden_states: Whether the inputs of the LM head are wanted.

        Returns:
            One ForwardOutput per batch, as `read` returns them.
        """
        home, device = self.student.layout, self.process_groups.device
        routes: list[tuple[int | Literal["hidden"], int, int]] = [
            (
                layer,
                self.layout.stage_of_layer(match[layer], self.shape.num_layers),
                home.stage_of_layer(layer, self.student_shape.num_layers),
            )
            for layer in match
        ]
        if hidden_states:
            routes.append(("hidden", self.layout.pipeline_size - 1, home.pipeline_size - 1))

        def empty(key: Any) -> Tensor:
            (_, index), name = key
            B, G, R = batches[index].response_ids.shape
            if name == "hidden":
                num_tokens = int(batches[index].response_lengths.sum())
                return torch.empty(num_tokens, self.shape.hidden_size, dtype=self.stage.dtype, device=device)
            return torch.empty(B, G, R, batches[index].prompts.input_ids.shape[1] + R, device=device)

        results = [ForwardOutput(attention={}) for _ in batches]
        for index, name, away_stage, home_stage in (
            (index, *route) for index in range(max(work.counts)) for route in routes
        ):
            # One value per home replica at a time, so that a device never holds more of them.
            transfers = [
                transfer
                for transfer in work.stage_results(name, away_stage, home_stage)
                if transfer.what[0][1] == index
            ]
            available: dict[Any, Any] = {
                (item, name): output.hidden if name == "hidden" else output.attention[match[name]].to(device)
                for item, output in outputs.items()
                if item[1] == index and self.layout.pipeline_rank == away_stage
            }
            for arrived in carry_tensors(transfers, self.layout.rank, available, empty).values():
                if name == "hidden":
                    results[index] = replace(results[index], hidden=arrived)
                else:
                    cast(dict[int, Any], results[index].attention)[name] = arrived.cpu()
        return results
