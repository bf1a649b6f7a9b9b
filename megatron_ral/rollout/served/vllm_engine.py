# As vLLM is in another environment:
# pyright: reportMissingImports=false
"""vLLM as the engine of a sampler's server. The file runs in vLLM's environment, see `server.py`.

It was written after the source of vLLM 0.32.0 and departs from its usual way where that goes wrong silently:

- Prompts come with their image tokens expanded. They are given to the engine as processed input
  (`vllm/inputs/engine.py`: MultiModalInput), because the text processor would expand them again.
- The vision tower of this version normalises pixels itself (`mm_device_do_normalize`), so that patches are bytes.
- Random weights (`model_loader/dummy_loader.py`) are also written into the means and deviations of pixels, which no
  push would put right.
- The packed LM head of tied embeddings (`layers/utils.py`: dispatch_cpu_unquantized_gemm) is not packed again by a
  reload of the weights, because no weight of its own is loaded.
- Features of pictures seen before stay in the encoder cache, those of prompts in the prefix cache.
- A seeded request whose prompt is computed in several parts ends the engine on processors, so that none is.
"""

import hashlib
import os
import time

import numpy as np

_NEVER = -100.0
"""Bias of tokens that are never drawn, the lowest that vLLM takes."""
_TOKENS_PER_STEP = 8192


class Engine:
    """Engine of `server.py`.

    Args:
        options: `model` (folder), `dtype`, `max_length` of prompt and response, `max_sequences` at a time,
            `temperature` of all requests, `memory_share`.
    """

    def __init__(self, options):
        prepare(options["memory_share"])
        import vllm
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.is_cpu = vllm.platforms.current_platform.is_cpu()
        if self.is_cpu:  # a process of its own would lack the operators that `prepare` defines
            from vllm.model_executor.models import registry

            registry._run_in_subprocess = lambda call: call()
        only_parameters_are_random()
        self.version = vllm.__version__
        self.temperature = options["temperature"]
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=options["model"],
                load_format="dummy",
                dtype=options["dtype"],
                max_model_len=options["max_length"],
                max_num_seqs=options["max_sequences"],
                max_num_batched_tokens=max(_TOKENS_PER_STEP, options["max_length"]),
                enable_chunked_prefill=False,
                enforce_eager=self.is_cpu,
                gpu_memory_utilization=options["memory_share"],
                generation_config="vllm",
                limit_mm_per_prompt={"video": 0},
                mm_processor_cache_gb=0,
                # Of softmax(logits) before all that changes them, or of softmax(logits / temperature).
                logprobs_mode="raw_logprobs" if self.temperature == 1 else "processed_logprobs",
                seed=0,
                disable_log_stats=True,
            )
        )
        self.config = self.engine.vllm_config
        self.in_config = lambda: set_current_vllm_config(self.config)
        if not self.config.model_config.get_multimodal_config().mm_device_do_normalize:
            raise RuntimeError("this vLLM does not normalise pixels itself")
        hf = self.config.model_config.hf_config
        self.image_token, self.merge = hf.image_token_id, hf.vision_config.spatial_merge_size
        runner = self.engine.model_executor.driver_worker.worker.model_runner
        self.model = runner.get_model()
        self.names = {name for name, _ in self.model.named_parameters()}
        self.loaded, self.count = set(), 0

    def describe(self):
        """Return what the engine is."""
        return {"engine": "vllm", "version": self.version.split("+")[0]}

    # --- weights ------------------------------------------------------------------------------------------------------

    def begin_push(self, whole):
        """Make the layers ready to be loaded again. Those that get no weights stay as they are."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.loaded = set()
        with self.in_config():
            initialize_layerwise_reload(self.model)

    def update(self, tensors):
        """Load some tensors. A layer is packed when all of its tensors are there."""
        import torch

        def copies():  # vLLM keeps them until then
            for name, dtype, shape, data in tensors:
                yield name, torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)

        with self.in_config():
            self.loaded |= self.model.load_weights(copies())

    def finish_push(self, whole):
        """Pack what was not, and empty the caches. Return the names of parameters that got nothing."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self.in_config():
            finalize_layerwise_reload(self.model, self.config.model_config)
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")
        return sorted(self.names - self.loaded)

    # --- responses ----------------------------------------------------------------------------------------------------

    def generate(self, prompts, sampling):
        """Yield (number, prompt tokens as they were read, responses) for each prompt as it ends, and None in between.

        Closing the generator gives up what is not done.
        """
        waiting, requests = {}, {}
        try:
            for prompt in prompts:
                waiting[prompt.number] = [None] * len(prompt.seeds)
                inputs = self._inputs(prompt)
                for place, seed in enumerate(prompt.seeds):
                    name = f"{self.count}"
                    self.count += 1
                    requests[name] = (prompt.number, place)
                    self.engine.add_request(name, dict(inputs), self._parameters(seed, sampling))
            told = time.monotonic()
            while requests:
                for output in self.engine.step():
                    if not output.finished:
                        continue
                    number, place = requests.pop(output.request_id)
                    waiting[number][place] = _response(output.outputs[0], sampling.end_token)
                    if all(waiting[number]):
                        yield number, output.prompt_token_ids, waiting.pop(number)
                if time.monotonic() - told > 0.2:
                    told = time.monotonic()
                    yield None
        finally:
            if requests:
                self.engine.abort_request(list(requests))

    def _parameters(self, seed, sampling):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if sampling.temperature != self.temperature:
            raise RuntimeError(f"the engine was started for temperature {self.temperature}, not {sampling.temperature}")
        return SamplingParams(
            seed=seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_length,
            stop_token_ids=[sampling.end_token],
            ignore_eos=True,
            logit_bias=dict.fromkeys(sampling.forbidden, _NEVER),
            allowed_token_ids=list(range(sampling.num_tokens)) or None,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _inputs(self, prompt):
        """Return a prompt as the engine takes it, its pictures as bytes and in the places of their tokens."""
        import torch
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.model_executor.models.qwen2_vl import _create_qwen2vl_field_factory
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        if not len(prompt.grids):
            return tokens_input(prompt.ids)
        places, hashes, at, patches = [], [], 0, 0
        for grid in prompt.grids:
            size = int(grid.prod())
            length = size // self.merge**2
            at = prompt.ids.index(self.image_token, at)
            if prompt.ids[at : at + length] != [self.image_token] * length:
                raise RuntimeError(f"{length} image tokens are not one run of the prompt")
            places.append(PlaceholderRange(offset=at, length=length))
            own = np.ascontiguousarray(prompt.patches[patches : patches + size])
            hashes.append(hashlib.blake2b(own.tobytes() + grid.tobytes(), digest_size=16).hexdigest())
            at, patches = at + length, patches + size
        fields = {
            "pixel_values": torch.from_numpy(prompt.patches.copy()),
            "image_grid_thw": torch.from_numpy(prompt.grids.copy()),
        }
        items = MultiModalKwargsItems.from_hf_inputs(fields, _create_qwen2vl_field_factory(self.merge)(fields))
        return mm_input(prompt.ids, items, {"image": hashes}, {"image": places})


def _response(output, end_token):
    """Return (tokens, log-probabilities, whether the end token ended it) of a finished output."""
    tokens = list(output.token_ids)
    logprobs = [float(step[token].logprob) for step, token in zip(output.logprobs, tokens)]
    return tokens, logprobs, tokens[-1] == end_token


def only_parameters_are_random():
    """Leave constants of the model as they are where it starts with random weights."""
    from torch.nn import Parameter
    from vllm.model_executor.model_loader import dummy_loader

    original = dummy_loader.initialize_single_dummy_weight

    def initialize(tensor, *arguments, **named):
        if isinstance(tensor, Parameter):
            original(tensor, *arguments, **named)

    dummy_loader.initialize_single_dummy_weight = initialize


def prepare(memory_share):
    """Set what vLLM reads when it is imported.

    Args:
        memory_share: share of the machine's memory for the KV cache, where there is no GPU.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, whose model can be reached
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if torch.cuda.is_available():
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, int(memory_share * memory / 2**30)))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several servers share the machine
    # The build of torchvision beside this torch cannot load its operators, and asks for these two at import.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_LIBRARY"] = library  # its definitions end with it
