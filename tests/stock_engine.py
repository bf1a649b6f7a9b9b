"""Engine of a sampler's server around stock transformers, which really computes and draws as the native sampler does.

It has what made vLLM go wrong silently: a packed copy of the LM head, a cache of the vision tower's outputs, and pixels
that it normalises itself. Option `faults` names what it then gets wrong; `once` is as in `small_engine.py`.
"""

import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from megatron_ral.functional.sampling import sample_tokens

NAMES = (("model.layers.", "model.language_model.layers."), ("model.norm.", "model.language_model.norm."))
NAMES += (("model.embed_tokens.", "model.language_model.embed_tokens."), ("visual.", "model.visual."))


class Engine:
    """Engine of `server.py`.

    Args:
        options: `model`, `faults`, `once`, `version`.
    """

    def __init__(self, options):
        torch.set_num_threads(1)
        self.options = options
        self.config = AutoConfig.from_pretrained(options["model"])
        torch.manual_seed(1234)
        self.model = Qwen2_5_VLForConditionalGeneration._from_config(self.config, dtype=torch.float32).eval()
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(options["model"])
        self.parameters = dict(self.model.named_parameters())
        self.features, self.tower = {}, self.model.model.visual.forward
        self.model.model.visual.forward = self.cached_tower
        self.head = self.model.lm_head.weight.detach().clone()
        self.pushed = set()

    def describe(self):
        return {"engine": "stock", "version": self.options.get("version", "0.32.0")}

    def fails(self, fault):
        once = self.options.get("once")
        if fault not in self.options.get("faults", ()) or (once and Path(once).exists()):
            return False
        if once:
            Path(once).touch()
        return True

    def cached_tower(self, pixels, grid_thw, **named):
        """The tower's outputs for a prompt's pictures, which every row of a batch has."""
        pixels, grids = pixels[: len(pixels) // self.num_rows], grid_thw[: len(grid_thw) // self.num_rows]
        key = pixels.numpy().tobytes()
        if key not in self.features:
            self.features[key] = self.tower(pixels, grid_thw=grids, **named)
        found = self.features[key]
        return type(found)(**{**found, "pooler_output": found.pooler_output.repeat(self.num_rows, 1)})

    # --- weights ------------------------------------------------------------------------------------------------------

    def begin_push(self, whole):
        self.pushed = set()

    @torch.no_grad()
    def update(self, tensors):
        for name, dtype, shape, data in tensors:
            for theirs, ours in NAMES:
                if name.startswith(theirs):
                    name = ours + name[len(theirs) :]
            value = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)
            self.parameters[name].copy_(value)
            self.pushed.add(name)
            if self.fails("dies in a push"):
                os.kill(os.getpid(), 9)

    def finish_push(self, whole):
        if not self.fails("old head"):
            self.head = self.model.lm_head.weight.detach().clone()
        if not self.fails("old features"):
            self.features.clear()
        return sorted(self.parameters.keys() - self.pushed)

    # --- responses ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts, sampling):
        for prompt in prompts:
            if self.fails("stalls") or (prompt.number == 1 and self.fails("stalls later")):
                while True:
                    time.sleep(0.05)
                    yield None
            if prompt.number == 1 and self.fails("dies"):
                os.kill(os.getpid(), 9)
            yield prompt.number, prompt.ids, self.responses(prompt, sampling)

    def responses(self, prompt, sampling):
        uniforms = [
            torch.rand(sampling.max_length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in prompt.seeds
        ]
        rows, found = list(range(len(uniforms))), [([], []) for _ in uniforms]
        for step in range(sampling.max_length):
            ids = torch.tensor([prompt.ids + found[row][0] for row in rows])
            states = self.model.model(**self.inputs(ids, prompt)).last_hidden_state[:, -1]
            logits = states @ self.head.T
            logprobs = torch.log_softmax(logits / (sampling.temperature or 1.0), dim=-1)
            logits[:, sampling.forbidden] = float("-inf")
            logits = logits[:, : sampling.num_tokens or None]
            draws = torch.stack([uniforms[row][step] for row in rows])
            tokens = sample_tokens(logits, draws, sampling.temperature, sampling.top_p).tolist()
            for row, token, logprob in zip(rows, tokens, logprobs):
                found[row][0].append(token)
                found[row][1].append(float(logprob[token]))
            rows = [row for row, token in zip(rows, tokens) if token != sampling.end_token]
            if not rows:
                break
        return [(tokens, values, tokens[-1] == sampling.end_token) for tokens, values in found]

    def inputs(self, ids, prompt):
        self.num_rows = len(ids)
        result = {"input_ids": ids, "mm_token_type_ids": (ids == self.config.image_token_id).int()}
        if len(prompt.patches):
            grids = torch.from_numpy(prompt.grids.copy())
            result |= {"pixel_values": self.pixels(prompt).repeat(len(ids), 1)}
            result |= {"image_grid_thw": grids.repeat(len(ids), 1)}
        return result

    def pixels(self, prompt):
        values = torch.from_numpy(prompt.patches.copy()).float()
        if self.fails("pixels as they are"):
            return values / 255
        mean, std = (torch.tensor(part)[:, None] for part in (self.processor.image_mean, self.processor.image_std))
        return ((values.view(len(values), 3, -1) / 255 - mean) / std).reshape(len(values), -1)
