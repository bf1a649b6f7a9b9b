"""Trainable engine: gradients of a list of micro-batches under an objective, and the optimizer step.

Two frameworks divide losses, and the engine cancels both divisions:
- megatron's schedule divides by the number of micro-batches; `calculate_per_token_loss` and a 3-tuple turn that off;
- DeepSpeed averages gradients over data-parallel ranks; losses are multiplied by the number of those ranks.
The gradient thus is that of sum(loss) over all micro-batches and ranks. `tests/distributed/test_layouts.py` compares it
with one process on the whole batch.
"""

import math
from typing import Any, Iterable, Iterator, Sequence, cast

import torch
from torch import Tensor

from megatron_ral.compat.deepspeed_coalesced_reduction import coalesced_reduction
from megatron_ral.compat.deepspeed_early_reduction import EarlyReduction
from megatron_ral.compat.deepspeed_gradient_norm import use_gradient_norm
from megatron_ral.engine.outputs import StepResult
from megatron_ral.engine.settings import EngineSettings, TrainingSettings
from megatron_ral.engine.stage import StageEngine
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.shape import ModelShape
from megatron_ral.objectives.base import Objective, add_metrics
from megatron_ral.parallel.collectives import all_reduce_sum_, sum_metrics
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.types import TrainBatch
from megatron_ral.weights.resharding import StateSource, fitting_shard


class _AttachLoss(torch.autograd.Function):
    """Identity on a stage's output whose backward pass also feeds a loss formed on this stage.

    megatron does the same with its mixture-of-experts loss. An attention loss thus stays on its layer's stage.
    """

    @staticmethod
    def forward(ctx, output: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(loss)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.scale), None


class PolicyEngine(StageEngine):
    """Trainable stage of one rank.

    Args:
        shape, process_groups, settings: As for StageEngine.
        training: How the weights are trained.
    """

    def __init__(
        self, shape: ModelShape, process_groups: ProcessGroups, settings: EngineSettings, training: TrainingSettings
    ):
        super().__init__(shape, process_groups, settings, training)
        self.training = training
        self.num_steps_taken, self._losses_finite = 0, True
        use_gradient_norm(self.deepspeed.optimizer, self._own_norm)
        self._make_optimizer_state()
        self._trainable = {
            name: parameter for name, parameter in self.stage.named_parameters() if parameter.requires_grad
        }
        for parameter in self._trainable.values():
            parameter.grad_dtype = torch.float32  # micro-batches add up in float32 whatever the model's precision
        self._early = EarlyReduction(
            self.deepspeed.optimizer,
            self.stage.language.decoder.layers if settings.overlap else (),
        )
        self._partial = [
            parameter
            for parameter in self._trainable.values()
            if self.layout.tensor_size > 1 and getattr(parameter, "partial_over_tensor_ranks", False)
        ]
        self._tied = [
            parameter
            for parameter in self._trainable.values()
            if shape.tie_word_embeddings and process_groups.embedding is not None and self._is_embedding(parameter)
        ]

    def forward_backward(self, batches: Sequence[TrainBatch], objective: Objective) -> dict[str, float]:
        """Form the gradients of all micro-batches, reduced once over data-parallel ranks, ready for `step`.

        Args:
            batches: Micro-batches of one optimizer step on this rank.
            objective: Loss, either an `Objective` or something that is called in the same way.

        Returns:
            Metrics summed over micro-batches, ranks and stages, the same on every rank.
        """
        metrics = self.accumulate(batches, objective)
        self._sum_gradients(self._partial, self.process_groups.tensor)
        self._sum_gradients(self._tied, self.process_groups.embedding)
        sums = sum_metrics(metrics, self.process_groups)
        if not all(math.isfinite(value) for name, value in sums.items() if name.startswith("loss")):
            self._losses_finite = False
        return sums

    def accumulate(self, batches: Sequence[TrainBatch], objective: Objective) -> dict[str, Tensor]:
        """Run the stage forward and backward, the local part of `forward_backward`. Return this rank's metrics."""
        recorded = frozenset(self.local_layers(sorted(objective.recorded_layers)))
        scale = float(self.layout.data_size)  # cancels DeepSpeed's mean over data-parallel ranks
        metrics: dict[str, Tensor] = {}
        to_come = len(batches)

        def forward_step(iterator, stage):
            nonlocal to_come
            to_come -= 1
            batch, layout = self.arrive(next(iterator))
            pass_ = AttentionPass(layout, recorded)
            output = stage(batch.groups, pass_)
            for layer in sorted(recorded):
                record = pass_.records[layer]
                assert record.query_BGRnD.requires_grad, f"layer {layer} was recorded without gradient (recomputed?)"
                loss, values = objective.attention_loss(
                    layer, self.attention_rows(record, pass_, objective.position), batch
                )
                add_metrics(metrics, values)
                if loss is not None:
                    output = _AttachLoss.apply(output, loss, scale)
            if to_come == 0:
                self._early.begin_with_backward_of(output)

            def token_loss(logits):
                loss, values = objective.token_loss(
                    self.token_outputs(logits, batch.groups, layout, objective.temperature), batch
                )
                add_metrics(metrics, values)
                return loss * scale, torch.ones((), dtype=torch.int), {}

            return output, token_loss

        with self.ready(recorded), coalesced_reduction(self.deepspeed):
            self.run_schedule(forward_step, batches, forward_only=False)
            reduced = self._early.finish()
            for parameter in self._trainable.values():
                if (
                    parameter.grad is None and id(parameter) not in reduced
                ):  # an old gradient would be reused in its place
                    parameter.grad = torch.zeros(
                        cast(Any, parameter).ds_shape, device=self.process_groups.device, dtype=torch.float32
                    )
        return metrics

    def step(self) -> StepResult:
        """Clip the gradient and update this rank's shard with AdamW. Parameters stay sharded afterwards.

        Where the gradient, or a loss since the last step, is not finite on any rank, nothing changes but the place in
        the learning rate's schedule.
        """
        learning_rate = self.training.learning_rate_at(self.num_steps_taken)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        self.num_steps_taken += 1
        self._losses_finite = True
        return StepResult(
            float(self.deepspeed.get_global_grad_norm()), learning_rate, not self.deepspeed.optimizer.overflow
        )

    def gradient_shards(self) -> list[Tensor]:
        """Return copies of this rank's reduced gradient shards, in parameter order."""
        zero = self.deepspeed.optimizer
        return [zero.get_local_fp32_grad_for_param(parameter).clone() for parameter in self._trainable.values()]

    def gradient_norm(self, shards: Iterable[Tensor]) -> float:
        """Return the global norm of gradient shards, every parameter of every stage counted once."""
        return float(self._norm(shards))

    def _own_norm(self) -> Tensor:
        """Return the norm that DeepSpeed clips by. Where it is not finite, all ranks skip the step.

        It is made not finite after a loss that is not, even where the gradient is finite.
        """
        zero = self.deepspeed.optimizer
        return self._norm(
            map(zero.get_local_fp32_grad_for_param, self._trainable.values()), 0.0 if self._losses_finite else math.nan
        )

    def _norm(self, shards: Iterable[Tensor], start: float = 0.0) -> Tensor:
        counts = []
        for parameter in self._trainable.values():
            sharded_over_tensor = getattr(parameter, "tensor_model_parallel", False)
            once = not getattr(parameter, "shared", False) and (sharded_over_tensor or self.layout.tensor_rank == 0)
            counts.append(float(once))  # times 0, not left out: not finite in a copy is not finite in all
        norms = torch.stack(cast(Any, torch)._foreach_norm(list(shards), 2, dtype=torch.float64))
        total = (norms.square() * torch.tensor(counts).to(norms)).sum() + start
        all_reduce_sum_(total, self.process_groups.data)
        all_reduce_sum_(total, self.process_groups.model)
        return total.sqrt().float()

    def set_gradient_shards(self, shards: Sequence[Tensor]) -> None:
        """Replace the reduced gradient by shards in the order of `gradient_shards`."""
        for parameter, shard in zip(self._trainable.values(), shards):
            self.deepspeed.optimizer.set_local_grad_for_param(shard, parameter)

    def faulty_gradients(self) -> list[str]:
        """Return the parameters of this rank's stage whose reduced gradient is not finite in this rank's shard."""
        return [
            name for name, shard in zip(self._trainable, self.gradient_shards()) if not bool(shard.isfinite().all())
        ]

    def master_shards(self) -> dict[str, Tensor]:
        """Return this rank's shards of the trainable parameters' float32 master weights, by name."""
        zero = self.deepspeed.optimizer
        return {name: zero.get_local_fp32_param(parameter, None) for name, parameter in self._trainable.items()}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's shards of master weights and AdamW moments by `<parameter>/<kind>`, flat float32.

        The next step may change them in place.
        """
        zero = self.deepspeed.optimizer
        for name, parameter in self._trainable.items():
            # DeepSpeed's own accessor would copy offloaded state to the device first.
            group, start, numel = zero.grad_position[zero.get_param_id(parameter)]
            master = zero.fp32_partitioned_groups_flat[group]
            kept = {"master": master, **zero.optimizer.state[master]}
            for kind in _STATE_KINDS:
                yield f"{name}/{kind}", kept[kind].detach().narrow(0, start, numel)
        yield "adamw_step", torch.tensor(self._adamw_step())

    def load_state(self, state: StateSource, num_steps_taken: int) -> None:
        """Load what `state` yielded. Each key is asked for once.

        Raises:
            CheckpointError: A shard is missing or of another size.
        """
        zero = self.deepspeed.optimizer
        for name, parameter in self._trainable.items():
            for kind in _STATE_KINDS:
                value = fitting_shard(state, f"{name}/{kind}", cast(Any, parameter).ds_tensor.numel())
                zero.set_local_hp_param(value, parameter, None if kind == "master" else kind)
                if kind == "master":
                    cast(Any, parameter).ds_tensor.data.copy_(value)
        step = fitting_shard(state, "adamw_step", 1)
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat]["step"].fill_(float(step))
        self.num_steps_taken = num_steps_taken

    def _make_optimizer_state(self) -> None:
        """Make AdamW's moments before the first step, so that a checkpoint can fill them and memory shows them."""
        zero = self.deepspeed.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            step = torch.zeros((), dtype=torch.float32, device=flat.device if flat.is_cuda else "cpu")
            zero.optimizer.state[flat].update(
                step=step, exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat)
            )

    def _adamw_step(self) -> float:
        zero = self.deepspeed.optimizer
        return float(zero.optimizer.state[zero.fp32_partitioned_groups_flat[0]]["step"])

    def _is_embedding(self, parameter: Any) -> bool:
        return parameter is self.stage.language.shared_embedding_or_output_weight()

    def _sum_gradients(self, parameters: Sequence[Any], group: Any) -> None:
        """Add up the gradients of parameters that several ranks hold a copy of, each with a part of the gradient.

        These are norms over tensor-parallel ranks and tied embeddings over the first and last stage. One all-reduce
        serves all of them. Shards match because every rank cuts a parameter alike over data-parallel ranks.
        """
        if not parameters:
            return
        zero = self.deepspeed.optimizer
        shards = [zero.get_local_fp32_grad_for_param(parameter) for parameter in parameters]
        total = all_reduce_sum_(torch.cat([shard.flatten() for shard in shards]), group)
        for parameter, part in zip(parameters, total.split([shard.numel() for shard in shards])):
            zero.set_local_grad_for_param(part, parameter)


_STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
