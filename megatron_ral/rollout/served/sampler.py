"""Sampler that asks a server: one server per copy of the model, whose answers all ranks of the copy get.

The first rank of each copy owns a client and its server. Before it samples, the copy pushes the weights that have
changed, and then sends a probe: a prompt whose responses the policy reads with its own pass. If their log-probabilities
differ by more than a bound, the run stops. A server starts with random weights and answers the probe with them once, so
that all its caches hold something wrong before the first push, and a cache that the push does not clear shows at once.

Failures are counted per rollout. After the first one the request is repeated with the same seeds, for the prompts that
have no responses yet; a server that was lost is started again and gets all weights. The second one ends the run.

A rollout that is begun ahead (`begin`) is answered while the policy is trained. Its prompts keep the weights that it
began with, because nothing is pushed before the next rollout begins. Only a server that is lost meanwhile gets newer
weights, the policy's own of that moment: the older ones no longer exist. Every response says which ones it is from.

Pushes need no other copy of the model, because the copy's stages are resident during a rollout.
"""

import logging
import threading
import time
from itertools import islice
from typing import Any, Iterable, Iterator, NoReturn, Optional, Sequence

import torch
from torch import Tensor

from megatron_ral.data.processor import PromptProcessor
from megatron_ral.engine.decoding_batch import SamplingSettings
from megatron_ral.engine.policy import PolicyEngine
from megatron_ral.engine.weight_stream import stream_policy
from megatron_ral.errors import AgreedError, UserError
from megatron_ral.parallel.collectives import broadcast_from_stage_, from_first_rank, gather_from_all, raise_together
from megatron_ral.rollout.sampler import Background, SampledBatch
from megatron_ral.rollout.served.background import BackgroundRequests
from megatron_ral.rollout.served.client import SamplerClient, ServerProgram
from megatron_ral.rollout.served.conversion import response_batch, sampling_request
from megatron_ral.rollout.served.errors import Failure, RequestRefused, RequestTimeout, ServerLost
from megatron_ral.rollout.served.request import SampledGroup, SamplingRequest
from megatron_ral.rollout.served.settings import ServedSettings, device_variables
from megatron_ral.runtime.progress import progress
from megatron_ral.types import GroupBatch, Prompt, PromptBatch, ResponseBatch, pad_prompts

logger = logging.getLogger(__name__)

_KEY = "rollout.sampler"
_PROBE_RESPONSES, _PROBE_LENGTH = 4, 16


class ServedSampler:
    """Sampler of one copy of the model, whose server starts here.

    Args:
        engine: Policy.
        processor: Maker of the prompts.
        settings: Settings.

    Raises:
        AgreedError: a server cannot be started, or is another version than the tried ones.
    """

    def __init__(self, engine: PolicyEngine, processor: PromptProcessor, settings: ServedSettings):
        self.engine, self.settings = engine, settings
        self.group, layout = engine.process_groups.model, engine.layout
        self.owns = layout.tensor_rank == 0 and layout.pipeline_rank == 0
        """True on the rank that owns the client."""
        image, device = processor.image_processor, engine.process_groups.device
        self._pixels = tuple(image.image_mean), tuple(image.image_std)
        self.client: Optional[SamplerClient] = None
        self.version: Optional[int] = None
        """Updates behind the weights that the server has. None: it has none of ours."""
        self.num_pushes = self.num_failures = self.num_foreign_samples = 0
        """Pushes and failures so far, and responses that were dropped because they were of another version."""
        self.probe_difference = 0.0
        """Largest mean difference of log-probabilities in a probe so far."""
        self._probe: Optional[Prompt] = None
        self._rollout: tuple[object, ...] = ()
        self._failures: list[str] = []
        self._wanted = 0
        """Version of the weights that the rollout began with."""
        self._is_ahead = False
        """True if the rollout was begun before it is asked for."""
        self._background: Optional[BackgroundRequests] = None
        problem: Optional[Exception] = None
        if self.owns:
            program = ServerProgram(
                settings.python,
                settings.engine,
                settings.options,
                settings.log_folder / f"rank_{layout.rank}.log",
                settings.start_seconds,
                device_variables(device.type, device.index or 0),
            )
            self.client = SamplerClient(program, _tick)
            try:
                self._start()
            except (ServerLost, UserError) as error:
                problem = error if isinstance(error, UserError) else UserError(_KEY, "vllm", f": {error}")
        raise_together(problem)

    def sample(
        self, prompts: Iterable[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
    ) -> Iterator[SampledBatch]:
        if settings.exploration.is_on:
            raise UserError(_KEY, "vllm", "can neither change nor record attention while it decodes; set native")
        remaining = iter(prompts)
        self._enter(identity)
        with self.engine.resident():
            while taken := list(islice(remaining, batch_size)):
                batch = pad_prompts(taken, settings.pad_token_id)
                rows = self._answer(batch, settings, identity)
                yield SampledBatch(
                    response_batch(batch, rows, settings),
                    None if self._is_ahead else self.engine.encode_visual(batch),  # else when it is trained on
                    tuple(row.version for row in rows),
                )

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, batch_size: int, *identity: object
    ) -> Optional[Background]:
        self._enter(identity, is_ahead=True)
        parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        requests = [self._request(part, settings, identity) for part in parts]
        if prompts:
            with self.engine.resident():
                self._bring_up_to_date(prompts, settings)
        names = [tuple(prompt.sample.identity for prompt in part) for part in parts]

        def ask(request: SamplingRequest, groups: dict[int, SampledGroup]) -> None:
            assert self.client is not None
            self._ask(self.client, request, groups)

        self._background = BackgroundRequests(names, requests if self.owns else [], ask)
        return self._background

    def encode_visual(self, prompts: Sequence[Prompt], pad_token_id: int) -> Optional[tuple[Tensor, ...]]:
        return self.engine.encode_visual(pad_prompts(prompts, pad_token_id))

    def close(self) -> None:
        """End the server, and say how it went with those of all copies. All ranks call this together."""
        if self.client is not None:
            self.client.end()
        own = self.num_pushes, self.num_failures, self.num_foreign_samples, self.probe_difference
        pushes, failures, foreign, differences = zip(*filter(None, gather_from_all(own if self.owns else None)))
        if self.engine.layout.rank == 0:
            print(
                f"sampler: {sum(pushes)} pushes of weights to {len(pushes)} servers, each followed by a probe whose "
                f"log-probabilities differed by {max(differences):.2g} at most; {sum(failures)} failures; "
                f"{sum(foreign)} responses of other weights were dropped",
                flush=True,
            )

    # --- responses ----------------------------------------------------------------------------------------------------

    def _enter(self, identity: tuple[object, ...], is_ahead: bool = False) -> None:
        """Begin another rollout, with the weights of this moment, unless it has begun already."""
        if self._rollout == identity and not is_ahead:
            return
        assert self._background is None or self._background.is_collected, "requests of another rollout are under way"
        self._rollout, self._failures, self._background = identity, [], None
        self._wanted, self._is_ahead = self.engine.num_steps_taken, is_ahead

    def _answer(
        self, batch: PromptBatch, settings: SamplingSettings, identity: tuple[object, ...]
    ) -> list[SampledGroup]:
        """Return the responses to a batch of prompts, on every rank of the copy."""
        request = self._request(batch.prompts, settings, identity)
        groups: dict[int, SampledGroup] = {}
        background = self._background
        if background is not None and not background.is_collected:
            number = background.next(batch.identities)
            failure = self._on_owner(lambda client: background.collect(number, groups, progress.tick))
            if failure is not None:
                self._count(failure)
        while True:
            self._bring_up_to_date(batch.prompts, settings)
            failure = self._on_owner(lambda client: self._ask(client, request, groups))
            if failure is None:
                break
            self._count(failure)
        return from_first_rank(lambda: [groups[number] for number in range(len(batch))], self.group)

    def _ask(self, client: SamplerClient, request: SamplingRequest, groups: dict[int, SampledGroup]) -> None:
        """Ask for responses to the prompts that have none yet, and add them as they come."""
        missing = [number for number in range(len(request.sizes)) if number not in groups]
        if not missing:
            return
        assert self.version is not None
        foreign = False

        def take(number: int, group: SampledGroup) -> None:
            nonlocal foreign
            if group.version == self.version:
                groups[missing[number]] = group
            else:
                foreign = True
                self.num_foreign_samples += len(group.lengths)

        client.sample(request.only(missing), self.version, self.settings.request_seconds, take)
        if foreign or any(number not in groups for number in missing):
            client.end()
            raise ServerLost("the sampler's server left prompts unanswered, or answered with other weights")

    def _request(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, identity: tuple[object, ...]
    ) -> SamplingRequest:
        """Return the request for responses to some prompts. A prompt that cannot be sent ends the run."""
        forbidden = self.engine.shape.visual_token_ids
        try:
            return sampling_request(prompts, settings, identity, forbidden, self._pixels)
        except ValueError as error:
            self._stop(str(error))

    # --- weights ------------------------------------------------------------------------------------------------------

    def _bring_up_to_date(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> None:
        """Push the policy's weights if the server has not those that the rollout began with, and probe it. All ranks of
        the copy call this together.

        Raises:
            UserError: the probe differs, or the server has failed for the second time in this rollout.
        """
        if self._probe is None:
            # With pictures, and long, so that it fills blocks of the prefix cache.
            self._probe = max(prompts, key=lambda prompt: (len(prompt.grid_thw) > 0, len(prompt.input_ids)))
        while self.version != self._wanted:
            self._wanted = self.engine.num_steps_taken  # older weights than the policy's do not exist any more
            started = time.perf_counter()
            failure = self._push()
            if failure is not None:
                self._count(failure)
                continue
            self.num_pushes += 1
            groups: dict[int, SampledGroup] = {}
            batch, probe = pad_prompts([self._probe], settings.pad_token_id), _probe_settings(settings)
            request = self._request(batch.prompts, probe, ("probe", self.version))
            failure = self._on_owner(lambda client, r=request, g=groups: self._ask(client, r, g))
            if failure is not None:
                self.version = None  # weights without a probe are not used
                self._count(failure)
                continue
            [row] = from_first_rank(lambda g=groups: [g[0]], self.group)
            self._compare(response_batch(batch, [row], probe), probe.temperature, time.perf_counter() - started)

    def _push(self) -> Optional[Failure]:
        """Push the weights, all of them to a server that has none of ours. Every rank goes through the whole stream,
        whatever happens on the way. Return the failure."""
        engine, whole, version = self.engine, self.version is None, self.engine.num_steps_taken
        assert self._background is None or not self._background.is_running, "weights are pushed while requests run"
        self.version = None
        assert self._probe is not None
        warm_up = self._request([self._probe], _WARM_UP, ("probe", "warm-up"))

        def begin(client: SamplerClient) -> None:
            nonlocal push
            if whole:
                if not client.is_fresh:
                    self._start()
                client.sample(warm_up, -1, self.settings.request_seconds, lambda number, group: None, warms_up=True)
            push = client.push(version, whole, self.settings.bucket_bytes)

        push: Any = None
        failure = self._on_owner(begin)
        if failure is not None:
            return failure
        problem: Optional[Exception] = None
        for name, value in stream_policy(
            engine, receives=engine.layout.tensor_rank == 0, all_stages=True, skip_frozen=not whole
        ):
            if push is not None and problem is None and value is not None:
                try:
                    push.add(name, value)
                except (ServerLost, RequestRefused) as error:
                    problem = error

        def finish(client: SamplerClient) -> None:
            try:
                if problem is not None:
                    raise problem
                if push.finish() != version:
                    raise RequestRefused("weights of another version are in place")
            except RequestRefused as error:  # what is in place now cannot be known
                client.end()
                raise ServerLost(f"the sampler's server refused weights: {error}") from None
            finally:
                push.close()

        failure = self._on_owner(finish)
        if failure is None:
            self.version = version
        return failure

    def _compare(self, responses: ResponseBatch, temperature: float, seconds: float) -> None:
        """Compare the log-probabilities of the probe with those of the policy's own pass.

        Raises:
            UserError: they differ by more than the bound.
        """
        engine, batch = self.engine, GroupBatch(responses.prompts, responses.response_ids, responses.response_lengths)
        output = engine.forward([batch], temperature=temperature)[0]
        mask, difference = batch.response_mask, torch.zeros(1, device=engine.process_groups.device)
        if output.tokens is not None:
            own = output.tokens.logprobs.float().cpu()
            difference += float((own - responses.rollout_logprobs).abs()[mask].mean())
        found = float(broadcast_from_stage_(difference, -1, engine.process_groups))
        self.probe_difference = max(self.probe_difference, found)
        if not found <= self.settings.probe_bound:
            self._stop(
                f"answers a probe with other log-probabilities than the policy after weights of version "
                f"{self.version} were pushed: they differ by {found:.3g} on average over {int(mask.sum())} tokens, "
                f"more than rollout.vllm.probe_bound = {self.settings.probe_bound:g}; nothing was trained on its "
                "responses"
            )
        if self.num_pushes == 1 and engine.layout.rank == 0:
            what = self.client.description if self.client is not None else {}
            print(
                f"sampler: {what.get('engine')} {what.get('version')}, weights pushed and probed in {seconds:.1f} s, "
                f"log-probabilities differ by {found:.2g}",
                flush=True,
            )

    # --- failures -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the server, on the rank that owns it.

        Raises:
            ServerLost: it cannot be started.
            UserError: it is another version than the tried ones.
        """
        assert self.client is not None
        with progress.within("sampler", is_long=True):
            self.client.start()
        found, tried = str(self.client.description.get("version")), self.settings.versions
        if tried and found not in tried:
            self.client.end()
            raise UserError(
                "rollout.vllm.python",
                self.settings.python,
                f"has {self.client.description.get('engine')} {found}, which was not tried; install {tried[-1]}",
            )

    def _on_owner(self, do: Any) -> Optional[Failure]:
        """Call a function of the client on the rank that owns it. Return its failure on every rank of the copy."""

        def attempt() -> Optional[Failure]:
            assert self.client is not None
            try:
                do(self.client)
            except (RequestTimeout, ServerLost, RequestRefused) as error:
                return Failure.of(error)
            return None

        return from_first_rank(attempt, self.group)

    def _count(self, failure: Failure) -> None:
        """Note a failure. The second one in a rollout ends the run."""
        self.num_failures += 1
        self._failures.append(failure.reason)
        if failure.is_lost:
            self.version = None
        if failure.is_final:
            self._stop(f": {failure.reason}")
        if len(self._failures) > 1:
            self._stop(f"failed twice in one rollout: {' -- then: '.join(self._failures)}")
        if self.owns:
            logger.warning("%s; %s", failure.reason, "starting it again" if failure.is_lost else "asking once more")

    def _stop(self, remedy: str) -> NoReturn:
        """End the run with one message. Every rank of the copy calls this.

        Other copies do not know of it: an error that is not an `AgreedError` is told to all ranks by the watchdog.
        """
        if self.client is not None:
            self.client.end()
        error = AgreedError if self.engine.layout.data_size == 1 or not self.owns else UserError
        raise error(_KEY, "vllm", remedy)


_WARM_UP = SamplingSettings(group_size=1, max_response_length=1, end_token_id=0, pad_token_id=0)


def _tick() -> None:
    """Report progress where the main thread waits. That a server answers in the background says nothing of it."""
    if threading.current_thread() is threading.main_thread():
        progress.tick()


def _probe_settings(settings: SamplingSettings) -> SamplingSettings:
    return SamplingSettings(
        _PROBE_RESPONSES,
        min(_PROBE_LENGTH, settings.max_response_length),
        settings.end_token_id,
        settings.pad_token_id,
        settings.temperature,
        num_tokens=settings.num_tokens,
    )
