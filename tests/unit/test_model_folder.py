"""A model folder is tried before it is used: training, evaluation and tools refuse a wrong one in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ral.commands import common, evaluate, shards, train
from megatron_ral.data.processor import PromptProcessor
from megatron_ral.weights import stage_weights
from tests.integration.cases import RL, SFT, write_config

TEMPLATE, WAY_OUT = "chat_template.jinja", "; copy chat_template.jinja from the model that the folder was made from"
HEAD, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
PARTS = (
    "{%- for part in messages[0]['content'] -%}"
    "{{- {'image': IMAGE, 'video': VIDEO, 'text': TEXT}[part['type']] -}}"
    "{%- endfor -%}"
)


def template(
    image="'<|vision_start|><|image_pad|><|vision_end|>'",
    video="'<|vision_start|><|video_pad|><|vision_end|>'",
    text="WORDS",
    end=END,
) -> str:
    """A chat template of parts: Jinja expressions for each kind of part, and the text behind the question."""
    text = text.replace("WORDS", "part.get('text', '')")
    return HEAD + PARTS.replace("IMAGE", image).replace("VIDEO", video).replace("TEXT", text) + end


def write(content: str):
    return lambda folder: (folder / TEMPLATE).write_text(content)


def change_json(file, change, remove=None):
    def changed(folder):
        if remove:
            (folder / remove).unlink()
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return changed


def in_other_place(folder, file, **fields):
    text = (folder / TEMPLATE).read_text()
    (folder / TEMPLATE).unlink()
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**known, "chat_template": text, **fields}))


def change_weights(change):
    def changed(folder):
        tensors = load_file(folder / "model.safetensors")
        changed = {name: tensor.contiguous() for name, tensor in change(tensors).items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


NO_TEMPLATE = "holds a tokenizer without a chat template" + WAY_OUT
ASK = "has a chat template that cannot ask a question about an image: it "
BEGINS = "has a chat template that begins every response with "
FOLDERS = {
    "no chat template": (lambda folder: (folder / TEMPLATE).unlink(), NO_TEMPLATE),
    "a template whose content must be a string": (
        write("{{- '<|im_start|>user\\n' + messages[0]['content'] + '<|im_end|>\\n<|im_start|>assistant\\n' -}}"),
        ASK + 'fails on it (TypeError: can only concatenate str (not "list") to str)' + WAY_OUT,
    ),
    "a template that prints the list of parts": (
        write(HEAD + "{{ messages[0]['content'] }}" + END),
        ASK + "writes <|image_pad|> 0 times instead of once" + WAY_OUT,
    ),
    "a template that drops the image": (
        write(template(image="''")),
        ASK + "writes <|image_pad|> 0 times instead of once" + WAY_OUT,
    ),
    "a template that writes the image twice": (
        write(template(image="'<|image_pad|><|image_pad|>'")),
        ASK + "writes <|image_pad|> 2 times instead of once" + WAY_OUT,
    ),
    "a template that drops the video": (
        write(template(video="''")),
        "cannot ask a question about a video: it writes <|video_pad|> 0 times instead of once" + WAY_OUT,
    ),
    "a template that refuses parts": (
        write("{{ raise_exception('Only text is supported') }}"),
        ASK + "fails on it (TemplateError: Only text is supported)" + WAY_OUT,
    ),
    "a template that is cut off": (
        write("{%- for message in messages -%}{{ message['role'] }}"),
        ASK + "fails on it (TemplateSyntaxError: ",
    ),
    "a template that drops the question": (
        write(template(text="''")),
        ASK + "writes the question 0 times instead of once" + WAY_OUT,
    ),
    "a template that changes the question": (
        write(template(text="WORDS | lower")),
        ASK + "writes the question 0 times instead of once" + WAY_OUT,
    ),
    "a template that repeats the question": (
        write(template(text="WORDS + WORDS")),
        ASK + "writes the question 2 times instead of once" + WAY_OUT,
    ),
    "a template that does not end the turn": (
        write(template(end="\nAnswer:")),
        ASK + "does not end the question with <|im_end|>" + WAY_OUT,
    ),
    "a template without a generation prompt": (
        write(template(end="<|im_end|>\n")),
        ASK + "writes no generation prompt behind it (the head of the assistant's turn)" + WAY_OUT,
    ),
    "a template that prefills an empty thought": (
        write(template(end=END + "<think>\n\n</think>\n\n")),
        BEGINS + "'<think>\\n\\n</think>\\n'; only '<think>' can be prefilled, so take a template (or the default of "
        "an option in it) that leaves the rest to the model",
    ),
    "a template that prefills the answer": (
        write(template(end=END + "<answer>")),
        BEGINS + "'<answer>'; only '<think>' can be prefilled",
    ),
    "a legacy template file that is no JSON": (
        lambda folder: (folder / TEMPLATE).rename(folder / "chat_template.json"),
        "chat_template.json' is not readable",
    ),
    "an image token of another tokenizer": (
        change_json("config.json", lambda content: content.update(image_token_id=7)),
        "has image_token_id = 7 in config.json, which is no added token of its tokenizer (it is '",
    ),
    "an image token beyond the tokenizer": (
        change_json("config.json", lambda content: content.update(image_token_id=500)),
        "has image_token_id = 500 in config.json, which is no added token of its tokenizer (it is None); config and "
        "tokenizer are not of one model",
    ),
    "more tokens than rows": (
        change_json("config.json", lambda content: content["text_config"].update(vocab_size=300)),
        "has tokens up to number 332 in its tokenizer but 300 rows of the embedding in config.json "
        "(text_config.vocab_size); config and tokenizer are not of one model",
    ),
    "an image processor of other patches": (
        change_json("preprocessor_config.json", lambda content: content.update(patch_size=16)),
        "has patch_size = 16 in preprocessor_config.json instead of 14, which config.json has in vision_config",
    ),
    "an image processor that merges other patches": (
        change_json("preprocessor_config.json", lambda content: content.update(merge_size=4)),
        "has merge_size = 4 in preprocessor_config.json instead of 2, which config.json has in vision_config",
    ),
    "an image processor that keeps the range of 8 bits": (
        change_json("preprocessor_config.json", lambda content: content.update(rescale_factor=1)),
        "has rescale_factor = 1 in preprocessor_config.json instead of 0.00392156862745098, the only value that is "
        "known",
    ),
    "an image processor that does not normalize": (
        change_json("preprocessor_config.json", lambda content: content.update(do_normalize=False)),
        "has do_normalize = False in preprocessor_config.json instead of True, the only value that is known",
    ),
    "an image processor that divides by zero": (
        change_json("preprocessor_config.json", lambda content: content.update(image_std=[0, 0, 0])),
        "has image_std = [0, 0, 0] in preprocessor_config.json",
    ),
    "an image processor of another model": (
        change_json(
            "preprocessor_config.json", lambda content: content.update(image_processor_type="CLIPImageProcessor")
        ),
        "names the image processor CLIPImageProcessor in preprocessor_config.json; only Qwen2VLImageProcessor is "
        "known, so copy the file from the model that the folder was made from",
    ),
    "an empty image processor": (
        lambda folder: (folder / "preprocessor_config.json").write_text("{}"),
        "names the image processor none in preprocessor_config.json",
    ),
    "templates without a default": (
        change_json(
            "tokenizer_config.json",
            lambda content: content.update(chat_template=[{"name": "tool_use", "template": template()}]),
            remove=TEMPLATE,
        ),
        "has chat templates named tool_use; name the one for questions 'default'",
    ),
    "a template that writes the date": (
        write("{{- strftime_now('%d %B %Y') -}}" + template()),
        "has a chat template that writes the time (strftime_now), so that a run resumed tomorrow would get other "
        "prompts; write a fixed date into it",
    ),
    "a template without the tokens around an image": (
        write(template(image="'<|image_pad|>'")),
        ASK + "does not write <|image_pad|> between <|vision_start|> and <|vision_end|>" + WAY_OUT,
    ),
    "tokens around an image that changed places": (
        change_json("config.json", lambda content: content.update(vision_start_token_id=325, vision_end_token_id=324)),
        ASK + "does not write <|image_pad|> between <|vision_end|> and <|vision_start|>" + WAY_OUT,
    ),
    "a template that reverses image and video": (
        change_json("config.json", lambda content: content.update(image_token_id=328, video_token_id=327)),
        ASK + "writes <|video_pad|> 0 times instead of once" + WAY_OUT,
    ),
    "padding with a visual token": (
        change_json("tokenizer_config.json", lambda content: content.update(pad_token="<|image_pad|>")),
        "pads with <|image_pad|>, a visual token; name another pad_token",
    ),
    "no image processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "holds no usable tokenizer and image processor",
    ),
    "a tokenizer that is cut short": (
        lambda folder: (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:-100]),
        "holds no usable tokenizer and image processor",
    ),
    "a tokenizer that was not fetched": (
        lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n"),
        "holds Git LFS pointers instead of files (tokenizer.json); fetch them with git lfs pull",
    ),
}
WEIGHTS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no file 'model.safetensors'"),
    "weights that are cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "is not a whole safetensors file",
    ),
    "weights under a prefix": (
        change_weights(lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()}),
        "has 80 of its 80 weights under the prefix 'module.' of a wrapper",
    ),
    "a tied head that differs": (
        change_weights(lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}),
        "holds 'lm_head.weight' with other values than 'model.embed_tokens.weight'",
    ),
    "a missing layer": (
        change_weights(lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.3" not in name}),
        "missing model.layers.3.",
    ),
    "eight bits": (
        change_weights(lambda tensors: {name: tensor.to(torch.float8_e5m2) for name, tensor in tensors.items()}),
        "has type F8_E5M2; known: F32, BF16, F16; give the folder of the unquantized model",
    ),
    "an adapter beside the model": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "remove 'adapter_config.json'",
    ),
}


@pytest.fixture
def folder(material, tmp_path, monkeypatch) -> Path:
    """A copy of a model folder. Nothing may load its weights, and an error ends a command with SystemExit."""

    def end(status):
        raise SystemExit(status)

    def load(*arguments):
        raise AssertionError("weights were loaded from a wrong folder")

    for module in (common, train):
        monkeypatch.setattr(module, "leave", end)
    monkeypatch.setattr(stage_weights, "load_stage", load)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    return Path(shutil.copytree(material["tiny"], tmp_path / "model"))


def refused(run, arguments: list[str], capsys) -> str:
    """Run a command; return the error that it ends with, on one line."""
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(run(arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("error: ") == 1, error
    return " ".join(error.partition("error: ")[2].split())


@pytest.mark.parametrize("kind", [*FOLDERS, *WEIGHTS])
def test_training_and_evaluation_refuse_a_wrong_folder(folder, material, tmp_path, capsys, kind):
    change, message = {**FOLDERS, **WEIGHTS}[kind]
    change(folder)
    for text, name in ((RL, "rl"), (SFT, "search")):
        path, overrides = write_config(tmp_path, text, folder, material["data"], name)
        arguments = ["--config", path, *overrides, f"train.output_dir={tmp_path}/run"]
        assert message in refused(train.main, arguments, capsys)
    evaluation = [*arguments, "--output", f"{tmp_path}/result.json"]
    assert message in refused(evaluate.main, evaluation, capsys)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("kind", FOLDERS)
def test_tools_refuse_a_wrong_folder(folder, material, tmp_path, capsys, kind):
    change, message = FOLDERS[kind]
    change(folder)
    assert message in refused(shards.index, [f"{material['data']}/rl-*.tar", "--model", f"{folder}"], capsys)
    (tmp_path / "records.json").write_text("[{}]")
    arguments = ["--input", f"{tmp_path}/records.json", "--media", f"{tmp_path}", "--output", f"{tmp_path}/out"]
    assert message in refused(shards.make, [*arguments, "--model", f"{folder}", "--workers", "2"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        write(template()),
        write(template(end=END + "Sure. ")),
        write("<|im_start|>system\nBe brief.<|im_end|>\n" + template()),
        lambda folder: in_other_place(folder, "chat_template.json"),
        lambda folder: in_other_place(folder, "tokenizer_config.json"),
    ],
    ids=["as made", "of parts", "prefilled words", "system prompt", "of the processor", "in the tokenizer's config"],
)
def test_usable_templates_are_used(folder, change):
    change(folder)
    assert PromptProcessor(str(folder), 1).response_prefix == ""


def test_an_evaluation_of_no_prompt_is_an_error(folder, material, tmp_path, capsys):
    path, overrides = write_config(tmp_path, RL, folder, material["data"], "rl")
    arguments = ["--config", path, *overrides, "data.max_prompt_length=5", f"train.output_dir={tmp_path}/run"]
    message = (
        "data.eval_shards: none of the first 10 samples of 4 shards (first: "
        f"'{material['data']}/heldout-000000.tar') can be used (10 prompt_too_long), so that there is nothing to "
        "evaluate"
    )
    assert message in refused(evaluate.main, [*arguments, "--output", f"{tmp_path}/result.json"], capsys)
    assert not (tmp_path / "result.json").exists()
