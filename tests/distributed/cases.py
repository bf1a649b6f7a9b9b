"""What the ranks of the distributed tests do: fixed rollouts of a tiny model, and one optimizer step on them."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_ral.config import RunConfig
from megatron_ral.config.adapter import AdapterConfig
from megatron_ral.config.loss import LossConfig, OptimizerConfig
from megatron_ral.config.sections import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_ral.data.loader import PromptLoader, open_sources
from megatron_ral.data.peers import ReplicaPeers
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.frozen import FrozenEngine
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.engine.settings import EngineSettings, shape_from_config
from megatron_ral.engine.stage import StageEngine
from megatron_ral.evaluation.prompt_set import read_prompts
from megatron_ral.functional.advantages import group_advantages
from megatron_ral.objectives.base import Objective, finish_metrics
from megatron_ral.parallel.collectives import gather_from_all, gather_shards
from megatron_ral.parallel.process_groups import ProcessGroups, start_groups, stop_groups
from megatron_ral.rollout.assemble import assemble_minibatches
from megatron_ral.rollout.collect import RolloutBatch
from megatron_ral.training.build import build_objective, build_policy
from megatron_ral.types import GroupBatch, RlBatch, Score, StepTotals, pad_prompts

NUM_GROUPS, GROUP_SIZE, LENGTH = 8, 3, 7


def make_config(
    path: str,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    parallel: dict | None = None,
    dtype: str = "float32",
    num_groups: int = NUM_GROUPS,
    learning_rate: float = 1e-3,
    adapter: dict | None = None,
    **loss,
) -> RunConfig:
    settings = {"attention_coef": 2.0, "attention_target": "reference", "kl_coef": 0.04, **loss}
    return RunConfig(
        seed=3,
        model=ModelConfig(path=path, dtype=dtype),
        adapter=AdapterConfig(**(adapter or {})),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            sequence_parallel=sequence_parallel,
            **(parallel or {}),
        ),
        data=DataConfig(train=(SourceConfig(shards="unused"),), max_prompt_length=128),
        rollout=RolloutConfig(
            num_prompts=num_groups, group_size=GROUP_SIZE, num_minibatches=1, num_epochs=2, max_response_length=LENGTH
        ),
        loss=LossConfig(**settings),
        # The key bias has a gradient of rounding size only; with AdamW's usual eps its sign alone would decide.
        optimizer=OptimizerConfig(learning_rate=learning_rate, clip_grad_norm=0.5, eps=1e-5),
        train=TrainConfig(algorithm="ral", num_steps=10, micro_batch_size=2),
    )


def open_loader(shards: str, processor: PromptProcessor, process_groups: ProcessGroups) -> PromptLoader:
    """Stream of a rank's training prompts, decoded by the first rank of its copy of the model."""
    return PromptLoader(
        open_sources([(shards, 0)], "data.train"),
        processor,
        DataConfig(shuffle_buffer=20, decode_workers=0),
        dp_rank=process_groups.layout.data_rank,
        dp_size=process_groups.layout.data_size,
        seed=5,
        exchange=gather_from_all,
        peers=ReplicaPeers(process_groups),
    )


def responses_by_prompt(batches: Sequence[RolloutBatch], mark: Callable[[Score], Tensor]) -> dict[str, tuple]:
    """Prompt -> token ids of its responses, and whether `mark` of its group's score is true."""
    return {
        key: (batch.groups.response_ids[b].tolist(), bool(mark(batch.score)[b]))
        for batch in batches
        for b, key in enumerate(batch.groups.prompts.identities)
    }


def fixed_groups(path: str, data: str, num_groups: int = NUM_GROUPS) -> list[tuple]:
    """`num_groups` prompts with made-up responses of different lengths and rewards, the same in every process."""
    processor = PromptProcessor(path, 128)
    shards = open_sources([(f"{data}/rl-*.tar", 0)], "data.train")[0].shards
    prompts = read_prompts(shards, processor, num_groups)
    result = []
    for index, prompt in enumerate(prompts):
        if index % 3 == 1:  # prompts of two lengths, so that padding matters
            longer = dataclasses.replace(prompt.sample, problem=f"{prompt.sample.problem} Which digit is it?")
            prompt = processor(longer)
        generator = torch.Generator().manual_seed(100 + index)
        ids = torch.randint(0, 320, (GROUP_SIZE, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (GROUP_SIZE,), generator=generator)
        rewards = torch.randint(0, 3, (GROUP_SIZE,), generator=generator).float()
        result.append((prompt, ids, lengths, rewards))
    return result


def micro_batches(
    process_groups: list[tuple], size: int, engine: PolicyEngine | None, alike: bool = False
) -> list[RolloutBatch]:
    """Groups cut into micro-batches of different shapes, or `alike` of the widest; visual embeddings from the engine's
    frozen tower where one is given."""
    widest, result = max(len(prompt.input_ids) for prompt, *_ in process_groups), []
    for start in range(0, len(process_groups), size):
        prompts, ids, lengths, rewards = zip(*process_groups[start : start + size])
        batch = pad_prompts(prompts, 0, widest if alike else 0)
        embeds = engine.encode_visual(batch) if engine is not None else None
        rewards, ids, lengths = torch.stack(rewards), torch.stack(ids), torch.stack(lengths)
        ids, score = ids[..., : LENGTH if alike else int(lengths.max())], Score(rewards, {}, ())
        result.append(
            RolloutBatch(
                GroupBatch(batch, ids, lengths, embeds),
                score,
                group_advantages(rewards),
                group_advantages(rewards),
                made_up_logprobs(ids),
                torch.ones_like(rewards, dtype=torch.bool),
                torch.zeros(len(prompts), dtype=torch.bool),
            )
        )
    return result


def made_up_logprobs(ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of a sampler that no model has, around the mean of those of the tiny models."""
    return 0.6 * torch.sin(1.7 * ids.float()) - 6.8


def open_policy(path: str, tensor: int, pipeline: int, process_groups=None, **loss):
    """`groups`: process groups that are open already."""
    config = make_config(path, tensor=tensor, pipeline=pipeline, **loss)
    process_groups = process_groups or start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    shape = shape_from_config(config)
    objective = build_objective(config, shape, process_groups)
    return config, process_groups, shape, build_policy(config, shape, process_groups), objective


def full_weights(policy: StageEngine) -> dict[str, torch.Tensor]:
    """Every parameter of every stage by Hugging Face name, on every rank; of trainable ones the float32 master."""
    zero = policy.deepspeed.optimizer
    return full_tensors(
        policy, lambda parameter: zero.get_full_hp_param(parameter) if parameter.requires_grad else parameter.detach()
    )


def full_gradient(policy: PolicyEngine) -> dict[str, torch.Tensor]:
    """The reduced gradient of every trainable parameter by Hugging Face name, on every rank."""
    zero = policy.deepspeed.optimizer
    return full_tensors(
        policy, lambda parameter: zero.get_fp32_grad_for_param(parameter) if parameter.requires_grad else None
    )


def full_tensors(policy: StageEngine, of) -> dict[str, torch.Tensor]:
    """`of` every parameter of every stage (None: nothing), joined over tensor ranks."""
    from megatron_ral.parallel.collectives import gather_objects
    from megatron_ral.weights.stage_weights import describe_stage

    mine = {}
    with policy.resident():
        parameters = dict(policy.stage.named_parameters())
        for tensor in describe_stage(policy.stage):
            part = of(parameters[tensor.name])
            if part is None:
                continue
            full = tensor.join(gather_shards(part, policy.process_groups.tensor), policy.layout.tensor_size)
            if getattr(parameters[tensor.name], "shared", False):
                mine["tied copy"] = full
                continue
            mine.update({name: piece.clone() for name, piece in zip(tensor.sources, tensor.split(full))})
    return {
        name: value for part in gather_objects(mine, policy.process_groups.pipeline) for name, value in part.items()
    }


def fixed_minibatch(
    opened: tuple,
    other: str,
    data: str,
    micro_batch_size: int,
    sequence_parallel: bool = False,
    equal_rewards: tuple = (),
    alike: bool = False,
) -> list[RlBatch]:
    """This rank's part of one optimizer step on the fixed rollouts, whose old and reference policies, and rows that the
    attention is compared with, are those of another model; groups `equal_rewards` have no signal. alike: all
    micro-batches have one shape."""
    config, process_groups, shape, policy, objective = opened
    frozen = FrozenEngine(
        dataclasses.replace(shape, adapter=None),
        process_groups,
        EngineSettings(other, config.model.dtype, sequence_parallel),
    )
    everything = [
        (*row[:3], torch.ones_like(row[3]) if index in equal_rewards else row[3])
        for index, row in enumerate(fixed_groups(config.model.path, data, config.rollout.num_prompts))
    ]
    assert len({len(prompt.input_ids) for prompt, *_ in everything}) == 2
    share = len(everything) // process_groups.layout.data_size
    mine = everything[process_groups.layout.data_rank * share : (process_groups.layout.data_rank + 1) * share]
    rollout = micro_batches(mine, min(micro_batch_size, share), policy, alike)
    reference = frozen.forward(
        [scored.groups for scored in rollout],
        sorted(objective.recorded_layers),
        position=objective.term("attention").stored_position,
        store=objective.term("attention").store,
    )
    target = None if config.loss.attention_target == "oracle" else reference
    [minibatch] = assemble(rollout, reference, reference, target, objective, config, process_groups)
    return minibatch


def assemble(rollout, old, reference, target, objective: Objective, config: RunConfig, process_groups) -> list:
    """`assemble_minibatches` as a run with this configuration calls it."""
    return assemble_minibatches(
        rollout,
        old,
        reference,
        target,
        objective.term("attention"),
        num_minibatches=config.rollout.num_minibatches,
        max_response_length=config.rollout.max_response_length,
        process_groups=process_groups,
    )


def rl_batch(groups: GroupBatch, totals: StepTotals, **parts) -> RlBatch:
    """A micro-batch in which every group counts, without rewards."""
    B, G, R = groups.response_ids.shape
    usual = {
        "group_mask": torch.ones(B, dtype=torch.bool),
        "advantages": torch.zeros(B, G),
        "attention_advantages": torch.zeros(B, G),
        "rollout_logprobs": torch.zeros(B, G, R),
        "from_teacher": torch.zeros(B, dtype=torch.bool),
        "is_on_policy": False,
        "compares_sampler": False,
    }
    return RlBatch(groups, totals, **{**usual, **parts})


def one_step(
    path: str,
    other: str,
    data: str,
    tensor: int,
    pipeline: int,
    micro_batch_size: int,
    num_steps: int = 1,
    layers: tuple = (-1,),
    sequence_parallel: bool = False,
    equal_rewards: tuple = (),
    process_groups=None,
    measures_attention: bool = True,
    **loss,
) -> dict:
    """Optimizer steps on fixed rollouts whose old and reference policies are another model, so that every term and
    its gradient is far from zero. Returns metrics, norms, and all weights. `groups`: process groups that stay open."""
    opened = open_policy(
        path, tensor, pipeline, process_groups, attention_layers=layers, sequence_parallel=sequence_parallel, **loss
    )
    _, _, _, policy, objective = opened
    minibatch = fixed_minibatch(opened, other, data, micro_batch_size, sequence_parallel, equal_rewards)
    history, gradient = [], None
    before = full_weights(policy)
    for _ in range(num_steps):
        attention_norm = 0.0
        if measures_attention:
            policy.forward_backward(minibatch, objective.only("attention"))
            attention_norm = policy.gradient_norm(policy.gradient_shards())
        metrics = finish_metrics(policy.forward_backward(minibatch, objective))
        norm = policy.gradient_norm(policy.gradient_shards())
        gradient = gradient or full_gradient(policy)
        result = policy.step()
        history.append(
            {
                **metrics,
                "own_norm": norm,
                "grad_norm": result.grad_norm,
                "attention_norm": attention_norm,
            }
        )
    weights = full_weights(policy)
    held = policy.shard_bytes()
    if process_groups is None:
        stop_groups()
    return {
        "history": history,
        "weights": weights,
        "bytes": held,
        "gradient": gradient,
        "changes": {name: weights[name] - before[name] for name in weights},
    }
