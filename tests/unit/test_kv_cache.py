"""KV cache and decoding step of the core attention, against a softmax over all keys of each row."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_ral.attention.group_layout import GroupLayout
from megatron_ral.models.attention_pass import AttentionPass
from megatron_ral.models.instrumented_attention import InstrumentedAttention
from megatron_ral.models.kv_cache import GroupKVCache

LENGTHS, P, G, HEADS, KV, D, LAYER = torch.tensor([5, 2, 7, 4]), 7, 3, 6, 2, 8, 1


def attention():
    config = SimpleNamespace(context_parallel_size=1, attention_dropout=0.0, kv_channels=D, num_attention_heads=HEADS)
    return InstrumentedAttention(config, LAYER + 1, AttnMaskType.causal, "self")


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def dense(query, keys, values):
    """[heads, D], [S, kv, D] -> [heads, D]."""
    keys, values = (part.double().repeat_interleave(HEADS // KV, dim=1) for part in (keys, values))
    weights = torch.softmax(torch.einsum("hd,shd->hs", query.double(), keys) * D**-0.5, dim=-1)
    return torch.einsum("hs,shd->hd", weights, values)


# step -> (responses that continue after it, True where prompts without a response are dropped too)
CUTS = {2: ([0, 1, 3, 4, 5, 6, 8, 9, 11], False), 4: ([0, 1, 6, 8, 11], True), 6: ([1, 11], True), 7: ([11], True)}


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_decoding_equals_a_softmax_over_all_keys(monkeypatch, block, on_host, dtype, tolerance):
    monkeypatch.setattr(GroupKVCache, "BLOCK", block)
    torch.manual_seed(0)
    cache, layer = GroupKVCache(LENGTHS, G), attention()
    prompt_key, prompt_value = random(4, P, KV, D, dtype=dtype), random(4, P, KV, D, dtype=dtype)
    cache.store_prompt(LAYER, prompt_key, prompt_value)
    rows, own = list(range(4 * G)), {row: ([], []) for row in range(4 * G)}
    for step in range(9):
        N = len(rows)
        query, key, value = (random(N, heads, D, dtype=dtype) for heads in (HEADS, KV, KV))
        pass_ = AttentionPass(GroupLayout(cache.prompt_lengths, torch.zeros(4, 0), P, 0), cache=cache)
        pass_.decode_step = torch.tensor([step])
        cache.reserve(step)
        cache.start_step(pass_.decode_step)
        if on_host:
            output = layer.decode(query.unflatten(1, (KV, -1)), key, value, pass_)[None]
        else:
            output = layer(query[None], key[None], value[None], pass_)
        assert output.shape == (1, N, HEADS * D) and output.dtype == dtype
        for index, row in enumerate(rows):
            own[row][0].append(key[index])
            own[row][1].append(value[index])
            b = row // G
            keys, values = (
                torch.cat([prompt[b, : LENGTHS[b]], torch.stack(mine)])
                for prompt, mine in zip((prompt_key, prompt_value), own[row])
            )
            assert torch.allclose(
                output[0, index].view(HEADS, D).double(), dense(query[index], keys, values), atol=tolerance
            ), (step, row)
        if step in CUTS:
            going, cut = CUTS[step]
            index = torch.tensor([rows.index(row) for row in going])
            cache.select(index, cache.row_prompt[index].unique() if cut else None)
            rows = going
        capacity = cache.response[LAYER][0].shape[2]
        assert step + 1 <= capacity < step + 1 + block, "the cache holds what was written, to the next block"
    assert cache.prompt[LAYER][0].shape == (1, KV, 4, D), "unused prompts and padding are dropped"
    assert cache.response[LAYER][0].shape[0] == 1


def test_rows_and_places_are_inverse():
    cache = GroupKVCache(LENGTHS, G)
    cache.select(torch.tensor([0, 4, 5, 9, 10, 11]), torch.tensor([0, 1, 3]))
    rows = torch.randn(6, 2)
    places = cache.by_prompt(rows)
    assert places.shape == (3, 3, 2) and torch.equal(cache.by_row(places), rows)
    assert torch.equal(places[0], torch.stack([rows[0], torch.zeros(2), torch.zeros(2)]))
    assert cache.row_prompt.tolist() == [0, 1, 1, 2, 2, 2] and cache.prompt_lengths.tolist() == [5, 2, 4]


def test_large_scores_do_not_overflow():
    """Attention to the prompt and to the own response is joined around the common maximum of the scores."""
    cache, layer = GroupKVCache(torch.tensor([2]), 1), attention()
    big = torch.full((1, 2, KV, D), 100.0)
    cache.store_prompt(LAYER, big, torch.ones(1, 2, KV, D))
    pass_ = AttentionPass(GroupLayout(cache.prompt_lengths, torch.zeros(1, 0), 2, 0), cache=cache)
    pass_.decode_step = torch.tensor([0])
    cache.reserve(0)
    cache.start_step(pass_.decode_step)
    for sign, wanted in ((1.0, 1.0), (-1.0, 3.0)):  # all on the prompt, all on itself
        output = layer(
            torch.full((1, 1, HEADS, D), 100.0 * sign), torch.zeros(1, 1, KV, D), torch.full((1, 1, KV, D), 3.0), pass_
        )
        assert torch.equal(output, torch.full_like(output, wanted))
