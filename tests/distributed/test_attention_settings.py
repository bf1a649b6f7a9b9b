"""The attention term in its settings on real stages: the same step in every layout, coefficients by ratio of gradients
and by schedule, and rows under more tensor ranks than key/value heads.

One launch per layout goes through everything, on process groups that stay open.
"""

from dataclasses import replace

import pytest
import torch

from megatron_ral.attention.types import QueryPosition
from megatron_ral.objectives.base import finish_metrics
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.training.gradients import accumulate_gradients
from tests.distributed.cases import fixed_groups, fixed_minibatch, full_weights, micro_batches, one_step, open_policy
from tests.distributed.runner import run_ranks
from tests.distributed.test_layouts import close

SETTINGS = {
    "reference": {
        "attention_target": "reference",
        "attention_row": "predictor",
        "attention_keys": "visual",
        "attention_divergence": "forward_kl",
        "attention_normalizer": "sequence_sum",
    },
    "hindsight": {"attention_target": "hindsight", "attention_keys": "visual", "layers": (0, 2, -1)},
    "oracle": {"attention_target": "oracle", "attention_keys": "visual", "attention_divergence": "reverse_kl"},
    "old": {
        "attention_target": "old",
        "attention_store": "qk",
        "attention_negative_weight": 0.5,
        "attention_row_cap": 0.02,
        "layers": (1, -1),
    },
}
#           world, tensor, pipeline, micro-batch
LAYOUTS = {"TP=2": (2, 2, 1, 2), "PP=2 DP=2": (4, 1, 2, 2)}


def everything(path, other, data, tensor, pipeline, micro_batch_size) -> dict:
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    paths, layout = (path, other, data), (tensor, pipeline)
    steps = {
        name: one_step(*paths, *layout, micro_batch_size, process_groups=process_groups, **settings)["history"][0]
        for name, settings in SETTINGS.items()
    }
    result = {
        "steps": steps,
        "ratio": by_ratio(*paths, *layout, micro_batch_size, process_groups),
        "schedule": by_schedule(*paths, *layout, micro_batch_size, process_groups),
    }
    stop_groups()
    return result


def parts_of_gradient(policy, minibatch, objective) -> tuple:
    """(metrics, gradient shards) of the attention term at coefficient 1, and of the token terms."""
    alone = objective.only("attention").with_term(replace(objective.term("attention"), coefficient=1.0))
    for parts in (alone, objective.without("attention")):
        metrics = policy.forward_backward(minibatch, parts)
        yield finish_metrics(metrics), policy.gradient_shards()


def by_ratio(path, other, data, tensor, pipeline, micro_batch_size, groups) -> dict:
    """One step whose coefficient is chosen, and one in which it is given: norms, metrics, weights."""
    opened = open_policy(path, tensor, pipeline, groups, attention_grad_ratio=0.1, attention_coef=77.0)
    config, _, _, policy, objective = opened
    minibatch, before = fixed_minibatch(opened, other, data, micro_batch_size), full_weights(policy)
    (attention_metrics, attention), (token_metrics, tokens) = parts_of_gradient(policy, minibatch, objective)
    metrics = accumulate_gradients(policy, minibatch, objective, config.num_optimizer_steps, True)
    combined, coef = policy.gradient_shards(), metrics["attention/coef"]
    wrong = [whole - token - coef * part for whole, token, part in zip(combined, tokens, attention)]
    norms = {
        name: policy.gradient_norm(shards)
        for name, shards in (("attention", attention), ("tokens", tokens), ("combined", combined), ("wrong", wrong))
    }
    stepped = policy.step().grad_norm
    given = open_policy(path, tensor, pipeline, groups, attention_coef=coef)
    minibatch = fixed_minibatch(given, other, data, micro_batch_size)
    plain = accumulate_gradients(given[3], minibatch, given[4], given[0].num_optimizer_steps, True)
    given[3].step()
    return {
        "metrics": metrics,
        "attention_metrics": attention_metrics,
        "token_metrics": token_metrics,
        "norms": norms,
        "stepped": stepped,
        "plain": plain,
        "changes": changes(full_weights(policy), before),
        "plain_changes": changes(full_weights(given[3]), before),
    }


def changes(weights, before) -> dict:
    return {name: weights[name] - before[name] for name in weights}


def by_schedule(path, other, data, tensor, pipeline, micro_batch_size, groups) -> list[tuple]:
    """(coefficient, attention loss, the same at coefficient 1, ratio of gradients by their norms, ratio as logged)."""
    opened = open_policy(
        path, tensor, pipeline, groups, attention_coef=2.0, attention_coef_warmup_steps=2, attention_coef_decay="linear"
    )
    config, _, _, policy, objective = opened
    config = replace(config, train=replace(config.train, num_steps=2))  # of two updates each
    minibatch, history = fixed_minibatch(opened, other, data, micro_batch_size), []
    for _ in range(5):
        (raw, attention), (_, tokens) = parts_of_gradient(policy, minibatch, objective)
        ratio = policy.gradient_norm(attention) / policy.gradient_norm(tokens)
        metrics = accumulate_gradients(policy, minibatch, objective, config.num_optimizer_steps, True)
        history.append(
            (
                metrics["attention/coef"],
                metrics["loss/attention"],
                raw["loss/attention"],
                ratio,
                metrics.get("attention/grad_ratio"),
            )
        )
        policy.step()
    return history


def paths(material) -> list[str]:
    return [str(material[key]) for key in ("tiny", "tiny_other", "data")]


@pytest.fixture(scope="module")
def alone(material):
    return run_ranks(1, everything, *paths(material), 1, 1, 8)[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def results(request, material):
    world, tensor, pipeline, micro_batch_size = LAYOUTS[request.param]
    return run_ranks(world, everything, *paths(material), tensor, pipeline, micro_batch_size)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_acts(alone, name):
    """The comparison would be worth little if the term or its gradient were zero."""
    step = alone["steps"][name]
    assert abs(step["loss/attention"]) > 1e-4 and step["attention/divergence"] > 1e-3
    assert step["attention_norm"] > 1e-4 and step["attention/above_floor"] > 0.3
    others = [other["attention_norm"] for key, other in alone["steps"].items() if key != name]
    assert all(abs(step["attention_norm"] / other - 1) > 1e-2 for other in others)


def test_layout_equals_one_process(alone, results):
    """Every metric and every norm of every setting, on every rank."""
    for name, wanted in alone["steps"].items():
        for rank, result in enumerate(results):
            assert result["steps"][name].keys() == wanted.keys()
            for metric, value in wanted.items():
                close(f"{name}, rank {rank}, {metric}", result["steps"][name][metric], value)


# --- coefficients -----------------------------------------------------------------------------------------------------


def check_ratio(found: dict) -> None:
    norms, metrics, coef = found["norms"], found["metrics"], found["metrics"]["attention/coef"]
    assert coef * norms["attention"] / norms["tokens"] == pytest.approx(0.1, rel=1e-6)
    assert metrics["attention/grad_ratio"] == 0.1 and abs(coef - 77.0) > 1
    assert norms["wrong"] < 1e-7 * norms["combined"] and norms["combined"] == pytest.approx(found["stepped"], rel=1e-5)
    assert abs(norms["combined"] / norms["tokens"] - 1) > 1e-4, "the attention's share must be seen"
    # metrics of both parts, the attention loss at the coefficient that was chosen
    close("loss", metrics["loss/attention"], coef * found["attention_metrics"]["loss/attention"])
    for name, value in {**found["attention_metrics"], **found["token_metrics"]}.items():
        if name != "loss/attention":
            assert metrics[name] == value, name
    # a run that is given this coefficient makes the same step
    for name, value in found["plain"].items():
        close(name, metrics[name], value)
    for name, change in found["plain_changes"].items():
        assert (found["changes"][name] - change).norm() <= 1e-3 * change.norm(), name


def test_coefficient_by_ratio_of_gradients(alone):
    check_ratio(alone["ratio"])


def test_coefficient_by_ratio_of_gradients_in_every_layout(alone, results):
    for result in results:
        check_ratio(result["ratio"])
        for name, value in alone["ratio"]["metrics"].items():
            close(name, result["ratio"]["metrics"][name], value)


def test_scheduled_coefficient(alone, results):
    """Warm-up over two steps, then linear to 0 at the end of the run's four; beyond, the term is only measured."""
    for history in [alone["schedule"]] + [result["schedule"] for result in results]:
        assert [coef for coef, *_ in history] == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.0])
        for (coef, loss, raw, ratio, logged), wanted in zip(history, alone["schedule"]):
            assert loss == pytest.approx(coef * raw, rel=1e-6) and abs(raw) > 1e-4
            close("raw", raw, wanted[2], 1e-4)  # steps with Adam amplify the rounding of the layouts
            assert logged is None if coef == 0 else logged == pytest.approx(coef * ratio, rel=1e-4)


def on_policy(path, data):
    """The rollout's own policy as the target: nothing to take a ratio of."""
    opened = open_policy(path, 1, 1, attention_target="old", attention_grad_ratio=0.1, kl_coef=0.0)
    config, _, _, policy, objective = opened
    minibatch = fixed_minibatch(opened, path, data, 4)
    (_, attention), (_, tokens) = parts_of_gradient(policy, minibatch, objective)
    metrics = accumulate_gradients(policy, minibatch, objective, config.num_optimizer_steps, True)
    combined = policy.gradient_shards()
    stop_groups()
    return metrics, attention, tokens, combined


def test_ratio_of_nothing_is_coefficient_zero(material):
    [(metrics, attention, tokens, combined)] = run_ranks(1, on_policy, str(material["tiny"]), str(material["data"]))
    assert metrics["attention/coef"] == metrics["loss/attention"] == 0.0 and "attention/grad_ratio" not in metrics
    # Not exactly zero on every processor: a product may round by where its matrices lie in memory.
    signal, noise = (sum(float(shard.square().sum()) for shard in part) ** 0.5 for part in (tokens, attention))
    assert signal > 0 and noise <= 1e-5 * signal
    assert all(torch.equal(whole, token) for whole, token in zip(combined, tokens))


# --- rows over tensor ranks -------------------------------------------------------------------------------------------


def rows_of_every_kind(path, data, tensor):
    """Head-averaged rows of two layers. The model has 4 heads and 2 key/value heads."""
    _, _, _, policy, _ = open_policy(path, tensor, 1)
    [scored] = micro_batches(fixed_groups(path, data)[:3], 3, policy)
    found = {
        position.value: policy.forward(
            [scored.groups], [0, 3], position=position, store=lambda rows, batch: rows.attention
        )
        for position in QueryPosition
    }
    lengths, responses = scored.groups.prompts.prompt_lengths, scored.groups.response_lengths
    stop_groups()
    return {kind: output.attention for kind, [output] in found.items()}, lengths, responses


def test_rows_are_the_mean_over_all_heads_on_every_tensor_rank(material):
    arguments = str(material["tiny"]), str(material["data"])
    [(alone, lengths, _)] = run_ranks(1, rows_of_every_kind, *arguments, 1)
    P = int(lengths.max())
    for layers in alone.values():
        for rows in layers.values():
            assert torch.allclose(rows.sum(-1), torch.ones_like(rows[..., 0]), atol=1e-5)
    token, predictor, last = (alone[kind][3] for kind in ("token", "predictor", "last_prompt"))
    assert torch.allclose(predictor[:, :, 1:], token[:, :, :-1], atol=1e-6), "one place earlier"
    assert torch.allclose(predictor[:, :, :1, :P], last.expand(-1, 3, -1, -1), atol=1e-6), (
        "the first: the prompt's last"
    )
    assert (token[:, :, 0, P] > 0).all() and not token[:, :, 0, P + 1 :].any() and not predictor[:, :, 0, P:].any()
    for tensor in (2, 4):
        for found, *_ in run_ranks(tensor, rows_of_every_kind, *arguments, tensor):
            for kind, layers in alone.items():
                for layer, rows in layers.items():
                    assert torch.allclose(found[kind][layer], rows, rtol=0, atol=1e-6), (tensor, kind, layer)
