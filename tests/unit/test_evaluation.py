"""Held-out prompts: decoded when they are reached, counted where they are unusable; warnings before an evaluation."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ral.config.sections import RewardConfig
from megatron_ral.data import peers
from megatron_ral.data.issues import SampleError, printable
from megatron_ral.data.loader import open_sources
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.errors import DataError
from megatron_ral.evaluation import prompt_set
from megatron_ral.evaluation.generation import EvaluationSettings
from megatron_ral.evaluation.prompt_set import PromptSet, read_prompts, warn_about_prompts
from megatron_ral.parallel.process_groups import ProcessGroups
from megatron_ral.rollout.scoring import unused_rules
from tests.distributed.cases import make_config
from tests.unit.shard_faults import picture
from tests.unit.test_data import good, write_shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eleven samples in two shards; three cannot be used, the last one by its name."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(
        folder / "a.tar",
        [good(f"a{index}", **({"target_boxes": [[0, 0, 99, 9]]} if index == 2 else {})) for index in range(6)],
    )
    key, members = good("b0")
    write_shard(
        folder / "b.tar",
        [(key, {**members, "png": picture()[:60]}), good("b1"), good("b2"), good("b3"), ("../b4", members)],
    )
    return sorted(map(str, folder.glob("*.tar")))


@pytest.fixture(scope="module")
def processor(material):
    return PromptProcessor(str(material["tiny"]), 128)


def keys(prompts) -> list[str]:
    return [prompt.sample.key for prompt in prompts]


def test_unusable_samples_are_counted_and_told_of_once(shards, processor, caplog):
    prompts = PromptSet(shards, processor, 100)
    for _ in range(2):
        assert keys(prompts) == ["a0", "a1", "a3", "a4", "a5", "b1", "b2", "b3"]
    assert Counter(prompts.left_out.values()) == {"target_box": 1, "broken_image": 1}
    assert caplog.text.count("left out of the evaluation") == 2
    [source] = open_sources([(shards[0].replace("a.tar", "*.tar"), 0)], "data.eval_shards")
    assert prompts.size(source) == 10


@pytest.mark.parametrize("limit", [7, 100])
def test_ranks_share_the_set(shards, processor, limit):
    whole = keys(read_prompts(shards, processor, limit))
    shares = [keys(PromptSet(shards, processor, limit, dp_rank=rank, dp_size=3)) for rank in range(3)]
    assert sorted(key for share in shares for key in share) == sorted(whole) and max(map(len, shares)) <= 4
    assert len(whole) == {7: 5, 100: 8}[limit]


def test_a_picture_is_decoded_when_its_prompt_is_reached(shards, processor, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        prompt_set,
        "parse_sample",
        lambda entry, parse=prompt_set.parse_sample: (decoded.append(entry["__key__"]), parse(entry))[1],
    )
    prompts = iter(PromptSet(shards, processor, 100))
    assert decoded == [] and next(prompts).sample.key == "a0" and decoded == ["a0"]
    assert next(prompts).sample.key == "a1" and next(prompts).sample.key == "a3" and decoded == ["a0", "a1", "a2", "a3"]


def test_a_decoder_that_fails_in_its_own_way_ends_no_evaluation(shards, processor):
    def fails(sample):
        if sample.key == "a1":
            raise ZeroDivisionError("odd")
        return processor(sample)

    prompts = PromptSet(shards[:1], fails, 100)
    assert keys(prompts) == ["a0", "a3", "a4", "a5"] and prompts.left_out[shards[0], "a1"] == "unusable"


@pytest.mark.parametrize("fault, expected", [(lambda path: path.unlink(), DataError), (None, MemoryError)])
def test_what_one_rank_alone_may_meet_is_left_out_by_no_rank_alone(shards, processor, tmp_path, fault, expected):
    """A disk or a memory that fails: alone it is counted, with others it ends the evaluation."""
    shard = tmp_path / "b.tar"
    shard.write_bytes(Path(shards[1]).read_bytes())

    def read(num_readers):
        def decode(sample):
            if fault is None and sample.key == "b2":
                raise MemoryError
            return processor(sample)

        prompts = PromptSet([str(shard)], decode, 100, num_readers=num_readers)
        found = iter(prompts)
        first = next(found).sample.key
        if fault is not None and shard.exists():
            fault(shard)
        return [first, *keys(found)]

    with pytest.raises(expected):
        read(2)
    shard.write_bytes(Path(shards[1]).read_bytes())
    assert read(1) == (["b1"] if fault is not None else ["b1", "b3"])


def test_warnings_before_an_evaluation(shards, caplog):
    """The rule of numbers is not used, and the set is cut."""
    [source] = open_sources([(shards[0], 0)], "data.eval_shards")
    warn_about_prompts(source, 400, "exact")
    assert "reward.accuracy=exact" in caplog.text and "rules of their own (numerical)" in caplog.text
    assert "only the first" not in caplog.text
    caplog.clear()
    warn_about_prompts(source, 5, "by_type")
    assert "only the first 5 of 6 samples" in caplog.text and "exact" not in caplog.text
    assert unused_rules(["", "exact", "no such type", "VizWiz", "multiple-choice"], "exact") == [
        "VizWiz",
        "multiple-choice",
    ]


def test_settings_of_an_evaluation_are_those_of_the_rollout_and_the_reward():
    config = make_config("m")
    config = replace(
        config,
        seed=7,
        reward=RewardConfig(accuracy="by_type"),
        watchdog=replace(config.watchdog, timeout_seconds=60),
        rollout=replace(config.rollout, temperature=0.5, top_p=0.9, cache_tokens=500),
    )
    assert EvaluationSettings.from_config(config) == EvaluationSettings(
        config.rollout.max_response_length, config.rollout.generation_batch_size, 500, 0.5, 0.9, 7, config.reward, 42.0
    )


class Network:
    """Network of a replica in one process: a peer receives what the first rank sent last."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.sent, self.failure = monkeypatch, [], None

    def rank(self, is_first: bool) -> peers.ReplicaPeers:
        def broadcast(lists, process_groups):
            if self.failure is not None:
                raise self.failure
            self.sent = lists if is_first else self.sent
            return self.sent

        self.monkeypatch.setattr(peers, "is_first_of_replica", lambda process_groups: is_first)
        self.monkeypatch.setattr(peers, "broadcast_in_replica", broadcast)
        return peers.ReplicaPeers(ProcessGroups.__new__(ProcessGroups))


def test_a_lost_peer_ends_the_evaluation_and_is_no_fault_of_the_samples(shards, processor, monkeypatch):
    network = Network(monkeypatch)
    prompts = PromptSet(shards, processor, 100, num_readers=2, peers=network.rank(is_first=True))
    found = iter(prompts)
    assert next(found).sample.key == "a0"
    network.failure = RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        list(found)
    assert prompts.left_out == {}


def test_a_fault_reaches_the_peers_whatever_its_text(shards, processor, monkeypatch):
    """A message may quote a name of undecodable bytes. An error while it is sent would leave the peers waiting."""
    sample, network, told = next(iter(PromptSet(shards, processor, 1))).sample, Network(monkeypatch), []

    def fails(sample):
        raise SampleError("'\udcff.png' cannot be decoded", "broken_image")

    for is_first in (True, False):
        with pytest.raises(SampleError, match="cannot be decoded") as caught:
            network.rank(is_first).make(sample, fails)
        told.append((caught.value.reason, printable(str(caught.value))))
    assert told == [("broken_image", "'\\udcff.png' cannot be decoded")] * 2
