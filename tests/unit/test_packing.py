"""Sequences without padding: places, order, and gradients."""

import pytest
import torch

from megatron_ral.attention.group_layout import PackedGroups
from megatron_ral.attention.packing import Packing, take
from megatron_ral.types import GroupBatch, Prompt, PromptBatch, Sample, pad_prompts


def make_prompts(lengths: list[int]) -> PromptBatch:
    """Return prompts of text whose tokens and positions differ."""
    prompts = []
    for number, length in enumerate(lengths):
        ids = torch.arange(length) + 10 * (number + 1)
        nothing = torch.zeros(length, dtype=torch.bool)
        prompts.append(
            Prompt(
                sample=Sample(str(number), "shard", "", "", "", "", (), ()),
                input_ids=ids,
                position_ids=torch.stack([ids, ids + 1, ids + 2]),
                next_position=length + 3,
                patches=(),
                grid_thw=torch.zeros(0, 3, dtype=torch.int64),
                is_video=torch.zeros(0, dtype=torch.bool),
                seconds_per_grid=torch.zeros(0),
                visual_mask=nothing,
                target_mask=nothing,
                response_ids=ids[:0],
            )
        )
    return pad_prompts(prompts, 0)


@pytest.mark.parametrize("lengths, width", [([[2, 3], [1, 3]], 3), ([[3, 3]], 3), ([4, 1, 2], 6), ([0, 2], 2)])
def test_packing_and_padding_are_inverse(lengths, width):
    lengths = torch.tensor(lengths)
    packing = Packing.of(lengths, width)
    assert packing.num_tokens == int(lengths.sum()) and packing.shape == (*lengths.shape, width)
    padded = torch.randn(*packing.shape, 2, dtype=torch.float64, requires_grad=True)
    is_real = torch.arange(width) < lengths[..., None]
    packed = packing.pack(padded)
    assert torch.equal(packed, padded[is_real])
    assert torch.equal(packing.pad(packed), padded.masked_fill(~is_real[..., None], 0.0))
    assert torch.autograd.gradcheck(packing.pack, (padded,))
    assert torch.autograd.gradcheck(packing.pad, (packed.detach().requires_grad_(),))
    assert torch.autograd.gradgradcheck(packing.pad, (packed.detach().requires_grad_(),))


def test_take_gives_its_gradient_to_the_chosen_rows():
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: take(rows, torch.tensor([4, 0, 2])), (rows,))


def test_tokens_of_a_pass_and_the_rows_that_predict_them():
    """Prompts stand first, then responses; a response is predicted by its prompt's last row and by its own rows."""
    prompts = make_prompts([3, 5])
    lengths = torch.tensor([[1, 4], [2, 3]])
    ids = torch.arange(100, 116).view(2, 2, 4)
    groups = GroupBatch(prompts, ids, lengths)
    packed = PackedGroups.of_batch(groups)
    assert packed.num_tokens == 8 + 10
    wanted_ids = [
        *prompts.input_ids[0, :3],
        *prompts.input_ids[1, :5],
        100,
        104,
        105,
        106,
        107,
        108,
        109,
        112,
        113,
        114,
    ]
    assert packed.token_ids(groups).tolist() == wanted_ids
    positions = packed.position_ids(groups)
    first, second = prompts.next_position.tolist()
    own = [first, first, first + 1, first + 2, first + 3, second, second + 1, second, second + 1, second + 2]
    for axis in range(3):
        texts = [prompts.position_ids[axis, 0, :3], prompts.position_ids[axis, 1, :5], torch.tensor(own)]
        assert torch.equal(positions[axis], torch.cat(texts))
    # A hidden state that holds the index of its token shows which row predicts which token.
    hidden = torch.arange(packed.num_tokens, dtype=torch.float64)[:, None].expand(-1, 2)
    read = packed.read_rows(hidden, prompts.prompt_lengths)
    assert read[:, 0].tolist() == [2, 7, *range(8, 18)]
    rows = packed.predicting_rows(read)[:, 0].tolist()
    assert rows == [2, 2, 9, 10, 11, 7, 13, 7, 15, 16]


def test_predicting_rows_share_the_gradient_of_a_prompt():
    prompts = make_prompts([2, 3])
    packed = PackedGroups.of(prompts.prompt_lengths, torch.tensor([[1, 2], [2, 2]]), 3, 2)
    hidden = torch.randn(packed.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    lengths = prompts.prompt_lengths
    assert torch.autograd.gradcheck(lambda rows: packed.predicting_rows(packed.read_rows(rows, lengths)), (hidden,))
