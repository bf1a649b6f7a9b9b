"""Gated delta rule in chunks and by steps against a float64 loop over tokens, and the states that rows continue."""

import pytest
import torch

from megatron_ral.functional.delta_rule import delta_step_, gated_delta_rule
from megatron_ral.models.kv_cache import GroupKVCache
from megatron_ral.models.linear_attention import LinearAttentionShape

B, KEYS, VALUES, DK, DV = 2, 2, 6, 8, 5


def loop(query, key, value, decay, step, state):
    """Outputs and state by the recurrence, token by token, in the precision of the inputs."""
    repeats, outputs = value.shape[2] // query.shape[2], []
    query, key = (
        (part * (part.square().sum(-1, keepdim=True) + 1e-6) ** -0.5).repeat_interleave(repeats, 2)
        for part in (query, key)
    )
    for t in range(value.shape[1]):
        state = state * decay[:, t].exp()[..., None, None]
        error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], step[:, t][..., None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t] * DK**-0.5))
    return torch.stack(outputs, dim=1), state


def inputs(length: int, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [
        torch.randn(B, length, KEYS, DK, dtype=torch.float64),
        torch.randn(B, length, KEYS, DK, dtype=torch.float64),
        torch.randn(B, length, VALUES, DV, dtype=torch.float64),
        -2 * torch.rand(B, length, VALUES, dtype=torch.float64),
        torch.rand(B, length, VALUES, dtype=torch.float64),
        torch.randn(B, VALUES, DK, DV, dtype=torch.float64),
    ]


@pytest.mark.parametrize("length, chunk", [(1, 64), (7, 64), (64, 64), (150, 64), (150, 16), (33, 32)])
def test_chunks_equal_the_recurrence(length, chunk):
    exact = [part.requires_grad_() for part in inputs(length)]
    ours = [part.detach().float().requires_grad_() for part in exact]
    wanted, found = loop(*exact), gated_delta_rule(*ours, chunk=chunk)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32 and (mine - theirs).abs().max() < 2e-6 * theirs.abs().max()
    weights = [torch.randn_like(part) for part in wanted]
    sum((part * weight).sum() for part, weight in zip(wanted, weights)).backward()
    sum((part * weight.float()).sum() for part, weight in zip(found, weights)).backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm()


def test_no_state_is_a_state_of_zeros():
    *parts, state = (part.float() for part in inputs(20))
    for mine, theirs in zip(gated_delta_rule(*parts), gated_delta_rule(*parts, torch.zeros_like(state)), strict=True):
        assert torch.equal(mine, theirs)


def test_tokens_without_step_and_decay_leave_the_state_and_what_came_before():
    *parts, state = (part.float() for part in inputs(40))
    is_real = (torch.arange(40) < 25)[None, :, None]
    padded = gated_delta_rule(*parts[:3], parts[3] * is_real, parts[4] * is_real, state)
    short = gated_delta_rule(*(part[:, :25] for part in parts), state)
    assert torch.allclose(padded[0][:, :25], short[0], atol=1e-6) and torch.allclose(padded[1], short[1], atol=1e-6)


def test_one_step_after_the_other_equals_the_recurrence():
    exact = inputs(12)
    wanted, last = loop(*exact)
    *parts, state = (part.float() for part in exact)
    outputs = [delta_step_(*(part[:, t].contiguous() for part in parts), state) for t in range(12)]
    assert (torch.stack(outputs, dim=1) - wanted).abs().max() < 2e-6 and (state - last).abs().max() < 2e-6


def test_weights_of_a_layer_are_cut_by_heads_and_come_back():
    shape = LinearAttentionShape((0,), KEYS, VALUES, DK, DV, 4)
    weights = {name: torch.randn(size) for name, size in shape.weight_shapes(16).items()}
    parts = [weights[f"in_proj_{part}.weight"] for part in ("qkv", "z", "b", "a")]
    merged = shape.merge_inputs(parts)
    assert all(torch.equal(*pair) for pair in zip(shape.split_inputs(merged), parts, strict=True))
    conv = shape.merge_conv([weights["conv1d.weight"]])
    assert torch.equal(shape.split_conv(conv)[0], weights["conv1d.weight"])
    # the second half of the rows belongs to the second key head: its query, its key, and the values that it serves
    values = VALUES // KEYS * DV
    query, key, value, gate, step, decay = merged[len(merged) // 2 :].split([DK, DK, values, values, 3, 3])
    mixed = parts[0]
    assert torch.equal(query, mixed[DK : 2 * DK]) and torch.equal(key, mixed[3 * DK : 4 * DK])
    assert torch.equal(value, mixed[4 * DK + values :]) and torch.equal(gate, parts[1][values:])
    assert torch.equal(step, parts[2][3:]) and torch.equal(decay, parts[3][3:])


def test_each_row_continues_a_copy_of_its_prompts_state():
    cache = GroupKVCache(torch.tensor([5, 3]), 2)
    tail, state = torch.arange(2.0).view(2, 1, 1), torch.arange(2.0).view(2, 1, 1, 1)
    cache.store_state(7, tail, state)
    cache.row_states(7)[1].add_(torch.tensor([0.0, 0.1, 0.2, 0.3]).view(4, 1, 1, 1))
    assert torch.equal(state.flatten(), torch.tensor([0.0, 1.0])), "the prompts' own is not changed"
    cache.select(torch.tensor([1, 2]))
    assert cache.row_states(7)[1].flatten().tolist() == pytest.approx([0.1, 1.2])
    assert cache.row_states(7)[0].flatten().tolist() == [0.0, 1.0]
    cache.select(torch.tensor([1]), prompts=torch.tensor([1]))
    assert cache.row_states(7)[1].flatten().tolist() == pytest.approx([1.2])


def test_rows_dropped_before_the_first_step_take_their_prompts_with_them():
    cache = GroupKVCache(torch.tensor([5, 3, 4]), 2, feeds_prompt_end=True)
    assert cache.state_lengths.tolist() == [4, 2, 3]
    cache.store_state(0, torch.arange(3.0).view(3, 1, 1), torch.arange(3.0).view(3, 1, 1, 1))
    cache.select(torch.tensor([0, 4, 5]), prompts=torch.tensor([0, 2]))
    assert cache.row_states(0)[1].flatten().tolist() == [0.0, 2.0, 2.0]
