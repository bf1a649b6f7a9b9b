"""Attention rows, distributions and the hand-written gradient of a row's divergence.

Proven: rows and distributions equal a loop over rows and heads; values and gradients of the divergence equal the
definition, finite differences and autograd through an eager softmax, in every kind of rows and keys; nothing depends on
padding, on how the work is cut into pieces or heads over ranks, or on the order of responses; rows that are equal bit
for bit give exactly zero; nothing is NaN where there is no mass; and no map of heads x rows x keys is ever held.
"""

import math

import pytest
import torch

from megatron_ral.attention import blocks
from megatron_ral.attention.distribution import attention_distribution
from megatron_ral.attention.mass import RowMass, row_masses
from megatron_ral.attention.rows import head_mean_attention, row_divergence
from megatron_ral.attention.torch_backend import head_blocks, weight_blocks
from megatron_ral.attention.types import RowKeys, RowQK
from tests.unit.slow_attention import KINDS, slow_attention, slow_divergences, slow_policy
from tools.benchmarks.trl_side import peak_bytes

SCALE, LENGTHS = 0.6, (5, 3)
ROWS = ("token", "predictor", "prompt alone")
COLUMNS = {
    "all": [[1] * 5, [1] * 5],
    "prompt": [[1] * 5, [1, 1, 1, 0, 0]],
    "visual": [[0, 1, 1, 0, 0], [1, 0, 1, 0, 0]],
}


def random_qk(rows="token", *, k=2, m=2, B=2, G=3, R=4, P=5, D=3, dtype=torch.float64, seed=0) -> RowQK:
    """Rows of B groups of prompts of 5, 3, 5, .. tokens; leaves of autograd."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return (1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    T = 0 if rows == "prompt alone" else R
    lengths = torch.tensor([LENGTHS[b % 2] for b in range(B)])
    return RowQK(
        make(B, G, R, k * m, D), make(B, P, k, D), make(B, G, T, k, D), lengths, int(rows == "predictor"), SCALE, k * m
    )


def row_keys(qk: RowQK, rows="token", columns="all", own=True) -> RowKeys:
    """`columns` of COLUMNS (own response included for "all"); `own`: leave out the token that a row belongs to."""
    B, _, R = qk.query_BGRnD.shape[:3]
    P, T = qk.prompt_key_BPkD.shape[1], qk.response_key_BGTkD.shape[2]
    chosen = [COLUMNS[columns][b % 2] + [int(columns == "all")] * T for b in range(B)]
    last = [int(length) - 1 for length in qk.prompt_lengths_B]
    tokens = {
        "token": lambda b: [P + r for r in range(R)],
        "prompt alone": lambda b: [last[b]] * R,
        "predictor": lambda b: [last[b]] + [P + r for r in range(R - 1)],
    }[rows]
    return RowKeys(torch.tensor(chosen).bool(), torch.tensor([tokens(b) for b in range(B)]) if own else None)


def slow(qk: RowQK, keys: RowKeys) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and distributions by loops, with gradient."""
    attention = slow_attention(*qk[:6])
    return attention, slow_policy(attention, *keys)


def eager_attention(qk: RowQK) -> torch.Tensor:
    """Rows through one softmax over heads x rows x keys, with gradient."""
    query, prompt, own, lengths, lag, scale, n = qk[:7]
    P, T, R, m = prompt.shape[1], own.shape[2], query.shape[2], n // prompt.shape[2]
    keys = torch.cat([prompt[:, None].expand(-1, query.shape[1], -1, -1, -1), own], dim=2).repeat_interleave(m, dim=3)
    scores = torch.einsum("bgrhd,bgshd->bghrs", query, keys) * scale
    prompt_seen = (torch.arange(P) < lengths[:, None])[:, None, :].expand(-1, R, -1)
    own_seen = (torch.arange(T) <= torch.arange(R)[:, None] - lag).expand(len(query), -1, -1)
    seen = torch.cat([prompt_seen, own_seen], dim=-1)[:, None, None]
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1).mean(dim=2)


def eager_divergence(qk: RowQK, target: torch.Tensor, keys: RowKeys) -> torch.Tensor:
    """jsd as one would write it."""
    chosen = keys.columns_BS[:, None, None]
    if keys.own_BR is not None:
        chosen = chosen & (torch.arange(chosen.shape[-1]) != keys.own_BR[:, None, :, None])
    policy = eager_attention(qk) * chosen
    policy = policy / policy.sum(dim=-1, keepdim=True)
    mean = (policy + target) / 2
    ratios = ((row.clamp(min=1e-300) / mean.clamp(min=1e-300)).log() for row in (policy, target))
    return 0.5 * sum((row * ratio).sum(dim=-1) for row, ratio in zip((policy, target), ratios))


def another_policy(qk: RowQK, keys: RowKeys, rows="token", seed=1) -> torch.Tensor:
    """Policy of other rows over the same keys."""
    B, G, R, n, D = qk.query_BGRnD.shape
    k, P = qk.prompt_key_BPkD.shape[2], qk.prompt_key_BPkD.shape[1]
    other = random_qk(rows, k=k, m=n // k, B=B, G=G, R=R, P=P, D=D, dtype=qk.query_BGRnD.dtype, seed=seed)
    return attention_distribution(head_mean_attention(other._replace(prompt_lengths_B=qk.prompt_lengths_B)), keys)[0]


def gradients(qk: RowQK, target, keys, kind="jsd", weights=1.0) -> tuple[torch.Tensor, ...]:
    value = row_divergence(qk, head_mean_attention(qk), target, keys, kind)
    return torch.autograd.grad((value * weights).sum(), qk[:3], allow_unused=True)


def random_weights(qk: RowQK) -> torch.Tensor:
    return torch.randn(qk.query_BGRnD.shape[:3], generator=torch.Generator().manual_seed(7), dtype=torch.float64)


# --- rows and distributions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("k, m", [(2, 1), (2, 2), (1, 4)])
def test_rows_and_distributions_equal_the_loop(k, m, rows, columns, own):
    qk = random_qk(rows, k=k, m=m)
    keys = row_keys(qk, rows, columns, own)
    attention, policy = slow(qk, keys)
    ours = head_mean_attention(qk)
    assert torch.allclose(ours, attention, rtol=0, atol=1e-14) and not ours.requires_grad
    assert not ours[attention == 0].any(), "columns that a row cannot see must be exactly 0"
    ours, mass = attention_distribution(ours, keys)
    assert torch.allclose(ours, policy, rtol=0, atol=1e-14) and not ours[policy == 0].any()
    assert torch.allclose(mass, (attention * (policy > 0)).sum(-1), rtol=0, atol=1e-14) and (mass > 1e-4).all()


@pytest.mark.parametrize("small", [1, 1 << 16])
@pytest.mark.parametrize("rows", ["token", "predictor"])
def test_padding_is_left_out(monkeypatch, rows, small):
    """Rows and gradients of real rows are those without lengths, and rows of padding are 0."""
    monkeypatch.setattr(blocks, "SMALL_MAP", 0)
    monkeypatch.setattr(blocks, "SMALL_BLOCK", small)
    qk, lengths = random_qk(rows), torch.tensor([[4, 1, 2], [3, 4, 0]])
    is_real = torch.arange(4) < lengths[..., None]
    keys, trimmed = row_keys(qk, rows), qk._replace(num_rows_BG=lengths)
    whole, ours = head_mean_attention(qk), head_mean_attention(trimmed)
    assert torch.equal(ours[is_real], whole[is_real])
    assert small > 1 or not ours[~is_real].any()
    target, weights = another_policy(qk, keys, rows), random_weights(qk) * is_real
    for mine, wanted in zip(
        gradients(trimmed, target, keys, weights=weights), gradients(qk, target, keys, weights=weights)
    ):
        assert torch.allclose(mine, wanted, rtol=0, atol=1e-14)


def test_heads_are_averaged_before_renormalising():
    """The other order is another distribution; the test must see the difference."""
    qk = random_qk(k=4, m=1)
    keys = row_keys(qk)
    each = [attention_distribution(head_mean_attention(head_shard(qk, h, 4)) * 4, keys)[0] for h in range(4)]
    assert (torch.stack(each).mean(0) - slow(qk, keys)[1]).abs().max() > 1e-2


def head_shard(qk: RowQK, rank: int, ranks: int) -> RowQK:
    """The key/value heads, and the query heads that share them, of one tensor rank."""
    cut = [
        tensor.detach().chunk(ranks, dim=3 if tensor.dim() == 5 else 2)[rank].clone().requires_grad_()
        for tensor in qk[:3]
    ]
    return RowQK(*cut, *qk[3:])


@pytest.mark.parametrize("rows", ROWS)
def test_head_shards_add_up_and_their_gradients_are_slices(rows):
    qk = random_qk(rows, k=4, m=2)
    keys = row_keys(qk, rows)
    target, weights, whole = another_policy(qk, keys, rows), random_weights(qk), head_mean_attention(qk)
    shards = [head_shard(qk, rank, 2) for rank in range(2)]
    attention = sum(head_mean_attention(shard) for shard in shards)
    assert torch.allclose(attention, whole, rtol=0, atol=1e-15)
    found = [
        torch.autograd.grad((row_divergence(shard, attention, target, keys) * weights).sum(), shard[:3])
        for shard in shards
    ]
    for parts, wanted in zip(zip(*found), gradients(qk, target, keys, weights=weights)):
        assert torch.allclose(torch.cat(parts, dim=-2), wanted, rtol=0, atol=1e-15)


# --- value and gradient of the divergence -----------------------------------------------------------------------------


@pytest.mark.parametrize("columns, own", [("all", True), ("all", False), ("visual", True), ("prompt", True)])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_and_gradient_equal_autograd_through_the_loop(kind, rows, columns, own):
    qk = random_qk(rows, R=3)
    keys, weights = row_keys(qk, rows, columns, own), random_weights(qk)
    target = another_policy(qk, keys, rows)
    wanted = slow_divergences(slow(qk, keys)[1], target, kind)
    value = row_divergence(qk, head_mean_attention(qk), target, keys, kind)
    assert torch.allclose(value, wanted, rtol=1e-10, atol=1e-14) and wanted.max() > 1e-2
    theirs = torch.autograd.grad((wanted * weights).sum(), qk[:3], allow_unused=True)
    for ours, gradient in zip(gradients(qk, target, keys, kind, weights), theirs):
        assert torch.allclose(ours, gradient, rtol=0, atol=1e-10) and (ours.numel() == 0 or ours.abs().max() > 1e-3)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, rows, columns):
    """Finite differences of the value, the rows formed again for each."""
    qk = random_qk(rows, B=2, G=2, R=2, D=2, k=1, m=2)
    keys, weights = row_keys(qk, rows, columns), random_weights(qk)
    target = another_policy(qk, keys, rows)

    def loss(*leaves):
        moved = RowQK(*leaves, *qk[len(leaves) :])
        return (row_divergence(moved, head_mean_attention(moved), target, keys, kind) * weights).sum()

    assert torch.autograd.gradcheck(loss, qk[: 2 if rows == "prompt alone" else 3], atol=1e-7, rtol=1e-5)


def test_gradient_equals_eager_autograd_at_a_larger_size():
    qk = random_qk(B=2, G=3, R=20, P=40, k=2, m=3, D=8)._replace(prompt_lengths_B=torch.tensor([40, 23]))
    own = 40 + torch.arange(20).expand(2, -1)
    keys, weights = RowKeys(torch.ones(2, 60, dtype=torch.bool), own), random_weights(qk)
    target = another_policy(qk, keys)
    value = row_divergence(qk, head_mean_attention(qk), target, keys)
    wanted = eager_divergence(qk, target, keys)
    assert torch.allclose(value, wanted, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad((wanted * weights).sum(), qk[:3])
    for ours, gradient in zip(gradients(qk, target, keys, weights=weights), theirs):
        assert torch.allclose(ours, gradient, rtol=0, atol=1e-10) and gradient.abs().max() > 1e-2


def test_target_and_attention_are_constants_and_the_target_may_be_one_row():
    qk = random_qk()
    keys = row_keys(qk, columns="prompt")
    row = another_policy(qk, keys)[:, :1, :1].requires_grad_()
    attention = head_mean_attention(qk).requires_grad_()
    value = row_divergence(qk, attention, row, keys)
    assert torch.equal(value, row_divergence(qk, attention, row.expand(2, 3, 4, -1).contiguous(), keys))
    for constant in (attention, row):
        assert torch.autograd.grad(value.sum(), constant, allow_unused=True, retain_graph=True)[0] is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_down_the_gradient_brings_rows_nearer(kind):
    """By what the gradient promises."""
    qk = random_qk()
    keys = row_keys(qk)
    target, found = another_policy(qk, keys), gradients(qk, another_policy(qk, keys), keys, kind)
    before = row_divergence(qk, head_mean_attention(qk), target, keys, kind)
    moved = RowQK(*(tensor.detach() - 1e-4 * gradient for tensor, gradient in zip(qk, found)), *qk[3:])
    after = row_divergence(moved, head_mean_attention(moved), target, keys, kind)
    promised = 1e-4 * sum(float(gradient.square().sum()) for gradient in found)
    assert float(before.sum() - after.sum()) == pytest.approx(promised, rel=1e-2) and promised > 1e-5


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [50.0, 1e4])
@pytest.mark.parametrize("rows", ["token", "predictor"])
def test_padding_changes_nothing(rows, noise):
    """Two prompt columns and two response rows more, full of large numbers; rows beyond the real ones do not count."""
    qk = random_qk(rows)
    query, prompt, own = (tensor.detach() for tensor in qk[:3])
    loud = [torch.full_like(tensor, noise) for tensor in (query[:, :, :2], prompt[:, :2], own[:, :, :2])]
    wide = qk._replace(
        query_BGRnD=torch.cat([query, loud[0]], 2).requires_grad_(),
        prompt_key_BPkD=torch.cat([prompt, loud[1]], 1).requires_grad_(),
        response_key_BGTkD=torch.cat([own, loud[2]], 2).requires_grad_(),
    )
    real = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9, 10])  # columns of the padded rows that are not padding
    keys, weights = row_keys(qk, rows), random_weights(qk)
    last = (qk.prompt_lengths_B - 1)[:, None]
    own_columns = 7 + torch.arange(6).expand(2, -1)
    if rows == "predictor":
        own_columns = torch.cat([last, own_columns[:, :-1]], dim=1)
    wide_keys = RowKeys(torch.ones(2, 13, dtype=torch.bool), own_columns)
    target = another_policy(qk, keys, rows)
    wide_target = torch.zeros(2, 3, 6, 13, dtype=torch.float64).index_copy(
        3, real, torch.nn.functional.pad(target, (0, 0, 0, 2))
    )
    padded = head_mean_attention(wide)
    assert torch.allclose(padded[:, :, :4, real], head_mean_attention(qk), rtol=0, atol=1e-15)
    assert not padded[:, :, :, 5:7].any() and not padded[:, :, :4, 11:].any()
    value = row_divergence(wide, padded, wide_target, wide_keys)[:, :, :4]
    assert torch.allclose(value, row_divergence(qk, head_mean_attention(qk), target, keys), rtol=1e-12, atol=1e-15)
    found = torch.autograd.grad((value * weights).sum(), wide[:3])
    wanted = gradients(qk, target, keys, weights=weights)
    for ours, gradient, dim in zip(found, wanted, (2, 1, 2)):
        kept, padding = ours.split([gradient.shape[dim], 2], dim=dim)
        assert torch.allclose(kept, gradient, rtol=0, atol=1e-14) and not padding.any()
    assert not found[1][1, 3:].any(), "keys beyond a shorter prompt get no gradient"


CUTS = {
    "a row and a head at a time": (1, 1),
    "two rows": (2 * 18, 2 * 9),
    "whole responses": (80, 50),
    "whole groups": (240, 120),
    "everything at once": (1 << 20, 1 << 20),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", CUTS)
def test_cutting_into_blocks_changes_nothing(monkeypatch, cut, kind):
    qk = random_qk(dtype=torch.float32)
    shape, S = qk.query_BGRnD.shape[:3], qk.num_keys
    keys, weights = row_keys(qk), random_weights(qk).float()
    target = another_policy(qk, keys)

    def everything():
        attention = head_mean_attention(qk)
        return (
            attention,
            attention_distribution(attention, keys)[0],
            row_divergence(qk, attention, target, keys, kind),
            *gradients(qk, target, keys, kind, weights),
        )

    wanted = everything()
    small, large = CUTS[cut]
    monkeypatch.setattr(blocks, "SMALL_MAP", 0)
    monkeypatch.setattr(blocks, "SMALL_BLOCK", small)
    monkeypatch.setattr(blocks, "LARGE_BLOCK", large)
    boxes = list(weight_blocks(qk))
    assert (
        len(boxes)
        == {
            "a row and a head at a time": 24,
            "two rows": 12,
            "whole responses": 6,
            "whole groups": 2,
            "everything at once": 1,
        }[cut]
        == len(list(blocks.row_blocks(shape, S)))
    )
    assert len(list(head_blocks(qk, boxes[0]))) == (1 if cut == "everything at once" else 2)
    for ours, value in zip(everything(), wanted):
        assert torch.allclose(ours, value, rtol=1e-5, atol=1e-7)


def test_blocks_cover_every_row_once_and_keep_to_their_size():
    for shape in ((1, 1, 1), (3, 2, 5), (2, 7, 3), (4, 1, 9)):
        for row_elements in (1, 10, 100):
            for elements in (1, 25, 60, 170, 1000, 10000):
                seen = torch.zeros(shape, dtype=torch.int64)
                for b, g, r in blocks.row_blocks(shape, row_elements, elements):
                    seen[b, g, r] += 1
                    size = seen[b, g, r].numel()
                    assert size == 1 or size * row_elements <= elements
                assert (seen == 1).all()


def test_order_of_responses_is_kept():
    qk = random_qk()
    keys, weights, order = row_keys(qk), random_weights(qk), torch.tensor([2, 0, 1])
    target = another_policy(qk, keys)
    turned = qk._replace(query_BGRnD=qk.query_BGRnD[:, order], response_key_BGTkD=qk.response_key_BGTkD[:, order])
    value = row_divergence(qk, head_mean_attention(qk), target, keys)
    again = row_divergence(turned, head_mean_attention(turned), target[:, order], keys)
    assert torch.allclose(again, value[:, order], rtol=0, atol=1e-15)
    assert (value[:, 0] - value[:, 1]).abs().min() > 1e-4, "responses must differ"
    query, prompt, own = gradients(qk, target, keys, weights=weights)
    found = gradients(turned, target[:, order], keys, weights=weights[:, order])
    for ours, wanted in zip(found, (query[:, order], prompt, own[:, order])):
        assert torch.allclose(ours, wanted, rtol=0, atol=1e-14)


# --- precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_inputs_give_float32_rows_and_bfloat16_gradients():
    """The maths is that of float32 on the same numbers; only the gradient is rounded."""
    coarse = random_qk(dtype=torch.bfloat16)
    fine = RowQK(*(tensor.detach().float().requires_grad_() for tensor in coarse[:3]), *coarse[3:])
    keys = row_keys(coarse)
    target, weights = another_policy(fine, keys), random_weights(fine).float()
    attention = head_mean_attention(coarse)
    assert attention.dtype == torch.float32 and torch.equal(attention, head_mean_attention(fine))
    value = row_divergence(coarse, attention, target, keys)
    assert value.dtype == torch.float32 and torch.equal(value, row_divergence(fine, attention, target, keys))
    for ours, wanted in zip(
        gradients(coarse, target, keys, weights=weights), gradients(fine, target, keys, weights=weights)
    ):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, wanted.bfloat16()) and wanted.abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_equal_rows_are_exactly_zero(rows, kind):
    qk = random_qk(rows, dtype=torch.float32)
    keys = row_keys(qk, rows)
    attention = head_mean_attention(qk)
    value = row_divergence(qk, attention, attention_distribution(attention, keys)[0], keys, kind)
    assert torch.equal(value, torch.zeros(2, 3, 4))
    for gradient in torch.autograd.grad(value.sum(), qk[:3], allow_unused=True):
        assert not gradient.any()


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("P", [33_000, 40_000, 65_537, 100_003])
def test_equal_rows_are_exactly_zero_in_whatever_blocks(two_threads, monkeypatch, P):
    """With several threads (as on a GPU) the rounding of a sum over one long row can differ from that of the same row
    in a sum over many. For which lengths it does depends on the processor, hence several."""
    R = 2
    qk = random_qk(B=1, G=1, R=R, P=P, k=1, m=2, D=1, dtype=torch.float32)._replace(prompt_lengths_B=torch.tensor([P]))
    monkeypatch.setattr(blocks, "LARGE_BLOCK", P)  # a row is a block
    assert len(list(weight_blocks(qk))) == R
    keys = RowKeys(torch.ones(1, P + R, dtype=torch.bool), P + torch.arange(R)[None])
    attention = head_mean_attention(qk)
    for kind in KINDS:
        value = row_divergence(qk, attention, attention_distribution(attention, keys)[0], keys, kind)
        assert not value.any()
        assert not any(gradient.any() for gradient in torch.autograd.grad(value.sum(), qk[:3])), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_signal_of_ral_is_positive_and_right_in_float32(kind):
    """Rows after a small step: true divergences near 1e-9 nats, from the same float32 rows in float64."""
    qk = random_qk(B=2, G=4, R=8, P=5, D=8, dtype=torch.float32)
    keys = row_keys(qk)
    moved = qk._replace(
        query_BGRnD=qk.query_BGRnD
        + 1e-4 * torch.randn(qk.query_BGRnD.shape, generator=torch.Generator().manual_seed(3))
    )
    rows, target = head_mean_attention(moved), attention_distribution(head_mean_attention(qk), keys)[0]
    exact_rows = slow_policy(rows.double(), *keys)
    exact_target = target.double() / target.double().sum(-1, keepdim=True)
    wanted = slow_divergences(exact_rows, exact_target, kind)
    assert 1e-10 < float(wanted.median()) < 1e-8, float(wanted.median())
    value = row_divergence(moved, rows, target, keys, kind)
    assert (value > 0).all()
    assert float(value.mean()) == pytest.approx(float(wanted.mean()), rel=1e-2)
    large = wanted > 2e-10  # below, the rounding of the rows themselves is not small any more
    assert torch.allclose(value[large].double(), wanted[large], rtol=1e-2, atol=0) and large.float().mean() > 0.5


# --- rows and entries without mass ------------------------------------------------------------------------------------


def assert_silent(qk, target, keys, kind, where):
    """Rows `where` [B] give 0, the others do not; no gradient comes from the former, none is NaN."""
    value = row_divergence(qk, head_mean_attention(qk), target, keys, kind)
    assert torch.equal(value[where], torch.zeros_like(value[where])) and (value[~where] > 0).all()
    for gradient in torch.autograd.grad(value.sum(), qk[:3]):
        assert torch.isfinite(gradient).all() and not gradient[where].any() and gradient[~where].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_keys_or_without_target_are_silent(kind):
    qk, where = random_qk(dtype=torch.float32), torch.tensor([False, True])
    text_only = row_keys(qk, columns="visual")._replace(columns_BS=torch.tensor([[0, 1, 1] + [0] * 6, [0] * 9]).bool())
    policy, mass = attention_distribution(head_mean_attention(qk), text_only)
    assert not policy[1].any() and not mass[1].any()
    for target in (another_policy(qk, text_only), torch.softmax(torch.randn(2, 1, 1, 9), -1)):
        assert_silent(qk, target, text_only, kind, where)
    visual = row_keys(qk, columns="visual")
    target = another_policy(qk, visual)
    target[1] = 0.0
    assert_silent(qk, target, visual, kind, where)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [40.0, 60.0, 80.0, 88.0, 95.0, 103.0, 200.0])
@pytest.mark.parametrize("columns", [[1, 1, 1, 1], [0, 0, 1, 1]])
def test_keys_and_rows_of_next_to_no_mass_give_no_nan(kind, columns, gap):
    """Two scores `gap` below the best: weights of 1e-18 to 1e-35, of subnormal size, and 0. While float32 holds
    them well, the gradient to the scores is that of float64; then it has its direction and is smaller, never NaN."""

    def gradient(dtype):
        key = torch.tensor([0.0, 0.0, -gap, -gap - 1], dtype=dtype).view(1, 4, 1, 1).requires_grad_()
        query = torch.ones(1, 1, 1, 1, 1, dtype=dtype)
        qk = RowQK(query, key, query.new_zeros(1, 1, 0, 1, 1), torch.tensor([4]), 0, 1.0, 1)
        keys = RowKeys(torch.tensor([columns]).bool())
        target = attention_distribution(torch.tensor([0.1, 0.1, 0.4, 0.4], dtype=dtype).view(1, 1, 1, 4), keys)[0]
        value = row_divergence(qk, head_mean_attention(qk), target, keys, kind)
        none = columns[0] == 0 and gap >= 103 and dtype == torch.float32
        assert torch.isfinite(value) and (float(value) == 0) == none
        return torch.autograd.grad(value.sum(), key)[0].flatten()

    ours, exact = gradient(torch.float32).double(), gradient(torch.float64)
    assert torch.isfinite(ours).all() and ours.norm() < exact.norm() * 1.01
    if exact.norm() > 1e-6 and (gap <= 60 or (columns[0] == 1 and gap == 80)):
        assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-6 * float(exact.norm()))
    elif gap <= 88 and columns[0] == 0:
        assert ours @ exact > 0.999 * ours.norm() * exact.norm() > 0


# --- where rows look --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 6, 1 << 18])
def test_row_mass_by_hand(monkeypatch, size):
    """Four prompt columns and two of the response; the row's own column is left out before anything is counted."""
    monkeypatch.setattr(blocks, "LARGE_BLOCK", size)
    attention = torch.tensor([[[[0.08, 0.16, 0.24, 0.32, 0.2, 0.0], [0.25, 0.0, 0.0, 0.1, 0.15, 0.5]]]])
    keys = RowKeys(torch.ones(1, 6, dtype=torch.bool), torch.tensor([[4, 5]]))
    visual, target = torch.tensor([[False, True, True, False]]), torch.tensor([[False, False, True, False]])
    mass = RowMass(*row_masses(attention, keys, visual, target))
    wanted = {
        "visual": [0.5, 0.0],
        "prompt": [1.0, 0.7],
        "sink": [0.1, 0.5],
        "target_share": [0.6, 0.0],
        "entropy": [-sum(p * math.log(p) for p in row) for row in ([0.1, 0.2, 0.3, 0.4], [0.5, 0.2, 0.3])],
    }
    for name, values in wanted.items():
        assert getattr(mass, name).flatten().tolist() == pytest.approx(values, rel=1e-6), name


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_case(R: int, S: int = 4096, n: int = 28, k: int = 4, D: int = 128):
    """One response of R tokens in a sequence of S, heads as in Qwen2.5-VL 7B."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator, requires_grad=True)

    P = S - R
    qk = RowQK(make(1, 1, R, n, D), make(1, P, k, D), make(1, 1, R, k, D), torch.tensor([P]), 0, D**-0.5, n)
    keys = RowKeys(torch.ones(1, S, dtype=torch.bool), P + torch.arange(R)[None])
    return qk, keys, torch.softmax(torch.randn(1, 1, R, S, generator=generator), -1)


def test_memory_is_that_of_three_maps_of_rows():
    """28 heads, 512 rows, 4096 keys: forward and backward hold at most 3 x rows x keys x 4 bytes above the inputs, the
    gradients of queries and keys (15.7 MB) included. Eager rows need more than ten times as much per row: they keep
    heads x rows x keys (28 maps) several times."""
    qk, keys, target = memory_case(512)

    def ours():
        value = row_divergence(qk, head_mean_attention(qk), target, keys)
        return torch.autograd.grad(value.sum(), qk[:3])

    _, peak = peak_bytes(ours)
    gradients_alone = sum(tensor.numel() * 4 for tensor in qk[:3])
    assert gradients_alone + 512 * 4096 * 4 < peak <= 3 * 512 * 4096 * 4, peak
    assert peak - gradients_alone <= 2 * 512 * 4096 * 4, "without the gradients themselves"
    qk, keys, target = memory_case(32)

    def eager():
        return torch.autograd.grad(eager_divergence(qk, target, keys).sum(), qk[:3])

    _, few = peak_bytes(eager)
    assert few / 32 > 10 * peak / 512, (few, peak)
    assert few > 2 * 28 * 32 * 4096 * 4
