"""Weights as a stream: names, shapes and values of an export, bit for bit, with no more than a few parameters held."""

import hashlib
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ral.engine.gather import gathered
from megatron_ral.engine.weight_stream import stream_policy
from megatron_ral.parallel.process_groups import stop_groups
from megatron_ral.weights.stage_weights import describe_stage, export_stage
from tests.distributed.cases import assemble, fixed_groups, full_tensors, micro_batches, open_policy
from tests.distributed.runner import run_ranks


class HeldNumbers(TorchDispatchMode):
    """Context that counts the numbers in all memory that was taken inside it and not given back."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self._old, self._new = weakref.WeakSet(), weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in self._new:
                self._old.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage not in self._old and storage not in self._new:
                    self._new.add(storage)
                    self._add(storage.nbytes() // tensor.itemsize)
                    weakref.finalize(storage, self._add, -(storage.nbytes() // tensor.itemsize))
        return result

    def _add(self, numbers: int) -> None:
        self.held += numbers
        self.peak = max(self.peak, self.held)


def sharded(policy) -> bool:
    """Say whether this rank holds nothing but its shards."""
    return all(parameter.ds_status.name == "NOT_AVAILABLE" for parameter in policy.stage.parameters())


def digest(folder: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def streams(path: str, data: str, dtype: str, tensor: int, pipeline: int, output: str) -> dict:
    """After one optimizer step: this rank's streams, the weights by another way, exports, and numbers held."""
    config, process_groups, shape, policy, objective = open_policy(
        path, tensor, pipeline, dtype=dtype, kl_coef=0.0, attention_target="hindsight", attention_keys="prompt"
    )
    rollout = micro_batches(fixed_groups(path, data)[:2], 2, policy)
    [minibatch] = assemble(rollout, [None], None, None, objective, config, process_groups)
    policy.forward_backward(minibatch, objective)
    policy.step()
    receives, layout = process_groups.layout.tensor_rank == 0, process_groups.layout
    whole = full_tensors(policy, lambda parameter: parameter.detach())
    whole.pop("tied copy", None)
    found = {"wanted": {shape.family.hub_name(name): value for name, value in whole.items()}}
    for name, settings in (
        ("own", {}),
        ("all", {"all_stages": True}),
        ("trained", {"all_stages": True, "skip_frozen": True}),
    ):
        stream = stream_policy(policy, receives=receives, **settings)
        found[name] = [(name, value if value is None else value.clone()) for name, value in stream]
        assert sharded(policy), "the stream has left a parameter whole"
        with HeldNumbers() as numbers:
            for _, value in stream_policy(policy, receives=receives, **settings):
                assert (value is not None) == receives
            del value
        found[f"{name} held"] = numbers.peak
        deadline = time.monotonic() + 60.0
        while numbers.held and time.monotonic() < deadline:  # gloo's threads let go of a buffer a moment later
            time.sleep(0.01)
        assert numbers.held == 0
    with policy.resident():
        again = [value for _, value in stream_policy(policy, receives=receives) if value is not None]
        assert not sharded(policy), "a parameter that was whole before must stay so"
        assert all(torch.equal(*pair) for pair in zip(again, (value for _, value in found["own"])))
        export_stage(policy.stage, process_groups, path, f"{output}/resident")
    export_stage(policy.stage, process_groups, path, f"{output}/sharded", gathered=gathered)
    parameters = dict(policy.stage.named_parameters())
    sizes = [
        parameters[part.name].ds_numel * (tensor if part.cut_dim is not None else 1)
        for part in describe_stage(policy.stage)
    ]
    stop_groups()
    return found | {"layout": layout, "largest": max(sizes)}


@pytest.mark.parametrize(
    "world, tensor, pipeline, kind, dtype",
    [
        (8, 2, 2, "tiny", "float32"),
        (8, 2, 2, "qwen3", "bfloat16"),
        (2, 1, 1, "untied", "bfloat16"),
        (4, 4, 1, "untied", "float32"),
    ],
)
def test_stream_equals_the_whole_model_and_what_export_writes(material, tmp_path, world, tensor, pipeline, kind, dtype):
    path = str(material[kind])
    results = run_ranks(world, streams, path, str(material["data"]), dtype, tensor, pipeline, str(tmp_path))
    files = load_all(tmp_path / "sharded")
    wanted = results[0]["wanted"]
    assert files.keys() == wanted.keys() and len(files) > 40
    assert all(same(files[name], wanted[name]) for name in files)
    assert digest(tmp_path / "sharded") == digest(tmp_path / "resident")
    trained, largest = {name for name in wanted if "visual." not in name}, max(r["largest"] for r in results)
    for result in results:
        layout, receives = result["layout"], result["layout"].tensor_rank == 0
        names = [name for name, _ in result["all"]]
        assert names == [name for name, _ in results[0]["all"]] and len(set(names)) == len(names)
        assert set(names) == wanted.keys()
        assert [name for name, _ in result["trained"]] == [name for name in names if name in trained]
        own = [name for name, _ in result["own"]]
        assert own == [name for name in names if name in own] and (len(own) < len(names)) == (pipeline > 1)
        for name, value in [*result["own"], *result["all"], *result["trained"]]:
            assert same(value, wanted[name]) if receives else value is None, name
        for stream in ("own", "all", "trained"):
            # Receiving: two whole parameters, this rank's part, and another rank's. Else: parameters that are not cut,
            # or two parts, and what gloo lets go of late.
            bound = ((2 if receives else 1) + 2 / tensor) * largest
            assert 0 < result[f"{stream} held"] <= bound, (stream, layout, result[f"{stream} held"], bound)
    assert 2 * (2 + 2 / tensor) * largest < sum(value.numel() for value in wanted.values()), "all would pass"
    own = [
        name
        for result in results
        if result["layout"].tensor_rank == 0 == result["layout"].data_rank
        for name, _ in result["own"]
    ]
    assert sorted(own) == sorted(wanted), "the stages together yield every tensor once"


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
