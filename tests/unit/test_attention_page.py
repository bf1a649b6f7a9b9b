"""The page of attention by token, as `megatron-ral attention` writes it."""

import base64
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_ral.commands import attention


class _Page(HTMLParser):
    """Parser of the page: its sections with their contents."""

    def __init__(self):
        super().__init__()
        self.sections, self.scripts, self.sources, self.open, self.into = [], [], [], [], None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        kind = attributes.get("class", "")
        self.sources += [value for name, value in attributes.items() if name in ("src", "href")]
        if tag == "section":
            self.sections.append(
                {
                    "token": [],
                    "masses": "",
                    "target": 0,
                    "img": 0,
                    "canvas": [],
                    "tokens-by-layer": 0,
                    "question": "",
                    "reference": "",
                    "completion": "",
                    "option": [],
                }
            )
        self.into = None
        if self.sections and tag in ("img",):
            self.sections[-1]["img"] += 1
        elif self.sections and tag == "canvas":
            self.sections[-1]["canvas"].append(
                (attributes["data-cells"].split(), int(attributes["width"]), int(attributes["height"]))
            )
        elif self.sections and kind in ("target", "tokens-by-layer"):
            self.sections[-1][kind] += 1
        elif self.sections and (kind in ("token", "masses", "question", "reference", "completion") or tag == "option"):
            self.into = "option" if tag == "option" else kind
            if isinstance(self.sections[-1][self.into], list):
                self.sections[-1][self.into].append("")

    def handle_endtag(self, tag):
        self.into = None

    def handle_data(self, data):
        if self.into:
            held = self.sections[-1][self.into]
            if isinstance(held, list):
                held[-1] += data
            else:
                self.sections[-1][self.into] += data


@pytest.mark.parametrize("kind, panels, boxes", [("data", 1, 1), ("clips", 8, 2)])
def test_page_of_attention_by_token(material, clips, tmp_path, capsys, kind, panels, boxes):
    """The page has a section per sample and a cell per token, and its masses sum to the visual mass."""
    shards = f"{material['data'] if kind == 'data' else clips}/heldout-*.tar"
    output, made = tmp_path / "report.html", []
    make = attention.make_samples
    attention.make_samples = lambda arguments: made.append(make(arguments)) or made[0]  # to compare with
    try:
        assert (
            attention.main(
                [
                    str(material["tiny"]),
                    shards,
                    "--num-samples",
                    "3",
                    "--layers",
                    "-1",
                    "1",
                    "--output",
                    str(output),
                    "rollout.max_response_length=6",
                ]
            )
            == 0
        )
    finally:
        attention.make_samples = make
    (samples, layers), text = made[0], output.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert sorted(layers) == [1, 3] and len(page.sections) == len(samples) == 3
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert "http" not in text.lower().replace("http://www.w3.org", "")
    for section, sample in zip(page.sections, samples):
        assert section["question"] == sample.question and section["completion"] == sample.completion
        assert len(section["token"]) == len(sample.tokens) > 0 and all(section["token"])
        assert section["img"] == len(section["canvas"]) == panels and section["target"] == boxes
        assert section["option"] == ["1", "3"] and section["tokens-by-layer"] == 1
        data = json.loads(section["masses"])
        assert data["target"] == np.flatnonzero(sample.target).tolist() and data["visual"] == len(sample.target)
        assert all(
            len(cells) == width * height and all(0 <= int(cell) < data["visual"] for cell in cells)
            for cells, width, height in section["canvas"]
        )
        for layer, part in data["layers"].items():
            rows = np.frombuffer(base64.b64decode(part["rows"]), "<u2").reshape(len(sample.tokens), data["visual"])
            masses = rows * np.array(part["peaks"])[:, None] / 65535
            assert masses.sum(axis=1) == pytest.approx(sample.visual_mass(int(layer)), rel=1e-3)
            assert (masses.sum(axis=1) > 0).all() and (masses.sum(axis=1) < 1).all()
            assert masses[:, data["target"]].sum(axis=1) == pytest.approx(sample.target_mass(int(layer)), rel=1e-3)
    assert not math.isclose(samples[0].visual_mass(1).mean(), samples[0].visual_mass(3).mean(), rel_tol=1e-3)


def test_page_refuses_what_it_cannot_use(material, tmp_path, capsys):
    tiny, shards = str(material["tiny"]), f"{material['data']}/heldout-*.tar"
    for arguments, said in (
        ([tiny, f"{tmp_path}/*.tar"], "SHARDS"),
        ([tiny, shards, "--layers", "9"], "--layers names layer 9"),
        ([str(tmp_path), shards], "CHECKPOINT = "),
        ([tiny, shards, "rollout.nonsense=1"], "is not a known setting"),
    ):
        assert attention.main([*arguments, "--output", str(tmp_path / "x.html")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
