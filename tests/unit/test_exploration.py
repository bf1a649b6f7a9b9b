"""Noise on attention: kept mass, cells of pictures and clips, draws that depend on the response alone."""

import pytest
import torch

from megatron_ral.attention.exploration import (
    AttentionNoise,
    ExplorationSettings,
    VisualNoise,
    move_inside_picture,
    visual_cells,
)
from megatron_ral.attention.targets.contrast import contrast_weights
from megatron_ral.attention.targets.load import load_target
from megatron_ral.types import PromptBatch


class FakePrompt:
    """What the noise reads of a prompt: grids of patches, two by two to a visual token, and where the tokens stand."""

    def __init__(self, key: str, grids: list, before: int, length: int):
        self.grid_thw = torch.tensor(grids).reshape(-1, 3)
        count = int(self.grid_thw.prod(-1).sum()) // 4
        self.visual_mask = torch.zeros(length, dtype=torch.bool)
        self.visual_mask[before : before + count] = True
        self.sample = type("Sample", (), {"identity": key})


def batch_of(*prompts: FakePrompt) -> PromptBatch:
    length = max(len(prompt.visual_mask) for prompt in prompts)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        mask[b, : len(prompt.visual_mask)] = prompt.visual_mask
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    lengths = torch.tensor([len(prompt.visual_mask) for prompt in prompts])
    return PromptBatch(tuple(prompts), ids, lengths, None, None, mask, torch.zeros_like(mask))


PICTURE, CLIP, TEXT = (
    FakePrompt("a.tar/1", [[1, 8, 12]], 3, 40),
    FakePrompt("a.tar/2", [[1, 4, 4], [3, 4, 8]], 1, 50),
    FakePrompt("a.tar/3", [], 0, 9),
)


def test_cells_without_a_grid_are_the_visual_tokens():
    assert visual_cells(PICTURE, 0).tolist() == list(range(24))
    assert visual_cells(CLIP, 0).tolist() == list(range(4 + 3 * 8))
    assert visual_cells(TEXT, 0).tolist() == []


def test_cells_of_a_coarse_grid():
    assert visual_cells(PICTURE, 2).view(4, 6).tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    assert visual_cells(PICTURE, 5).view(4, 6).tolist() == [
        [5 * row + column for column in (0, 0, 1, 2, 3, 4)] for row in range(4)
    ]
    own = visual_cells(CLIP, 2)
    assert own[:4].tolist() == [0, 1, 2, 3]
    assert own[4:].view(3, 2, 4)[1].tolist() == [[8, 8, 9, 9], [10, 10, 11, 11]]


def test_noise_is_centred_and_belongs_to_the_response():
    settings = ExplorationSettings(2.0, frozenset({1, 3}), (2,))
    together = AttentionNoise.draw(batch_of(TEXT, PICTURE, CLIP), 4, settings, 0, 1)
    alone = AttentionNoise.draw(batch_of(PICTURE), 4, settings, 0, 1)
    cells = alone.values_NLC.shape[2]
    assert torch.equal(together.values_NLC[4:8, :, :cells], alone.values_NLC)
    assert torch.equal(together.cells_BP[1, :40], alone.cells_BP[0])
    per_key = alone.values_NLC.gather(2, visual_cells(PICTURE, 2).expand(4, 2, -1))
    assert per_key.mean(-1).abs().max() < 1e-6 and per_key.std() > 0.5
    flat = alone.values_NLC.flatten(0, 1)
    assert len({tuple(row.tolist()) for row in flat}) == 8, "responses and layers have noise of their own"
    other = AttentionNoise.draw(batch_of(PICTURE), 4, settings, 0, 2)
    assert not torch.equal(other.values_NLC, alone.values_NLC), "the next rollout has other noise"
    assert [alone.place_of(layer) for layer in range(4)] == [None, 0, None, 1]


def test_shared_noise_is_the_same_in_all_layers_of_a_response():
    settings = ExplorationSettings(2.0, frozenset({1, 3}), (2,), is_shared=True)
    noise = AttentionNoise.draw(batch_of(PICTURE, CLIP), 4, settings, 0, 1)
    assert [noise.place_of(layer) for layer in range(4)] == [None, 0, None, 0] and noise.values_NLC.shape[1] == 1
    assert len({tuple(row.tolist()) for row in noise.values_NLC[:, 0]}) == 8, "responses have noise of their own"
    fewer = AttentionNoise.draw(batch_of(CLIP), 4, ExplorationSettings(2.0, frozenset({3}), (2,), is_shared=True), 0, 1)
    assert torch.equal(fewer.values_NLC, noise.values_NLC[4:]), "whichever other layers have it"


def test_responses_take_the_grids_in_turn_and_draw_as_with_one_alone():
    prompts, layers = batch_of(TEXT, PICTURE, CLIP), frozenset({1, 3})
    several = AttentionNoise.draw(prompts, 5, ExplorationSettings(2.0, layers, (2, 0, 1)), 0, 1)

    def on_tokens(noise: AttentionNoise, b: int, g: int) -> torch.Tensor:
        cells = noise.cells_BP[b, prompts.visual_mask[b]]
        return noise.values_NLC[b * 5 + g][:, cells]

    for g, grid in enumerate((2, 0, 1, 2, 0)):
        one = AttentionNoise.draw(prompts, 5, ExplorationSettings(2.0, layers, (grid,)), 0, 1)
        for b in range(3):
            assert torch.equal(on_tokens(several, b, g), on_tokens(one, b, g))
    assert on_tokens(several, 1, 0)[0].unique().numel() == 4
    assert on_tokens(several, 1, 1)[0].unique().numel() == 24
    assert on_tokens(several, 1, 2).abs().max() < 1e-9, "one cell leaves the picture as it is"


def test_scale_of_the_noise():
    wide = FakePrompt("w", [[1, 64, 64]], 0, 1024)
    noise = AttentionNoise.draw(batch_of(wide), 4, ExplorationSettings(3.0, frozenset({0})), 9)
    assert noise.values_NLC.std() == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("by_lead", [False, True])
def test_moved_weights_equal_a_float64_loop_and_keep_the_mass(by_lead):
    generator = torch.Generator().manual_seed(0)
    B, K, W, M, P = 2, 2, 3, 2, 7
    scores = torch.randn(B, K, W, M, P, generator=generator, dtype=torch.float64) * 3
    scores = scores - scores.amax(-1, keepdim=True)
    noise = torch.randn(B, W, P, generator=generator, dtype=torch.float64) * (1 if by_lead else 6)
    visual = torch.rand(B, P, generator=generator) < 0.6
    moved = move_inside_picture(scores.float(), VisualNoise((noise * visual[:, None]).float(), visual, by_lead))
    for b in range(B):
        seen = visual[b]
        for index in torch.cartesian_prod(torch.arange(K), torch.arange(W), torch.arange(M)).tolist():
            k, w, m = index
            plain, ours = scores[b, k, w, m].exp(), moved[b, k, w, m].double()
            own = scores[b, k, w, m][seen]
            lead = own.max() - own.mean() if by_lead else 1.0
            shifted = scores[b, k, w, m] + torch.where(seen, noise[b, w] * lead, 0.0)
            shift = torch.logsumexp(shifted[seen], 0) - torch.logsumexp(own, 0)
            wanted = torch.where(seen, shifted - shift, scores[b, k, w, m]).softmax(0) * plain.sum()
            assert (ours - wanted).abs().max() < 1e-6
            assert (ours[~seen] - plain[~seen]).abs().max() < 1e-6
            assert ours[seen].sum() == pytest.approx(float(plain[seen].sum()), rel=1e-5)


def test_a_very_sure_gaze_is_moved_without_loss_of_mass():
    """The favoured key leads by 200, beyond what exp can show in float32."""
    scores = torch.tensor([0.0, -1.0, -201.0, -201.0, -float("inf")]).view(1, 1, 1, 1, 5)
    visual = torch.tensor([[False, True, True, True, False]])
    noise = torch.tensor([0.0, -1.0, 2.0, -1.0, 0.0]).view(1, 1, 5)
    moved = move_inside_picture(scores, VisualNoise(noise, visual, True)).flatten()
    assert moved[0] == 1 and moved[4] == 0
    assert moved[1:4].sum() == pytest.approx(scores[..., 1].exp().item(), rel=1e-5)
    assert moved[2] == pytest.approx(scores[..., 1].exp().item(), rel=1e-5), "lead 133: 2 x 133 - 200 beats -133"


def test_prompt_without_a_picture_and_picture_without_mass_stay():
    scores = -torch.rand(1, 1, 2, 1, 5)
    for by_lead in (False, True):
        blind = VisualNoise(torch.zeros(1, 2, 5), torch.zeros(1, 5, dtype=torch.bool), by_lead)
        assert torch.equal(move_inside_picture(scores.clone(), blind), scores.exp())
        dark = scores.clone()
        dark[..., :2] = -1000.0
        picture = torch.tensor([[True, True, False, False, False]])
        noise = VisualNoise(torch.tensor([2.0, -2.0, 0, 0, 0]).expand(1, 2, 5), picture, by_lead)
        assert torch.equal(move_inside_picture(dark.clone(), noise), dark.exp())


def test_weights_of_contrast_are_success_against_failure():
    right = torch.tensor([[True, False, False, True], [True] * 4, [False] * 4, [False, True, False, False]])
    weights = contrast_weights(right)
    wanted = [[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [0.0] * 4, [-1 / 3, 1.0, -1 / 3, -1 / 3]]
    assert torch.allclose(weights, torch.tensor(wanted)) and weights.sum(dim=1).abs().max() < 1e-6


def test_success_is_the_accuracy_and_never_the_format():
    advantages, rewards = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.1, 0.0]])  # only the format differs
    accuracy = torch.zeros(1, 2)
    assert not load_target("contrast").response_weights(advantages, rewards, accuracy).any()
    assert torch.equal(load_target("explored").response_weights(advantages, rewards, accuracy), advantages)
    rewarded = torch.tensor([[0.5, 0.49]])
    assert load_target("evidence").response_weights(advantages, rewarded, accuracy).tolist() == [[1.0, 0.0]]
