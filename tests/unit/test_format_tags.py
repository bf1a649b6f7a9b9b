"""Tags of the format as tokens or as text, and a template that writes the first of them: one answer everywhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_ral.config.sections import RewardConfig
from megatron_ral.data.format_tags import export_tokenizer
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.rewards.answer import format_reward
from megatron_ral.rollout.scoring import answer_tokens, score_responses
from megatron_ral.types import ResponseBatch, Sample, pad_prompts
from tests.unit.test_data import png

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THINKING = "{{- '<|im_start|>assistant\\n' -}}", "{{- '<|im_start|>assistant\\n<think>\\n' -}}"


def change_tokens(folder: Path, kept: int = 4, special: bool = False, listed: str = "") -> None:
    """Leave the first tags as added tokens, make them special, and name them in a list of the configuration."""
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] not in TAGS[kept:]]
    for token in rules["added_tokens"]:
        if token["content"] in TAGS:
            token["special"] = special
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    if listed:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config[listed] = [*config.pop("extra_special_tokens"), *TAGS[:kept]]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def think(folder: Path, old: str = THINKING[0], new: str = THINKING[1]) -> None:
    """Let the chat template begin every response with <think>."""
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(text.replace("    " + old, "    " + new))
    assert text != (folder / "chat_template.jinja").read_text()


def like_qwen(folder: Path, **tokens) -> None:
    """Write the tokenizer as version 4 of transformers did for Qwen: one file per part, and a class of its own."""
    change_tokens(folder, **tokens)
    rules = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in rules["added_tokens"]
    }
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(rules["model"]["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {token["content"]: token["id"] for token in rules["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def both(*changes):
    def change(folder):
        for each in changes:
            each(folder)

    return change


# Change of a folder with four ordinary tags, model.format_tags, form of the tags, whether the tokenizer is edited.
TOKENIZERS = {
    "four ordinary tokens": (lambda folder: None, "auto", "token", False),
    "four ordinary tokens, as text": (lambda folder: None, "text", "text", True),
    "two ordinary tokens": (lambda folder: change_tokens(folder, 2), "auto", "text", True),
    "two ordinary tokens, as tokens": (lambda folder: change_tokens(folder, 2), "token", "token", False),
    "one ordinary token": (lambda folder: change_tokens(folder, 1), "auto", "text", True),
    "no tokens": (lambda folder: change_tokens(folder, 0), "auto", "text", False),
    "four special tokens": (lambda folder: change_tokens(folder, 4, True), "auto", "text", True),
    "four special tokens, as tokens": (lambda folder: change_tokens(folder, 4, True), "token", "token", True),
    "two special tokens": (lambda folder: change_tokens(folder, 2, True), "auto", "text", True),
    "special by the list alone": (
        lambda folder: change_tokens(folder, 2, False, "extra_special_tokens"),
        "auto",
        "text",
        True,
    ),
    "special by an old list": (
        lambda folder: change_tokens(folder, 4, True, "additional_special_tokens"),
        "auto",
        "text",
        True,
    ),
    "two tokens of a thinking model": (both(lambda folder: change_tokens(folder, 2), think), "auto", "token", False),
    "special tokens of a thinking model": (
        both(lambda folder: change_tokens(folder, 2, True), think),
        "auto",
        "token",
        True,
    ),
    "files of version 4": (lambda folder: like_qwen(folder, kept=2), "auto", "text", True),
    "special tokens in files of version 4": (
        lambda folder: like_qwen(folder, kept=4, special=True),
        "auto",
        "text",
        True,
    ),
}


def sample(process="<think>\nThe red one is a 7.</think>\n", problem="Which <think> is red?") -> Sample:
    return Sample("s", "a.tar", problem, "<answer>7</answer>", process, "", (png(),), ())


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tags_are_read_and_written_alike_here_and_by_stock(material, tmp_path, kind):
    change, choice, form, edited = TOKENIZERS[kind]
    model = Path(shutil.copytree(material["tiny"], tmp_path / "model"))
    change(model)
    before = AutoTokenizer.from_pretrained(model)
    single = [tag for tag in TAGS if tag in before.get_vocab()] if form == "token" else []
    processor = PromptProcessor(str(model), 256, format_tags=choice)
    assert processor.format_tags == form
    for tag in TAGS:
        assert (len(processor.tokenizer.encode(tag)) == 1) == (tag in single), tag

    prompt = processor(sample())
    response = "<think>\nThe red one is a 7.</think>\n<answer>7</answer>"
    assert processor.decode(prompt.response_ids) == response and format_reward(response) == 1.0
    assert processor.lengths(sample()).response_length == len(prompt.response_ids)

    exported = Path(shutil.copytree(model, tmp_path / "exported"))
    export_tokenizer(model, exported, choice)
    stock = AutoTokenizer.from_pretrained(exported)
    text = f"Which <think> is red?{response}<|im_end|>"
    assert stock.encode(text) == processor.tokenizer.encode(text)
    assert stock.decode(stock.encode(text), skip_special_tokens=True) == text.removesuffix("<|im_end|>")
    assert not set(stock.all_special_tokens) & set(TAGS)
    others = {token: number for token, number in before.get_vocab().items() if token not in TAGS}
    assert others.items() <= stock.get_vocab().items() and len(stock) == len(before)
    again = PromptProcessor(str(exported), 256, format_tags="auto" if choice == "auto" else form)
    assert torch.equal(again(sample()).response_ids, prompt.response_ids)
    if not edited:
        assert {path.name: path.read_bytes() for path in exported.iterdir()} == {
            path.name: path.read_bytes() for path in model.iterdir()
        }


@pytest.fixture
def thinking(material, tmp_path) -> PromptProcessor:
    model = Path(shutil.copytree(material["tiny"], tmp_path / "model"))
    think(model)
    return PromptProcessor(str(model), 256)


@pytest.mark.parametrize(
    "process, written",
    [
        ("<think>\nIt is red.</think>\n", "It is red.</think>\n<answer>7</answer>"),
        ("<think>It is red.</think>", "It is red.</think><answer>7</answer>"),
        ("\n<think>\n\nIt is red.</think>", "\nIt is red.</think><answer>7</answer>"),
        ("", "\n</think>\n\n<answer>7</answer>"),
    ],
)
def test_a_prefilled_tag_is_taught_once_and_counts(thinking, process, written):
    assert thinking.response_prefix == "<think>\n"
    prompt = thinking(sample(process, "Which is red?"))
    taught = thinking.tokenizer.decode(torch.cat([prompt.input_ids, prompt.response_ids]))
    assert taught.endswith(f"assistant\n<think>\n{written}<|im_end|>") and taught.count("<think>") == 1
    assert thinking.lengths(sample(process, "Which is red?")).response_length == len(prompt.response_ids)
    assert thinking.decode(prompt.response_ids) == f"<think>\n{written}"

    length = len(prompt.response_ids)
    responses = ResponseBatch(
        pad_prompts([prompt], 0),
        prompt.response_ids[None, None],
        torch.tensor([[length]]),
        torch.zeros(1, 1, length),
        torch.tensor([[True]]),
    )
    score = score_responses(responses, thinking, RewardConfig())
    assert score.components["format"].item() == score.components["accuracy"].item() == 1.0
    [[place]] = answer_tokens(responses, score.texts, thinking).tolist()
    assert thinking.tokenizer.decode([prompt.response_ids[place]]) == "7"


def test_a_format_without_thought_is_refused_where_the_template_begins_one(thinking, material, tmp_path):
    from megatron_ral.config import load_config
    from megatron_ral.errors import ConfigError
    from tests.integration.cases import SFT, write_config

    path, overrides = write_config(tmp_path, SFT, tmp_path / "model", material["data"])
    assert PromptProcessor.from_config(load_config(path, overrides)).response_prefix == "<think>\n"
    with pytest.raises(ConfigError) as caught:
        PromptProcessor.from_config(load_config(path, [*overrides, "reward.require_think=false"]))
    assert str(caught.value) == (
        "reward.require_think = false asks for responses without a thought, but the chat template of "
        f"'{tmp_path}/model' begins each with <think>; take true, or a template that does not"
    )
