"""The group layout is exact: log-probs, attention policy and gradients equal those of G separate sequences, and what
was generated through the KV cache is what training computes."""

import pytest
import torch

from megatron_ral.attention.layer_rows import AttentionRows
from megatron_ral.attention.types import QueryPosition
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.pipelined_decoder import generate
from megatron_ral.objectives.base import TokenOutputs
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.types import GroupBatch, RlBatch, StepTotals, pad_prompts
from tests.distributed.cases import assemble, fixed_groups, micro_batches, open_policy, rl_batch
from tests.distributed.runner import run_ranks


class WeightedSum:
    """A smooth loss of every log-prob and every attention row, with a weight of its own for each response (handed over
    as advantages)."""

    recorded_layers = frozenset({1, 3})
    position = QueryPosition.RESPONSE
    temperature = 1.0

    def token_loss(self, outputs: TokenOutputs, batch: RlBatch):
        return (outputs.logprobs * batch.groups.response_mask * batch.advantages[..., None]).sum(), {}

    def attention_loss(self, layer: int, rows: AttentionRows, batch: RlBatch):
        inside = torch.arange(rows.layout.P) < batch.groups.prompts.prompt_lengths[:, None]
        target = torch.nn.functional.pad(inside / inside.sum(1, keepdim=True), (0, rows.layout.R))[:, None, None]
        weight = batch.groups.response_mask * batch.advantages[..., None]
        return (rows.divergence(target) * weight).sum() * (layer + 1), {}


def separate(groups):
    """Each response as a group of one."""
    return [
        (prompt, ids[g : g + 1], lengths[g : g + 1], rewards[g : g + 1])
        for prompt, ids, lengths, rewards in groups
        for g in range(len(ids))
    ]


def group_against_sequences(path, data):
    _, _, _, policy, _ = open_policy(path, 1, 1)
    everything = fixed_groups(path, data)[:3]
    alone = separate(everything)
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(7))
    result, rows = {}, {}
    for layer in policy.stage.layers:
        layer.mlp.register_forward_hook(
            lambda module, inputs, output, number=layer.layer_number: rows.update({number: len(inputs[0])})
        )
    for name, groups_, weight in (("group", everything, weights), ("separate", alone, weights.reshape(9, 1))):
        prompts = pad_prompts([row[0] for row in groups_], 0)
        batch = GroupBatch(
            prompts,
            torch.stack([row[1] for row in groups_]),
            torch.stack([row[2] for row in groups_]),
            policy.encode_visual(prompts),
        )
        output = policy.forward([batch], [1, 3])[0]
        mask = batch.response_mask
        policy.forward_backward([rl_batch(batch, StepTotals(1, 1, 1), advantages=weight)], WeightedSum())
        gradients = [shard.clone() for shard in policy.gradient_shards()]
        names = [n for n, p in policy.stage.named_parameters() if p.requires_grad]
        result[name] = {
            "logprobs": (output.tokens.logprobs * mask).reshape(9, -1),
            "attention": {
                layer: (rows * mask[..., None]).reshape(9, 7, -1) for layer, rows in output.attention.items()
            },
            "gradients": dict(zip(names, gradients)),
            "rows": [rows[number] for number in sorted(rows)],
            "read": len(groups_) + int(batch.response_lengths.sum()),
            "tokens": int(prompts.prompt_lengths.sum() + batch.response_lengths.sum()),
        }
    stop_groups()
    return result


@pytest.mark.parametrize("family", ["tiny", "qwen3", "internvl", "qwen3_5"])
def test_group_equals_separate_sequences(material, family):
    result = run_ranks(1, group_against_sequences, str(material[family]), str(material["data"]))[0]
    group, alone = result["group"], result["separate"]
    for one in (group, alone):  # of a prompt the last MLP reads the row that predicts, and the others read all
        assert one["rows"] == [*[one["tokens"]] * (len(one["rows"]) - 1), one["read"]] and one["read"] < one["tokens"]
    assert group["logprobs"].abs().max() > 1
    assert torch.allclose(group["logprobs"], alone["logprobs"], atol=1e-5)
    for layer, rows in group["attention"].items():
        assert rows.max() > 0.05 and torch.allclose(rows, alone["attention"][layer], atol=1e-5)
    for name, gradient in group["gradients"].items():
        wanted = alone["gradients"][name]
        # The decays of linear attention sum parts over all tokens that cancel (seen: 1.1e-5).
        allowed = 3e-5 if name.endswith(("A_log", "dt_bias")) else 1e-5
        assert (gradient - wanted).norm() <= allowed * max(float(wanted.norm()), 1e-3), name


def generated_against_training(path, data, tensor, pipeline):
    _, _, _, policy, _ = open_policy(path, tensor, pipeline)
    prompts = pad_prompts([row[0] for row in fixed_groups(path, data)[:4]], 0)
    settings = SamplingSettings(
        group_size=3, max_response_length=12, end_token_id=328, pad_token_id=0, temperature=0.8, top_p=0.9
    )
    with policy.resident():
        embeds = policy.encode_visual(prompts)
        sampled = generate(policy, prompts, embeds, settings, 0, 0)
    batch = GroupBatch(prompts, sampled.response_ids, sampled.response_lengths, embeds)
    output = policy.forward([batch], temperature=0.8)[0]
    mask = batch.response_mask
    result = {
        "ids": sampled.response_ids,
        "lengths": sampled.response_lengths,
        "finished": sampled.finished,
        "rollout": sampled.rollout_logprobs,
        "training": None,
    }
    if output.tokens is not None:
        result["training"] = output.tokens.logprobs * mask
    stop_groups()
    return result


@pytest.mark.parametrize("world, tensor, pipeline", [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_generated_logprobs_are_training_logprobs(material, world, tensor, pipeline):
    results = run_ranks(
        world, generated_against_training, str(material["tiny"]), str(material["data"]), tensor, pipeline
    )
    first, last = results[0], results[-1]
    assert torch.allclose(last["rollout"], last["training"], atol=1e-4)
    assert last["training"].abs().max() > 1
    for result in results:
        assert torch.equal(result["ids"], first["ids"]), "every rank must hold the same responses"
    # responses of one prompt differ from each other, as they draw from streams of their own
    assert len({tuple(row) for row in first["ids"][0].tolist()}) == 3
    alone = run_ranks(1, generated_against_training, str(material["tiny"]), str(material["data"]), 1, 1)[0]
    assert torch.equal(alone["ids"], first["ids"]), "the layout must not change what is sampled"


def stop_token(path, data):
    """Generation with a stop token that is likely: lengths, padding and the finished flag."""
    _, _, _, policy, _ = open_policy(path, 1, 1)
    prompts = pad_prompts([row[0] for row in fixed_groups(path, data)[:4]], 0)
    settings = SamplingSettings(group_size=6, max_response_length=12, end_token_id=-1, pad_token_id=0)
    with policy.resident():
        embeds = policy.encode_visual(prompts)
        free = generate(policy, prompts, embeds, settings, 5)
        end = int(free.response_ids[:, :, 2].flatten().mode().values)
        stopped = generate(policy, prompts, embeds, SamplingSettings(6, 12, end, 0), 5)
    stop_groups()
    return free, stopped, end


def test_stop_token_ends_a_response_and_nothing_else(material):
    free, stopped, end = run_ranks(1, stop_token, str(material["tiny"]), str(material["data"]))[0]
    assert not free.finished.any() and (free.response_lengths == 12).all()
    assert stopped.finished.any()
    for b in range(4):
        for g in range(6):
            tokens = free.response_ids[b, g].tolist()
            length = tokens.index(end) + 1 if end in tokens else 12
            assert int(stopped.response_lengths[b, g]) == length
            assert bool(stopped.finished[b, g]) == (end in tokens)
            ours = stopped.response_ids[b, g].tolist()
            assert ours[:length] == tokens[:length] and not any(ours[length:])


def zero_gradients(path, data):
    """Gradient of the attention term alone, and the term on policy with target `old`."""
    from megatron_ral.objectives.base import finish_metrics

    config, process_groups, _, policy, objective = open_policy(path, 1, 1, attention_target="old", kl_coef=0.0)
    names = [n for n, p in policy.stage.named_parameters() if p.requires_grad]
    rollout = micro_batches(fixed_groups(path, data), 4, policy)
    layers = sorted(objective.recorded_layers)
    old = policy.forward([scored.groups for scored in rollout], layers)
    [minibatch] = assemble(rollout, old, None, old, objective, config, process_groups)
    policy.forward_backward(minibatch, objective.only("attention"))
    on_policy = dict(zip(names, policy.gradient_shards()))
    first = finish_metrics(policy.forward_backward(minibatch, objective))
    policy.step()
    policy.forward_backward(minibatch, objective.only("attention"))
    after = dict(zip(names, policy.gradient_shards()))
    second = finish_metrics(policy.forward_backward(minibatch, objective))
    stop_groups()
    return on_policy, first, after, second


def test_attention_term_is_exactly_zero_on_policy_and_acts_after_a_step(material):
    on_policy, first, after, second = run_ranks(1, zero_gradients, str(material["tiny"]), str(material["data"]))[0]
    assert first["attention/divergence"] == 0.0 and first["loss/attention"] == 0.0
    assert all(not gradient.any() for gradient in on_policy.values())
    assert second["attention/divergence"] > 0.0
    # Last layer: only W_q and W_k matter to its own rows; W_v, W_o, MLP, final norm and LM head do not.
    last = "language.decoder.layers.3."
    for name in (
        f"{last}self_attention.linear_proj.weight",
        f"{last}pre_mlp_layernorm.weight",
        f"{last}mlp.linear_fc1.weight",
        f"{last}mlp.linear_fc2.weight",
        "language.decoder.final_layernorm.weight",
    ):
        assert not after[name].any(), name
    qkv = after[f"{last}self_attention.linear_qkv.weight"].view(2, 4, 32, 128)  # groups x [q q k v] x D x hidden
    assert qkv[:, :3].any() and not qkv[:, 3].any()
    bias = after[f"{last}self_attention.linear_qkv.bias"].view(2, 4, 32)
    assert bias[:, :2].any() and not bias[:, 3].any()
    for name in (
        "language.decoder.layers.0.mlp.linear_fc2.weight",
        f"{last}input_layernorm.weight",
        "language.embedding.word_embeddings.weight",
    ):
        assert after[name].any(), name


def lm_head_gradient(path, data):
    config, process_groups, _, policy, objective = open_policy(path, 1, 1)
    names = [n for n, p in policy.stage.named_parameters() if p.requires_grad]
    rollout = micro_batches(fixed_groups(path, data), 4, policy)
    batches = [scored.groups for scored in rollout]
    old = policy.forward(batches, [3])
    # a target away from the policy: every row's neighbour
    moved = [type(output)(output.tokens, {3: output.attention[3].roll(1, 0)}) for output in old]
    [minibatch] = assemble(rollout, old, moved, moved, objective, config, process_groups)
    policy.forward_backward(minibatch, objective.only("attention"))
    gradients = dict(zip(names, policy.gradient_shards()))
    stop_groups()
    return {name: float(gradient.norm()) for name, gradient in gradients.items()}


def test_lm_head_gets_no_gradient_from_attention(material):
    norms = run_ranks(1, lm_head_gradient, str(material["untied"]), str(material["data"]))[0]
    assert norms["language.output_layer.weight"] == 0.0
    assert norms["language.decoder.layers.3.self_attention.linear_qkv.weight"] > 0.0
