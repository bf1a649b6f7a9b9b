"""Every wrong configuration ends with one sentence that names file, key and value."""

import math

import pytest

from megatron_ral.config import check_layout, dump_config, flat_settings, known_keys, load_config
from megatron_ral.errors import ConfigError

GOOD = """
model: {path: somewhere, dtype: float32}
data: {train: [{shards: a-*.tar, num_samples: 32}, {shards: b-*.tar}]}
optimizer: {learning_rate: 1e-4}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_scientific_notation_is_a_number(file):
    assert load_config(file).optimizer.learning_rate == 1e-4
    assert load_config(file, ["optimizer.eps=1e-7"]).optimizer.eps == 1e-7


def test_overrides_apply_in_order_and_reach_lists(file):
    config = load_config(file, ["loss.attention_coef=5", "loss.attention_coef=0.5", "data.train.0.num_samples=7"])
    assert config.loss.attention_coef == 0.5
    assert config.data.train[0].num_samples == 7


@pytest.mark.parametrize(
    "overrides, needed",
    [
        (["loss.kl_coef=0"], False),
        ([], True),
        (["train.algorithm=sft"], False),
        (["loss.kl_coef=0", "loss.attention_target=reference", "loss.attention_coef=0"], True),
    ],
)
def test_reference_is_held_where_something_is_compared_with_it(file, overrides, needed):
    assert load_config(file, overrides).needs_reference == needed


def test_dump_reads_back_equal(file, tmp_path):
    config = load_config(file, ["seed=5", "loss.attention_layers=[-1, 0]"])
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    "override, named",
    [
        ("loss.atention_coef=2", ["loss.atention_coef", "loss.attention_coef"]),
        ("los.attention_coef=2", ["los = ", "did you mean loss?"]),
        ("rollout.group_size=1", ["rollout.group_size", "1"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed=one", ["seed", "one"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "fast"]),
        ("loss.policy_loss=ppo", ["loss.policy_loss", "ppo", "'gspo'"]),
        ("loss.dual_clip=0.5", ["loss.dual_clip", "0.5", "more than 1"]),
        ("loss={policy_loss: cispo, dual_clip: 3.0}", ["loss.dual_clip", "3.0", "cispo"]),
        ("loss.attention_target=olds", ["loss.attention_target", "olds", "old, reference, hindsight, oracle"]),
        ("parallel=3", ["parallel", "3"]),
        ("rollout.num_prompts=30", ["rollout.num_prompts", "30", "rollout.num_minibatches"]),
        ("data.train.0.num_samples=0", ["data.train.0.num_samples", "0"]),
        ("data.train=[]", ["data.train"]),
        ("model.path=''", ["model.path"]),
        ("loss.attention_layers=[1, 1]", ["loss.attention_layers", "[1, 1]"]),
        ("loss.attention_layers=[]", ["loss.attention_layers", "[]"]),
        (
            "loss.attention_target=hindsight",
            ["loss.attention_keys", "= all", "loss.attention_target = hindsight", "prompt"],
        ),
        ("loss.attention_target=oracle", ["loss.attention_keys", "= all", "loss.attention_target = oracle", "visual"]),
        ("loss={attention_target: oracle, attention_keys: prompt}", ["loss.attention_keys", "= prompt", "oracle"]),
        (
            "loss={attention_target: hindsight, attention_keys: visual, attention_store: qk}",
            ["loss.attention_store", "= qk", "loss.attention_target = hindsight", "rows"],
        ),
        (
            "loss={attention_target: oracle, attention_keys: visual, attention_store: qk}",
            ["loss.attention_store", "= qk", "loss.attention_target = oracle"],
        ),
        ("loss.attention_ema_decay=0.99", ["loss.attention_ema_decay", "0.99", "was removed"]),
        ("loss.attention_target=ema", ["loss.attention_target", "ema", "was removed", "reference"]),
        ("loss.attention_target=group", ["loss.attention_target", "group", "was removed", "hindsight"]),
        ("loss.kl_estimator=k1", ["loss.kl_estimator", "k1", "was removed", "k3"]),
        ("loss.attention_row=next", ["loss.attention_row", "next", "'predictor'"]),
        ("loss.attention_divergence=kl", ["loss.attention_divergence", "kl", "'forward_kl'"]),
        ("loss.attention_negative_weight=-1", ["loss.attention_negative_weight", "-1"]),
        ("loss.attention_row_cap=-0.1", ["loss.attention_row_cap", "-0.1"]),
        ("loss.attention_coef_decay=step", ["loss.attention_coef_decay", "step", "'linear'"]),
        ("loss.attention_coef_warmup_steps=-1", ["loss.attention_coef_warmup_steps", "-1"]),
        ("loss.attention_grad_ratio=-0.1", ["loss.attention_grad_ratio", "-0.1"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate"]),
        ("optimizer.beta1=1.0", ["optimizer.beta1", "1.0"]),
        ("data={[1]: 2}", ["data"]),
        ("no_equals_sign", ["no_equals_sign", "dotted.key=value"]),
    ],
)
def test_wrong_setting_is_named(file, override, named):
    with pytest.raises(ConfigError) as error:
        load_config(file, [override])
    sentence = str(error.value)
    assert "\n" not in sentence
    for part in named:
        assert part in sentence, sentence


@pytest.mark.parametrize(
    "settings",
    [
        "attention_target: hindsight, attention_keys: prompt",
        "attention_target: hindsight, attention_keys: visual",
        "attention_target: oracle, attention_keys: visual",
        "attention_target: reference, attention_store: qk, attention_keys: visual",
        "attention_store: qk",
    ],
)
def test_possible_attention_settings_load(file, settings):
    loss = load_config(file, [f"loss={{{settings}}}"]).loss
    for pair in settings.split(", "):
        name, value = pair.split(": ")
        assert getattr(loss, name) == value


@pytest.mark.parametrize(
    "sections",
    [
        "loss: {attention_ema_decay: 0.99}",
        "loss: {attention_ema_decay: 0.5, attention_target: reference}",
        "loss: {kl_estimator: k1, kl_coef: 0.0}",
        "loss: {attention_target: ema, attention_ema_decay: 0.5}\ntrain: {algorithm: sft}",
    ],
)
def test_a_file_of_an_earlier_version_loads_where_a_removed_setting_had_no_effect(file, sections):
    file.write_text(f"{GOOD}\n{sections}\n")
    loss = load_config(file).loss
    assert loss.kl_estimator == "k3" and loss.attention_target in ("old", "reference")


@pytest.mark.parametrize(
    "loss, named",
    [
        ("attention_target: ema, attention_ema_decay: 0.99", ["loss.attention_target = ema was removed", "reference"]),
        ("attention_target: group, attention_keys: prompt", ["loss.attention_target = group was removed", "hindsight"]),
        ("kl_estimator: k1", ["loss.kl_estimator = k1 was removed", "k2 or k3"]),
    ],
)
def test_a_removed_setting_that_had_an_effect_is_refused(file, loss, named):
    file.write_text(f"{GOOD}\nloss: {{{loss}}}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    for part in [*named, "run.yaml"]:
        assert part in str(error.value), str(error.value)


def test_an_error_keeps_its_parts(file):
    with pytest.raises(ConfigError) as error:
        load_config(file, ["rollout.num_prompts=30"])
    assert (error.value.key, error.value.value) == ("rollout.num_prompts", 30)
    assert error.value.remedy == f"is not divisible by rollout.num_minibatches = 4 (in {file} with overrides)"


def test_flat_settings_are_typed_and_complete(file):
    flat = flat_settings(load_config(file, ["reward.functions={mine: {path: 'a:b', weight: -1.0}}"]))
    assert flat["loss.attention_coef"] == 1.0 and flat["logging.tensorboard"] is True
    assert flat["loss.attention_layers"] == [-1] and flat["data.train"][1] == {"shards": "b-*.tar", "num_samples": 0}
    assert flat["reward.functions.mine.weight"] == -1.0
    leaves = {key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())}
    assert leaves - {"reward.functions"} == {key for key in flat if not key.startswith("reward.functions.")}


def test_attention_acts_by_coefficient_or_by_ratio(file):
    for overrides, acts in (
        ([], True),
        (["loss.attention_coef=0"], False),
        (["loss.attention_coef=0", "loss.attention_grad_ratio=0.1"], True),
    ):
        assert load_config(file, overrides).attention_acts == acts


def test_file_is_named(file, tmp_path):
    file.write_text(GOOD + "\nseeds: 3\n")
    with pytest.raises(ConfigError, match="seeds = 3 .*run.yaml"):
        load_config(file)
    file.write_text(GOOD + "\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="seed is given twice .*run.yaml"):
        load_config(file)
    file.write_text("model: [unclosed")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(file)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "world, overrides, named",
    [
        (3, ["parallel.tensor_model_parallel_size=2"], ["tensor_model_parallel_size", "2", "world size 3"]),
        (3, [], ["rollout.num_prompts", "32", "3 data-parallel"]),
        (1, ["train.micro_batch_size=3"], ["train.micro_batch_size", "3", "8 prompt groups"]),
        (5, ["train.algorithm=sft"], ["train.batch_size", "32"]),
    ],
)
def test_world_size_that_does_not_fit_is_named(file, world, overrides, named):
    with pytest.raises(ConfigError) as error:
        check_layout(load_config(file, overrides), world)
    for part in named:
        assert part in str(error.value), str(error.value)


def test_shipped_configurations_load():
    from pathlib import Path

    files = sorted((Path(__file__).parents[2] / "pretrained_configs" / "runs").glob("*.yaml"))
    assert files
    for path in files:
        config = load_config(path, ["model.path=somewhere"])
        teacher_tensor, teacher_pipeline = config.teacher_layout
        model = math.lcm(
            config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size,
            teacher_tensor * teacher_pipeline,
        )
        for data in (1, 2, 4):
            check_layout(config, model * data)
