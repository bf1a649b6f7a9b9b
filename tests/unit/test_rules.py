"""Every rule about combinations of settings fires on a small configuration, and none on the defaults."""

from pathlib import Path

import pytest

from megatron_ral.config import RunConfig, check_layout, load_config, setting_warnings
from megatron_ral.config.load import apply_overrides
from megatron_ral.config.loss import LossConfig
from megatron_ral.config.rule import Launch, Severity
from megatron_ral.config.rules import LAUNCH_RULES, RULES, check_settings
from megatron_ral.config.sections import ModelConfig, ParallelConfig, RolloutConfig, TrainConfig
from megatron_ral.errors import ConfigError

RUNS = sorted((Path(__file__).parents[2] / "pretrained_configs" / "runs").glob("*.yaml"))
TEACHER = "teacher={path: t}"
SERVED = "rollout={sampler: vllm, vllm: {python: p}}"
ONE_OF_EACH = [  # settings on top of a working configuration -> key of the rule, part of its sentence
    (["model.path=''"], "model.path", "is empty"),
    (["data.train=[]"], "data.train", "is empty"),
    (["data.train=[{shards: a}, {shards: b}]"], "data.train.0.num_samples", "= 0 (endless)"),
    (["rollout.num_prompts=30"], "rollout.num_prompts", "= 30 is not divisible by rollout.num_minibatches = 4"),
    (["model.train_vision=true"], "model.train_vision", "= true is not possible with train.algorithm = ral"),
    (["loss.attention_layers=[]"], "loss.attention_layers", "= [] must name"),
    (["loss.attention_layers=[1, 1]"], "loss.attention_layers", "= [1, 1] must name"),
    (["loss.attention_target=olds"], "loss.attention_target", "= olds is not a known target; choose one of old, "),
    (
        ["loss.attention_target=oracle"],
        "loss.attention_keys",
        "= all is not possible with loss.attention_target = oracle",
    ),
    (
        ["loss={attention_target: hindsight, attention_keys: visual, attention_store: qk}"],
        "loss.attention_store",
        "= qk is not possible with loss.attention_target = hindsight; set rows",
    ),
    (
        ["adapter={rank: 8}", "train.algorithm=sft", "model.train_vision=true"],
        "model.train_vision",
        "is not possible with adapter.rank = 8",
    ),
    (["adapter={rank: 8, dropout: 0.1}"], "adapter.dropout", "= 0.1 is not possible: "),
    (["adapter={rank: 8, targets: []}"], "adapter.targets", "= [] must name at least one of q_proj"),
    (["adapter={path: p}"], "adapter.rank", "= 0 means no adapters, but adapter.path = p"),
    (["adapter={alpha: 8.0}"], "adapter.alpha", "= 8.0 has no effect with adapter.rank = 0"),
    (["adapter={targets: [q_proj]}"], "adapter.targets", "has no effect with adapter.rank = 0"),
    (["loss.dual_clip=0.5"], "loss.dual_clip", "= 0.5 must be 0 (off) or more than 1"),
    (
        ["loss={dual_clip: 3.0, policy_loss: cispo}"],
        "loss.dual_clip",
        "= 3.0 has no effect with loss.policy_loss = cispo",
    ),
    (
        ["loss.sampler_correction=token_truncate", "rollout.top_p=0.9"],
        "loss.sampler_correction",
        "= token_truncate is not possible with rollout.top_p = 0.9",
    ),
    (
        ["loss.sampler_correction=sequence_mask", "rollout.attention_noise={sigma: 2.0}"],
        "loss.sampler_correction",
        "= sequence_mask is not possible with rollout.attention_noise.sigma = 2.0",
    ),
    (
        ["loss.sampler_correction=sequence_mask", "rollout.views={keep: 0.3}"],
        "loss.sampler_correction",
        "= sequence_mask is not possible with rollout.views.keep = 0.3",
    ),
    (["loss.sampler_correction_cap=3.0"], "loss.sampler_correction_cap", "with loss.sampler_correction = none"),
    (
        ["train.algorithm=sft", "loss.sampler_correction=token_truncate", "rollout.top_p=0.9"],
        "loss.sampler_correction",
        "= token_truncate has no effect with train.algorithm = sft",
    ),
    (
        [TEACHER, "loss={policy_coef: 0.0, sampler_correction: token_truncate}", "rollout.top_p=0.9"],
        "loss.sampler_correction",
        "= token_truncate has no effect with loss.policy_coef = 0.0",
    ),
    ([TEACHER, "loss.filter_equal_rewards=true"], "loss.filter_equal_rewards", "= true is not possible with a teacher"),
    (
        [TEACHER, "rollout.refill_rounds=3"],
        "rollout.refill_rounds",
        "= 3 is not possible with a teacher: it would replace",
    ),
    (["rollout.sampler=vllm"], "rollout.vllm.python", "is empty, but rollout.sampler = vllm needs an environment"),
    (
        [SERVED, "rollout.attention_noise={sigma: 2.0}"],
        "rollout.sampler",
        "= vllm is not possible with rollout.attention_noise.sigma = 2.0",
    ),
    (
        [SERVED, "loss={attention_target: explored, attention_keys: visual}"],
        "rollout.sampler",
        "= vllm is not possible with loss.attention_target = explored, which reads attention",
    ),
    (
        [SERVED, "rollout.temperature=0.7", "rollout.top_p=0.9"],
        "rollout.temperature",
        "= 0.7 is not possible with rollout.sampler = vllm and rollout.top_p = 0.9",
    ),
    (
        [SERVED, "rollout.vllm.request_seconds=900"],
        "rollout.vllm.request_seconds",
        "= 900 is too long: two of it and rollout.vllm.start_seconds = 400 last longer than parallel.timeout_minutes",
    ),
    ([SERVED], "loss.sampler_correction", "= none with rollout.sampler = vllm leaves the difference"),
    (
        ["rollout.overlap=true", "rollout.attention_noise={sigma: 2.0}"],
        "rollout.overlap",
        "= true is not possible with rollout.attention_noise.sigma = 2.0",
    ),
    (
        ["rollout={overlap: true, views: {keep: 0.3}}"],
        "rollout.overlap",
        "= true is not possible with rollout.views.keep = 0.3",
    ),
    (
        ["rollout.overlap=true", "loss.attention_target=explored"],
        "rollout.overlap",
        "= true is not possible with loss.attention_target = explored, whose rows would be those of older weights",
    ),
    (
        ["rollout.overlap=true", "loss.sampler_correction=none"],
        "loss.sampler_correction",
        "= none with rollout.overlap = true trains on samples of older weights",
    ),
    (
        ["rollout.overlap=true", "rollout.top_p=0.9"],
        "loss.sampler_correction",
        "= token_truncate is not possible with rollout.top_p = 0.9",
    ),
    (
        ["rollout.overlap=true", "train.algorithm=sft"],
        "rollout.overlap",
        "= true has no effect with train.algorithm = sft",
    ),
    (["rollout.vllm.bucket_mib=8"], "rollout.vllm.bucket_mib", "= 8 has no effect with rollout.sampler = native"),
    (["distill.attention_layers=[2, 2]"], "distill.attention_layers", "= [2, 2] must name each layer only once"),
    ([TEACHER, "distill.teacher_rollouts=0.5"], "distill.teacher_rollouts", "loss.policy_coef = 1.0"),
    ([TEACHER, "distill.token_divergence=cross_entropy"], "distill.token_divergence", "teacher_rollouts = 1, not"),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel", "= true has no effect with parallel.tensor"),
    (["distill.top_tokens=5"], "distill.top_tokens", "= 5 has no effect without teacher.path"),
    (["train.algorithm=sft", "distill.top_tokens=5"], "distill.top_tokens", "has no effect with train.algorithm = sft"),
    (["teacher.cpu_offload=true"], "teacher.cpu_offload", "has no effect without teacher.path"),
    (["train.algorithm=sft", TEACHER], "teacher.path", "= t has no effect with train.algorithm = sft"),
    (["loss={policy_coef: 0.0, attention_coef: 0.0}"], "loss.policy_coef", "rewards give no gradient"),
    (["teacher={path: t, sequence_parallel: true}"], "teacher.sequence_parallel", "one tensor-parallel rank"),
    ([TEACHER, "distill={token_coef: 0.0, attention_coef: 0.0}"], "distill.token_coef", "only logged"),
    ([TEACHER, "distill.beta=0.3"], "distill.beta", "= 0.3 has no effect with distill.token_divergence = reverse_kl"),
    (
        [TEACHER, "loss={policy_coef: 0.0, attention_coef: 0.0}"]
        + ["distill={token_divergence: cross_entropy, teacher_rollouts: 1.0, temperature: 2.0}"],
        "distill.temperature",
        "has no effect with distill.token_divergence = cross_entropy",
    ),
    (
        [TEACHER, "distill={attention_keys: visual, attention_exclude_self: false}"],
        "distill.attention_exclude_self",
        "= false has no effect with distill.attention_keys = visual",
    ),
    ([TEACHER, "loss={policy_coef: 0.0, clip_low: 0.1}"], "loss.clip_low", "has no effect with loss.policy_coef = 0.0"),
    (
        ["rollout.attention_noise={sigma: 2.0, layers: [1, 1]}"],
        "rollout.attention_noise.layers",
        "must name each layer only once",
    ),
    (
        ["rollout.attention_noise={sigma: 2.0, grid: 3, grids: [2, 4]}"],
        "rollout.attention_noise.grid",
        "= 3 is not used with rollout.attention_noise.grids = [2, 4]",
    ),
    (
        ["rollout.attention_noise={sigma: 2.0, grids: [1, 2, 3]}", "rollout.group_size=2"],
        "rollout.attention_noise.grids",
        "= [1, 2, 3] has more values than rollout.group_size = 2",
    ),
    (
        ["rollout={views: {keep: 0.3}, attention_noise: {sigma: 2.0}}"],
        "rollout.views.keep",
        "= 0.3 is not possible with rollout.attention_noise.sigma = 2.0",
    ),
    (
        ["rollout.views={keep: 0.3}", "loss.attention_target=explored"],
        "loss.attention_keys",
        "= all is not possible with rollout.views.keep = 0.3",
    ),
    (
        [
            TEACHER,
            "distill.teacher_rollouts=0.5",
            "loss={attention_target: explored, attention_coef: 0.0, policy_coef: 0.0}",
        ],
        "loss.attention_target",
        "reads the policy's own decoding",
    ),
    (
        ["loss={attention_target: contrast, attention_keys: visual}"],
        "loss.attention_target",
        "= contrast has next to no signal with rollout.attention_noise.sigma = 0.0",
    ),
    (
        [
            "rollout.attention_noise={sigma: 2.0}",
            "loss={attention_target: contrast, attention_keys: visual, attention_divergence: forward_kl,"
            " attention_row: predictor, attention_row_cap: 1.0}",
        ],
        "loss.attention_divergence",
        "= forward_kl has no effect with loss.attention_target = contrast, because it is a cross-entropy",
    ),
    (
        ["rollout.attention_noise={grid: 4}"],
        "rollout.attention_noise.grid",
        "= 4 has no effect with rollout.attention_noise.sigma = 0.0",
    ),
    (
        ["rollout.attention_noise={adaptive: 2}"],
        "rollout.attention_noise.adaptive",
        "= 2 has no effect with rollout.attention_noise.sigma = 0.0",
    ),
    (
        [TEACHER, "loss={policy_coef: 0.0, attention_coef: 0.0}", "distill.teacher_rollouts=1.0"]
        + ["rollout.attention_noise={sigma: 2.0}"],
        "rollout.attention_noise.sigma",
        "= 2.0 has no effect with distill.teacher_rollouts = 1.0, because the teacher answers every prompt",
    ),
    (
        [TEACHER, "loss={policy_coef: 0.0, attention_coef: 0.0}", "distill.teacher_rollouts=1.0"]
        + ["rollout.views={keep: 0.3}"],
        "rollout.views.keep",
        "= 0.3 has no effect with distill.teacher_rollouts = 1.0, because the teacher answers every prompt",
    ),
    (
        ["rollout.views={grid: 4}"],
        "rollout.views.grid",
        "= 4 has no effect with rollout.views.keep = 1.0",
    ),
    (["loss.attention_coef=0"], "loss.attention_coef", "this run is GRPO"),
    (["rollout.num_minibatches=1"], "loss.attention_target", "exactly zero"),
    (["loss={attention_grad_ratio: 0.1, attention_coef: 5.0}"], "loss.attention_coef", "= 5.0 has no effect"),
    (
        ["loss={attention_target: oracle, attention_keys: visual, attention_advantages: shuffled}"],
        "loss.attention_advantages",
        "= shuffled has no effect with loss.attention_target = oracle",
    ),
    (
        ["loss={attention_target: hindsight, attention_keys: visual, attention_negative_weight: 0.5}"],
        "loss.attention_negative_weight",
        "= 0.5 has no effect with loss.attention_target = hindsight",
    ),
    (
        ["loss={attention_keys: visual, attention_exclude_self: false}"],
        "loss.attention_exclude_self",
        "= false has no effect",
    ),
    (["loss={kl_coef: 0.0, kl_clamp: 10.0}"], "loss.kl_clamp", "= 10.0 has no effect with loss.kl_coef = 0.0"),
    (["model.reference_path=b", "loss.kl_coef=0"], "model.reference_path", "= b has no effect"),
    (["loss.policy_loss=gspo"], "loss.policy_loss", "= gspo with loss.clip_high = 0.2"),
]


def configuration(overrides) -> RunConfig:
    """A working configuration with `overrides` that is not checked yet."""
    import megatron_ral.config.load as load

    checked, load.check_settings = load.check_settings, lambda config: None
    try:
        return apply_overrides({"model": {"path": "m"}, "data": {"train": [{"shards": "a"}]}}, overrides)
    finally:
        load.check_settings = checked


def firing(config: RunConfig) -> list:
    """Rules that apply, up to the first error as a run reports it."""
    fired = []
    for rule in RULES:
        if rule.applies(config):
            fired.append(rule)
            if rule.severity is Severity.ERROR:
                break
    return fired


def test_the_defaults_are_silent():
    assert not setting_warnings(RunConfig()) and not firing(configuration([]))


@pytest.mark.parametrize("overrides, key, said", ONE_OF_EACH)
def test_a_rule_fires(overrides, key, said):
    config = configuration(overrides)
    sentences = [str(rule.error(config)) for rule in firing(config)]
    assert any(sentence.startswith(f"{key} ") and said in sentence for sentence in sentences), sentences
    errors = [rule for rule in firing(config) if rule.severity is Severity.ERROR]
    if errors:
        with pytest.raises(ConfigError) as error:
            check_settings(config)
        assert error.value.key == key
    else:
        check_settings(config)
        assert setting_warnings(config) == sentences


def test_every_rule_that_says_something_of_its_own_is_among_them():
    """Warnings about one setting each come in families; one of a family is enough."""
    fired = {id(rule) for overrides, *_ in ONE_OF_EACH for rule in firing(configuration(overrides))}
    rest = [rule for rule in RULES if id(rule) not in fired]
    families = {rule.key.partition(".")[0] for rule in rest}
    assert not [rule for rule in rest if rule.severity is Severity.ERROR]
    assert families <= {"distill", "teacher", "loss", "rollout"} and all(
        "has no effect" in str(_say(rule)) for rule in rest
    )


def _say(rule) -> str:
    return str(rule.error(configuration([])))


@pytest.mark.parametrize(
    "world, overrides, rule",
    [
        (3, ["parallel.tensor_model_parallel_size=2"], 0),
        (3, [TEACHER, "teacher.tensor_model_parallel_size=2", "rollout.num_prompts=12"], 1),
        (3, [], 2),
        (5, ["train.algorithm=sft"], 2),
        (1, ["train.micro_batch_size=3"], 3),
    ],
)
def test_a_rule_about_processes_fires(world, overrides, rule):
    config = configuration(overrides)
    fired = next(number for number, each in enumerate(LAUNCH_RULES) if each.applies(Launch(config, world)))
    assert fired == rule
    with pytest.raises(ConfigError) as error:
        check_layout(config, world)
    assert str(error.value) == str(LAUNCH_RULES[rule].error(Launch(config, world)))
    if rule > 1:
        check_layout(config, world, training=False)


def test_views_and_corrections_go_with_a_served_sampler():
    views = [SERVED, "rollout.views={keep: 0.3}", "loss={attention_target: explored, attention_keys: visual}"]
    assert not any(rule.severity is Severity.ERROR for rule in firing(configuration(views)))
    assert not setting_warnings(configuration([SERVED, "loss.sampler_correction=token_truncate"]))


def test_a_rollout_ahead_is_corrected_unless_somebody_says_otherwise():
    """The default is resolved where settings are read, so that a checkpoint holds it and a resumed run has it."""
    ahead = ["rollout.overlap=true"]
    assert configuration([]).loss.sampler_correction == "none"
    assert configuration(ahead).loss.sampler_correction == "token_truncate"
    assert not setting_warnings(configuration(ahead)) and not setting_warnings(configuration([SERVED, *ahead]))
    for written in ("none", "sequence_mask"):
        config = configuration([*ahead, f"loss.sampler_correction={written}"])
        assert config.loss.sampler_correction == written
        assert any("older weights" in warning for warning in setting_warnings(config)) == (written == "none")
    assert configuration([*ahead, "loss.policy_coef=0.0", TEACHER]).loss.sampler_correction == "none"
    assert configuration([*ahead, "train.algorithm=sft"]).loss.sampler_correction == "none"


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_no_shipped_run_fires_an_error(path):
    config = load_config(path, ["model.path=m"])
    assert [str(rule.error(config)) for rule in RULES if rule.severity is Severity.ERROR and rule.applies(config)] == []


def test_settings_beside_the_loss():
    assert "exactly zero" in "".join(setting_warnings(RunConfig(rollout=RolloutConfig(num_minibatches=1))))
    reference = RunConfig(rollout=RolloutConfig(num_minibatches=1), loss=LossConfig(attention_target="reference"))
    assert not setting_warnings(reference)
    cut = ParallelConfig(sequence_parallel=True, tensor_model_parallel_size=2)
    assert not setting_warnings(RunConfig(parallel=cut))
    assert not setting_warnings(RunConfig(model=ModelConfig(path="a", reference_path="b")))
    assert not setting_warnings(
        RunConfig(train=TrainConfig(algorithm="sft"), loss=LossConfig(kl_coef=0.0, kl_clamp=1.0))
    )
