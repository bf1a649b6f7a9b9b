"""The whole loss that an engine calls back, against a float64 loop written from the formulas: values, gradients, signs.

A sign-flipped policy, KL, entropy or attention term, a wrong denominator, a mask left out, or a wrong share of a layer
fails here. The attention term is compared in every one of its settings, from queries and keys to the loss.
"""

import itertools
import math
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

from megatron_ral.attention.group_layout import AttentionRecord, GroupLayout
from megatron_ral.attention.layer_rows import AttentionRows, HeadSettings
from megatron_ral.attention.types import QueryPosition
from megatron_ral.config.loss import LossConfig
from megatron_ral.objectives.attention import PRECISION_FLOOR, AttentionTerm
from megatron_ral.objectives.base import Objective, TokenOutputs, finish_metrics
from megatron_ral.objectives.policy_gradient import PolicyGradientTerm
from megatron_ral.objectives.supervised import supervised_objective
from megatron_ral.types import GroupBatch, PromptBatch, RlBatch, SftBatch, StepTotals
from tests.unit.slow_attention import KINDS, slow_attention, slow_divergence, slow_policy

B, G, R, P = 2, 3, 4, 5
LENGTHS, PROMPTS = torch.tensor([[4, 2, 3], [1, 4, 2]]), torch.tensor([5, 3])
ADVANTAGES = torch.tensor([[1.2, -0.7, 0.0], [-1.1, 0.4, 0.9]], dtype=torch.float64)
VISUAL = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
BOX = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
HEADS = HeadSettings(scale=0.7, num_heads=4, process_group=SimpleNamespace(size=lambda: 1))
REAL = torch.arange(R) < LENGTHS[..., None]
ANSWERS = torch.tensor([[2, 1, -1], [0, 3, 1]])
"""Tokens with which the answers begin; -1: the response has none."""
RECORDED = ("explored", "contrast")
"""Targets whose rows decoding recorded; they predict each token."""


def rand(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(num_tokens, **parts) -> RlBatch:
    """A micro-batch of a step that has `num_tokens` response tokens, 9 responses of at most 6 tokens."""
    prompts = PromptBatch(
        prompts=(None,) * B,
        input_ids=torch.zeros(B, P, dtype=torch.int64),
        prompt_lengths=PROMPTS,
        position_ids=torch.zeros(3, B, P, dtype=torch.int64),
        next_position=PROMPTS,
        visual_mask=VISUAL,
        target_mask=BOX,
    )
    groups = GroupBatch(prompts, torch.zeros(B, G, R, dtype=torch.int64), LENGTHS, None, ANSWERS)
    usual = {
        "group_mask": torch.ones(B, dtype=torch.bool),
        "advantages": ADVANTAGES,
        "attention_advantages": ADVANTAGES,
        "rollout_logprobs": torch.zeros(B, G, R),
        "from_teacher": torch.zeros(B, dtype=torch.bool),
        "is_on_policy": False,
        "compares_sampler": False,
    }
    return RlBatch(groups, StepTotals(num_tokens, 9, 6), **{**usual, **parts})


def make_objective(layers=(3,), **loss) -> Objective:
    settings = LossConfig(**loss)
    attention = AttentionTerm(settings, frozenset(layers), settings.attention_coef)
    return Objective((PolicyGradientTerm(settings), attention), attention.position)


def term_of(objective: Objective) -> AttentionTerm:
    return objective.term("attention")


def slow_token_loss(new, old, ref, entropy, settings, num_tokens, groups=range(B)):
    """Token by token: weight * (policy + kl_coef * KL - entropy_coef * entropy)."""
    total = 0.0
    for b in groups:
        for g in range(G):
            length = int(LENGTHS[b, g])
            weight = {
                "token_mean": 1 / num_tokens,
                "sequence_mean": 1 / (9 * length),
                "sequence_sum_norm": 1 / (9 * 6),
            }[settings.aggregation]
            sequence = sum(new[b, g, r] - old[b, g, r] for r in range(length)) / length
            for r in range(length):
                advantage, low, high = float(ADVANTAGES[b, g]), 1 - settings.clip_low, 1 + settings.clip_high
                ratio = torch.exp(sequence if settings.policy_loss == "gspo" else new[b, g, r] - old[b, g, r])
                clipped = torch.clamp(ratio, low, high)
                policy = -torch.minimum(ratio * advantage, clipped * advantage)
                if settings.policy_loss == "cispo":
                    policy = -clipped.detach() * advantage * new[b, g, r]
                if settings.dual_clip and advantage < 0:
                    policy = torch.clamp(policy, max=-settings.dual_clip * advantage)
                difference = ref[b, g, r] - new[b, g, r]
                kl = {"k2": difference**2 / 2, "k3": torch.exp(difference) - difference - 1}[settings.kl_estimator]
                if settings.kl_clamp:
                    kl = torch.clamp(kl, -settings.kl_clamp, settings.kl_clamp)
                total = total + weight * (policy + settings.kl_coef * kl - settings.entropy_coef * entropy[b, g, r])
    return total


FAMILY = {
    "grpo": {},
    "dapo": {"clip_high": 0.4, "dual_clip": 1.5, "entropy_coef": 0.3, "kl_clamp": 0.2},
    "grpo as published": {"aggregation": "sequence_mean"},
    "dr_grpo": {"aggregation": "sequence_sum_norm", "kl_estimator": "k2", "kl_clamp": 0.1},
    "gspo": {"policy_loss": "gspo", "aggregation": "sequence_mean", "kl_estimator": "k2", "clip_low": 0.05},
    "cispo": {"policy_loss": "cispo", "clip_low": 1.0, "entropy_coef": 0.3},
}


@pytest.mark.parametrize("num_tokens", [16, 40])
@pytest.mark.parametrize("name", FAMILY)
def test_token_loss_of_the_family(name, num_tokens):
    settings = LossConfig(**{"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.7, **FAMILY[name]})
    new = (0.4 * rand(B, G, R, seed=1) - 2).requires_grad_()
    entropy = rand(B, G, R, seed=4).exp().requires_grad_()
    old, ref = 0.4 * rand(B, G, R, seed=2) - 2, 0.4 * rand(B, G, R, seed=3) - 2
    objective = Objective((PolicyGradientTerm(settings),))
    loss, metrics = objective.token_loss(
        TokenOutputs(new, entropy),
        batch(num_tokens, advantages=ADVANTAGES, old_logprobs=old, ref_logprobs=ref, attention_advantages=-ADVANTAGES),
    )
    wanted = slow_token_loss(new, old, ref, entropy, settings, num_tokens)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
    for source in (new, entropy)[: 1 + (settings.entropy_coef > 0)]:
        (ours,) = torch.autograd.grad(loss, source, retain_graph=True)
        (theirs,) = torch.autograd.grad(wanted, source, retain_graph=True)
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-16) and ours.abs().max() > 1e-3
        assert not ours[~REAL].any()
    assert float(metrics["loss/token"]) == pytest.approx(float(wanted), rel=1e-12)
    # the log is a mean over tokens whatever the loss is
    assert float(metrics["entropy"]) == pytest.approx(float(entropy[REAL].sum()) / num_tokens)
    assert not any(value.requires_grad for value in metrics.values())
    assert settings.entropy_coef > 0 or not torch.autograd.grad(loss, entropy, allow_unused=True)[0]


def test_token_loss_prefers_what_was_rewarded():
    """One gradient step down the loss must make tokens of A > 0 likelier and of A < 0 less likely (kl_coef = 0)."""
    new = torch.full((B, G, R), -2.0, dtype=torch.float64, requires_grad=True)
    loss, _ = make_objective(kl_coef=0.0).token_loss(
        TokenOutputs(new, torch.ones_like(new)), batch(16, advantages=ADVANTAGES, old_logprobs=new.detach())
    )
    step = -torch.autograd.grad(loss, new)[0]
    assert (torch.sign(step) == torch.sign(ADVANTAGES)[..., None] * REAL).all()


# --- the attention term -----------------------------------------------------------------------------------------------


@lru_cache
def record(seed: int) -> AttentionRecord:
    """Queries and keys of a layer with 4 heads over 2 key/value heads, leaves of autograd."""
    shapes = (B, G, R, 4, 3), (B, 4, 3), (B, P, 2, 3), (B, G, R, 2, 3)
    return AttentionRecord(*(1.5 * rand(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)))


def leaves(source: AttentionRecord) -> tuple[torch.Tensor, ...]:
    tensors = source.query_BGRnD, source.last_prompt_query_BnD, source.prompt_key_BPkD, source.response_key_BGRkD
    return tuple(tensor.requires_grad_() for tensor in tensors)


def rows(source: AttentionRecord, kind: str | QueryPosition = "token") -> AttentionRows:
    return AttentionRows(source, GroupLayout(PROMPTS, LENGTHS, P, R), QueryPosition(kind), HEADS)


@lru_cache
def slow_rows(seed: int, kind: str) -> torch.Tensor:
    """[B, G, R, P + R], or [B, 1, 1, P] for the last prompt row, with gradient to the leaves of `record(seed)`."""
    query, last_prompt, prompt_key, response_key = leaves(record(seed))
    last_prompt = last_prompt[:, None, None]
    if kind == "last_prompt":
        return slow_attention(last_prompt, prompt_key, response_key[:, :1, :0], PROMPTS, 0, HEADS.scale)
    if kind == "predictor":
        query = torch.cat([last_prompt.expand(-1, G, -1, -1, -1), query[:, :, :-1]], dim=2)
    return slow_attention(query, prompt_key, response_key, PROMPTS, int(kind == "predictor"), HEADS.scale)


def slow_policies(seed: int, kind: str, settings: LossConfig) -> torch.Tensor:
    """Policies over the keys of the settings, columns and own token written down by hand."""
    columns = {
        "all": [[1] * 5 + [1] * R] * 2,
        "visual": [[0, 1, 1, 1, 0] + [0] * R, [1, 1, 0, 0, 0] + [0] * R],
        "prompt": [[1] * 5 + [0] * R, [1, 1, 1, 0, 0] + [0] * R],
    }[settings.attention_keys]
    own = {"token": [[5, 6, 7, 8], [5, 6, 7, 8]], "predictor": [[4, 5, 6, 7], [2, 5, 6, 7]], "last_prompt": [[4], [2]]}[
        kind
    ]
    attention = slow_rows(seed, kind)
    columns = torch.tensor(columns).bool()[:, : attention.shape[-1]]
    return slow_policy(attention, columns, torch.tensor(own) if settings.attention_exclude_self else None)


def slow_success_rows(settings: LossConfig, advantages: torch.Tensor) -> torch.Tensor:
    """[B, P]: where the successful responses of the other model looked in the prompt, by their advantage."""
    policy, result = slow_policies(2, settings.attention_row, settings), torch.zeros(B, P, dtype=torch.float64)
    for b in range(B):
        total = sum(float(advantages[b, g]) for g in range(G) if advantages[b, g] > 0)
        for g in range(G):
            if advantages[b, g] > 0:
                mean = sum(policy[b, g, r, :P] for r in range(int(LENGTHS[b, g]))) / int(LENGTHS[b, g])
                result[b] += float(advantages[b, g]) / total * mean.detach()
    return result


def slow_target(settings: LossConfig, kind: str, advantages: torch.Tensor) -> torch.Tensor:
    """Like the policies, over the same keys."""
    target = settings.attention_target
    if target in ("old", "reference", *RECORDED):
        return slow_policies(2, kind, settings).detach()
    policy = slow_policies(1, kind, settings).detach()
    row = {
        "hindsight": lambda: slow_success_rows(settings, advantages),
        "oracle": lambda: torch.tensor([[0, 0, 0.5, 0.5, 0], [0] * 5], dtype=torch.float64),
        "evidence": lambda: torch.tensor(
            [[0, 0.1 / 3, 0.45 + 0.1 / 3, 0.45 + 0.1 / 3, 0], [0] * 5], dtype=torch.float64
        ),
    }[target]()
    same = torch.zeros_like(policy)
    same[..., :P] = row[:, None, None]
    same = same * (policy > 0)
    return same / same.sum(dim=-1, keepdim=True).clamp(min=1e-300)


def slow_weight(settings: LossConfig, advantages: torch.Tensor, b: int, g: int) -> float:
    advantage = float(advantages[b, g])
    scaled = advantage * (settings.attention_negative_weight if advantage < 0 else 1.0)
    return {
        "oracle": float(BOX[b].any()),
        "evidence": advantage * float(BOX[b].any()),
        "hindsight": sum(max(float(other), 0.0) for other in advantages[b]),
    }.get(settings.attention_target, scaled)


def slow_position(settings: LossConfig) -> str:
    if settings.attention_target in RECORDED:
        return "predictor"
    return "last_prompt" if settings.attention_target == "hindsight" else settings.attention_row


def slow_row_weight(settings: LossConfig, kind: str, b: int, g: int, r: int) -> float:
    """Weight of a row by `attention_rows`; 0 where the row does not count."""
    if kind == "last_prompt" or settings.attention_rows == "all":
        return 1.0
    if settings.attention_rows == "deciding":
        return float(r == int(ANSWERS[b, g]) - (kind == "token"))
    return float(slow_rows(1, kind)[b, g, r, :P][VISUAL[b]].sum())


def slow_attention_term(settings: LossConfig, num_tokens: int, advantages=ADVANTAGES, prompts=range(B)):
    """(loss at coefficient 1 with one layer, [(advantage, divergence)] of the rows that count)."""
    kind = slow_position(settings)
    policy, target = slow_policies(1, kind, settings), slow_target(settings, kind, advantages)
    loss, seen = 0.0, []
    for b in prompts:
        for g in range(policy.shape[1]):
            for r in range(int(LENGTHS[b, g]) if kind != "last_prompt" else 1):
                if not target[b, g, r].any():
                    continue  # nothing to compare with: no box, no success
                if not slow_row_weight(settings, kind, b, g, r):
                    continue
                if settings.attention_target == "contrast":
                    wanted = target[b, g, r]
                    divergence = -(wanted[wanted > 0] * policy[b, g, r][wanted > 0].log()).sum()
                else:
                    divergence = slow_divergence(policy[b, g, r], target[b, g, r], settings.attention_divergence)
                if not policy[b, g, r].any():
                    divergence = 0.0 * divergence
                seen.append((float(advantages[b, g]), float(divergence)))
                has_cap = settings.attention_row_cap and settings.attention_target != "contrast"
                if has_cap and float(divergence) > settings.attention_row_cap:
                    divergence = 0.0 * divergence + settings.attention_row_cap
                weight = slow_weight(settings, advantages, b, g) * slow_row_weight(settings, kind, b, g, r)
                loss = loss + weight * divergence
    one_row = settings.attention_rows == "deciding" and kind != "last_prompt"
    per_response = settings.attention_normalizer == "sequence_sum" or one_row
    return loss / (9 if per_response else num_tokens), seen


def train_batch(objective: Objective, num_tokens=16, advantages=ADVANTAGES, other: int = 2, **parts) -> RlBatch:
    """With what the objective keeps of another model's pass, made into targets as `assemble_minibatches` does."""
    train, target = batch(num_tokens), term_of(objective).settings.attention_target
    if target in ("oracle", "evidence"):
        return batch(num_tokens, attention_advantages=advantages, **parts)
    if target in RECORDED:
        recorded = {3: rows(record(other), "predictor").attention}
        return batch(num_tokens, attention_advantages=advantages, target_attention=recorded, **parts)
    kept = term_of(objective).store(rows(record(other), term_of(objective).settings.attention_row), train.groups)
    kept = term_of(objective).target.combine(kept, advantages)
    return batch(num_tokens, attention_advantages=advantages, target_attention={3: kept}, **parts)


def attention_loss(objective: Objective, train: RlBatch, source=None) -> tuple:
    """(loss, gradients to the leaves, metrics)."""
    source = record(1) if source is None else source
    inputs = leaves(source)
    loss, metrics = objective.attention_loss(3, rows(source, objective.position), train)
    return loss, torch.autograd.grad(loss, inputs, allow_unused=True), metrics


COMPARED = [(target, keys) for target in ("old", "reference") for keys in ("all", "visual", "prompt")] + [
    ("hindsight", "visual"),
    ("hindsight", "prompt"),
    ("oracle", "visual"),
    ("evidence", "visual"),
    ("explored", "all"),
    ("explored", "visual"),
    ("explored", "prompt"),
    ("contrast", "visual"),
]
EXTRAS = [
    {},
    {"attention_normalizer": "sequence_sum"},
    {"attention_row_cap": 0.1},
    {"attention_negative_weight": 0.25},
    {"attention_negative_weight": 0.0, "attention_row_cap": 0.5},
    {"attention_normalizer": "sequence_sum", "attention_negative_weight": 3.0},
    {"attention_row_cap": 5.0},
    {"attention_rows": "deciding"},
    {"attention_rows": "visual", "attention_negative_weight": 2.0},
]


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("row", ["token", "predictor"])
@pytest.mark.parametrize("target, keys", COMPARED)
def test_attention_loss_in_every_setting(target, keys, row, exclude_self):
    """Value, gradient to queries and keys, and metrics of the divergence, against the loop."""
    for index, kind in enumerate(KINDS):
        extra = EXTRAS[(COMPARED.index((target, keys)) * 5 + 2 * index + (row == "token") + exclude_self) % len(EXTRAS)]
        settings = {
            "attention_target": target,
            "attention_keys": keys,
            "attention_row": row,
            "attention_exclude_self": exclude_self,
            "attention_divergence": kind,
            **extra,
        }
        check_attention_loss(settings, num_tokens=16)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("target, keys", [("old", "all"), ("hindsight", "prompt"), ("contrast", "visual")])
def test_attention_loss_with_every_weight_and_denominator(target, keys, extra):
    for num_tokens, layers, coef in ((16, (3,), 1.0), (40, (1, 3), 5.0)):
        check_attention_loss({"attention_target": target, "attention_keys": keys, **extra}, num_tokens, layers, coef)


def check_attention_loss(settings: dict, num_tokens: int, layers=(3,), coef=1.0) -> None:
    objective = make_objective(layers, attention_coef=coef, **settings)
    wanted, seen = slow_attention_term(term_of(objective).settings, num_tokens)
    wanted = coef * wanted / len(layers)
    loss, gradients, metrics = attention_loss(objective, train_batch(objective, num_tokens))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-9), settings
    theirs = torch.autograd.grad(wanted, leaves(record(1)), allow_unused=True, retain_graph=True)
    largest = 0.0
    for ours, gradient in zip(gradients, theirs):
        gradient = torch.zeros(()) if gradient is None else gradient
        assert torch.allclose(torch.zeros(()) if ours is None else ours, gradient, rtol=1e-9, atol=1e-12), settings
        largest = max(largest, float(gradient.abs().max()))
    assert largest > 1e-5 or settings.get("attention_row_cap"), "a comparison of zeros"
    chosen = {
        "divergence": [value for _, value in seen],
        "above_floor": [value > PRECISION_FLOOR[torch.float64] for _, value in seen],
    }
    if settings["attention_target"] != "hindsight":
        chosen |= {
            "divergence_positive": [value for advantage, value in seen if advantage > 0],
            "divergence_negative": [value for advantage, value in seen if advantage < 0],
        }
    assert {name for name in metrics if "divergence" in name and name.endswith("sum")} == {
        f"attention/{name}:sum" for name in chosen if "divergence" in name
    }
    for name, values in chosen.items():
        assert float(metrics[f"attention/{name}:sum"]) == pytest.approx(sum(values), rel=1e-9, abs=1e-14), name
        assert int(metrics[f"attention/{name}:count"]) == len(values) > 0, name
    assert float(metrics["loss/attention"]) == pytest.approx(float(wanted), rel=1e-9)
    assert not any(value.requires_grad for value in metrics.values())


def test_the_settings_make_a_difference():
    """The comparison would be worth little if a setting changed nothing in it."""
    base = {"attention_target": "old", "attention_keys": "prompt"}
    changed = [
        {},
        {"attention_keys": "all"},
        {"attention_keys": "visual"},
        {"attention_row": "predictor"},
        {"attention_divergence": "forward_kl"},
        {"attention_divergence": "reverse_kl"},
        {"attention_normalizer": "sequence_sum"},
        {"attention_row_cap": 0.1},
        {"attention_negative_weight": 0.25},
        {"attention_target": "hindsight"},
        {"attention_keys": "all", "attention_exclude_self": False},
        {"attention_target": "oracle", "attention_keys": "visual"},
        {"attention_target": "explored", "attention_keys": "visual"},
        {"attention_target": "contrast", "attention_keys": "visual"},
        {"attention_rows": "deciding"},
        {"attention_rows": "visual"},
    ]
    values = []
    for change in changed:
        objective = make_objective(**{**base, **change})
        values.append(float(attention_loss(objective, train_batch(objective))[0]))
    values.sort()
    assert all(high - low > 1e-4 for low, high in itertools.pairwise(values)), values


def test_rows_beyond_the_cap_give_no_gradient_and_the_others_theirs():
    free, capped = make_objective(), make_objective(attention_row_cap=0.1)
    train = train_batch(free)
    divergence = rows(record(1)).divergence(train.target_attention[3])
    beyond = divergence > 0.1
    assert 3 < int((beyond & REAL).sum()) < 13
    of_free, of_capped = attention_loss(free, train)[1][0], attention_loss(capped, train)[1][0]
    assert not of_capped[beyond].any() and torch.equal(of_capped[~beyond], of_free[~beyond])
    assert of_free[beyond & REAL & (ADVANTAGES != 0)[..., None]].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("row", ["token", "predictor"])
@pytest.mark.parametrize("target", ["old", "reference"])
def test_stored_queries_and_keys_equal_stored_rows_bit_for_bit(target, row):
    """In float32, from views of whole layers as a pass hands them over, of which nothing else is kept alive."""
    whole = rand(P + G * R, B, 4, 3, seed=5).float(), rand(P + G * R, B, 2, 3, seed=6).float()
    query, key = (tensor.transpose(0, 1) for tensor in whole)
    other = AttentionRecord(
        query[:, P:].unflatten(1, (G, R)),
        query[torch.arange(B), PROMPTS - 1],
        key[:, :P],
        key[:, P:].unflatten(1, (G, R)),
    )
    mine = AttentionRecord(*(tensor.detach().float() for tensor in leaves(record(1))))
    found = []
    for store in ("rows", "qk"):
        objective = make_objective(attention_target=target, attention_row=row, attention_store=store)
        kept = term_of(objective).store(rows(other, row), batch(16).groups)
        assert isinstance(kept, AttentionRecord) == (store == "qk")
        train = batch(16, attention_advantages=ADVANTAGES.float(), target_attention={3: kept})
        found.append(attention_loss(objective, train, mine))
        # the policy itself as the target: exactly zero, whichever was stored
        kept = term_of(objective).store(rows(mine, row), batch(16).groups)
        train = batch(16, attention_advantages=ADVANTAGES.float(), target_attention={3: kept})
        loss, gradients, metrics = attention_loss(objective, train, mine)
        assert not any(gradient.any() for gradient in gradients if gradient is not None)
        assert float(metrics["attention/divergence:sum"]) == 0.0 == float(loss)
    (loss, gradients, metrics), (again, same, more) = found
    assert torch.equal(loss, again) and abs(float(loss)) > 1e-4
    assert metrics.keys() == more.keys() and all(torch.equal(metrics[name], more[name]) for name in metrics)
    for one, two in zip(gradients, same):
        assert (one is None and two is None) or torch.equal(one, two)
    kept = term_of(make_objective(attention_store="qk")).store(rows(other), batch(16).groups)
    for tensor in (kept.query_BGRnD, kept.last_prompt_query_BnD, kept.prompt_key_BPkD, kept.response_key_BGRkD):
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel() and not tensor.requires_grad


def test_groups_that_take_no_part_leave_no_trace():
    """The second group alone: every term, its gradient and every metric, as if the first were not in the batch."""
    objective, parts = make_objective(kl_coef=0.7, entropy_coef=0.3, aggregation="sequence_mean"), {}
    new, entropy = (0.4 * rand(B, G, R, seed=1) - 2).requires_grad_(), rand(B, G, R, seed=4).exp()
    old, ref = 0.4 * rand(B, G, R, seed=2) - 2, 0.4 * rand(B, G, R, seed=3) - 2
    for group_mask in ([False, True], [False, False]):
        train = train_batch(
            objective, 7, advantages=ADVANTAGES, old_logprobs=old, ref_logprobs=ref, group_mask=torch.tensor(group_mask)
        )
        train = batch(
            7,
            advantages=ADVANTAGES,
            **{
                name: getattr(train, name)
                for name in ("old_logprobs", "ref_logprobs", "group_mask", "target_attention", "attention_advantages")
            },
        )
        loss, metrics = objective.token_loss(TokenOutputs(new, entropy), train)
        attention, gradients, more = attention_loss(objective, train)
        (gradient,) = torch.autograd.grad(loss, new)
        parts[group_mask[1]] = loss, gradient, attention, gradients, {**metrics, **more}
    loss, gradient, attention, gradients, metrics = parts[True]
    wanted = slow_token_loss(new, old, ref, entropy, term_of(objective).settings, 7, groups=[1])
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12) and not gradient[0].any() and gradient[1].any()
    wanted, seen = slow_attention_term(term_of(objective).settings, 7, prompts=[1])
    assert float(attention) == pytest.approx(float(wanted), rel=1e-9)
    assert all(not part[0].any() and part[1].any() for part in gradients if part is not None)
    done = finish_metrics({name: float(value) for name, value in metrics.items()})
    assert done["attention/divergence"] == pytest.approx(sum(value for _, value in seen) / 7, rel=1e-9)
    mask = REAL & torch.tensor([False, True])[:, None, None]
    assert float(metrics["ratio"]) == pytest.approx(float(((new - old).exp() * mask).sum() / 7))
    assert float(metrics["attention/divergence_negative:count"]) == 1  # the one token of the one response of A < 0
    loss, gradient, attention, gradients, metrics = parts[False]
    assert float(loss) == 0 and not gradient.any() and float(attention) == 0
    assert not any(part.any() for part in gradients if part is not None)
    assert all(float(value) == 0 for value in metrics.values())


def test_hindsight_leaves_out_groups_that_take_no_part():
    objective = make_objective(attention_target="hindsight", attention_keys="prompt")
    train = train_batch(objective, 7, group_mask=torch.tensor([False, True]))
    wanted, seen = slow_attention_term(term_of(objective).settings, 7, prompts=[1])
    loss, _, metrics = attention_loss(objective, train)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-9) and len(seen) == 1
    assert int(metrics["attention/divergence:count"]) == 1


# --- which way a step goes --------------------------------------------------------------------------------------------


def moved(objective: Objective, train: RlBatch, size: float) -> AttentionRecord:
    """One step down the gradient of the attention loss."""
    _, gradients, _ = attention_loss(objective, train)
    return AttentionRecord(
        *(
            leaf.detach() - (0.0 if gradient is None else size * gradient)
            for leaf, gradient in zip(leaves(record(1)), gradients)
        )
    )


def divergence_of(objective: Objective, train: RlBatch, source: AttentionRecord) -> torch.Tensor:
    """[B, G, R] (or [B, 1, 1]) to the objective's own target."""
    formed, term = rows(source, objective.position), term_of(objective)
    keys = term._keys(formed, train.groups.prompts)
    return formed.divergence(
        term._target_distribution(3, formed, keys, train), keys, term_of(objective).settings.attention_divergence
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["old", "reference"])
def test_a_step_pulls_where_rewarded_and_pushes_where_not(target, kind):
    """One response has an advantage at a time, so that no other row's gradient moves it through shared keys."""
    objective = make_objective(attention_target=target, attention_divergence=kind)
    for b, g, advantage in ((0, 0, 1.0), (0, 1, -1.0), (1, 1, 1.0), (1, 2, -1.0)):
        advantages = torch.zeros(B, G, dtype=torch.float64)
        advantages[b, g] = advantage
        train = train_batch(objective, advantages=advantages)
        before = (divergence_of(objective, train, record(1)) * REAL).sum(-1)
        after = (divergence_of(objective, train, moved(objective, train, 0.02)) * REAL).sum(-1)
        assert torch.sign(after - before)[b, g] == -advantage
        assert abs(float(after[b, g] - before[b, g])) > 1e-7


def test_negative_weight_zero_leaves_only_the_pull():
    objective = make_objective(attention_negative_weight=0.0)
    query = attention_loss(objective, train_batch(objective))[1][0]
    assert (query.flatten(2).any(-1) == (ADVANTAGES > 0)).all()


@pytest.mark.parametrize("keys", ["visual", "prompt"])
def test_hindsight_moves_the_last_prompt_row_alone(keys):
    objective = make_objective(attention_target="hindsight", attention_keys=keys)
    train = train_batch(objective)
    query, last_prompt, prompt_key, response_key = attention_loss(objective, train)[1]
    assert query is None and (response_key is None or not response_key.any())
    assert last_prompt.flatten(1).any(-1).all() and prompt_key[0].any()
    before = divergence_of(objective, train, record(1))
    assert before.shape == (B, 1, 1) and (divergence_of(objective, train, moved(objective, train, 0.1)) < before).all()


def test_hindsight_does_nothing_where_nobody_succeeded():
    objective = make_objective(attention_target="hindsight", attention_keys="prompt")
    for advantages in (torch.zeros_like(ADVANTAGES), -ADVANTAGES.abs()):
        loss, gradients, metrics = attention_loss(objective, train_batch(objective, advantages=advantages))
        assert float(loss) == 0 and not any(part.any() for part in gradients if part is not None)
        assert float(metrics["attention/divergence:sum"]) == 0


def test_hindsight_compares_over_the_same_keys():
    """The last prompt token is none of its own row's keys, although responses look at it: a row that looks where they
    looked otherwise is at its target."""
    for exclude_self in (True, False):
        objective = make_objective(
            attention_target="hindsight", attention_keys="prompt", attention_exclude_self=exclude_self
        )
        formed = rows(record(1), "last_prompt")
        keys = term_of(objective)._keys(formed, batch(1).groups.prompts)
        target = term_of(objective)._target_distribution(
            3, formed, keys, batch(1, target_attention={3: formed.attention[:, 0, 0]})
        )
        assert torch.allclose(formed.divergence(target, keys), torch.zeros(B, 1, 1, dtype=torch.float64), atol=1e-15)
        assert (float(target[0, 0, 0, 4]) == 0) == exclude_self and float(formed.attention[0, 0, 0, 4]) > 1e-2


def mass_on_box(objective: Objective, train: RlBatch, source: AttentionRecord) -> torch.Tensor:
    """Of the policies of the rows of the first prompt."""
    formed = rows(source)
    policy = formed.distribution(term_of(objective)._keys(formed, train.groups.prompts))
    return (policy[0, :, :, :P] * BOX[0]).sum(-1)[REAL[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_raises_mass_on_the_box_whatever_the_reward(kind):
    """A step of the queries alone, each its own row's: keys are shared, and one row's pull can move another."""
    objective = make_objective(attention_target="oracle", attention_keys="visual", attention_divergence=kind)
    for advantages in (ADVANTAGES, -ADVANTAGES):
        train, size = train_batch(objective, advantages=advantages), 0.002 if kind == "reverse_kl" else 0.5
        query, _, key, _ = attention_loss(objective, train)[1]
        assert not key[1].any() and query[0][REAL[0]].flatten(1).any(-1).all() and not query[1].any(), (
            "the second prompt has no box"
        )

        after = replace(record(1), query_BGRnD=(record(1).query_BGRnD - size * query).detach())
        before, after = (
            (divergence_of(objective, train, source)[0][REAL[0]], mass_on_box(objective, train, source))
            for source in (record(1), after)
        )
        assert (after[0] < before[0]).all() and after[1].mean() > before[1].mean() + 1e-4


# --- what is measured -------------------------------------------------------------------------------------------------


def test_coefficient_zero_still_measures_and_parts_are_apart():
    objective = make_objective(attention_coef=0.0)
    train = train_batch(objective, advantages=ADVANTAGES)
    loss, metrics = objective.attention_loss(3, rows(record(1)), train)
    assert loss is None and float(metrics["attention/divergence:sum"]) > 0.1
    whole = make_objective(layers=(1, 3))
    train = batch(
        16,
        advantages=ADVANTAGES,
        old_logprobs=rand(B, G, R, seed=2),
        target_attention=train.target_attention,
        attention_advantages=ADVANTAGES,
    )
    new = rand(B, G, R, seed=1).requires_grad_()
    alone = whole.only("attention")
    loss, metrics = alone.token_loss(TokenOutputs(new, new), train)
    assert float(loss) == 0.0 and not torch.autograd.grad(loss, new)[0].any() and not metrics
    wanted = float(attention_loss(whole, train)[0])
    assert float(attention_loss(alone, train)[0]) == wanted != 0
    assert float(
        attention_loss(whole.only("attention").with_term(replace(term_of(whole), coefficient=3.0)), train)[0]
    ) == pytest.approx(3 * wanted, rel=1e-12)
    tokens = whole.without("attention")
    assert tokens.recorded_layers == frozenset() and alone.recorded_layers == {1, 3}
    assert torch.equal(
        tokens.token_loss(TokenOutputs(new, new), train)[0], whole.token_loss(TokenOutputs(new, new), train)[0]
    )


def test_the_control_shuffles_the_attention_term_alone():
    objective, other = make_objective(), ADVANTAGES[:, [1, 2, 0]]
    new, old = rand(B, G, R, seed=1), rand(B, G, R, seed=2)
    train = batch(
        16,
        advantages=ADVANTAGES,
        old_logprobs=old,
        attention_advantages=other,
        target_attention=train_batch(objective).target_attention,
    )
    wanted, _ = slow_attention_term(term_of(objective).settings, 16, advantages=other)
    assert float(attention_loss(objective, train)[0]) == pytest.approx(float(wanted), rel=1e-9)
    own, _ = slow_attention_term(term_of(objective).settings, 16)
    assert abs(float(own) - float(wanted)) > 1e-3
    plain = batch(16, advantages=ADVANTAGES, old_logprobs=old)
    assert torch.equal(*(objective.token_loss(TokenOutputs(new, new), item)[0] for item in (train, plain)))


def uniform_rows(kind=QueryPosition.RESPONSE) -> AttentionRows:
    source = record(1)
    return rows(
        AttentionRecord(
            torch.zeros_like(source.query_BGRnD),
            torch.zeros_like(source.last_prompt_query_BnD),
            source.prompt_key_BPkD,
            source.response_key_BGRkD,
        ),
        kind,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_row": "predictor"},
        {"attention_target": "hindsight", "attention_keys": "visual"},
        {"attention_keys": "visual"},
    ],
    ids=str,
)
def test_masses_by_hand(settings):
    """Uniform attention: masses are counts, namely of the tokens' own rows over all keys, whatever the term has."""
    objective = make_objective(**settings)
    _, metrics = objective.attention_loss(3, uniform_rows(objective.position), train_batch(objective))
    values = finish_metrics({name: float(value) for name, value in metrics.items()})
    wanted = dict.fromkeys(("visual_mass", "prompt_mass", "sink_mass", "self_mass", "row_entropy"), 0.0)
    for b, (length, visual) in enumerate(((5, 3), (3, 2))):
        for g in range(G):
            for r in range(int(LENGTHS[b, g])):
                keys = length + r  # before the token
                for name, value in (
                    ("visual_mass", visual / keys),
                    ("prompt_mass", length / keys),
                    ("sink_mass", 1 / keys),
                    ("self_mass", 1 / (keys + 1)),
                    ("row_entropy", math.log(keys)),
                ):
                    wanted[name] += value / 16
    for name, value in wanted.items():
        assert values[f"attention/{name}"] == pytest.approx(value, rel=1e-12), name
    assert values["attention/target_mass"] == pytest.approx(2 / 3)
    assert int(metrics["attention/target_mass:count"]) == 9, "rows of the prompt that has a box"


def test_above_floor_is_the_share_of_rows_that_differ_by_more_than_rounding():
    """16 rows in float32: the first group's 9 have a target that differs by rounding, the other 7 by more."""
    exact = rows(record(1)).distribution()
    source = AttentionRecord(*(tensor.detach().float() for tensor in leaves(record(1))))
    target = exact.float()
    target[1] = rows(record(2)).distribution()[1].float()
    objective = make_objective()
    _, metrics = objective.attention_loss(
        3, rows(source), batch(16, attention_advantages=ADVANTAGES.float(), target_attention={3: target})
    )
    divergence = (rows(source).divergence(target) * REAL)[0]
    assert 0 < float(divergence.max()) < PRECISION_FLOOR[torch.float32], "rounding alone, but not nothing"
    assert int(metrics["attention/above_floor:sum"]) == 7 and int(metrics["attention/above_floor:count"]) == 16


def test_metrics_are_means_over_layers():
    objective = make_objective(layers=(1, 3))
    train = train_batch(objective)
    train = batch(
        16,
        attention_advantages=ADVANTAGES,
        target_attention={1: rows(record(1)).distribution(), 3: train.target_attention[3]},
    )
    sums: dict[str, float] = {}
    for layer in (1, 3):
        for name, value in objective.attention_loss(layer, rows(record(1)), train)[1].items():
            sums[name] = sums.get(name, 0.0) + float(value)
    done = finish_metrics(sums)
    wanted, seen = slow_attention_term(term_of(objective).settings, 16)
    assert done["attention/divergence"] == pytest.approx(sum(value for _, value in seen) / 16 / 2, rel=1e-9)
    assert done["loss/attention"] == pytest.approx(float(wanted) / 2, rel=1e-9)


# --- supervised -------------------------------------------------------------------------------------------------------


def test_supervised_loss():
    new = rand(B, G, R, seed=1).requires_grad_()
    loss, metrics = supervised_objective().token_loss(
        TokenOutputs(new, new.detach()), SftBatch(batch(1).groups, StepTotals(32, 9, 6))
    )
    assert float(loss) == pytest.approx(-float(new[REAL].sum()) / 32)
    assert torch.equal(torch.autograd.grad(loss, new)[0], -REAL.double() / 32)
    assert math.isclose(float(metrics["loss"]), float(loss))


# --- the first update, which is made on the policy of the rollout -----------------------------------------------------


@pytest.mark.parametrize("store", ["rows", "qk"])
@pytest.mark.parametrize("row", ["token", "predictor"])
@pytest.mark.parametrize("target, keys", [case for case in COMPARED if case[0] in ("old", "reference", "hindsight")])
def test_on_policy_terms_are_those_of_a_pass_just_before(target, keys, row, store):
    """Loss, gradient and metrics with `is_on_policy` equal those with what a pass of the same weights kept."""
    if store == "qk" and target == "hindsight":
        pytest.skip("refused by the configuration")
    objective = make_objective(
        attention_target=target,
        attention_keys=keys,
        attention_row=row,
        attention_store=store,
        policy_loss="cispo" if row == "token" else "grpo",
    )
    other = 2 if target == "reference" else 1  # 1 are the weights that are updated
    before = train_batch(objective, other=other)
    own = batch(
        16,
        attention_advantages=ADVANTAGES,
        is_on_policy=True,
        target_attention=before.target_attention if target == "reference" else {},
    )
    wanted, gradients, metrics = attention_loss(objective, before)
    loss, same, more = attention_loss(objective, own)
    assert torch.equal(loss, wanted) and metrics.keys() == more.keys()
    assert all(torch.equal(metrics[name], more[name]) for name in metrics)
    for one, two in zip(gradients, same):
        assert (one is None and two is None) or torch.equal(one, two)
    if target == "old":  # exactly GRPO
        assert float(loss) == 0 and not any(part.any() for part in same if part is not None)
    else:
        assert float(loss.detach().abs()) > 1e-4

    new = (0.4 * rand(B, G, R, seed=1) - 2).requires_grad_()
    outputs = TokenOutputs(new, torch.ones_like(new))
    loss, metrics = objective.token_loss(outputs, batch(16, advantages=ADVANTAGES, is_on_policy=True))
    wanted, more = objective.token_loss(outputs, batch(16, advantages=ADVANTAGES, old_logprobs=new.detach()))
    (gradient,) = torch.autograd.grad(loss, new)
    assert torch.equal(loss, wanted) and torch.equal(gradient, torch.autograd.grad(wanted, new)[0]) and gradient.any()
    assert metrics.keys() == more.keys() and all(torch.equal(metrics[name], more[name]) for name in metrics)


def test_sampler_and_engine_are_compared_where_the_sampler_is_given():
    objective, new = make_objective(), 0.4 * rand(B, G, R, seed=1) - 2
    sampler = new + 0.25
    sampler[~REAL] = float("nan")
    outputs = TokenOutputs(new, torch.ones_like(new))
    for teacher, counted in (
        (torch.tensor([False, False]), REAL),
        (torch.tensor([True, False]), REAL & torch.tensor([False, True])[:, None, None]),
    ):
        _, metrics = objective.token_loss(
            outputs,
            batch(16, is_on_policy=True, from_teacher=teacher, rollout_logprobs=sampler, compares_sampler=True),
        )
        assert int(metrics["sampling/logprob_difference:count"]) == int(counted.sum()) > 0
        assert float(metrics["sampling/logprob_difference:sum"]) == pytest.approx(0.25 * int(counted.sum()))
    _, metrics = objective.token_loss(outputs, batch(16, advantages=ADVANTAGES, is_on_policy=True))
    assert not any(name.startswith("sampling") for name in metrics)
