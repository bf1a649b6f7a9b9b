"""What a run is watched by: FLOPs from the shape, flat settings, and the page of attention by token."""

import base64
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from megatron_ral.commands import attention
from megatron_ral.config.distill import TeacherConfig
from megatron_ral.config.loss import LossConfig
from megatron_ral.config.sections import TrainConfig
from megatron_ral.config.watching import LoggingConfig
from megatron_ral.models.flops import group_flops, tower_flops_per_patch
from megatron_ral.models.shape import read_shape
from megatron_ral.training.logging.dashboard import hyperparameters, method
from megatron_ral.training.logging.throughput import known_peak_tflops
from tests.distributed.cases import make_config

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("name, parameters", [("qwen2.5-vl-7b", 7.07e9), ("qwen2.5-vl-72b", 71.46e9)])
def test_flops_of_published_sizes(name, parameters):
    """PaLM's 2 N per token with the matrices of all layers and the LM head, plus attention by hand."""
    shape = read_shape(str(PROJECT / "pretrained_configs" / "models" / name))
    P, R, G = 2048, 256, 8
    query = shape.num_attention_heads * shape.kv_channels
    attention = 4 * query * shape.num_layers * (P * (P + 1) / 2 + G * (R * P + R * (R + 1) / 2))
    head = 2 * shape.hidden_size * shape.vocab_size
    linear = group_flops(shape, P, [R] * G) - attention - head * G * R
    assert linear / (P + G * R) / 2 + head / 2 == pytest.approx(parameters, rel=0.01)
    # the group layout does the prompt once
    apart = G * group_flops(shape, P, [R])
    assert 3 < apart / group_flops(shape, P, [R] * G) < 6


def test_flops_against_a_counter(material):
    """Stock transformers under torch's own counter: all T x T pairs and all rows of the LM head, so those are put right."""
    shape, T = read_shape(str(material["untied"])), 24
    model = AutoModelForImageTextToText.from_pretrained(material["untied"], attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 300, (1, T)))
    query = shape.num_attention_heads * shape.kv_channels
    seen = group_flops(shape, T, []) + 2 * shape.hidden_size * shape.vocab_size * T
    whole = seen + 4 * query * shape.num_layers * (T * T - T * (T + 1) / 2)
    rotary = counter.get_total_flops() - whole  # positions x frequencies as a small product
    assert 0 <= rotary < 0.002 * whole


@pytest.mark.parametrize("kind", ["tiny", "qwen3"])
def test_flops_of_the_tower_against_a_counter(material, kind):
    shape = read_shape(str(material[kind]))
    tower = AutoModelForImageTextToText.from_pretrained(material[kind], attn_implementation="eager").eval().model.visual
    patches = 16
    pixels = torch.randn(patches, 3 * shape.vision.temporal_patch_size * shape.vision.patch_size**2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(pixels, grid_thw=torch.tensor([[1, 4, 4]]))
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(count for operation, count in counts.items() if "bmm" not in str(operation))  # bmm: its attention
    assert tower_flops_per_patch(shape) * patches == pytest.approx(matrices, rel=1e-3)


def test_peaks():
    assert known_peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.0
    assert known_peak_tflops("NVIDIA H100 PCIe", "bfloat16") == 756.0
    assert known_peak_tflops("NVIDIA A100-SXM4-80GB", "float32") == 0.0 == known_peak_tflops("a card", "bfloat16")


def test_settings_are_flat_and_runs_have_a_method():
    config = make_config("m")
    flat = hyperparameters(config)
    assert (
        flat["_method"] == "ral" and flat["data.train.0.shards"] == "unused" and flat["loss.attention_layers"] == "-1"
    )
    assert flat["loss.attention_coef"] == 2.0 and flat["logging.tensorboard"] is True and flat["reward.functions"] == ""
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())
    grpo = replace(config, loss=LossConfig(attention_coef=0.0))
    assert method(grpo) == "grpo" and hyperparameters(grpo).keys() == flat.keys()
    assert method(replace(config, loss=LossConfig(attention_coef=0.0, policy_loss="gspo"))) == "gspo"
    assert method(replace(config, train=TrainConfig(algorithm="sft"))) == "sft"
    assert method(replace(grpo, teacher=TeacherConfig(path="t"))) == "distill"
    assert LoggingConfig().peak_tflops == 0.0


class _Page(HTMLParser):
    """Sections with what is in them."""

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
                (int(attributes["data-first"]), int(attributes["width"]), int(attributes["height"]))
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
    """Read back as a reader would: a section per sample, a cell per token, masses that sum to the visual mass."""
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
            0 <= first and first + width * height <= data["visual"] for first, width, height in section["canvas"]
        )
        for layer, part in data["layers"].items():
            rows = np.frombuffer(base64.b64decode(part["rows"]), "<u2").reshape(len(sample.tokens), data["visual"])
            masses = rows * np.array(part["peaks"])[:, None] / 65535
            assert masses.sum(axis=1) == pytest.approx(sample.visual_mass(int(layer)), rel=1e-3)
            assert (0 < masses.sum(axis=1)).all() and (masses.sum(axis=1) < 1).all()
            assert masses[:, data["target"]].sum(axis=1) == pytest.approx(sample.target_mass(int(layer)), rel=1e-3)
    assert not math.isclose(samples[0].visual_mass(1).mean(), samples[0].visual_mass(3).mean(), rel_tol=1e-3)


def test_page_refuses_what_it_cannot_use(material, tmp_path, capsys):
    tiny, shards = str(material["tiny"]), f"{material['data']}/heldout-*.tar"
    for arguments, said in (
        ([tiny, f"{tmp_path}/*.tar"], "SHARDS"),
        ([tiny, shards, "--layers", "9"], "--layers names layer 9"),
        ([str(tmp_path), shards], "CHECKPOINT = "),
        ([tiny, shards, "rollout.nonsense=1"], "not a known setting"),
    ):
        assert attention.main([*arguments, "--output", str(tmp_path / "x.html")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
