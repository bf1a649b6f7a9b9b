"""Engine of a sampler's server without a model: its tokens follow from the weights' bytes and the seeds.

It needs the standard library alone, so that a server starts at once. Option `faults` names what goes wrong, and option
`once` a file that is made when it does: from then on nothing goes wrong any more, in later processes as well.
"""

import os
import random
import time
import zlib
from pathlib import Path


class Engine:
    """Engine of `server.py`.

    Args:
        options: `names` of the weights, seconds that it `sleeps` at its start, `seconds` per prompt, `version`,
            `faults`, `once`.
    """

    def __init__(self, options):
        self.options, self.weights, self.num_prompts = options, {}, 0
        time.sleep(options.get("sleeps", 0.0))

    def describe(self):
        return {"engine": "small", "version": self.options.get("version", "1"), "pid": os.getpid()}

    def begin_push(self, whole):
        self.weights = {} if whole else self.weights

    def update(self, tensors):
        for name, dtype, shape, data in tensors:
            self.weights[name] = zlib.crc32(f"{dtype}{shape}".encode(), zlib.crc32(data))

    def finish_push(self, whole):
        return [name for name in self.options.get("names", ()) if name not in self.weights]

    def fails(self, fault: str) -> bool:
        once = self.options.get("once")
        if fault not in self.options.get("faults", ()) or (once and Path(once).exists()):
            return False
        if once:
            Path(once).touch()
        return True

    def generate(self, prompts, sampling):
        key = zlib.crc32(repr(sorted(self.weights.items())).encode())
        for prompt in prompts:
            time.sleep(self.options.get("seconds", 0.0))
            while self.fails("stalls"):
                while True:
                    time.sleep(0.01)
                    yield None
            if self.fails("freezes"):
                time.sleep(3600.0)
            if self.num_prompts >= self.options.get("first", 0) and self.fails("dies"):
                os.kill(os.getpid(), 9)
            self.num_prompts += 1
            responses = []
            for seed in prompt.seeds:
                draw = random.Random(f"{key} {seed} {prompt.ids} {zlib.crc32(prompt.patches.tobytes())}")
                length = draw.randint(1, sampling.max_length)
                tokens = [draw.randint(0, 99) + sampling.end_token + 1 for _ in range(length)]
                if length < sampling.max_length:
                    tokens[-1] = sampling.end_token
                if self.fails("draws pads"):
                    tokens[0] = sampling.forbidden[0]
                responses.append((tokens, [-draw.random() for _ in tokens], tokens[-1] == sampling.end_token))
            ids = prompt.ids + prompt.ids[-1:] if self.fails("expands twice") else prompt.ids
            yield prompt.number, ids, responses
