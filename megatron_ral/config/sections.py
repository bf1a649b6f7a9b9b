"""Sections of a run's configuration, with every default of the project. Those of the objective are in `loss.py`, of a
teacher in `distill.py`, of adapters in `adapter.py`, of a sampler's server in `sampler.py`, of the log and the watchdog
in `watching.py`.

Each section is a frozen dataclass that checks the types and bounds of its own fields, strictly: no string becomes a
number. Combinations of settings are checked in `rules.py`. Nothing here imports torch, so that a configuration is
checked in milliseconds on a login node.
"""

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass

from megatron_ral.attention.targets.registry import TARGETS, TargetPass
from megatron_ral.config.adapter import AdapterConfig
from megatron_ral.config.distill import DistillConfig, TeacherConfig
from megatron_ral.config.fields import STRICT, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from megatron_ral.config.loss import LossConfig, OptimizerConfig
from megatron_ral.config.sampler import VllmConfig
from megatron_ral.config.watching import LoggingConfig, WatchdogConfig


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Weights of the policy and of the reference, and their precision."""

    path: str = ""
    """Folder that the run starts from: a Hugging Face folder (config.json, safetensors, tokenizer, image processor), or
    a Megatron folder of any layout (tools/convert_checkpoint.py)."""
    reference_path: str = ""
    """Folder of the frozen reference model, of either kind; empty for `path`. With adapters and an empty folder, the
    reference is the policy with its adapters off, and no second copy is held."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of parameters and activations. Optimizer state and reductions are always float32."""
    train_vision: bool = False
    """Training of the vision tower and its projector. Possible in SFT only, because the paper freezes them in RL."""
    format_tags: Literal["auto", "text", "token"] = "auto"
    """Form of `<think>`, `<answer>` and their ends where the tokenizer has tokens of these names. text: the names are
    cut into ordinary pieces, for a model that was not trained on the tokens (Qwen3-VL-Instruct). token: one token each.
    auto: token where the chat template writes such a tag (Qwen3-VL-Thinking) or all four are ordinary added tokens,
    otherwise text. The exported tokenizer does the same."""


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    """Partition of one model over ranks. The data-parallel size is the rest: world size / (tensor * pipeline)."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks over which each matrix is split, best those of one node."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages into which the layers are split. They need not divide evenly."""
    sequence_parallel: bool = False
    """Split of the sequence over tensor-parallel ranks outside attention. Activations of norms and residuals shrink by
    the number of tensor-parallel ranks for the same traffic. Not used in generation, and without effect on one rank."""
    recompute_activations: bool = False
    """Activation checkpointing: only the inputs of each layer are stored, and the backward pass computes the rest
    again. Less memory for about a third more compute. Layers whose attention is recorded are never recomputed, because
    they would record no gradient."""
    gather: Literal["stage", "layer"] = "stage"
    """Unit of parameters that a training pass gathers from the data-parallel ranks. stage: the whole pipeline stage,
    once per optimizer step. layer: one layer after the other in every pass of every micro-batch; this holds only a few
    layers in memory and sends each layer 2 * micro-batches times instead of once (3 times the bytes of a step at 4
    micro-batches, docs/results/hardware.md). Generation always gathers the stage, once per rollout."""
    overlap_communication: bool = True
    """Overlap of communication with computation: layers are gathered ahead of the pass that needs them, and gradients
    are reduced during the last backward pass. Same bytes and same numbers as without."""
    offload_optimizer: bool = False
    """Storage of the policy's float32 weights, gradients and moments in host memory, where they are updated."""
    offload_parameters: bool = False
    """Storage of the parameter shards of policy and reference in host memory between uses."""
    timeout_minutes: PositiveInt = 30
    """Minutes after which a waiting collective operation ends the job."""


@dataclass(frozen=True, config=STRICT)
class SourceConfig:
    """One source of training samples. Sources are read one after the other, as a curriculum."""

    shards: str
    """Glob of local shards (tar files), e.g. `data/search-*.tar`."""
    num_samples: NonNegativeInt = 0
    """Number of samples to take from this source over the run, in as many epochs as needed; 0 for endless, which only
    the last source can be."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Sources of samples and limits on their length."""

    train: tuple[SourceConfig, ...] = ()
    """Sources of training samples, at least one."""
    eval_shards: str = ""
    """Glob of held-out shards; empty for no evaluation."""
    shuffle: bool = True
    """Random order in each epoch: of shards, and of samples within windows of `shuffle_buffer`."""
    shuffle_buffer: PositiveInt = 1000
    """Number of samples in one window of `shuffle`."""
    prompt_suffix: str = ""
    """Text appended to every question. It says how to answer, for a checkpoint that was not trained for the format."""
    max_prompt_length: PositiveInt = 4096
    """Maximum length of a prompt in tokens, visual tokens included. A longer prompt is dropped and never truncated: it
    is skipped by the index of its shard, or quarantined under its key when it is decoded."""
    max_visual_tokens: NonNegativeInt = 0
    """Maximum number of visual tokens of a prompt, with the same effect; 0 for no limit beside max_prompt_length."""
    group_by_length: bool = False
    """Batches of prompts of similar length, in a random order that is the same for any number of ranks. Less padding.
    Requires an index of every shard."""
    decode_workers: NonNegativeInt = 2
    """Threads that decode pictures and videos in advance, on the first rank of each replica (tensor x pipeline), which
    sends prompts to its peers; 0 to decode them on demand."""
    decode_ahead: NonNegativeInt = 8
    """Maximum number of prompts of the next batch that are decoded in advance per replica. It bounds host memory."""
    include_process: bool = True
    """Supervised training on the reasoning before the answer as well; false for the answer alone (RAL-zero)."""


@dataclass(frozen=True, config=STRICT)
class AttentionNoiseConfig:
    """Noise on attention while responses are sampled, one draw per response, layer and cell of the picture. Attention
    moves inside the picture only. The update reads the model without noise."""

    sigma: NonNegativeFloat = 0.0
    """Standard deviation of the noise on attention scores; 0 for none. With scale = absolute it has to exceed the
    differences between the scores of visual tokens, which are 5 to 30 where a model is sure."""
    scale: Literal["absolute", "lead"] = "absolute"
    """Unit of `sigma`. absolute: that of the scores. lead: for each head and row the largest of its scores of visual
    tokens minus their mean, so that the noise follows how sure the model is; useful values lie near 1."""
    layers: tuple[int, ...] = ()
    """Layers with noise, 0-based, negative from the last; empty for all."""
    grid: NonNegativeInt = 0
    """Cells along each side of an image or video frame, each with one draw for all its visual tokens; 0 for one draw
    per visual token, which averages out where an object covers many. With 1 a single picture is not explored; attention
    then moves between the frames or pictures of a prompt alone."""
    grids: tuple[NonNegativeInt, ...] = ()
    """Several values in place of `grid`, of which the responses of a group take one each, in turn: for objects of
    different or unknown sizes. Empty for `grid` alone."""
    shared: bool = False
    """True: a response has the same noise in all its layers, so that they look at the same place. False: each layer has
    noise of its own."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule by which `sigma` falls to 0 over the rollouts of the run."""
    adaptive: Annotated[int, Ge(0), Le(10)] = 0
    """Number of times that a prompt without a right response is sampled again in a rollout, each time with twice the
    `sigma` of the time before. The responses of the last time count."""


@dataclass(frozen=True, config=STRICT)
class ViewsConfig:
    """Partial views while responses are sampled: each response sees a random part of the picture. The update reads the
    whole picture."""

    keep: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the cells that a response sees; 1 for the whole picture."""
    grid: NonNegativeInt = 0
    """Cells along each side of an image or video frame; 0 for one cell per visual token."""


@dataclass(frozen=True, config=STRICT)
class RolloutConfig:
    """Sampling of responses before each round of updates."""

    num_prompts: PositiveInt = 32
    """Number of prompts per rollout over all data-parallel ranks."""
    group_size: Annotated[int, Ge(2)] = 8
    """Number of responses per prompt (G)."""
    refill_rounds: NonNegativeInt = 0
    """Maximum number of further rounds of sampling in a rollout, in each of which every prompt whose responses have
    equal rewards is replaced by a new one (dynamic sampling of DAPO, arXiv 2503.14476); 0 for none. A rollout may then
    read up to 1 + refill_rounds times `num_prompts` prompts."""
    num_minibatches: PositiveInt = 4
    """Number of optimizer updates per pass over a rollout. With one update per rollout, RAL with target `old` is
    exactly GRPO."""
    num_epochs: PositiveInt = 1
    """Number of passes over one rollout."""
    generation_batch_size: PositiveInt = 32
    """Number of prompts that are decoded in one batch. It bounds the KV cache and never changes the result. With S
    pipeline stages S batches are in flight, and each stage holds the cache of its own layers."""
    cache_tokens: NonNegativeInt = 0
    """Largest number of tokens in the KV cache of one batch, a further bound: its longest prompt, and group_size
    responses of max_response_length, times its prompts; 0 for none. Of the native sampler alone."""
    max_response_length: PositiveInt = 512
    """Maximum length of a response in tokens, with or without `</answer>`."""
    temperature: PositiveFloat = 1.0
    """Temperature of sampling. Log-probabilities in the losses use it as well."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Probability mass of the most likely tokens to sample from; 1 for all tokens."""
    sampler: Literal["native", "vllm"] = "native"
    """Engine that samples responses. native: the trained engine itself, one copy of the weights, exact. vllm: a server
    beside it that gets the weights after each update (docs/sampler.md). Evaluations are always native."""
    overlap: bool = False
    """Sampling of the next rollout with the weights that a step begins with, before its updates change them. A served
    sampler works while the policy is trained; the native one needs the same devices and gains nothing. Responses are
    one step old: `sampling/staleness` says so, and unless it is written `loss.sampler_correction` is then
    token_truncate (docs/sampler.md)."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """Server of sampler = vllm."""
    attention_noise: AttentionNoiseConfig = field(default_factory=AttentionNoiseConfig)
    """Exploration of attention while sampling."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Exploration of the picture while sampling, with any sampler."""

    @property
    def has_views(self) -> bool:
        """Say whether responses are sampled from partial views."""
        return self.views.keep < 1


@dataclass(frozen=True, config=STRICT)
class RewardFunctionConfig:
    """A reward function of the user: f(completion, solution, problem_type) -> float. One that has a parameter named
    `problem` too gets the text of the question."""

    path: str
    """Import path `package.module:function`, with its folder on PYTHONPATH. Where the function raises or returns no
    finite number, its part of the reward is 0 and the response counts in `rewards/error/mean`."""
    weight: float
    """Weight in the reward. It may be negative (a penalty) or 0 (only logged)."""


@dataclass(frozen=True, config=STRICT)
class RewardConfig:
    """Parts of the reward and their weights (the paper: 0.9 and 0.1)."""

    accuracy: Literal["exact", "by_type"] = "exact"
    """Rule that compares answer and solution. exact: equal texts (the paper, for every problem type). by_type: the rule
    of the sample's problem_type (`rewards/rules.py`), and exact where it has none."""
    accuracy_weight: NonNegativeFloat = 0.9
    """Weight of the accuracy, which lies in [0, 1]."""
    format_weight: NonNegativeFloat = 0.1
    """Weight of the format, which is 0 or 1."""
    require_think: bool = True
    """Requirement of `<think>..</think>` before the answer for the format reward; false for RAL-zero."""
    functions: dict[str, RewardFunctionConfig] = field(default_factory=dict)
    """Further parts of the reward by name, an identifier. They are logged as `rewards/<name>/mean`."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Algorithm, length of the run, and the files that it leaves."""

    algorithm: Literal["sft", "ral"] = "ral"
    """Supervised fine-tuning (`sft`) or reinforcement learning (`ral`). GRPO is `ral` with loss.attention_coef = 0."""
    num_steps: PositiveInt = 100
    """Number of optimizer steps (sft), or of rollouts with num_epochs * num_minibatches optimizer steps each (ral)."""
    batch_size: PositiveInt = 32
    """Number of samples per optimizer step over all data-parallel ranks (sft)."""
    micro_batch_size: PositiveInt = 4
    """Number of prompt groups per forward pass on one rank. It changes memory and speed, and the result only by
    rounding."""
    tokens_per_micro_batch: NonNegativeInt = 0
    """Largest number of tokens of prompts and responses, without padding, per forward pass on one rank, in place of
    micro_batch_size; 0 for none. A group (a prompt with its responses) that is longer has a pass of its own."""
    output_dir: str = "outputs/run"
    """Folder of checkpoints, TensorBoard files, the summary and the exported model, on a disk that all nodes share."""
    checkpoint_interval: NonNegativeInt = 0
    """Steps between checkpoints; 0 for one at the end only."""
    keep_checkpoints: PositiveInt = 2
    """Number of most recent checkpoints to keep."""
    async_checkpoint: bool = True
    """Writing of checkpoints in a thread while training continues. It holds a copy of the state in host memory."""
    export: bool = True
    """Export of the final weights as a Hugging Face folder, <output_dir>/hf, with adapters merged. Adapters are also
    written by themselves as a PEFT folder, <output_dir>/adapter."""
    max_skipped_steps: PositiveInt = 5
    """Number of consecutive steps with a non-finite loss or gradient after which the run stops. Each is skipped with a
    warning."""
    stop_after_step: NonNegativeInt = 0
    """Step after which the run writes a checkpoint and stops before num_steps, over which schedules still extend; 0 for
    none."""
    time_limit_minutes: NonNegativeFloat = 0.0
    """Minutes since the start of the process after which the run writes a checkpoint at the next step boundary and
    ends, to continue with --resume; 0 for no limit. SIGTERM and SIGUSR1 have the same effect. A scheduler's limit must
    leave time for one more step and a checkpoint."""
    keep_replays: NonNegativeInt = 2
    """Maximum number of batches with a non-finite loss or gradient that are saved, with the weights of that step, in
    <output_dir>/replay: the first ones of the run. 0 for none."""


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """Configuration of one run. It is saved, with all defaults, in every checkpoint."""

    seed: NonNegativeInt = 0
    """Seed of the order of samples, of sampling, of the shuffled controls and of new adapters. No other weight is drawn
    at random."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
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
        """Number of optimizer steps on one rollout."""
        return self.rollout.num_minibatches * self.rollout.num_epochs

    @property
    def num_optimizer_steps(self) -> int:
        """Number of optimizer steps of the whole run, over which learning-rate schedules extend."""
        return self.train.num_steps * (self.updates_per_rollout if self.train.algorithm == "ral" else 1)

    @property
    def needs_reference(self) -> bool:
        """True if the run makes passes of a frozen reference model."""
        # The divergence is logged at attention_coef = 0 too, so its target decides, not the coefficient.
        target = TARGETS[self.loss.attention_target]
        return self.train.algorithm == "ral" and (self.loss.kl_coef > 0 or target.needs is TargetPass.REFERENCE)

    @property
    def holds_reference(self) -> bool:
        """True if the run holds weights of the reference. With adapters it is the policy without them."""
        return self.needs_reference and not (self.adapter.rank and not self.model.reference_path)

    @property
    def distills(self) -> bool:
        """True if the run holds a teacher."""
        return self.train.algorithm == "ral" and bool(self.teacher.path)

    @property
    def overlaps(self) -> bool:
        """True if a rollout is sampled one step before it is trained on."""
        return self.train.algorithm == "ral" and self.rollout.overlap

    @property
    def teacher_layout(self) -> tuple[int, int]:
        """Tensor-parallel ranks and pipeline stages of the teacher."""
        return (
            self.teacher.tensor_model_parallel_size or self.parallel.tensor_model_parallel_size,
            self.teacher.pipeline_model_parallel_size or self.parallel.pipeline_model_parallel_size,
        )

    @property
    def attention_acts(self) -> bool:
        """True if the attention term has a gradient, rather than being only logged."""
        return self.loss.attention_coef > 0 or self.loss.attention_grad_ratio > 0
