"""Shards, samples, prompts: reading, refusal, quarantine, and restored positions."""

import io
import json
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ral.config.sections import DataConfig
from megatron_ral.data.index import open_index
from megatron_ral.data.issues import SampleError
from megatron_ral.data.loader import PromptLoader, open_sources
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import find_shards, open_shards, parse_sample, read_entry
from megatron_ral.errors import DataError
from megatron_ral.functional.patches import image_levels, patchify_image
from megatron_ral.types import FramePictures, Patches, Sample
from tests.unit.test_video import clip as mp4_clip


def png(width=56, height=56) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()


def record(**changes) -> dict:
    return {
        "problem": "Which digit is red?",
        "solution": "<answer>7</answer>",
        "process": "<think>red</think>",
        "problem_type": "numerical",
        "data_type": "image",
        "target_boxes": [[0, 0, 28, 28]],
        **changes,
    }


def write_shard(path, samples) -> None:
    """Write a shard of samples (key, {suffix: bytes})."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def good(key: str, **changes):
    return key, {"png": png(), "json": json.dumps(record(**changes)).encode()}


@pytest.fixture(scope="module")
def processor(material):
    return PromptProcessor(str(material["tiny"]), 128)


class Ranks:
    """Data-parallel ranks as threads of this process, with an exchange like that of a process group."""

    def __init__(self, shards, processor, size, **settings):
        self.barrier, self.slots = threading.Barrier(size, timeout=600), [None] * size
        self.loaders = [
            loader(
                shards, processor, rank, size, exchange=lambda value, rank=rank: self.exchange(rank, value), **settings
            )
            for rank in range(size)
        ]

    def exchange(self, rank, value):
        self.slots[rank] = value
        self.barrier.wait()
        gathered = list(self.slots)
        self.barrier.wait()
        return gathered

    def take(self, count):
        """Return the prompts of each rank."""
        with ThreadPoolExecutor(len(self.loaders)) as pool:
            return list(pool.map(lambda stream: stream.take(count), self.loaders))

    def keys(self, count):
        """Return the keys of one batch in the order of its places."""
        shares = [iter(share) for share in self.take(count)]
        return [next(shares[place % len(shares)]).sample.key for place in range(count)]


def loader(shards, processor, rank=0, size=1, num_samples=0, shuffle=True, exchange=None, **settings):
    sources = open_sources([(str(shards), num_samples)], "data.train")
    return PromptLoader(
        sources,
        processor,
        DataConfig(**{"shuffle": shuffle, "shuffle_buffer": 4, **settings}),
        dp_rank=rank,
        dp_size=size,
        seed=1,
        batch_size=6,
        exchange=exchange,
    )


# --- refused before training ------------------------------------------------------------------------------------------


def test_missing_shard_is_named(tmp_path):
    with pytest.raises(DataError, match="data.train = .*none-.*matches no file"):
        find_shards(str(tmp_path / "none-*.tar"), "data.train")


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "http://host/a.tar", "s3:bucket/a.tar"])
def test_schemes_never_reach_a_shell(url):
    with pytest.raises(DataError, match="only local files"):
        find_shards(url, "data.train")


def test_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match="data.train: .*a.tar' is not a tar"):
        open_shards(str(tmp_path / "*.tar"), "data.train")


def test_readable_part_of_a_damaged_shard_is_used_and_the_damage_reported(tmp_path, processor):
    write_shard(tmp_path / "whole.tar", [good(f"s{index}") for index in range(4)])
    whole = (tmp_path / "whole.tar").read_bytes()
    second = whole.index(b"s1.png")  # its header
    for name, data, keys, damage in (
        ("cut", whole[: second + 1600], ["s0"], "cut short in member 's1.json'"),
        # garbage where a header should be: a reader would take it for the end of the archive
        ("damaged", whole[:second] + b"x" * 3000 + whole[second:], ["s0"], f"damaged at byte {second}"),
        ("unfinished", whole[: whole.index(b"s3.png")], ["s0", "s1", "s2"], "without the mark of a whole archive"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
        stream = loader(tmp_path / f"{name}.tar", processor, shuffle=False)
        assert [prompt.sample.key for prompt in stream.take(2 * len(keys))] == 2 * keys
        assert damage in stream.quarantined[f"{name}.tar"]
        assert set(stream.quarantined_by_reason) == {"truncated"}
    (tmp_path / "nothing.tar").write_bytes(whole[:600])
    with pytest.raises(DataError, match="data.train = .*hold no sample|no sample of 1 shards"):
        loader(tmp_path / "nothing.tar", processor)


def test_first_of_several_samples_with_one_key_is_used(tmp_path, processor):
    write_shard(
        tmp_path / "a.tar",
        [good("s0"), good("s1", problem="first"), good("s1", problem="second"), good("s2"), good("s0", problem="far")],
    )
    stream = loader(tmp_path / "a.tar", processor, shuffle=False)
    assert [prompt.sample.problem for prompt in stream.take(3)] == [
        "Which digit is red?",
        "first",
        "Which digit is red?",
    ]
    assert stream.quarantined_by_reason == {"duplicate_key": 2}
    assert set(stream.quarantined) == {"a.tar/s1#2", "a.tar/s0#4"}


def test_several_images_in_the_order_of_their_numbers(tmp_path, processor):
    members = {"1.png": png(84, 56), "0.png": png(28, 28), "json": json.dumps(record(target_boxes=[])).encode()}
    write_shard(tmp_path / "a.tar", [("s0", members)])
    prompt = loader(tmp_path / "a.tar", processor).take(1)[0]
    assert prompt.grid_thw.tolist() == [[1, 2, 2], [1, 4, 6]]
    assert int(prompt.visual_mask.sum()) == 1 + 6


@pytest.mark.parametrize("field", ["problem", "solution"])
def test_shard_without_a_needed_field_is_named(tmp_path, field):
    broken = record()
    del broken[field]
    write_shard(tmp_path / "a.tar", [("s0", {"png": png(), "json": json.dumps(broken).encode()})])
    with pytest.raises(DataError, match=f"a.tar.*'s0' has no text field '{field}'"):
        open_sources([(str(tmp_path / "*.tar"), 0)], "data.train")


def test_shard_without_images_is_named(tmp_path):
    write_shard(tmp_path / "a.tar", [("s0", {"json": json.dumps(record()).encode()})])
    with pytest.raises(DataError, match="'s0' has data_type 'image' but no member .png"):
        open_sources([(str(tmp_path / "*.tar"), 0)], "data.train")


# --- samples and prompts ----------------------------------------------------------------------------------------------


def test_image_tokens_positions_and_target(processor, tmp_path):
    write_shard(tmp_path / "a.tar", [good("s0", target_boxes=[[28, 0, 56, 28]])])
    prompt = loader(tmp_path / "a.tar", processor).take(1)[0]
    assert int(prompt.visual_mask.sum()) == 4 == int(prompt.grid_thw.prod()) // 4
    first = int(prompt.visual_mask.nonzero()[0])
    assert prompt.target_mask.nonzero().flatten().tolist() == [first + 1], "the asked cell is the upper right one"
    assert processor.decode(prompt.response_ids) == "<think>red</think><answer>7</answer>"
    assert int(prompt.response_ids[-1]) == processor.end_token_id
    assert "Which digit is red?" in processor.decode(prompt.input_ids)


def test_unusable_samples_are_quarantined_by_key_and_the_run_goes_on(processor, tmp_path, caplog):
    write_shard(
        tmp_path / "a.tar",
        [
            good("good0"),
            good("literal", problem="What does <|image_pad|> mean?"),
            good("turn", process="<think>red<|im_end|></think>"),
            ("thin", {"png": png(1200, 4), "json": json.dumps(record(target_boxes=[])).encode()}),
            ("boxed", {"json": json.dumps(record(data_type="text")).encode()}),
            ("broken", {"png": png()[:60], "json": json.dumps(record()).encode()}),
            good("outside", target_boxes=[[0, 0, 500, 28]]),
            good("long", problem="Which digit is red? " * 60),
            ("textless", {"png": png(), "json": b"\xff\xfe"}),
            good("listed", process=["a", 1]),
            good("good1"),
        ],
    )
    stream = loader(tmp_path / "a.tar", processor, shuffle=False)
    keys = [prompt.sample.key for prompt in stream.take(4)]
    assert keys == ["good0", "good1", "good0", "good1"]
    reasons = {key.removeprefix("a.tar/"): reason for key, reason in stream.quarantined.items()}
    assert set(reasons) == {"literal", "turn", "thin", "boxed", "broken", "outside", "long", "textless", "listed"}
    assert "its problem contains the special token <|image_pad|>" in reasons["literal"]
    assert "its process contains the special token <|im_end|>" in reasons["turn"]
    assert "image cannot be used" in reasons["thin"] and "has target_boxes but no image" in reasons["boxed"]
    assert "cannot be decoded" in reasons["broken"]
    assert "not inside the image of 56 x 56" in reasons["outside"]
    assert "longer than data.max_prompt_length = 128" in reasons["long"]
    assert "'process' must be text, not list" in reasons["listed"]
    assert caplog.text.count("quarantined (") == 9, "each is reported once, not once per epoch"


@pytest.mark.parametrize("family", ["tiny", "qwen3"])
def test_patches_are_those_of_the_stock_processor_bit_for_bit(material, family):
    stock = PromptProcessor(str(material[family]), 128).image_processor
    rng = np.random.default_rng(0)
    sizes = [(28, 28), (300, 41), (31, 500), (5, 7), (448, 336), (200, 1)]
    sizes += [tuple(size) for size in rng.integers(20, 500, (40, 2)).tolist()]
    small = type(stock)(**{**stock.to_dict(), "size": {"shortest_edge": 4 * 28**2, "longest_edge": 20 * 28**2}})
    odd = type(stock)(**{**stock.to_dict(), "do_normalize": False, "image_mean": [0.1, 0.2, 0.3]})
    for number, (width, height) in enumerate(sizes):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for processor in (stock, small, odd)[: 3 if number < 20 else 1]:
            wanted = processor(images=[image], return_tensors="pt")
            pixels, grid = patchify_image(image, processor)
            values = Patches(pixels, image_levels(processor), processor.temporal_patch_size).values()
            assert torch.equal(values, wanted["pixel_values"]) and torch.equal(grid, wanted["image_grid_thw"][0])


def test_prompt_suffix_follows_the_question(processor, material, tmp_path):
    write_shard(tmp_path / "s.tar", [good("k")])
    sample = parse_sample(read_entry(open_index(tmp_path / "s.tar"), 0))
    plain, told = processor, PromptProcessor(str(material["tiny"]), 128, prompt_suffix=" Answer in tags.")
    texts = [each.tokenizer.decode(each(sample).input_ids) for each in (plain, told)]
    assert texts[1] == texts[0].replace(sample.problem, sample.problem + " Answer in tags.") != texts[0]
    assert told.lengths(sample).prompt_length == len(told(sample).input_ids) > plain.lengths(sample).prompt_length
    assert told.fingerprint() != plain.fingerprint(), "an index without it has other lengths"


def test_mismatch_of_tokens_and_features_is_caught_where_the_key_is_known(processor, tmp_path, monkeypatch):
    """A processor that disagrees with the text about the number of tokens (another merge size, say)."""
    write_shard(tmp_path / "a.tar", [good("s0")])
    sample = loader(tmp_path / "a.tar", processor).take(1)[0].sample
    monkeypatch.setattr(processor, "_tokenize", lambda sample, visuals: np.full(3, processor.image_token_id))
    with pytest.raises(SampleError, match="'s0': 3 visual tokens in the text but 4 visual features"):
        processor(sample)


def test_a_whole_epoch_without_a_usable_sample_ends_the_run(processor, tmp_path):
    write_shard(tmp_path / "a.tar", [good("s0", problem="word " * 500)])
    with pytest.raises(DataError, match="no usable sample in a whole epoch"):
        loader(tmp_path / "a.tar", processor).take(1)


def test_members_are_never_unpickled(tmp_path, processor):
    """A pickle beside a sample is carried as bytes and ignored."""
    evil = b"cos\nsystem\n(S'false'\ntR."
    write_shard(
        tmp_path / "a.tar", [("s0", {"png": png(), "pyd": evil, "pth": evil, "json": json.dumps(record()).encode()})]
    )
    assert loader(tmp_path / "a.tar", processor).take(1)[0].sample.key == "s0"
    with pytest.raises(ValueError, match="no .json"):
        parse_sample({"__key__": "k", "__url__": "u", "pyd": evil})


# --- order, ranks, resume ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        write_shard(folder / f"s-{shard}.tar", [good(f"k{shard}{index}") for index in range(6)])
    return folder / "s-*.tar"


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_batches_do_not_depend_on_the_number_of_ranks(four_shards, processor, size):
    """The same holds with more ranks than shards (6), and across epochs (24 samples, batches of 6 and 7)."""
    ranks, alone = Ranks(four_shards, processor, size), loader(four_shards, processor)
    for count in (6, 7, 6, 7, 6):
        assert ranks.keys(count) == [prompt.sample.key for prompt in alone.take(count)]
    assert [stream.state() for stream in ranks.loaders] == [alone.state()] * size


def test_order_is_shuffled_anew_each_epoch_and_repeatable(four_shards, processor):
    first = [prompt.sample.key for prompt in loader(four_shards, processor).take(48)]
    assert first == [prompt.sample.key for prompt in loader(four_shards, processor).take(48)]
    assert first[:24] != first[24:] and sorted(first[:24]) == sorted(first[24:])
    assert first[:24] != sorted(first[:24])


@pytest.mark.parametrize("taken", [0, 1, 7, 23, 24, 25, 40])
def test_restored_position_continues_exactly(four_shards, processor, taken):
    straight = loader(four_shards, processor)
    straight.take(taken)
    state = json.loads(json.dumps(straight.state()))
    wanted = [prompt.sample.key for prompt in straight.take(20)]
    resumed = loader(four_shards, processor)
    resumed.restore(state)
    assert [prompt.sample.key for prompt in resumed.take(20)] == wanted


def test_curriculum_reads_sources_in_order(four_shards, processor, tmp_path):
    write_shard(tmp_path / "b.tar", [good(f"b{index}") for index in range(3)])
    sources = open_sources([(str(tmp_path / "b.tar"), 5), (str(four_shards), 0)], "data.train")
    stream = PromptLoader(sources, processor, DataConfig(shuffle_buffer=4), dp_rank=0, dp_size=1, seed=0)
    keys = [prompt.sample.key for prompt in stream.take(9)]
    assert all(key.startswith("b") for key in keys[:5]) and all(key.startswith("k") for key in keys[5:])


def test_video_of_qwen3_stands_behind_its_time_stamps(material):
    """Each temporal patch is a run of its own; the template's outer pair of vision tokens is replaced."""
    frames = FramePictures(tuple(png(64, 64) for _ in range(4)), fps=1.0)
    processor = PromptProcessor(str(material["qwen3"]), 128)
    sample = Sample("v", "s", "Which digit is red?", "<answer>3</answer>", "", "", (), (), (frames,))
    text = processor.tokenizer.decode(processor(sample).input_ids)
    pad = "<|video_pad|>" * 4
    assert "".join(text.split()).startswith(
        "".join(
            (
                f"<|im_start|>user <0.5 seconds><|vision_start|>{pad}<|vision_end|>"
                f"<2.5 seconds><|vision_start|>{pad}<|vision_end|>Which digit is red?"
            ).split()
        )
    )


def test_mp4_members_are_videos(tmp_path, processor):
    clip = mp4_clip("mp4", 40)
    write_shard(
        tmp_path / "a.tar",
        [("s0", {"mp4": clip, "json": json.dumps(record(data_type="video", target_boxes=[])).encode()})],
    )
    prompt = loader(tmp_path / "a.tar", processor).take(1)[0]
    assert prompt.is_video.tolist() == [True] and int(prompt.grid_thw.prod()) // 4 == int(prompt.visual_mask.sum()) > 0
    write_shard(tmp_path / "b.tar", [("s0", {"json": json.dumps(record(data_type="video", target_boxes=[])).encode()})])
    with pytest.raises(DataError, match="'s0' has data_type 'video' but no member .mp4"):
        open_sources([(str(tmp_path / "b.tar"), 0)], "data.train")
