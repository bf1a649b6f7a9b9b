"""Tags of the format that the tokenizer has as tokens which the model was never trained on (Qwen3-VL-Instruct)."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from megatron_ral.data.processor import PromptProcessor
from megatron_ral.data.shards import parse_sample, shard_entries
from megatron_ral.rewards.answer import format_reward
from tests.conftest import PROJECT
from tests.faults.launch import run_command
from tests.integration.cases import RL, SFT, SHORT_SFT, write_config

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SHORT = [
    *SHORT_SFT,
    "logging.eval_interval=0",
    "rollout.max_response_length=96",
]


def instruct_folder(source: Path, target: Path) -> Path:
    """A model folder whose tokenizer has the tags of a thought alone as tokens, like that of Qwen3-VL-Instruct."""
    shutil.copytree(source, target)
    rules = json.loads((target / "tokenizer.json").read_text())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] not in TAGS[2:]]
    (target / "tokenizer.json").write_text(json.dumps(rules))
    return target


def run(module: str, *arguments: object) -> tuple[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = run_command(module, *map(str, arguments), environment=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_a_model_that_never_saw_the_tokens_learns_the_format_and_stock_agrees(material, tmp_path):
    model = instruct_folder(material["root"] / "tiny", tmp_path / "model")
    path, overrides = write_config(tmp_path, SFT, model, material["data"])
    run("megatron_ral.train", "--config", path, *overrides, *SHORT, f"train.output_dir={tmp_path}/run")
    exported = tmp_path / "run" / "hf"
    arguments = ["--config", path, *overrides, "rollout.max_response_length=96", "--model", exported]
    run("megatron_ral.evaluate", *arguments, "--output", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["format_rate"] == 1.0 and result["num_prompts"] > 0

    tokenizer, stock = AutoTokenizer.from_pretrained(exported), AutoModelForImageTextToText.from_pretrained(exported)
    processor = PromptProcessor(str(exported), 128)
    lines = [json.loads(line) for line in (tmp_path / "result.jsonl").read_text().splitlines()]
    samples = {
        entry["__key__"]: entry for entry in shard_entries(sorted(map(str, material["data"].glob("heldout-*.tar"))))
    }
    for line in lines[:4]:
        prompt = processor(parse_sample(samples[line["key"]]))
        with torch.no_grad():
            inputs = processor.stock_inputs(prompt, prompt.input_ids)
            tokens = stock.generate(**inputs, max_new_tokens=96, do_sample=False)[0, len(prompt.input_ids) :]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert text == line["greedy"]["text"] and format_reward(text) == 1.0
    for tag in TAGS:
        assert len(tokenizer.encode(tag, add_special_tokens=False)) > 1


def test_a_first_rollout_without_the_format_is_said(material, tmp_path):
    model = instruct_folder(material["root"] / "tiny", tmp_path / "model")
    path, overrides = write_config(tmp_path, RL, model, material["data"], "rl")
    quiet = ["logging.eval_interval=0", "logging.probe_interval=0", "logging.completions_interval=0"]
    one_step = ["train.num_steps=1", "train.export=false", "train.checkpoint_interval=0"]
    _, log = run(
        "megatron_ral.train", "--config", path, *overrides, *quiet, *one_step, f"train.output_dir={tmp_path}/run"
    )
    [line] = [line for line in log.splitlines() if "no response of the first rollout has the rewarded format" in line]
    assert "step 1: " in line and "its tags are read and written as text (model.format_tags)" in line
