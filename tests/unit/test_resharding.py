"""State of one layout read in another, against whole tensors cut by the table that loading and exporting use.

Padding in the old files (of the vocabulary, and of the last data-parallel shard) is NaN here: it must never be copied.
"""

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import save_file

from megatron_ral.errors import CheckpointError
from megatron_ral.models.parameter_shapes import expected_shapes
from megatron_ral.models.shape import read_shape
from megatron_ral.parallel.rank_layout import RankLayout
from megatron_ral.weights.resharding import OwnShards, ReshardedState
from megatron_ral.weights.safetensors_files import SafetensorsFile, SafetensorsWriter
from megatron_ral.weights.tensor_table import stage_tables

LAYOUTS = ((1, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 2), (4, 1, 1), (1, 3, 3), (4, 2, 3))
"""Tensor x pipeline x data."""
SHAPES = {
    "tied": {"num_query_groups": 2, "vocab_size": 37},
    "untied": {"num_query_groups": 1, "vocab_size": 41, "tie_word_embeddings": False},
}


def small(material, kind: str):
    """Return a shape of 5 layers, a vocabulary that no layout divides, fewer key/value heads than tensor ranks."""
    return dataclasses.replace(
        read_shape(str(material["tiny"])),
        num_layers=5,
        hidden_size=12,
        ffn_hidden_size=20,
        num_attention_heads=4,
        kv_channels=6,
        **SHAPES[kind],
    )


def whole_tensors(shape) -> dict[str, torch.Tensor]:
    """Return tensors in which no number occurs twice."""
    result, first = {}, 1
    for name, size in expected_shapes(shape).items():
        if not name.startswith("visual.") or ".blocks.1." in name:
            numel = torch.Size(size).numel()
            result[name] = torch.arange(first, first + numel, dtype=torch.float32).view(size)
            first += numel
    assert first < 2**24, "numbers must be exact in float32"
    return result


def places(layout: tuple[int, int, int]) -> list[RankLayout]:
    tensor, pipeline, data = layout
    return [RankLayout(rank, tensor * pipeline * data, tensor, pipeline) for rank in range(tensor * pipeline * data)]


def state_of(shape, whole, place: RankLayout, padding: float) -> dict[str, torch.Tensor]:
    """Return the state of one rank, made by cutting whole tensors."""
    tables = stage_tables(shape, place.tensor_size, place.pipeline_size)
    state = {"adamw_step": torch.tensor(7.0)}
    for tensor in tables[place.pipeline_rank]:
        if tensor.sources[0] not in whole:
            continue
        full = tensor.merge([whole[name] for name in tensor.sources])
        if "word_embeddings" in tensor.name or "output_layer" in tensor.name:
            full[shape.vocab_size :] = padding
        flat = tensor.cut(full, place.tensor_rank, place.tensor_size).flatten()
        size = -(-len(flat) // place.data_size)
        flat = torch.cat([flat, flat.new_full((size * place.data_size - len(flat),), padding)])
        part = flat[place.data_rank * size :][:size]
        for number, key in enumerate((f"{tensor.name}/master", f"{tensor.name}/exp_avg", f"ema/{tensor.name}")):
            state[key] = part * 2.0**-number
    return state


def write(folder, shape, whole, layout) -> None:
    folder.mkdir()
    for place in places(layout):
        state = state_of(shape, whole, place, float("nan"))
        save_file({key: value.clone() for key, value in state.items()}, folder / f"{place.rank}")


@pytest.mark.parametrize("kind", SHAPES)
def test_state_in_another_layout(material, tmp_path, kind):
    shape = small(material, kind)
    whole = whole_tensors(shape)
    wanted_of = {layout: [state_of(shape, whole, place, 0.0) for place in places(layout)] for layout in LAYOUTS}
    for layout in LAYOUTS:
        write(tmp_path / str(layout), shape, whole, layout)
    for index, step in itertools.product(range(len(LAYOUTS)), (1, 3)):
        old, new = LAYOUTS[index], LAYOUTS[(index + step) % len(LAYOUTS)]
        read = held = 0
        for place in places(new):
            state = ReshardedState(shape, places(old)[0], place, lambda rank, old=old: tmp_path / str(old) / str(rank))
            for key, wanted in wanted_of[new][place.rank].items():
                assert torch.equal(state.get(key), wanted), (old, new, place.rank, key)
                held += int(wanted.count_nonzero()) if key != "adamw_step" else 0
            assert state.get("language.nothing/master") is None
            assert state.get("language.decoder.layers.0.mlp.linear_fc1.weight/exp_avg_sq") is None
            read += state.num_bytes_read
            state.close()
        assert read == 4 * held, "not a byte is read that is not needed"


def test_the_own_file_is_read_as_it_is(material, tmp_path):
    shape = small(material, "tied")
    write(tmp_path / "saved", shape, whole_tensors(shape), (2, 1, 3))
    own = OwnShards(tmp_path / "saved" / "5")
    for key, wanted in state_of(shape, whole_tensors(shape), places((2, 1, 3))[5], float("nan")).items():
        assert torch.equal(own.get(key).nan_to_num(-1.0), wanted.nan_to_num(-1.0)), key
    padded = own.get("language.embedding.word_embeddings.weight/master")
    assert padded.isnan().any() and own.get("nothing/master") is None


def test_damaged_files_are_named(material, tmp_path):
    shape = small(material, "tied")
    write(tmp_path / "saved", shape, whole_tensors(shape), (1, 1, 2))
    key = "language.decoder.layers.0.mlp.linear_fc1.weight/master"
    path = tmp_path / "saved" / "1"
    content = path.read_bytes()

    def read():
        return ReshardedState(
            shape, places((1, 1, 2))[0], places((1, 1, 1))[0], lambda rank: tmp_path / "saved" / str(rank)
        ).get(key)

    opened = SafetensorsFile(path)
    path.write_bytes(content[: len(content) // 20])
    with pytest.raises(CheckpointError, match="saved/1' is cut short in tensor 'language"):
        opened.read_into(key, 0, torch.empty(opened.shapes[key]).view(-1))
    for broken in (content[: len(content) // 20], content[:-1], content + b"0", content[:100], b"", b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match="saved/1' is not a whole safetensors file"):
            read()
    save_file({"other": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="saved/1' has no float32 tensor 'language"):
        read()
    save_file({key: torch.zeros(30, dtype=torch.float64)}, path)
    with pytest.raises(CheckpointError, match="damaged or of another model"):
        read()
    assert "other" not in SafetensorsFile(path)


def test_a_written_file_equals_one_of_the_safetensors_package(tmp_path):
    """Tensors may be added in any order; the bytes are those of the announced order."""
    values = {name: torch.randn(size).bfloat16() for name, size in (("a.x", (3, 4)), ("a.y", (2,)), ("b", (5, 1, 2)))}
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    writer = SafetensorsWriter(tmp_path / "ours", [(name, value.dtype, value.shape) for name, value in values.items()])
    for name in ("b", "a.x", "a.y"):
        writer.add(name, values[name])
    writer.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_parts_are_read_without_the_rest_of_the_tensor(tmp_path, monkeypatch):
    """Slices of every dimension equal those of the whole tensor, and no other byte is read."""
    values = {"a": torch.randn(5, 6, 7), "b": torch.randn(3, 4).bfloat16(), "c": torch.tensor(2.0), "d": torch.empty(0)}
    save_file(values, tmp_path / "file")
    file, read = SafetensorsFile(tmp_path / "file"), []
    fill = SafetensorsFile._fill

    def counted(self, name, stretches):
        read.append(sum(target.numel() for _, target in stretches))
        fill(self, name, stretches)

    monkeypatch.setattr(SafetensorsFile, "_fill", counted)
    for name, value in values.items():
        assert torch.equal(file.read(name), value) and file.dtype_of(name) == value.dtype
    for name, dim, start, stop in (("a", 0, 1, 4), ("a", 1, 2, 3), ("a", 2, 0, 5), ("b", 1, 1, 4), ("b", 0, 2, 2)):
        wanted = values[name].narrow(dim, start, stop - start)
        assert torch.equal(file.read_part(name, dim, start, stop), wanted) and read[-1] == wanted.numel()
