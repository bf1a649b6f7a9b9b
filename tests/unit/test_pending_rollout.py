"""Files of a rollout that waits for its step: read back by any number of ranks, never with other prompts."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ral.data.order import Place
from megatron_ral.engine.pipelined_decoder import PromptResponses
from megatron_ral.errors import CheckpointError
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.rollout.ahead import PendingRollout
from megatron_ral.rollout.collect import ScoredRollout
from megatron_ral.rollout.refill import ScoredGroups
from megatron_ral.training.checkpoint import pending as files
from megatron_ral.training.checkpoint.files import Manifest
from megatron_ral.types import Score

G, PAD, NUM_SLOTS = 3, 9, 8
PLACES = {slot: Place(0, slot % 3, 10 + slot) for slot in range(NUM_SLOTS)}


def name_of(place: Place) -> str:
    return f"shard-{place.shard}.tar/{place.number}"


class FakeLoader:
    """Reads a prompt that is its name alone, for one of `size` ranks."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def read(self, places) -> Any:
        own = [place for slot, place in sorted(places.items()) if slot % self.size == self.rank]
        return [SimpleNamespace(sample=SimpleNamespace(identity=name_of(place))) for place in own]


def loader(rank: int, size: int) -> Any:
    return FakeLoader(rank, size)


def group(slot: int) -> tuple[PromptResponses, torch.Tensor]:
    """Responses of a length of their own, and their rewards."""
    generator = torch.Generator().manual_seed(slot)
    width = 2 + slot
    lengths = torch.randint(1, width + 1, (G,), generator=generator)
    ids = torch.randint(10, 99, (G, width), generator=generator).masked_fill(
        torch.arange(width) >= lengths[:, None], PAD
    )
    logprobs = -torch.rand(G, width, generator=generator)
    return PromptResponses(ids, lengths, logprobs, lengths < width), torch.rand(G, generator=generator)


def pending(rank: int, size: int) -> PendingRollout:
    """What one of `size` data-parallel ranks holds; it has replaced `rank` groups."""
    slots = range(rank, NUM_SLOTS, size)
    rows, rewards = zip(*map(group, slots))
    score = Score(
        torch.stack(rewards),
        {"accuracy": torch.stack(rewards) / 2, "unparsed": torch.zeros(len(rows), G)},
        tuple(tuple(f"text {slot} {number} \u00e9" for number in range(G)) for slot in slots),
        tuple(tuple((f"unparsed: {slot}",) * (number % 2) for number in range(G)) for slot in slots),
    )
    prompts = FakeLoader(rank, size).read(PLACES)
    versions, taught = [4 + slot % 2 for slot in slots], [slot == 5 for slot in slots]
    groups = ScoredGroups(prompts, list(rows), [None] * len(rows), taught, versions, score)
    sampled = torch.cat([score.rewards, torch.full((rank, G), 0.5)])
    return PendingRollout(7, ScoredRollout(groups, sampled), PLACES, 1.25)


def write(folder, size: int) -> None:
    manifest = Manifest(7, 2 * size, 1, 2, [], {})
    (folder / "manifest.json").write_text(manifest.text())
    for rank in range(2 * size):
        layout = RankLayout(rank, 2 * size, 1, 2)
        found = files.pending_files(pending(layout.data_rank, size), layout, PAD)
        assert bool(found) == (layout.pipeline_rank == 0), "one rank of each copy writes"
        for name, content in found.items():
            (folder / name).write_bytes(content)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    def raise_it(problem):
        if problem is not None:
            raise problem

    monkeypatch.setattr(files, "raise_together", raise_it)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_number_of_ranks_finds_its_groups(tmp_path, size):
    write(tmp_path, 2)
    sampled = []
    for rank in range(size):
        found = files.restore_pending(tmp_path, RankLayout(rank, size, 1, 1), loader(rank, size))
        wanted, groups = pending(rank, size).scored.groups, found.scored.groups
        assert (found.step, found.seconds, found.places) == (7, 1.25, PLACES)
        assert [one.sample.identity for one in groups.prompts] == [one.sample.identity for one in wanted.prompts]
        assert (groups.versions, groups.from_teacher) == (wanted.versions, wanted.from_teacher)
        assert (groups.score.texts, groups.score.problems) == (wanted.score.texts, wanted.score.problems)
        assert torch.equal(groups.score.rewards, wanted.score.rewards)
        assert groups.score.components.keys() == wanted.score.components.keys()
        for name, values in wanted.score.components.items():
            assert torch.equal(groups.score.components[name], values)
        for one, other in zip(groups.responses, wanted.responses, strict=True):
            width = other.response_ids.shape[1]
            assert torch.equal(one.response_ids[:, :width], other.response_ids)
            assert (one.response_ids[:, width:] == PAD).all()
            assert torch.equal(one.rollout_logprobs[:, :width], other.rollout_logprobs)
            assert torch.equal(one.response_lengths, other.response_lengths)
            assert torch.equal(one.finished, other.finished)
        sampled.append(found.scored.sampled_rewards)
    rewards = torch.cat(sampled)
    assert len(rewards) == NUM_SLOTS + 1 and float(rewards.sum()) == pytest.approx(
        sum(float(pending(rank, 2).scored.sampled_rewards.sum()) for rank in range(2))
    )


def test_no_rollout_no_files():
    assert files.pending_files(None, RankLayout(0, 1, 1, 1), PAD) == {}


def test_responses_are_not_given_to_another_sample(tmp_path):
    write(tmp_path, 2)
    path = tmp_path / "rollout_00001.json"
    tree = json.loads(path.read_text())
    tree["identities"][1] = "shard-0.tar/99"
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="responses to sample 'shard-0.tar/99', but the data now has 'shard-0.t"):
        files.restore_pending(tmp_path, RankLayout(0, 1, 1, 1), loader(0, 1))
    assert files.restore_pending(tmp_path, RankLayout(0, 2, 1, 1), loader(0, 2)), "of the other rank's groups"


@pytest.mark.parametrize("name", ["rollout_00000.json", "rollout_00000.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x00" * 64])
def test_files_that_cannot_be_read_are_named_in_one_sentence(tmp_path, name, content):
    write(tmp_path, 2)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="readable|cannot be read"):
        files.restore_pending(tmp_path, RankLayout(0, 1, 1, 1), loader(0, 1))
