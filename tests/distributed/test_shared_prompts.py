"""Tensor and pipeline peers get the prompts that the first rank of their replica decodes, faults included."""

import dataclasses

import pytest
import torch

from megatron_ral.config.sections import DataConfig
from megatron_ral.data import loader as loader_module
from megatron_ral.data.issues import SampleError
from megatron_ral.data.loader import PromptLoader, open_sources
from megatron_ral.data.peers import ReplicaPeers
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.errors import DataError
from megatron_ral.parallel.collectives import broadcast_in_replica, gather_from_all
from megatron_ral.parallel.process_groups import start_groups, stop_groups
from megatron_ral.types import Prompt
from tests.distributed.runner import run_ranks
from tests.unit.shard_faults import picture, text
from tests.unit.test_data import write_shard
from tests.unit.test_video import clip

LAYOUTS = {"tp2": (2, 1, 2), "pp2": (1, 2, 2), "tp2_pp2": (2, 2, 4), "tp2_dp2": (2, 1, 4)}


class CountingProcessor(PromptProcessor):
    """Processor that counts the prompts it makes."""

    made = 0

    def __call__(self, sample) -> Prompt:
        prompt = super().__call__(sample)
        self.made += 1
        return prompt


def fail_on(rank: int, own: int, key: str, reason: str, patched: pytest.MonkeyPatch) -> None:
    """Let one rank alone be unable to read one sample."""
    read = loader_module.read_entry

    def read_or_fail(index, number):
        if rank == own and index.keys[number] == key:
            raise SampleError(f"sample '{key}': the disk of rank {rank} fails", reason)
        return read(index, number)

    patched.setattr(loader_module, "read_entry", read_or_fail)


def taken(model: str, shards: str, tensor: int, pipeline: int, faults: tuple) -> dict:
    """Take batches, and the last one again; return what this rank got of them, and the error that ended it."""
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    processor, layout, prompts, error = CountingProcessor(model, 256), process_groups.layout, [], ""
    again: list[Prompt] = []
    processor.made = 0
    with pytest.MonkeyPatch.context() as patched:
        sources = open_sources([(shards, 0)], "data.train")
        if faults:
            fail_on(layout.rank, *faults, patched)
        stream = PromptLoader(
            sources,
            processor,
            DataConfig(shuffle_buffer=8, decode_workers=2, decode_ahead=2),
            dp_rank=layout.data_rank,
            dp_size=layout.data_size,
            seed=3,
            exchange=gather_from_all,
            peers=ReplicaPeers(process_groups),
        )
        try:
            for count in (4, 6, 4):
                prompts += stream.take(count)
            again += stream.read(stream.places)
        except DataError as caught:
            error = str(caught)
    result = {
        "layout": (layout.data_rank, layout.tensor_rank, layout.pipeline_rank),
        "prompts": {prompt.sample.identity: fields_of(prompt) for prompt in prompts},
        "again": {prompt.sample.identity: fields_of(prompt) for prompt in again},
        "tables": len({id(part.levels) for prompt in prompts for part in prompt.patches}),
        "made": processor.made,
        "state": stream.state(),
        "error": error,
    }
    stop_groups()
    return result


def fields_of(prompt: Prompt) -> dict:
    """A prompt as values that can be compared, its sample included."""
    fields = {item.name: getattr(prompt, item.name) for item in dataclasses.fields(prompt)}
    return fields | {"patches": [vars(part) for part in prompt.patches], "values": prompt.pixel_values}


def same(one, other) -> bool:
    if torch.is_tensor(one):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures of several sizes, several of them, a video, text alone, and samples that cannot be used."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [(f"p{number}", {"png": picture(28 * (number + 1), 56), "json": text()}) for number in range(6)]
    samples += [
        ("two", {"0.png": picture(56, 56), "1.png": picture(84, 28), "json": text()}),
        ("film", {"mp4": clip("mp4", count=8), "json": text(data_type="video")}),
        ("both", {"png": picture(), "mp4": clip("mp4", count=4), "json": text(data_type="video")}),
        ("words", {"json": text(data_type=None)}),
        ("torn", {"jpg": picture(suffix="jpg")[:200], "json": text()}),
        ("dumb", {"png": picture(), "json": text(solution=None)}),
    ]
    write_shard(folder / "a.tar", samples)
    return str(folder / "a.tar")


@pytest.fixture(scope="module")
def alone(material, shards):
    return run_ranks(1, taken, str(material["tiny"]), shards, 1, 1, ())[0]


def test_the_shards_have_prompts_of_every_kind_and_faults(alone):
    kinds = {(len(found["grid_thw"]), bool(found["is_video"].any())) for found in alone["prompts"].values()}
    assert kinds == {(0, False), (1, False), (2, False), (1, True), (2, True)}
    assert set(alone["state"]["quarantined"]) == {"a.tar/torn", "a.tar/dumb"} and not alone["error"]
    assert alone["tables"] == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_of_a_replica_decodes_and_all_get_its_prompts(material, shards, alone, layout):
    tensor, pipeline, size = LAYOUTS[layout]
    parts = run_ranks(size, taken, str(material["tiny"]), shards, tensor, pipeline, ())
    for part in parts:
        assert part["state"] == alone["state"] and not part["error"]
        decodes = part["layout"][1:] == (0, 0)
        assert (part["made"] > 0) == decodes
        mates = [other for other in parts if other["layout"][0] == part["layout"][0]]
        assert all(same(part["prompts"], other["prompts"]) for other in mates)
        assert part["again"] and same({key: part["prompts"][key] for key in part["again"]}, part["again"])
        assert part["tables"] <= 2, "the vision tower looks up together what shares a table"
    found = {key: prompt for part in parts for key, prompt in part["prompts"].items()}
    assert same({key: found[key] for key in alone["prompts"]}, alone["prompts"])


@pytest.mark.parametrize("own", [0, 1], ids=["the rank that decodes", "a rank that gets prompts"])
def test_a_sample_that_one_rank_cannot_read_is_left_out_by_all(material, shards, own):
    parts = run_ranks(2, taken, str(material["tiny"]), shards, 2, 1, (own, "p3", "truncated"))
    assert same(parts[0]["prompts"], parts[1]["prompts"]) and parts[0]["state"] == parts[1]["state"]
    assert "a.tar/p3" in parts[0]["state"]["quarantined"] and "a.tar/p3" not in parts[0]["prompts"]


@pytest.mark.parametrize("own", [0, 1], ids=["the rank that decodes", "a rank that gets prompts"])
@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_a_disk_that_fails_on_one_rank_is_an_error_on_all(material, shards, own, tensor, pipeline):
    parts = run_ranks(2, taken, str(material["tiny"]), shards, tensor, pipeline, (own, "p3", "cannot_read"))
    assert parts[0]["error"] == parts[1]["error"] and f"the disk of rank {own} fails" in parts[0]["error"]


def sent(tensor: int, pipeline: int) -> list:
    process_groups = start_groups(tensor_size=tensor, pipeline_size=pipeline, seed=0)
    is_first = torch.distributed.get_rank() == 0
    lists = [
        [torch.arange(5).byte(), torch.tensor([True, False, True]), torch.arange(6).view(2, 3).T, torch.tensor(-7)],
        [],
        [torch.zeros(0, 3), torch.randn(3, dtype=torch.float64), torch.randn(2, 1, 3).bfloat16()],
    ]
    result = broadcast_in_replica(lists if is_first else [], process_groups)
    stop_groups()
    return [result, lists if is_first else None]


def test_tensors_of_every_type_and_shape_arrive():
    first, second = run_ranks(2, sent, 2, 1)
    assert same(first[0], first[1]) and same(second[0], first[1])
