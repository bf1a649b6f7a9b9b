"""Shards, samples, prompts: what is read, what is refused, what is quarantined, and how a position is restored."""

import io
import json
import tarfile

import pytest
from PIL import Image

from megatron_ral.data.loader import PromptLoader, open_sources
from megatron_ral.data.processor import PromptProcessor, SampleError
from megatron_ral.data.shards import DataError, find_shards, parse_sample
from megatron_ral.types import FramePictures, Sample
from tests.unit.test_video import clip as mp4_clip


def png(width=56, height=56) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, "PNG")
    return stream.getvalue()


def record(**changes) -> dict:
    return {"problem": "Which digit is red?", "solution": "<answer>7</answer>", "process": "<think>red</think>",
            "problem_type": "numerical", "data_type": "image", "target_boxes": [[0, 0, 28, 28]], **changes}


def write_shard(path, samples) -> None:
    """samples: (key, {suffix: bytes})"""
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


def loader(shards, processor, rank=0, size=1, num_samples=0, shuffle=True):
    sources = open_sources([(str(shards), num_samples)], "data.train")
    return PromptLoader(sources, processor, dp_rank=rank, dp_size=size, seed=1, shuffle=shuffle, shuffle_buffer=4)


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
    with pytest.raises(DataError, match="a.tar' is not a tar"):
        find_shards(str(tmp_path / "*.tar"), "data.train")


def test_shard_that_is_cut_short_or_damaged_is_named(tmp_path):
    write_shard(tmp_path / "whole.tar", [good(f"s{index}") for index in range(4)])
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1800])
    with pytest.raises(DataError, match="cut.tar' is cut short or damaged"):
        find_shards(str(tmp_path / "cut.tar"), "data.train")
    # garbage where the header of the third member should be: a reader would take it for the end of the archive
    (tmp_path / "damaged.tar").write_bytes(whole[:2048] + b"x" * 3000 + whole[2048:])
    with pytest.raises(DataError, match="damaged.tar' is damaged at byte"):
        find_shards(str(tmp_path / "damaged.tar"), "data.train")


def test_duplicate_members_end_the_run_naming_the_shard(tmp_path, processor):
    write_shard(tmp_path / "a.tar", [good("s0"), ("s1", {"png": png()}), ("s1", {"png": png()})])
    with pytest.raises(DataError, match="a.tar' cannot be read on"):
        loader(tmp_path / "a.tar", processor, shuffle=False).take(3)


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
    write_shard(tmp_path / "a.tar", [
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
    ])
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


def test_mismatch_of_tokens_and_features_is_caught_where_the_key_is_known(processor, tmp_path, monkeypatch):
    """A processor that disagrees with the text about the number of tokens (another merge size, say)."""
    write_shard(tmp_path / "a.tar", [good("s0")])
    sample = loader(tmp_path / "a.tar", processor).take(1)[0].sample
    monkeypatch.setattr(processor, "_tokenize", lambda sample, counts: [processor.image_token_id] * 3)
    with pytest.raises(SampleError, match="'s0': 3 visual tokens in the text but 4 visual features"):
        processor(sample)


def test_a_whole_epoch_without_a_usable_sample_ends_the_run(processor, tmp_path):
    write_shard(tmp_path / "a.tar", [good("s0", problem="word " * 500)])
    with pytest.raises(DataError, match="no usable sample in a whole epoch"):
        loader(tmp_path / "a.tar", processor).take(1)


def test_members_are_never_unpickled(tmp_path, processor):
    """A pickle beside a sample is carried as bytes and ignored."""
    evil = b"cos\nsystem\n(S'false'\ntR."
    write_shard(tmp_path / "a.tar", [("s0", {"png": png(), "pyd": evil, "pth": evil, "json": json.dumps(record()).encode()})])
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


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_ranks_share_an_epoch_without_overlap(four_shards, processor, size):
    """Also with more ranks than shards (6), where samples are dealt instead of shards."""
    shares = {1: [24], 2: [12, 12], 3: [12, 6, 6], 4: [6] * 4, 6: [4] * 6}[size]
    keys = [prompt.sample.key for rank in range(size)
            for prompt in loader(four_shards, processor, rank, size).take(shares[rank])]
    assert sorted(keys) == sorted(f"k{shard}{index}" for shard in range(4) for index in range(6))


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


def test_resume_with_another_number_of_ranks_is_refused(four_shards, processor):
    state = loader(four_shards, processor, 0, 2).state()
    with pytest.raises(DataError, match="2 data-parallel ranks, this run has 1"):
        loader(four_shards, processor).restore(state)


def test_curriculum_reads_sources_in_order(four_shards, processor, tmp_path):
    write_shard(tmp_path / "b.tar", [good(f"b{index}") for index in range(3)])
    sources = open_sources([(str(tmp_path / "b.tar"), 5), (str(four_shards), 0)], "data.train")
    stream = PromptLoader(sources, processor, dp_rank=0, dp_size=1, seed=0, shuffle=True, shuffle_buffer=4)
    keys = [prompt.sample.key for prompt in stream.take(9)]
    assert all(key.startswith("b") for key in keys[:5]) and all(key.startswith("k") for key in keys[5:])


def test_video_of_qwen3_stands_behind_its_time_stamps(material):
    """Each temporal patch is a run of its own; the template's outer pair of vision tokens is replaced."""
    frames = FramePictures(tuple(png(64, 64) for _ in range(4)), fps=1.0)
    processor = PromptProcessor(str(material["qwen3"]), 128)
    sample = Sample("v", "s", "Which digit is red?", "<answer>3</answer>", "", "", (), (), (frames,))
    text = processor.tokenizer.decode(processor(sample).input_ids)
    pad = "<|video_pad|>" * 4
    assert "".join(text.split()).startswith("".join((
        f"<|im_start|>user <0.5 seconds><|vision_start|>{pad}<|vision_end|>"
        f"<2.5 seconds><|vision_start|>{pad}<|vision_end|>Which digit is red?").split()))


def test_mp4_members_are_videos(tmp_path, processor):
    clip = mp4_clip("mp4", 40)
    write_shard(tmp_path / "a.tar", [("s0", {"mp4": clip, "json": json.dumps(
        record(data_type="video", target_boxes=[])).encode()})])
    prompt = loader(tmp_path / "a.tar", processor).take(1)[0]
    assert prompt.is_video.tolist() == [True] and int(prompt.grid_thw.prod()) // 4 == int(prompt.visual_mask.sum()) > 0
    write_shard(tmp_path / "b.tar", [("s0", {"json": json.dumps(record(data_type="video", target_boxes=[])).encode()})])
    with pytest.raises(DataError, match="'s0' has data_type 'video' but no member .mp4"):
        open_sources([(str(tmp_path / "b.tar"), 0)], "data.train")
