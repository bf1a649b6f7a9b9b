"""Two hundred configurations that are each wrong in one place: one sentence, which names the key and the value."""

import dataclasses
import json
import random
import typing
from pathlib import Path

import pytest
from annotated_types import Ge, Gt, Le, Lt

from megatron_ral.config import RunConfig, check_layout, load_config
from megatron_ral.errors import ConfigError

RUNS = sorted((Path(__file__).parents[2] / "pretrained_configs" / "runs").glob("*.yaml"))


def leaves(section=RunConfig, prefix=""):
    """(dotted key, type) of every setting."""
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(item.type):
            yield from leaves(item.type, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item.type


def wrong_values(kind):
    """Values that a setting of this type cannot have."""
    bare, bounds = kind, ()
    if typing.get_origin(kind) is typing.Annotated:
        bare, *bounds = typing.get_args(kind)
    for bound in bounds:
        if isinstance(bound, Gt):
            yield bound.gt
            yield bound.gt - 3
        elif isinstance(bound, Ge):
            yield bound.ge - 1
        elif isinstance(bound, Le):
            yield bound.le + 6
        elif isinstance(bound, Lt):
            yield bound.lt
    yield {int: "many", float: "fast", bool: "maybe", str: 17}.get(bare, "nonsense")
    yield {int: 2.5, float: True, bool: 1, str: True}.get(bare, 3)
    yield None
    if bare in (int, float, bool, str):
        yield [1, 2]


def contradictions():
    """(key that is named, value that is named, overrides): each setting possible by itself."""
    yield "rollout.num_prompts", "31", ["rollout.num_prompts=31"]
    yield "loss.attention_keys", "all", ["loss.attention_target=hindsight", "loss.attention_store=rows"]
    yield "loss.attention_keys", "prompt", ["loss.attention_target=oracle", "loss.attention_keys=prompt"]
    yield (
        "loss.attention_store",
        "qk",
        ["loss.attention_target=hindsight", "loss.attention_keys=prompt", "loss.attention_store=qk"],
    )
    yield "loss.attention_layers", "[2, 2]", ["loss.attention_layers=[2, 2]"]
    yield "loss.dual_clip", "3.0", ["loss.dual_clip=3.0", "loss.policy_loss=cispo"]
    yield "loss.dual_clip", "0.5", ["loss.dual_clip=0.5"]
    yield "model.train_vision", "true", ["model.train_vision=true", "train.algorithm=ral"]
    yield "distill.attention_layers", "[1, 1]", ["distill.attention_layers=[1, 1]"]
    yield "distill.teacher_rollouts", "0.5", ["teacher.path=x", "distill.teacher_rollouts=0.5", "loss.policy_coef=1.0"]
    yield "loss.filter_equal_rewards", "true", ["teacher.path=x", "loss.filter_equal_rewards=true"]
    yield "distill.token_divergence", "cross_entropy", ["teacher.path=x", "distill.token_divergence=cross_entropy"]
    yield "train.micro_batch_size", "3", ["train.micro_batch_size=3", "rollout.num_prompts=64"]
    yield "tensor_model_parallel_size", "3", ["parallel.tensor_model_parallel_size=3"]


def mutations():
    for key, kind in leaves():
        if key in ("data.train", "reward.functions"):
            for value in (3, "text", [3]):
                yield key, value, [f"{key}={json.dumps(value)}"]
            continue
        for value in wrong_values(kind):
            yield key, value, [f"{key}={json.dumps(value)}"]
        yield f"{key}_x", 12345, [f"{key}_x=12345"]


def chosen():
    draw, everything = random.Random(0), list(mutations())
    assert len(everything) > 300
    return [*((*one, True) for one in contradictions()), *((*one, False) for one in draw.sample(everything, 190))]


@pytest.mark.parametrize("number, case", list(enumerate(chosen())))
def test_mutation_is_one_sentence_that_names_key_and_value(number, case):
    key, value, overrides, contradiction = case
    path = RUNS[[run.stem for run in RUNS].index("ral_7b")] if contradiction else RUNS[number % len(RUNS)]
    with pytest.raises(ConfigError) as error:
        check_layout(load_config(path, ["model.path=somewhere", *overrides]), 8)
    sentence = str(error.value)
    assert "\n" not in sentence and "Traceback" not in sentence
    said = sentence.removesuffix(f" (in {path} with overrides)")
    assert key in said, (key, value, sentence)
    assert (value if isinstance(value, str) else json.dumps(value)) in said, (key, value, sentence)
