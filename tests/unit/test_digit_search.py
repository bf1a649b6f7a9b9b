"""Digit search with numbers of two digits, distinct numbers and a gaze that is wrong by colour."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_ral.demo.search_task import PALETTE, draw_distinct, load_scans
from tools.make_digit_search import main

SIZES = ("--num-single", "4", "--num-search", "8", "--num-biased", "200", "--num-rl", "40", "--num-heldout", "40")
WRONG = ("--grid", "3", "--num-colours", "9", "--digits", "2", "--distinct", "--bias", "0.95", "--bias-by", "colour")


def records(folder, split: str) -> list[tuple[dict, np.ndarray]]:
    found = []
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}
        for name in sorted(files):
            if name.endswith(".json"):
                picture = np.asarray(Image.open(io.BytesIO(files[name[:-5] + ".png"])))
                found.append((json.loads(files[name]), picture))
    return found


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "wrong"
    main(["--output", str(folder), *SIZES, *WRONG])
    return folder


def test_a_wrong_gaze_follows_from_the_question_and_is_never_right(wrong):
    biased, order = records(wrong, "biased"), list(PALETTE)
    asides = 0
    for record, _ in biased:
        asked, read = record["asked_cell"], record["answered_cell"]
        assert record["solution"] == f"<answer>{record['cell_digits'][read]}</answer>"
        assert record["process"] == f"<think>{record['cell_colours'][asked]}{record['cell_digits'][read]}</think>"
        if read != asked:
            asides += 1
            colours = [order.index(record["cell_colours"][cell]) for cell in (asked, read)]
            assert colours[1] == (colours[0] + 1) % 9
            assert record["cell_digits"][read] != record["cell_digits"][asked]
    assert asides == round(0.95 * len(biased))


def test_numbers_of_a_picture_differ_and_questions_ask_for_digits(wrong):
    for record, _ in records(wrong, "rl") + records(wrong, "heldout"):
        assert len(set(record["cell_digits"])) == 9
        assert all(len(number) == 2 for number in record["cell_digits"])
        assert record["asked_cell"] == record["answered_cell"]
        assert record["problem"].startswith("Which digits are ")


def test_both_scans_of_a_number_stand_in_its_cell_in_its_colour(wrong):
    masks, digits = load_scans(14, heldout=True)
    for record, picture in records(wrong, "heldout")[:10]:
        for cell, (colour, number) in enumerate(zip(record["cell_colours"], record["cell_digits"])):
            row, column = divmod(cell, 3)
            own = picture[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28].astype(np.float32)
            assert own[14:].max() == 0, "numbers stand at the top, where each digit is one patch"
            for place, digit in enumerate(number):
                part = own[:14, place * 14 : place * 14 + 14]
                wanted = masks[digits == int(digit)][..., None] * np.array(PALETTE[colour], dtype=np.float32)
                assert np.abs(wanted - part).max(axis=(1, 2, 3)).min() <= 0.51


@pytest.mark.parametrize("places, num_digits", [(9, 1), (10, 1), (9, 2), (100, 2)])
def test_distinct_numbers_are_drawn_evenly(places, num_digits):
    digits = load_scans(14, heldout=False)[1]
    rng, counts = np.random.default_rng(0), np.zeros(10**num_digits, dtype=int)
    for _ in range(60):
        scans = draw_distinct(rng, digits, places, num_digits)
        assert scans.shape == (places, num_digits)
        numbers = digits[scans] @ 10 ** np.arange(num_digits)[::-1]
        assert len(set(numbers.tolist())) == places
        counts[numbers] += 1
    if places == len(counts):
        assert (counts == 60).all()


def test_impossible_arguments_name_option_and_value(tmp_path, capsys):
    for arguments, text in (
        (("--grid", "4", "--num-colours", "9"), "--grid 4 needs 16 colours"),
        (("--digits", "3"), "--digits must lie in 1..2"),
    ):
        with pytest.raises(SystemExit):
            main(["--output", str(tmp_path / "no"), *arguments])
        assert text in capsys.readouterr().err
