"""The sections of a run's configuration; every default of the project lives here (those of the
objective in `loss.py`, of a teacher in `distill.py`, of the log and the watchdog in `watching.py`).

Each section is a frozen dataclass that checks its own types (strictly: no string becomes a number) and its own
impossible values. What concerns two sections at once is checked in `RunConfig`. Nothing here imports torch, so
that a configuration is checked in milliseconds on a login node.
"""

from dataclasses import field
from typing import Annotated, Literal, Optional

from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from megatron_ral.config.distill import DistillConfig, TeacherConfig
from megatron_ral.config.loss import LossConfig, OptimizerConfig
from megatron_ral.config.watching import LoggingConfig, WatchdogConfig
from megatron_ral.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, STRICT


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Which weights, in which precision."""

    path: str = ""
    """Hugging Face folder (config.json, safetensors, tokenizer, image processor) or Megatron folder
    (tools/convert_checkpoint.py) of any layout that the run starts from."""
    reference_path: str = ""
    """Such a folder of the frozen reference; empty: the same as `path`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of parameters and activations. Optimizer state and reductions are float32 in both."""
    train_vision: bool = False
    """Train the vision tower and its projector (the paper freezes them in RL)."""


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """How one model is cut over ranks. Data-parallel size is what remains: world / (tensor * pipeline)."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that each matrix is cut over; best those of one node, next to each other."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are cut into; they need not divide evenly."""
    sequence_parallel: bool = False
    """Cut the sequence over tensor ranks outside attention too: activations of norms and residuals shrink by the number
    of tensor ranks for the same traffic. No effect with one tensor rank; generation goes without."""
    recompute_activations: bool = False
    """Keep only the inputs of each layer for the backward pass and compute the rest again in it: less memory for about
    a third more compute. Layers whose attention is recorded are never recomputed (they would record no gradient)."""
    gather: Literal["stage", "layer"] = "stage"
    """What is gathered from the data-parallel ranks at a time in a training pass. stage: the whole stage, once per
    optimizer step. layer: one layer after the other, in every pass of every micro-batch, which takes the memory of a few
    layers and sends a layer 2 * micro-batches times in place of once (in all 3 times the bytes of a step at 4
    micro-batches, docs/hardware.md). Generation always gathers the stage, once per rollout."""
    overlap_communication: bool = True
    """Gather layers ahead of the pass that is on its way to them, and reduce their gradients while the last backward pass
    goes on, in place of before and after it. The same bytes and numbers."""
    offload_optimizer: bool = False
    """Keep the policy's float32 weights, gradients and moments in the host's memory and update them there."""
    offload_parameters: bool = False
    """Keep the shards of the policy's and the reference's parameters in the host's memory between uses."""
    timeout_minutes: PositiveInt = 30
    """A collective that waits longer than this ends the job."""


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """One source of training samples; sources are read one after the other (a curriculum)."""

    shards: str
    """Glob of local tar files, e.g. `data/search-*.tar`."""
    num_samples: NonNegativeInt = 0
    """Samples taken from this source over the run, epochs repeated as needed; 0 (last source only): endless."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Where samples come from and how long they may be."""

    train: tuple[SourceConfig, ...] = ()
    """The training data; give at least one source."""
    eval_shards: str = ""
    """Glob of held-out shards; empty: no evaluation."""
    shuffle: bool = True
    """Permute the shards, and the samples inside windows of shuffle_buffer samples, anew in each epoch."""
    shuffle_buffer: PositiveInt = 1000
    """Samples in one window of `shuffle`."""
    prompt_suffix: str = ""
    """Text after every question: how to answer, which a checkpoint that was not trained for the format must be told."""
    max_prompt_length: PositiveInt = 4096
    """Tokens, visual tokens included. A longer prompt is left out: by the index of its shard without being read, or
    quarantined under its key when it is decoded; it is never cut."""
    max_visual_tokens: NonNegativeInt = 0
    """Visual tokens of a prompt, likewise; 0: as many as max_prompt_length allows."""
    group_by_length: bool = False
    """Batches of prompts of similar length, in random order (the same for any number of ranks): less padding. Needs the
    index of every shard."""
    decode_workers: NonNegativeInt = 2
    """Threads of each rank that decode pictures and videos; 0: decoded when they are needed."""
    decode_ahead: NonNegativeInt = 8
    """Prompts of the next batch that each rank decodes ahead at most; bounds the memory."""
    include_process: bool = True
    """Supervised training on the reasoning before the answer; false: on the answer alone (RAL-zero)."""


@dataclass(frozen=True, config=STRICT)
class RolloutConfig:
    """What is sampled before each round of updates."""

    num_prompts: PositiveInt = 32
    """Prompts per rollout over all data-parallel ranks."""
    group_size: Annotated[int, Ge(2)] = 8
    """G: responses per prompt."""
    num_minibatches: PositiveInt = 4
    """Optimizer updates per pass over a rollout. With 1 update in all, RAL with target `old` is exactly GRPO."""
    num_epochs: PositiveInt = 1
    """Passes over one rollout."""
    generation_batch_size: PositiveInt = 32
    """Prompts generated together in one batch; bounds the KV cache, never changes the result. With S pipeline stages S
    batches are in flight, each stage holding the cache of its own layers."""
    max_response_length: PositiveInt = 512
    """Tokens after which a response is cut off, `</answer>` or not."""
    temperature: PositiveFloat = 1.0
    """Of sampling; log-probabilities in the losses are those of the same temperature."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the most likely tokens that together have this probability; 1: from all."""


@dataclass(frozen=True, config=STRICT)
class RewardFunctionConfig:
    """A reward function of one's own: f(completion, solution, problem_type) -> float."""

    path: str
    """`package.module:function`, its folder on PYTHONPATH. Where it raises or returns no finite number, its part of the
    reward is 0 and the response is counted in `rewards/error/mean`."""
    weight: float
    """May be negative (a penalty) or 0 (only logged)."""


@dataclass(frozen=True, config=STRICT)
class RewardConfig:
    """Weights of the reward's parts (the paper: 0.9 and 0.1)."""

    accuracy: Literal["exact", "by_type"] = "exact"
    """exact: the answer is the same text as the solution's (the paper, for every problem type). by_type: the rule of
    the sample's problem_type (`rewards/rules.py`), exact where it has none."""
    accuracy_weight: NonNegativeFloat = 0.9
    """Of the accuracy, in [0, 1]."""
    format_weight: NonNegativeFloat = 0.1
    """Of the format, 0 or 1."""
    require_think: bool = True
    """Format needs `<think>..</think>` before the answer (false: RAL-zero)."""
    functions: dict[str, RewardFunctionConfig] = field(default_factory=dict)
    """Further parts of the reward by name; the name, an identifier, is logged as `rewards/<name>/mean`."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """What is run, for how long, and what is kept."""

    algorithm: Literal["sft", "ral"] = "ral"
    """`ral` covers GRPO too: loss.attention_coef=0."""
    num_steps: PositiveInt = 100
    """sft: optimizer steps. ral: rollouts, each with num_epochs * num_minibatches optimizer steps."""
    batch_size: PositiveInt = 32
    """sft: samples per optimizer step over all data-parallel ranks."""
    micro_batch_size: PositiveInt = 4
    """Prompt groups per forward pass on one rank; changes memory and speed, the result by rounding alone."""
    output_dir: str = "outputs/run"
    """Checkpoints, TensorBoard files, the summary and the exported model; on a disk that all nodes share."""
    checkpoint_interval: NonNegativeInt = 0
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """The newest so many stay."""
    async_checkpoint: bool = True
    """Write in a thread while training goes on; holds a copy of the state in the host's memory. See README.md."""
    export: bool = True
    """Write the final weights as a Hugging Face folder to <output_dir>/hf."""
    max_skipped_steps: PositiveInt = 5
    """Stop after this many steps in a row whose loss or gradient was not finite (each is skipped with a warning)."""
    stop_after_step: NonNegativeInt = 0
    """Checkpoint and stop after this step although num_steps is larger (schedules keep num_steps); 0: off."""
    time_limit_minutes: NonNegativeFloat = 0.0
    """Checkpoint and end, to go on with --resume, at the first step boundary after so many minutes (from the start of the
    process); 0: none. SIGTERM and SIGUSR1 do the same. Leave time for one step and a checkpoint before a scheduler's
    limit."""
    keep_replays: NonNegativeInt = 2
    """Batches whose loss or gradient was not finite that are kept, with the weights they met, in <output_dir>/replay (the
    first ones of the run; 0: none)."""


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """One run. Saved, resolved, with every checkpoint."""

    seed: NonNegativeInt = 0
    """Of the order of samples, of sampling and of the shuffled controls; no weight is drawn at random."""
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    distill: DistillConfig = DistillConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    logging: LoggingConfig = LoggingConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps made on one rollout."""
        return self.rollout.num_minibatches * self.rollout.num_epochs

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run (what learning-rate schedules are stretched over)."""
        return self.train.num_steps * (self.updates_per_rollout if self.train.algorithm == "ral" else 1)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference model has to be held."""
        # The divergence is logged at attention_coef = 0 too, so its target decides, not the coefficient.
        return self.train.algorithm == "ral" and (self.loss.kl_coef > 0 or self.loss.attention_target == "reference")

    @property
    def distills(self) -> bool:
        """Whether a teacher has to be held."""
        return self.train.algorithm == "ral" and bool(self.teacher.path)

    @property
    def teacher_layout(self) -> tuple[int, int]:
        """Tensor and pipeline ranks of the teacher."""
        return (
            self.teacher.tensor_model_parallel_size or self.parallel.tensor_model_parallel_size,
            self.teacher.pipeline_model_parallel_size or self.parallel.pipeline_model_parallel_size,
        )

    @property
    def attention_acts(self) -> bool:
        """Whether the attention term has a gradient, rather than being only measured."""
        return self.loss.attention_coef > 0 or self.loss.attention_grad_ratio > 0

    def problem(self) -> Optional[tuple[str, str]]:
        """First contradiction between sections as (key, sentence), or None."""
        sources = self.data.train
        if not self.model.path:
            return "model.path", "is empty; give a Hugging Face folder"
        if not sources:
            return "data.train", "is empty; give at least one source of shards"
        for index, source in enumerate(sources[:-1]):
            if source.num_samples == 0:
                return (
                    f"data.train.{index}.num_samples",
                    "= 0 (endless) is only possible for the last source; give a number of samples",
                )
        if self.train.algorithm == "ral" and self.rollout.num_prompts % self.rollout.num_minibatches:
            return (
                "rollout.num_prompts",
                f"= {self.rollout.num_prompts} is not divisible by "
                f"rollout.num_minibatches = {self.rollout.num_minibatches}",
            )
        if len(set(self.loss.attention_layers)) != len(self.loss.attention_layers) or not self.loss.attention_layers:
            return "loss.attention_layers", f"= {list(self.loss.attention_layers)} must name each layer once"
        if self.train.algorithm == "ral" and self.model.train_vision:
            return (
                "model.train_vision",
                "= true has no effect with train.algorithm = ral, whose visual features are made "
                "once per rollout; set it to false",
            )
        target, keys = self.loss.attention_target, self.loss.attention_keys
        if target in ("group", "hindsight") and keys == "all":
            return (
                "loss.attention_keys",
                f"= all is not possible with loss.attention_target = {target}, which compares "
                "different responses over the keys they share; set prompt or visual",
            )
        if target == "oracle" and keys != "visual":
            return (
                "loss.attention_keys",
                f"= {keys} is not possible with loss.attention_target = oracle, whose target is "
                "the annotated box; set visual",
            )
        if self.loss.attention_store == "qk" and target not in ("old", "reference", "ema"):
            return (
                "loss.attention_store",
                f"= qk has no meaning with loss.attention_target = {target}, which keeps no rows; set rows",
            )
        distill_layers = self.distill.attention_layers
        if len(set(distill_layers)) != len(distill_layers):
            return "distill.attention_layers", f"= {list(distill_layers)} must name each layer once"
        if self.distill.teacher_rollouts and self.distills and (self.loss.policy_coef or self.attention_acts):
            return (
                "distill.teacher_rollouts",
                f"= {self.distill.teacher_rollouts} is not possible with loss.policy_coef = "
                f"{self.loss.policy_coef} and loss.attention_coef = {self.loss.attention_coef}: responses of the teacher "
                "are not samples of the policy and have no advantages; set these to 0, or distill.teacher_rollouts",
            )
        if self.distills and self.loss.filter_equal_rewards:
            return (
                "loss.filter_equal_rewards",
                "= true is not possible with a teacher: it would leave the groups that all "
                "failed, which have most to learn from one, out of distillation too",
            )
        if self.distills and self.distill.token_divergence == "cross_entropy" and self.distill.teacher_rollouts < 1:
            return (
                "distill.token_divergence",
                "= cross_entropy is likelihood of the teacher's responses and needs "
                f"distill.teacher_rollouts = 1, not {self.distill.teacher_rollouts}",
            )
        dual_clip = self.loss.dual_clip
        if 0 < dual_clip <= 1:
            return "loss.dual_clip", f"= {dual_clip} must be 0 (off) or more than 1"
        if dual_clip and self.loss.policy_loss == "cispo":
            return "loss.dual_clip", f"= {dual_clip} does not act with loss.policy_loss = cispo; set it to 0"
        return None

    def layout_problem(self, world_size: int, training: bool = True) -> Optional[tuple[str, str]]:
        """First contradiction with a number of processes as (key, sentence), or None; `training`: batches too."""
        tensor, pipeline = self.parallel.tensor_model_parallel_size, self.parallel.pipeline_model_parallel_size
        if world_size % (tensor * pipeline):
            return (
                "parallel",
                f"tensor_model_parallel_size * pipeline_model_parallel_size = {tensor} * {pipeline} "
                f"does not divide the world size {world_size}; start a multiple of {tensor * pipeline} processes",
            )
        teacher_tensor, teacher_pipeline = self.teacher_layout
        if self.distills and world_size % (teacher_tensor * teacher_pipeline):
            return (
                "teacher",
                f"tensor_model_parallel_size * pipeline_model_parallel_size = {teacher_tensor} * "
                f"{teacher_pipeline} does not divide the world size {world_size}; it runs on the ranks of the policy",
            )
        if not training:
            return None
        data = world_size // (tensor * pipeline)
        if self.train.algorithm == "sft":
            key, groups = "train.batch_size", self.train.batch_size
            unit, what = data, f"the {data} data-parallel ranks"
        else:
            key, groups = "rollout.num_prompts", self.rollout.num_prompts
            unit = data * self.rollout.num_minibatches
            what = f"{data} data-parallel ranks * rollout.num_minibatches = {self.rollout.num_minibatches}"
        if groups % unit:
            return key, f"= {groups} is not divisible by {what}"
        per_rank = groups // unit
        if per_rank % min(self.train.micro_batch_size, per_rank):
            return (
                "train.micro_batch_size",
                f"= {self.train.micro_batch_size} does not divide the {per_rank} "
                f"prompt groups that one rank handles per optimizer step",
            )
        return None
