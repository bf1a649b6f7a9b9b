"""TRL's side of whole_step_trl.py, which runs in an environment of its own: it imports nothing of this project."""

import argparse
import functools
import json
import os
import resource
import time
from pathlib import Path

QUESTION = "Which digit is red?"
OTHER_TOKEN = 17
"""Token that stands where a model drew the end too early."""


def read_lengths(folder: Path) -> list[list[int]] | None:
    """Return the length that every response must have, by prompt. None: all are as long as the limit."""
    file = folder / "lengths.json"
    return json.loads(file.read_text()) if file.exists() else None


def peak_bytes(function):
    """Run a function, and return (its result, most bytes that PyTorch's allocator gave it at once)."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak


def length_reward(completion: str, solution: str = "", problem_type: str = "") -> float:
    """Return a reward that differs between random responses."""
    return len(completion) % 17 / 17


def say(phases: list[dict[str, float]], **more) -> None:
    """Print one JSON line: seconds of the phases of all steps but the first, and peak resident memory in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"phases": phases[1:], "peak": peak, **more}), flush=True)


def run_trl(args: argparse.Namespace) -> None:
    """Train with GRPOTrainer on the folder. It runs under the other environment's Python."""
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, Qwen2_5_VLProcessor, TrainerCallback
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    now = time.perf_counter if args.clock == "wall" else time.process_time
    folder, spent, phases, seen = Path(args.folder), {"rollout": 0.0, "old": 0.0}, [], {}
    lengths, peaks, sampled = read_lengths(folder), [], []
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    class Processor(Qwen2_5_VLProcessor):
        """Processor without videos, because their processor needs torchvision."""

        def check_argument_for_proper_class(self, name, argument):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    processor = Processor(
        Qwen2VLImageProcessorPil.from_pretrained(folder / "model"),
        tokenizer,
        None,
        chat_template=tokenizer.chat_template,
    )

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            started, before = now(), spent["old"]
            result = super()._generate_and_score_completions(inputs)
            spent["rollout"] += now() - started - (spent["old"] - before)
            return result

        def _get_per_token_logps_and_entropies(self, *positional, **named):
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*positional, **named)
            started = now()
            result = super()._get_per_token_logps_and_entropies(*positional, **named)
            spent["old"] += now() - started
            return result

        def _compute_loss(self, model, inputs):
            sampled.extend(inputs["completion_mask"].sum(1).tolist())
            seen.update(
                prompt=inputs["prompt_ids"].shape[1],
                visual=int(inputs["image_grid_thw"][0].prod()) // 4,
                rows=len(inputs["prompt_ids"]),
                old=inputs["old_per_token_logps"] is not None,
            )
            return super()._compute_loss(model, inputs)

        def training_step(self, model, inputs, *positional, **named):
            if not args.memory:
                return super().training_step(model, inputs, *positional, **named)
            work = functools.partial(super().training_step, model, inputs, *positional, **named)
            if self.state.global_step % args.prompts != args.prompts - 1:
                return work()  # the first of a rollout generates it
            result, peak = peak_bytes(work)
            peaks.append(peak)
            return result

    class Ends(LogitsProcessor):
        """Ends every response where its length says."""

        def __init__(self, prompt_length: int):
            self.prompt_length, self.lengths = prompt_length, torch.tensor(lengths).flatten()

        def __call__(self, input_ids, scores):
            ends = self.lengths == input_ids.shape[1] - self.prompt_length + 1
            scores[:, tokenizer.eos_token_id] = -torch.inf
            scores[ends] = -torch.inf
            scores[ends, tokenizer.eos_token_id] = 0.0
            return scores

    class Steps(TrainerCallback):
        """Clock of steps. One step of ours, a rollout and its updates, is args.prompts optimizer steps of TRL."""

        def on_train_begin(self, settings, state, control, **unused):
            self.started = now()

        def on_step_end(self, settings, state, control, **unused):
            if state.global_step % args.prompts == 0:
                whole, self.started = now() - self.started, now()
                phases.append({**spent, "update": whole - sum(spent.values())})
                spent.update(rollout=0.0, old=0.0)

    pictures = [Image.open(path).convert("RGB") for path in sorted((folder / "pictures").glob("*.png"))]
    question = [{"role": "user", "content": QUESTION}]
    data = Dataset.from_list([{"prompt": question, "image": picture} for picture in pictures])
    rows = args.trl_batch or args.group_size
    stops = {*tokenizer.all_special_ids, tokenizer.eos_token_id}
    stops = sorted(stops - {tokenizer.eos_token_id} if lengths else stops)
    forced = {} if lengths else {"min_new_tokens": args.length}
    settings = GRPOConfig(
        output_dir=str(folder / f"trl-{os.getpid()}"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=args.recompute,
        model_init_kwargs={"dtype": "float32", "attn_implementation": args.attention},
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=args.group_size // rows,
        steps_per_generation=args.prompts * args.group_size // rows,
        num_generations=args.group_size,
        max_completion_length=args.length,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        generation_kwargs={**forced, "suppress_tokens": stops},
        shuffle_dataset=False,
        beta=0.0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        adam_beta2=0.95,
        report_to=[],
        seed=0,
        max_steps=args.prompts * (args.steps + 1),
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )

    def reward(completions, **unused):
        return [length_reward(completion[0]["content"]) for completion in completions]

    trainer = Timed(
        model=str(folder / "model"),
        reward_funcs=reward,
        args=settings,
        train_dataset=data,
        processing_class=processor,
        callbacks=[Steps()],
    )
    for name, parameter in trainer.model.named_parameters():
        if "visual" in name:
            parameter.requires_grad_(False)
    if lengths:
        generate = trainer.model.generate

        def ended(**named):
            return generate(**named, logits_processor=LogitsProcessorList([Ends(named["input_ids"].shape[1])]))

        trainer.model.generate = ended
    trainer.train()
    wanted = [length for group in lengths for length in group] if lengths else [args.length] * len(sampled)
    assert sorted(sampled[-len(wanted) :]) == sorted(wanted), (sampled, wanted)
    assert seen["rows"] == rows and seen["old"], seen
    say(phases, update_peak=max(peaks, default=0), response=max(wanted), **seen)
