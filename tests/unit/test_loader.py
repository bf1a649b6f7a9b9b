"""The loader over faulty, indexed and long data: counting, filtering, grouping, and resuming anywhere."""

import functools
import io
import json
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from PIL import Image
from webdataset.tariterators import tar_file_expander

from megatron_ral.commands.shards import index_shard
from megatron_ral.config.sections import DataConfig
from megatron_ral.data.archive import plain_members, scan_archive
from megatron_ral.data.index import index_path, open_index
from megatron_ral.data.issues import SampleError
from megatron_ral.data.loader import PromptLoader, open_sources
from megatron_ral.data.order import EpochOrder
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, read_entry
from megatron_ral.errors import DataError
from megatron_ral.models.families import Family
from megatron_ral.types import FramePictures
from tests.unit.shard_faults import KINDS, picture, pixel_bomb, text, write_faulty_set, write_members
from tests.unit.test_data import Ranks, good, loader, write_shard
from tests.unit.test_video import clip


@pytest.fixture(scope="module")
def processor(material):
    return PromptProcessor(str(material["tiny"]), 128)


def identities(prompts) -> list[str]:
    return [prompt.sample.identity for prompt in prompts]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_faults_of_every_kind_in_2000_samples(tmp_path, processor, monkeypatch):
    """Each of the 5 % faulty samples is counted under its reason with its key; all others are seen once per epoch."""
    monkeypatch.chdir(tmp_path)
    usable, bad = write_faulty_set(tmp_path, num_shards=20, shard_size=100, faults_per_shard=5)
    assert len(usable) == 1900 and set(bad.values()) == set(KINDS)
    stream = loader(tmp_path / "s-*.tar", processor, shuffle_buffer=300)
    for _ in range(2):  # in the second epoch what is at fault is not even tried
        seen = [identity for _ in range(38) for identity in identities(stream.take(50))]
        assert Counter(seen) == Counter(usable)
    faults = stream.state()["quarantined"]
    assert {name: reason for name, (reason, _) in faults.items()} == bad
    assert stream.quarantined_by_reason == Counter(bad.values())
    for name, (_, said) in faults.items():
        assert name.rpartition("/")[2].partition("#")[0] in said, "the text names the key or the shard"
    assert stream.position.epoch == 1
    assert not (tmp_path / "pipe_was_run").exists() and not (tmp_path.parent / "k").exists()
    with pytest.raises(DataError, match="'pipe:' is refused"):
        open_sources([("pipe:touch pipe_was_run", 0)], "data.train")


def test_a_pixel_bomb_is_refused_by_its_header(processor):
    before = psutil.Process().memory_info().rss
    for data in (pixel_bomb(20000), pixel_bomb(12000)):
        with pytest.raises(SampleError, match="declares too many pixels") as refused:
            processor(parse_sample({"__key__": "k", "__url__": "s", "png": data, "json": text()}))
        assert refused.value.reason == "image_too_large"
    assert psutil.Process().memory_info().rss - before < 50e6


def test_links_and_sparse_members_are_refused(tmp_path, processor):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (
            ("linked.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name, data in (("s0.png", picture()), ("s0.json", text())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    stream = loader(tmp_path / "a.tar", processor)
    assert stream.take(1)[0].sample.key == "s0"
    assert stream.quarantined_by_reason == {"unsafe_member": 3}


def test_a_shard_that_vanishes_ends_the_run(tmp_path, processor):
    write_shard(tmp_path / "a.tar", [good("s0")])
    stream = loader(tmp_path / "a.tar", processor)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match="'s0': shard .*a.tar' cannot be read"):
        stream.take(1)


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"json": b'{"problem": ' + b"1" * 5000 + b"}"}, "unreadable_text"),
        ({"json": text(data_type=None, target_boxes=[[0, 0, 10**400, 1]])}, "target_box"),
        ({"json": text(data_type=None, target_boxes=["1234"])}, "target_box"),
        ({"json": text(data_type=None, target_frames=[{"seconds": [0, 10**400]}])}, "target_box"),
        ({"json": text(data_type=None, fps=10**400), "frames/1.png": picture()}, "wrong_field"),
        (
            {"json": text(data_type=None, fps=1e-320), "frames/1.png": picture(), "frames/2.png": picture()},
            "wrong_field",
        ),
        ({"json": text(), "9" * 5000 + ".png": picture()}, "missing_media"),
    ],
)
def test_hostile_numbers_are_faults_of_their_sample(members, reason):
    with pytest.raises(SampleError) as refused:
        parse_sample({"__key__": "k", "__url__": "s", **members})
    assert refused.value.reason == reason


def test_a_decoder_that_fails_in_its_own_way_ends_no_run(tmp_path, processor, monkeypatch):
    write_shard(tmp_path / "a.tar", [good("s0"), good("s1")])
    stream = loader(tmp_path / "a.tar", processor)
    patchify = Family.patchify_image
    failures, own = [ZeroDivisionError("once")], {thread.ident for thread in threading.enumerate()}

    def fails_once(*args):
        # threads that decode ahead for a test before are none of this one's
        if failures and (threading.get_ident() not in own or threading.current_thread() is threading.main_thread()):
            raise failures.pop()
        return patchify(*args)

    monkeypatch.setattr(Family, "patchify_image", fails_once)
    assert len(stream.take(3)) == 3
    [text] = stream.quarantined.values()
    assert "ZeroDivisionError: once" in text and stream.quarantined_by_reason == {"unusable": 1}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_members_are_those_that_webdataset_reads(tmp_path, form):
    """Sizes around a block, in each format of tar, and with each byte of a header changed."""
    stream = io.BytesIO()
    contents = {f"k.{number}.png": bytes([number + 1]) * size for number, size in enumerate((0, 1, 511, 512, 513))}
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.uname, info.mtime = len(content), "me", 1700000000
            archive.addfile(info, io.BytesIO(content))
        end = archive.offset
    data = stream.getvalue()[:end]
    assert plain_members(data) == list(contents.items())
    assert plain_members(data[:-513]) is None and plain_members(b"") == []
    for place in range(512):
        for byte in (0, 32, 53, 255):
            broken = data[:place] + bytes([byte]) + data[place + 1 :]
            found = plain_members(broken)
            if found is not None:
                shown = tar_file_expander([{"url": "s", "stream": io.BytesIO(broken)}], eof_value=None)
                assert found == [(member["fname"], member["data"]) for member in shown], (place, byte)


@pytest.mark.parametrize("name, kind", [("k" * 120, b"0"), ("k.ü", b"0"), ("k.png", b"2"), ("k.png", b"5"), ("", b"0")])
def test_members_that_are_not_plain_are_left_to_webdataset(name, kind):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo(name)
        info.type = kind
        assert plain_members(info.tobuf(form)) is None


def test_hostile_archives(tmp_path, processor):
    """Members with names of our own, numbers too large for a place, names of names of names."""
    path = tmp_path / "a.tar"
    write_members(
        path,
        [
            ("s0.png", picture()),
            ("s0.json", text()),
            ("s0.__key__", b"other"),
            ("s0.__url__", b"other"),
            ("../../etc/passwd", b"root"),
            ("s1.png", picture()),
            ("s1.json", text()),
        ],
    )
    stream = loader(path, processor, shuffle=False)
    assert [prompt.sample.identity for prompt in stream.take(3)] == ["a.tar/s0", "a.tar/s1", "a.tar/s0"]
    assert stream.quarantined_by_reason == {"unsafe_member": 1} and "a.tar/../../etc/passwd" in stream.quarantined
    whole = path.read_bytes()

    def header(kind: bytes, size: int) -> bytes:
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT)

    # each of the names in a name's place is a name in another's
    path.write_bytes(whole[:1536] + (header(tarfile.GNUTYPE_LONGNAME, 5) + b"name".ljust(512, b"\0")) * 3000 + whole)
    assert "damaged at byte" in scan_archive(path).damage
    path.write_bytes((header(tarfile.GNUTYPE_LONGNAME, 5) + b"name".ljust(512, b"\0")) * 3000)
    with pytest.raises(DataError, match="not a tar archive"):
        scan_archive(path)
    record = b"31 size=9999999999999999999999\n"
    path.write_bytes(whole[:4096] + header(tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0") + whole[4096:])
    assert "declares 9999999999999999999999 bytes" in open_index(path).damage


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory):
    """Write four shards of 7 samples, one of each with a fault that only decoding finds."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        write_shard(
            folder / f"s-{shard}.tar",
            [
                good(f"k{shard}{index}", **({"target_boxes": [[0, 0, 99, 9]]} if index == shard + 1 else {}))
                for index in range(7)
            ],
        )
    return folder / "s-*.tar"


def test_any_batch_any_number_of_ranks(with_faults, processor):
    """A run that stops after any batch of two epochs and resumes with 1, 2 or 3 ranks reads exactly the rest, in the
    same order, for any number of ranks before."""
    straight, per_batch, states = loader(with_faults, processor), [], []
    for _ in range(10):  # 24 usable samples, batches of 5: epochs end inside batches
        states.append(json.loads(json.dumps(straight.state())))
        per_batch.append(identities(straight.take(5)))
    first_epochs = [name for batch in per_batch for name in batch][:48]
    assert Counter(first_epochs).most_common()[0][1] == 2 and len(set(first_epochs)) == 24
    # the first epoch is the first four batches and all but one of the fifth, in which a replacement may stand first
    assert len(set(first_epochs[:20])) == 20 and len(set(first_epochs[:25])) == 24
    assert straight.quarantined_by_reason == {"target_box": 4}
    for size in (2, 3):
        ranks = Ranks(with_faults, processor, size)
        for state, batch in zip(states, per_batch):
            assert all(stream.state() == state for stream in ranks.loaders)
            assert [f"s-{key[1]}.tar/{key}" for key in ranks.keys(5)] == batch
    for stop, state in enumerate(states):
        for size in (1, 2, 3):
            ranks = Ranks(with_faults, processor, size)
            for stream in ranks.loaders:
                stream.restore(state)
            for batch in per_batch[stop : stop + 3]:
                assert [f"s-{key[1]}.tar/{key}" for key in ranks.keys(5)] == batch


def test_a_curriculum_goes_on_in_the_middle_with_other_ranks(with_faults, processor, tmp_path):
    write_shard(tmp_path / "b.tar", [good(f"b{index}") for index in range(3)])

    def make(rank, size, exchange=None):
        sources = open_sources([(str(tmp_path / "b.tar"), 5), (str(with_faults), 0)], "data.train")
        return PromptLoader(
            sources, processor, DataConfig(shuffle_buffer=4), dp_rank=rank, dp_size=size, seed=0, exchange=exchange
        )

    straight = make(0, 1)
    keys = [prompt.sample.key for prompt in straight.take(12)]
    for stop in (1, 4, 5, 6):
        stream = make(0, 1)
        stream.take(stop)
        ranks = Ranks(with_faults, processor, 2)
        exchanges = [functools.partial(ranks.exchange, rank) for rank in range(2)]
        ranks.loaders = [make(rank, 2, exchange) for rank, exchange in enumerate(exchanges)]
        for loaded in ranks.loaders:
            loaded.restore(stream.state())
        assert ranks.keys(12 - stop) == keys[stop:]


def test_shards_of_one_name_in_two_folders_are_told_apart(processor, tmp_path):
    """Index the shards like make_shards.py."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "shard-000000.tar", [good("0"), good("1", target_boxes=[[0, 0, 99, 9]])])
    stream = loader(tmp_path / "*" / "shard-*.tar", processor)
    stream.take(4)
    assert set(stream.quarantined) == {"one/shard-000000.tar/1", "two/shard-000000.tar/1"}
    assert stream.quarantined_by_reason == {"target_box": 2}


def test_any_batch_any_number_of_ranks_in_batches_of_similar_length(processor, tmp_path):
    """The shards have an index and a sample each with a fault that only decoding finds; epochs end inside batches."""
    for shard in range(3):
        write_members(
            tmp_path / f"s-{shard}.tar",
            [
                (f"k{shard}{number}.{suffix}", data)
                for number in range(9)
                for suffix, data in (
                    ("png", picture(28 * ((5 * number + shard) % 9 + 1), 28)[: 60 if number == shard else None]),
                    ("json", text()),
                )
            ],
        )
        index_shard(str(tmp_path / f"s-{shard}.tar"), processor)
    settings = {"group_by_length": True, "shuffle_buffer": 7}
    straight, per_batch, states = loader(tmp_path / "s-*.tar", processor, **settings), [], []
    assert all(order.batch_size == 6 for order in straight._orders), "batches are of similar length"
    for _ in range(9):  # 24 usable samples, batches of 6: two epochs and a little
        states.append(json.loads(json.dumps(straight.state())))
        per_batch.append([prompt.sample.key for prompt in straight.take(6)])
    assert straight.quarantined_by_reason == {"broken_image": 3} and straight.position.epoch == 2
    seen = [key for batch in per_batch[:8] for key in batch]
    assert len(set(seen)) == 24 and set(Counter(seen).values()) == {2}
    for stop, state in enumerate(states):
        for size in (1, 2, 3):
            ranks = Ranks(tmp_path / "s-*.tar", processor, size, **settings)
            for stream in ranks.loaders:
                stream.restore(state)
            for batch in per_batch[stop : stop + 3]:
                assert ranks.keys(6) == batch


def test_other_shards_than_the_checkpoints_are_refused(with_faults, processor, tmp_path):
    state = loader(with_faults, processor).state()
    write_shard(tmp_path / "a.tar", [good("s0")])
    with pytest.raises(DataError, match="data.train.* are not those of the checkpoint"):
        loader(tmp_path / "a.tar", processor).restore(state)
    with pytest.raises(DataError, match="older version"):
        loader(with_faults, processor).restore({"dp_size": 1, "source": 0, "epoch": 0, "entries_read": 3})


@pytest.mark.parametrize("workers, ahead", [(0, 0), (3, 1), (3, 64)])
def test_decoding_ahead_changes_nothing(with_faults, processor, workers, ahead):
    plain = loader(with_faults, processor, decode_workers=0)
    stream = loader(with_faults, processor, decode_workers=workers, decode_ahead=ahead)
    for count in (5, 5, 9, 1, 5):
        wanted, got = plain.take(count), stream.take(count)
        assert identities(wanted) == identities(got)
        assert len(stream._prefetcher._begun) <= ahead
        for one, other in zip(wanted, got):
            assert torch.equal(one.pixel_values, other.pixel_values) and torch.equal(one.input_ids, other.input_ids)


def test_memory_stays_flat_over_20_epochs(tmp_path, processor):
    write_shard(tmp_path / "a.tar", [(f"s{index}", {"png": picture(280, 280), "json": text()}) for index in range(16)])
    roomy = PromptProcessor(processor.tokenizer.name_or_path, 256)
    stream, held = loader(tmp_path / "a.tar", roomy, decode_ahead=4), []
    for _ in range(20):
        stream.take(16)
        held.append(psutil.Process().memory_info().rss / 2**20)
    print("RSS in MiB after each epoch:", " ".join(f"{value:.0f}" for value in held))
    # an epoch's pixels are 30 MiB: kept ones would show
    assert held[-1] - held[4] < 25


# --- index ------------------------------------------------------------------------------------------------------------


def several_lengths(folder, count=40) -> None:
    """Write samples of 1 to `count` visual tokens, in a mixed order."""
    write_members(
        folder / "a.tar",
        [
            (f"s{number:02d}.{suffix}", data)
            for number in range(count)
            for suffix, data in (("png", picture(28 * ((7 * number) % count + 1), 28)), ("json", text()))
        ],
    )


@pytest.mark.parametrize("family", ["tiny", "qwen3"])
def test_lengths_from_headers_are_those_of_the_prompt(material, family):
    processor = PromptProcessor(str(material[family]), 4096)
    frames = {f"frames/{number}.png": picture(64, 48) for number in range(5)}
    samples = [
        {"png": picture(300, 41)},
        {"0.jpg": picture(56, 90, "jpg"), "1.png": picture(28, 28)},
        {},
        {"mp4": clip("mp4", 30)},
        {"gif": clip("gif", 9)},
        {"png": picture(), "webm": clip("webm", 25)},
        frames,
    ]
    for members in samples:
        sample = parse_sample({"__key__": "k", "__url__": "s", "json": text(data_type=None, fps=0.5), **members})
        lengths, prompt = processor.lengths(sample), processor(sample)
        assert (lengths.prompt_length, lengths.visual_tokens, lengths.response_length) == (
            len(prompt.input_ids),
            int(prompt.visual_mask.sum()),
            len(prompt.response_ids),
        )
        assert lengths.num_images + lengths.num_videos == len(prompt.grid_thw)
    assert isinstance(sample.videos[0], FramePictures) and sample.videos[0].fps == 0.5


def test_lengths_need_no_pixels(processor):
    stream = io.BytesIO()
    Image.effect_noise((280, 280), 90).convert("RGB").save(stream, "PNG")
    headless = stream.getvalue()[:200]
    sample = parse_sample({"__key__": "k", "__url__": "s", "json": text(), "png": headless})
    assert processor.lengths(sample).visual_tokens == 100
    with pytest.raises(SampleError, match="cannot be decoded"):
        processor(sample)


def test_filters_read_nothing_but_the_index(tmp_path, processor, material, caplog):
    several_lengths(tmp_path)
    index_shard(str(tmp_path / "a.tar"), processor)
    index = open_index(tmp_path / "a.tar")
    assert not index.note and sorted(index.visual_tokens) == list(range(1, 41))
    few = PromptProcessor(str(material["tiny"]), 128, max_visual_tokens=12)
    stream = loader(tmp_path / "a.tar", few)
    assert stream.filtered == {"too_many_visual_tokens": 28} and not stream.quarantined
    assert "28 of 40 samples are left out by their index" in caplog.text
    assert max(int(prompt.visual_mask.sum()) for prompt in stream.take(12)) == 12
    assert stream.position.epoch == 0 and stream.position.offset == 12
    short = PromptProcessor(str(material["tiny"]), int(index.prompt_lengths.min()) + 3)
    stream = loader(tmp_path / "a.tar", short)
    assert stream.filtered == {"prompt_too_long": 36}
    assert {len(prompt.input_ids) for prompt in stream.take(4)} == {short.max_prompt_length - step for step in range(4)}
    # without an index the same samples are found when they are decoded
    index_path(tmp_path / "a.tar").unlink()
    stream = loader(tmp_path / "a.tar", few)
    stream.take(12)
    assert not stream.filtered
    stream.take(1)
    assert stream.quarantined_by_reason == {"too_many_visual_tokens": 28}


def test_ranks_that_found_other_indexes_end_together(tmp_path, processor, material):
    """An index appears after one rank has opened the shards and before another one does."""
    several_lengths(tmp_path, 8)
    few = PromptProcessor(str(material["tiny"]), 128, max_visual_tokens=4)
    ranks = Ranks(tmp_path / "a.tar", few, 2)
    index_shard(str(tmp_path / "a.tar"), few)
    ranks.loaders[1] = loader(tmp_path / "a.tar", few, 1, 2, exchange=lambda value: ranks.exchange(1, value))
    with ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(stream.take, 4) for stream in ranks.loaders]:
            with pytest.raises(DataError, match=r"data.train: rank 1 found other samples.*index of '.*a.tar'"):
                ended.result()


def test_an_index_made_for_a_run_is_believed_by_it(tmp_path, material, caplog):
    from megatron_ral.commands.shards import index as main
    from megatron_ral.config import load_config

    several_lengths(tmp_path, 6)
    run = "pretrained_configs/runs/ral_7b.yaml"
    suffix = load_config(run, ["model.path=unused"]).data.prompt_suffix
    assert suffix
    like_the_run = PromptProcessor(str(material["tiny"]), 256, prompt_suffix=suffix)
    for arguments, believed in (["--config", run], True), (["--prompt-suffix", suffix], True), ([], False):
        assert main([str(tmp_path / "a.tar"), "--model", str(material["tiny"]), *arguments]) == 0
        caplog.clear()
        assert len(loader(tmp_path / "a.tar", like_the_run).take(2)) == 2
        assert ("data.prompt_suffix" in caplog.text) != believed


@pytest.mark.parametrize(
    "change, said",
    [
        ("missing", "the index of 1 of 1 shards is missing"),
        ("stale", "is stale"),
        ("cut", "is unreadable"),
        ("foreign", "made with another tokenizer, image processor or data.prompt_suffix"),
    ],
)
def test_an_index_that_does_not_fit_is_not_believed(tmp_path, processor, material, caplog, change, said):
    several_lengths(tmp_path, 6)
    shard = tmp_path / "a.tar"
    index_shard(str(shard), processor if change != "foreign" else PromptProcessor(str(material["qwen3"]), 128))
    if change == "missing":
        index_path(shard).unlink()
    elif change == "stale":
        with tarfile.open(shard, "a") as archive:
            info = tarfile.TarInfo("later.json")
            archive.addfile(info, io.BytesIO(b""))
            for number in range(30):  # an archive grows in blocks of 20
                archive.addfile(tarfile.TarInfo(f"later.{number}.txt"))
    elif change == "cut":
        content = index_path(shard).read_text()
        index_path(shard).write_text(content[: len(content) - 40])
    limited = PromptProcessor(str(material["tiny"]), 128, max_visual_tokens=3)
    stream = loader(shard, limited, group_by_length=True)
    assert caplog.text.count(said) == 1 and "group_by_length has no effect" in caplog.text
    assert not stream.filtered
    assert sorted(int(prompt.visual_mask.sum()) for prompt in stream.take(3)) == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"key": 7},
        {"key": None},
        {"offset": -1},
        {"offset": 10**30},
        {"offset": 1.5},
        {"size": 2**40},
        {"size": "9"},
        {"prompt_length": 10**30},
        {"visual_tokens": 2**40},
        {"visual_tokens": "12"},
        {"reason": "none of ours", "text": "t"},
        {"reason": {}, "text": "t"},
        {"reason": "truncated", "text": 5},
    ],
)
def test_an_index_with_impossible_values_is_not_believed(tmp_path, processor, change):
    write_shard(tmp_path / "a.tar", [good("s0"), good("s1")])
    index_shard(str(tmp_path / "a.tar"), processor)
    assert not open_index(tmp_path / "a.tar").note
    head, first, second = index_path(tmp_path / "a.tar").read_text().splitlines()
    index_path(tmp_path / "a.tar").write_text("\n".join([head, first, json.dumps({**json.loads(second), **change})]))
    index = open_index(tmp_path / "a.tar")
    assert index.note == "unreadable" and index.keys == ("s0", "s1")
    for content in ("[" * 100000, "1" * 5000, "[]", ""):
        index_path(tmp_path / "a.tar").write_text(content)
        assert open_index(tmp_path / "a.tar").note == "unreadable"


def test_an_index_of_another_archive_of_the_same_size_is_noticed(tmp_path, processor):
    write_shard(tmp_path / "a.tar", [good("s0"), good("s1")])
    index_shard(str(tmp_path / "a.tar"), processor)
    write_shard(tmp_path / "a.tar", [good("s0"), good("t1")])
    stream = loader(tmp_path / "a.tar", processor)
    assert [prompt.sample.key for prompt in stream.take(2)] == ["s0", "s0"]
    assert "has sample 't1' in its place" in stream.quarantined["a.tar/s1"]


def test_members_by_their_place_are_those_of_the_file(tmp_path):
    """Long names and names that are no ASCII have headers of their own before them."""
    names = ["plain", "x" * 180, "größe", "folder/inside"]
    write_members(
        tmp_path / "a.tar",
        [(f"{name}.{suffix}", f"{name} {suffix}".encode()) for name in names for suffix in ("json", "txt")],
    )
    index = open_index(tmp_path / "a.tar")
    assert list(index.keys) == names and not index.damage
    for number in (3, 0, 2, 1):
        entry = read_entry(index, number)
        assert entry["json"] == f"{names[number]} json".encode() and entry["txt"] == f"{names[number]} txt".encode()
    assert scan_archive(tmp_path / "a.tar").num_bytes == (tmp_path / "a.tar").stat().st_size


# --- similar lengths --------------------------------------------------------------------------------------------------


def padding(stream, batches, size) -> tuple[int, list[str]]:
    wasted, seen = 0, []
    for _ in range(batches):
        prompts = stream.take(size)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        wasted += sum(max(lengths) - length for length in lengths)
        seen += identities(prompts)
    return wasted, seen


def test_batches_of_similar_length_waste_less(tmp_path, processor):
    several_lengths(tmp_path)
    index_shard(str(tmp_path / "a.tar"), processor)
    mixed, seen_mixed = padding(loader(tmp_path / "a.tar", processor, shuffle_buffer=40), 7, 6)
    alike, seen = padding(loader(tmp_path / "a.tar", processor, shuffle_buffer=40, group_by_length=True), 7, 6)
    assert sorted(seen[:40]) == sorted(seen_mixed[:40]) == sorted(set(seen))
    assert alike * 3 < mixed
    ranks = Ranks(tmp_path / "a.tar", processor, 3, shuffle_buffer=40, group_by_length=True)
    assert [f"a.tar/{key}" for _ in range(7) for key in ranks.keys(6)] == seen


def test_order_has_every_sample_once_from_any_offset():
    import numpy as np

    rng = np.random.default_rng(0)
    numbers = [np.arange(count) for count in (7, 0, 13, 5)]
    lengths = [rng.integers(100, size=len(part)) for part in numbers]
    for batch_size in (0, 4):
        order = EpochOrder(numbers, seed=3, shuffle=True, window=6, lengths=lengths, batch_size=batch_size)
        epochs = [order.at(epoch, 0, 100) for epoch in range(3)]
        assert epochs[0] != epochs[1] != epochs[2]
        for epoch, whole in enumerate(epochs):
            assert sorted(whole) == [(shard, number) for shard, part in enumerate(numbers) for number in part]
            fresh = EpochOrder(numbers, seed=3, shuffle=True, window=6, lengths=lengths, batch_size=batch_size)
            for offset in range(26):
                assert fresh.at(epoch, offset, 3) == whole[offset : offset + 3]


def test_batches_stay_whole_after_an_epoch_that_ends_inside_one():
    import numpy as np

    order = EpochOrder(
        [np.arange(10)], seed=1, shuffle=True, window=100, lengths=[np.arange(10)], batch_size=4, phase=1
    )
    stream = [None] + [
        place for epoch in range(4) for place in order.at(epoch, 0, 10)
    ]  # one sample of another source before
    inside = [stream[start : start + 4] for start in range(0, 40, 4) if (start - 1) % 10 <= 6 and start]
    assert len(inside) == 6
    for batch in inside:
        numbers = sorted(number for _, number in batch)
        assert numbers == list(range(numbers[0], numbers[0] + 4)), "neighbours by length"
