"""Write a randomly initialised, tiny Qwen2.5-VL, Qwen3-VL, Qwen3.5 or InternVL3.5 as a complete Hugging Face folder,
for tests and demonstrations.

The folder holds what a real checkpoint holds: safetensors, `config.json`, `generation_config.json`, a tokenizer with
its chat template, and `preprocessor_config.json`; so the loading code that runs on it is the code that runs on a 72B
model. It departs from the real Qwen2.5-VL in size (about 1.3 M parameters by default) and in the tokenizer: a
byte-level BPE trained on the text of a task (tools/make_digit_search.py, or with --task video-search also
tools/make_video_search.py), where a word keeps the space AFTER it instead of before. So a colour is one and the same
token in a question and in an answer, which is what lets the model tie a colour seen to a colour named. The tags of the
answer format and every digit are one token each.

    python tools/make_tiny_model.py --output tiny_model
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from megatron_ral.demo.search_task import PALETTE, answer, colour_question, digit_question, scene_question, think

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
VISION_PAD = "<|vision_pad|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD]
PATCH_SIZE = {"qwen2_5_vl": 14, "qwen3_vl": 16, "qwen3_5": 16, "internvl": 14}
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TASKS = ("digit-search", "video-search")
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]

# A single digit, a word with the space after it, a run of white space, or any other single character.
WORD_PATTERN = r"\d|\p{L}+ ?|\s+|[^\s\p{L}\d]"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('unknown content type: ' + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def chat_template(family: str) -> str:
    """Return the chat template, with the text that the family has for an image and a video."""
    if family != "internvl":
        return CHAT_TEMPLATE
    replaced = CHAT_TEMPLATE
    for theirs, ours in ((IMAGE_PAD, "context_image_token"), (VIDEO_PAD, "video_token")):
        replaced = replaced.replace(VISION_START + theirs + VISION_END, INTERNVL_TOKENS[ours] + "\\n")
    return replaced


def task_text(task: str) -> list[str]:
    """Return every word that a task can use, to train the tokenizer. Video search has the words of digit search too."""
    lines = ["system\n", "user\n", "assistant\n"]
    for colour in PALETTE:
        lines += [digit_question(colour), think(colour, "0"), answer(colour)]
    lines += [colour_question(cell) for cell in range(1, 10)]
    return lines + ([scene_question(scene) for scene in range(1, 10)] if task == "video-search" else [])


def build_tokenizer(task: str, family: str):
    """Return a byte-level BPE in which every word of the task is one token, with the family's special tokens and chat
    template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    lines = task_text(task)
    for tag in TAGS:
        lines = [line.replace(tag, "\n") for line in lines]  # tags are added as whole tokens below
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merging ends when every word is whole
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    named = INTERNVL_TOKENS if family == "internvl" else {}
    special = [*SPECIAL_TOKENS, *named.values()]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (TURN_END, END_OF_TEXT)],
        chat_template=chat_template(family),
        model_max_length=4096,
        **({"extra_special_tokens": named} if named else {}),
    )


def build_model(args: argparse.Namespace, tokenizer):
    """Return a randomly initialised model whose token ids match the tokenizer."""
    import torch
    from transformers import (
        GenerationConfig,
        InternVLConfig,
        InternVLForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    token_id = tokenizer.convert_tokens_to_ids
    layers = range(args.num_layers)
    half_head = args.hidden_size // args.num_heads // 2
    spatial = half_head * 3 // 8
    ends = {
        "bos_token_id": token_id(END_OF_TEXT),
        "eos_token_id": token_id(TURN_END),
        "pad_token_id": token_id(END_OF_TEXT),
    }
    text_config = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_heads,
        "num_key_value_heads": args.num_kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": args.initializer_range,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": args.rope_theta,
            "mrope_section": [half_head - 2 * spatial, spatial, spatial],
        },
        "tie_word_embeddings": not args.untied,
        **ends,
    }
    vision_config = {
        "depth": args.vision_depth,
        "hidden_size": args.vision_hidden_size,
        "intermediate_size": args.vision_intermediate_size,
        "num_heads": args.vision_num_heads,
        "out_hidden_size": args.hidden_size,
        "patch_size": PATCH_SIZE[args.family],
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": args.initializer_range,
    }
    if args.family == "internvl":
        make_config, make_model = InternVLConfig, InternVLForConditionalGeneration
        text_config |= {"model_type": "qwen3", "head_dim": args.hidden_size // args.num_heads}
        text_config["rope_parameters"].pop("mrope_section")
        vision_config = {
            "num_hidden_layers": args.vision_depth,
            "hidden_size": args.vision_hidden_size,
            "intermediate_size": args.vision_intermediate_size,
            "num_attention_heads": args.vision_num_heads,
            "attention_bias": True,
            "patch_size": [PATCH_SIZE[args.family]] * 2,
            "image_size": [PATCH_SIZE[args.family] * args.tile_patches] * 2,
            "initializer_range": args.initializer_range,
        }
    elif args.family == "qwen3_vl":
        make_config, make_model = Qwen3VLConfig, Qwen3VLForConditionalGeneration
        text_config["head_dim"] = args.hidden_size // args.num_heads
        text_config["rope_parameters"]["mrope_interleaved"] = True  # transformers knows it, vLLM reads it
        vision_config["num_position_embeddings"] = 64
        vision_config["deepstack_visual_indexes"] = list(range(min(3, args.vision_depth - 1)))
    elif args.family == "qwen3_5":
        make_config, make_model = Qwen3_5Config, Qwen3_5ForConditionalGeneration
        half_rotated, value_heads = half_head // 2, args.num_heads
        spatial = half_rotated * 3 // 8
        text_config["rope_parameters"] |= {
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
            "mrope_section": [half_rotated - 2 * spatial, spatial, spatial],
        }
        interval = args.full_attention_interval
        kinds = ["full_attention" if not (layer + 1) % interval else "linear_attention" for layer in layers]
        text_config |= {
            "head_dim": args.hidden_size // args.num_heads,
            "layer_types": kinds,
            "linear_num_key_heads": value_heads // 2 if value_heads % 2 == 0 else value_heads,
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": 2 * half_head,
            "linear_value_head_dim": 2 * half_head,
            "linear_conv_kernel_dim": 4,
        }
        vision_config["num_position_embeddings"] = 64
    else:
        make_config, make_model = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        text_config["max_window_layers"] = args.num_layers
        vision_config |= {"window_size": 112, "tokens_per_second": 2, "fullatt_block_indexes": [args.vision_depth - 1]}
    if args.family == "internvl":
        image = token_id(INTERNVL_TOKENS["context_image_token"])
        visual = {"image_token_id": image, "image_seq_length": args.tile_patches**2 // 4}
    else:
        visual = {
            "image_token_id": token_id(IMAGE_PAD),
            "video_token_id": token_id(VIDEO_PAD),
            "vision_start_token_id": token_id(VISION_START),
            "vision_end_token_id": token_id(VISION_END),
        }
    config = make_config(
        text_config=text_config,
        vision_config=vision_config,
        **visual,
        tie_word_embeddings=not args.untied,
        initializer_range=args.initializer_range,
        dtype="float32",
        **ends,
    )
    torch.manual_seed(args.seed)
    model = make_model(config)
    for layer in model.model.language_model.layers[: args.even_layers]:
        attention = getattr(layer, "self_attn", None)  # linear attention has none
        for projection in () if attention is None else (attention.q_proj, attention.k_proj):
            for parameter in projection.parameters():
                torch.nn.init.zeros_(parameter)
    model.generation_config = GenerationConfig(**ends)
    return model


def build_image_processor(family: str, tile_patches: int):
    """Return the family's image processor, which leaves small images unscaled where the family can."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if family == "internvl":
        side = tile_patches * PATCH_SIZE[family]
        return GotOcr2ImageProcessorPil(size={"height": side, "width": side})
    cell = (2 * PATCH_SIZE[family]) ** 2
    return Qwen2VLImageProcessorPil(min_pixels=cell, max_pixels=cell * 16384, patch_size=PATCH_SIZE[family])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line. Every error names the option and its value."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--force", action="store_true", help="replace a model that is already in --output")
    parser.add_argument("--family", choices=sorted(PATCH_SIZE), default="qwen2_5_vl", help="model family")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="task whose words the tokenizer has")
    parser.add_argument("--untied", action="store_true", help="give the LM head weights of its own")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--hidden-size", type=int, default=128, help="width of the language model")
    parser.add_argument(
        "--intermediate-size", type=int, default=384, help="width of the language model's feed-forward layers"
    )
    parser.add_argument("--num-layers", type=int, default=4, help="layers of the language model")
    parser.add_argument("--num-heads", type=int, default=4, help="query heads")
    parser.add_argument("--num-kv-heads", type=int, default=2, help="key and value heads")
    parser.add_argument("--vision-depth", type=int, default=2, help="blocks of the vision encoder")
    parser.add_argument("--vision-hidden-size", type=int, default=96, help="width of the vision encoder")
    parser.add_argument("--vision-intermediate-size", type=int, default=256, help="width of its feed-forward layers")
    parser.add_argument("--vision-num-heads", type=int, default=4, help="heads of the vision encoder")
    parser.add_argument(
        "--tile-patches",
        type=int,
        default=4,
        help="patches along a side of a tile of internvl, even; 4: a visual token for each cell of a search picture",
    )
    parser.add_argument(
        "--full-attention-interval",
        type=int,
        default=2,
        help="qwen3_5: layers of which the last has softmax attention and the others linear attention (4 in Qwen3.5)",
    )
    parser.add_argument("--vocab-size", type=int, default=512, help="rows of the word embeddings, unused ones included")
    parser.add_argument(
        "--rope-theta", type=float, default=10.0, help="base of the rotary embedding; small, so that cells differ"
    )
    parser.add_argument(
        "--even-layers",
        type=int,
        default=0,
        help="leading layers whose queries and keys are zero; they get no gradient, so that these layers attend to all "
        "tokens alike, and the model learns to search in a later one",
    )
    parser.add_argument(
        "--initializer-range", type=float, default=0.08, help="standard deviation of the weights at the start"
    )
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        free = isinstance(value, bool) or name in ("seed", "even_layers")
        if isinstance(value, int) and not free and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.rope_theta <= 1.0:
        parser.error(f"--rope-theta must be above 1, got {args.rope_theta}")
    if args.initializer_range <= 0.0:
        parser.error(f"--initializer-range must be above 0, got {args.initializer_range}")
    if not 0 <= args.even_layers < args.num_layers:
        parser.error(
            f"--even-layers must lie in 0..{args.num_layers - 1} (one layer has to search), got {args.even_layers}"
        )
    if args.hidden_size % args.num_heads or args.hidden_size // args.num_heads % 16:
        parser.error(
            f"--hidden-size {args.hidden_size} must be --num-heads ({args.num_heads}) times a multiple of 16 "
            "(the rotary sections are 2 : 3 : 3 of half a head)"
        )
    if args.num_heads % args.num_kv_heads:
        parser.error(f"--num-heads {args.num_heads} must be a multiple of --num-kv-heads ({args.num_kv_heads})")
    if args.vision_hidden_size % args.vision_num_heads or args.vision_hidden_size // args.vision_num_heads % 4:
        parser.error(
            f"--vision-hidden-size {args.vision_hidden_size} must be --vision-num-heads ({args.vision_num_heads}) "
            "times a multiple of 4 (two rotary axes)"
        )
    if args.tile_patches % 2:
        parser.error(f"--tile-patches {args.tile_patches} must be even (a visual token is 2 x 2 patches)")
    if args.output.exists():
        if not args.force:
            parser.error(f"--output {args.output} exists already; give --force to replace it")
        if not (args.output / "config.json").is_file():
            parser.error(f"--output {args.output} holds no config.json, so --force will not delete it")
    return args


def main(argv: list[str] | None = None) -> int:
    """Write the model to a temporary folder beside --output, then rename it."""
    args = parse_arguments(argv)
    tokenizer = build_tokenizer(args.task, args.family)
    if len(tokenizer) > args.vocab_size:
        sys.exit(f"--vocab-size must be at least {len(tokenizer)}, the tokens in use, got {args.vocab_size}")
    model = build_model(args, tokenizer)

    output = args.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        build_image_processor(args.family, args.tile_patches).save_pretrained(partial)
        if output.exists():
            shutil.rmtree(output)
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {model.num_parameters():,} parameters and {len(tokenizer)} tokens to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
