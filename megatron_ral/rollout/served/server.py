"""Server around a sampler's engine: weights in, responses out, over one Unix socket.

The file runs by its path in the sampler's own Python environment, where this package is not installed. It therefore
imports the standard library, numpy and its neighbour `channel.py` alone. The engine is a file as well, loaded by its
path (`vllm_engine.py`); it holds a class `Engine` with the methods that `Server` calls. The client is `client.py`. The
first message of a connection holds the token that the server read from its standard input.

Requests, and what is sent back:

    hello       token                                    -> hello: what the engine is
    push_begin  version, whole, memory                   -> ok     sampling is refused until the push has ended
    bucket      names, types, places, checksums          -> ok     tensors that lie in shared memory
    push_end    number of tensors and bytes              -> ok     caches are empty, the version is the new one
    sample      prompts, seeds, settings                 -> answer for each prompt as it finishes, then done
    abort       number of the request                    -> aborted

A request that cannot be served is answered by `refused` with a reason. After any other error the server ends. It also
ends with its client's connection, and with its parent process.
"""

import argparse
import ctypes
import hmac
import importlib.util
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from dataclasses import dataclass, fields
from typing import Any, Iterable, Mapping, Optional, Sequence

import numpy as np
from channel import Channel, ChannelClosed, Message  # beside this file, see above


class Refused(Exception):
    """A request that the server does not serve. The text says why."""


@dataclass(frozen=True)
class ServedPrompt:
    """Prompt as it came over the socket."""

    number: int
    """Number inside the request."""
    ids: list[int]
    """Token ids with visual tokens expanded."""
    grids: np.ndarray
    """Patches of each image along time, height and width, [V, 3] int64."""
    patches: np.ndarray
    """Bytes of the images, neither scaled nor normalised, [patches, numbers of a patch] uint8."""
    seeds: list[int]
    """Seed of each response."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the draws."""

    temperature: float
    top_p: float
    max_length: int
    """Most tokens of a response."""
    end_token: int
    """Token that ends a response and is part of it."""
    forbidden: list[int]
    """Tokens that are never drawn."""
    num_tokens: int
    """Number of ids, from the first, that may be drawn; 0 allows all."""


class Server:
    """Server of one connection.

    Args:
        channel: Connection.
        engine: Engine. `describe` returns what it is, for the client. `begin_push(whole)`, `update(tensors)` and
            `finish_push(whole)` take weights; the last one returns the names of those that are missing after a whole
            push, and leaves no cache that an earlier model has filled. `generate(prompts, sampling)` yields (number,
            prompt tokens as the model read them, responses) for each prompt as it ends, a response being (tokens,
            log-probabilities, ended by the end token), and None in between, at least once a second; closing it gives
            up the request.
    """

    def __init__(self, channel: Channel, engine: Any):
        self.channel, self.engine = channel, engine
        self.version: Optional[int] = None
        """Version of the weights; None before the first push and during one."""
        self._push: Optional[Push] = None

    def serve(self) -> None:
        """Serve requests until the connection ends."""
        while True:
            message = self.channel.receive(60.0)
            if message is None:
                continue
            serve = getattr(self, f"_on_{message.kind}", None)
            try:
                if serve is None:
                    raise Refused(f"there is no request of kind {message.kind}")
                serve(message)
            except Refused as error:
                self.channel.send("refused", reason=str(error))

    # --- weights ------------------------------------------------------------------------------------------------------

    def _on_push_begin(self, message: Message) -> None:
        header = message.header
        self._end_push()
        self.version = None
        self._push = Push(int(header["version"]), bool(header["whole"]), os.open(header["memory"], os.O_RDONLY))
        self.engine.begin_push(self._push.whole)
        self.channel.send("ok")

    def _on_bucket(self, message: Message) -> None:
        if self._push is None:
            raise Refused("a bucket of weights came outside a push")
        try:
            with mmap.mmap(self._push.memory, int(message.header["size"]), prot=mmap.PROT_READ) as memory:
                self.engine.update(self._push.checked(memory, message.header["tensors"]))
        except (Refused, ValueError) as error:
            self._end_push()
            raise Refused(str(error)) from None
        self.channel.send("ok")

    def _on_push_end(self, message: Message) -> None:
        push = self._push
        if push is None:
            raise Refused("no push is under way")
        self._end_push()
        sent = (message.header["num_tensors"], message.header["num_bytes"])
        if sent != (push.num_tensors, push.num_bytes):
            raise Refused(
                f"the push is not complete: {push.num_tensors} tensors of {push.num_bytes} bytes came, and "
                f"{sent[0]} of {sent[1]} were sent"
            )
        missing = self.engine.finish_push(push.whole)
        if push.whole and missing:
            raise Refused(f"the push left out {len(missing)} weights, the first of them {missing[0]}")
        self.version = push.version
        self.channel.send("ok", version=self.version)

    def _end_push(self) -> None:
        if self._push is not None:
            os.close(self._push.memory)
        self._push = None

    # --- responses ----------------------------------------------------------------------------------------------------

    def _on_sample(self, message: Message) -> None:
        header = message.header
        warms_up = bool(header["warms_up"])
        if self.version is None and not warms_up:
            raise Refused("no weights are in place")
        if header["version"] != self.version and not warms_up:
            raise Refused(f"the weights are of version {self.version} and not {header['version']}")
        prompts, sampling = read_request(message)
        answers, number = self.engine.generate(prompts, sampling), header["request"]
        by_number = {prompt.number: prompt for prompt in prompts}
        try:
            for answer in answers:
                if answer is not None and not warms_up:
                    self._send_answer(by_number[answer[0]], sampling, *answer[1:], request=number)
                if self._is_aborted(number):
                    answers.close()
                    self.channel.send("aborted", request=number)
                    return
        finally:
            answers.close()
        self.channel.send("done", request=number, version=self.version)

    def _on_abort(self, message: Message) -> None:
        self.channel.send("aborted", request=message.header["request"])  # it had ended when the message came

    def _is_aborted(self, number: int) -> bool:
        message = self.channel.receive(0.0)
        if message is None:
            return False
        if message.kind != "abort" or message.header["request"] != number:
            raise ChannelClosed(f"a request of kind {message.kind} came while another one was served")
        return True

    def _send_answer(
        self,
        prompt: ServedPrompt,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        responses: Sequence[tuple[Sequence[int], Sequence[float], bool]],
        request: int,
    ) -> None:
        """Check the responses to one prompt and send them.

        Raises:
            Refused: the engine has read or written something else than it was asked for.
        """
        if list(prompt_ids) != prompt.ids:
            raise Refused(
                f"the engine read a prompt of {len(prompt_ids)} tokens where {len(prompt.ids)} were sent; are its "
                "image tokens expanded twice?"
            )
        if len(responses) != len(prompt.seeds):
            raise Refused(f"the engine gave {len(responses)} responses where {len(prompt.seeds)} were asked for")
        forbidden = set(sampling.forbidden)
        for tokens, logprobs, ended in responses:
            drawn = forbidden.intersection(tokens)
            if drawn:
                raise Refused(f"the engine drew the token {min(drawn)}, which stands for visual input")
            if not 0 < len(tokens) <= sampling.max_length or len(tokens) != len(logprobs):
                raise Refused(f"a response has {len(tokens)} tokens and {len(logprobs)} log-probabilities")
            if ended != (tokens[-1] == sampling.end_token) or sampling.end_token in tokens[:-1]:
                raise Refused("a response does not end where its end token stands")
            if not np.isfinite(logprobs).all():
                raise Refused("a log-probability is not finite")
        self.channel.send(
            "answer",
            [
                np.array([token for tokens, *_ in responses for token in tokens], np.int32),
                np.array([value for _, logprobs, _ in responses for value in logprobs], np.float32),
            ],
            request=request,
            number=prompt.number,
            version=self.version,
            lengths=[len(tokens) for tokens, *_ in responses],
            ended=[bool(ended) for *_, ended in responses],
        )


@dataclass
class Push:
    """A push of weights that is under way."""

    version: int
    whole: bool
    """True if every weight of the model is sent."""
    memory: int
    """Descriptor of the memory that client and server share."""
    num_tensors: int = 0
    num_bytes: int = 0

    def checked(self, memory: mmap.mmap, tensors: Sequence) -> Iterable[tuple[str, str, list[int], memoryview]]:
        """Yield (name, type, shape, bytes) of the tensors of a bucket. The bytes may be read until the next one.

        Raises:
            Refused: the bytes are not those that were sent.
        """
        for name, dtype, shape, start, size, checksum in tensors:
            with memoryview(memory)[start : start + size] as view:
                if len(view) != size or zlib.crc32(view) != checksum:
                    raise Refused(f"the bytes of {name} are not those that were sent")
                yield name, dtype, shape, view
            self.num_tensors += 1
            self.num_bytes += size


def read_request(message: Message) -> tuple[list[ServedPrompt], Sampling]:
    """Return prompts and settings of a request for responses.

    Raises:
        Refused: its parts do not fit, or patches are not bytes.
    """
    header = message.header
    if len(message.arrays) != 4:
        raise Refused(f"a request has {len(message.arrays)} arrays and not 4")
    ids, grids, patches, seeds = message.arrays
    if patches.dtype != np.uint8:
        raise Refused(f"patches are of type {patches.dtype} and not uint8; normalised pixels are not taken")
    prompts, at = [], np.zeros(3, np.int64)
    for number, (numbers, own) in enumerate(zip(header["sizes"], seeds)):
        end = at + np.array(numbers)
        (a, b), (c, d), (e, f) = zip(at.tolist(), end.tolist())
        prompts.append(ServedPrompt(number, ids[a:b].tolist(), grids[c:d], patches[e:f], own.tolist()))
        at = end
    if at.tolist() != [len(ids), len(grids), len(patches)] or len(prompts) != len(header["sizes"]):
        raise Refused("the sizes of prompts do not fit their arrays")
    for prompt in prompts:
        if int(prompt.grids.prod(axis=1).sum()) != len(prompt.patches):
            raise Refused(f"{len(prompt.patches)} patches came for grids of {prompt.grids.tolist()}")
    return prompts, Sampling(**{field.name: header[field.name] for field in fields(Sampling)})


# --- the process ------------------------------------------------------------------------------------------------------


def die_with(parent: int) -> None:
    """End this process when its parent ends: at once on Linux, elsewhere within a second.

    Signals by which a scheduler asks a run to stop are left to the parent, which first ends its step.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def load_engine(path: str, options: Mapping[str, Any]) -> Any:
    """Return the engine of a Python file."""
    spec = importlib.util.spec_from_file_location("sampler_engine", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Engine(options)


def accept(listener: socket.socket, token: str) -> Channel:
    """Return the first connection that knows the token. Others are closed."""
    while True:
        connection, _ = listener.accept()
        channel = Channel(connection)
        try:
            message = channel.receive(10.0)
            if message is not None and hmac.compare_digest(str(message.header.get("token", "")), token):
                return channel
        except (ChannelClosed, TypeError):
            pass
        channel.close()


def main() -> None:
    """Serve one client, and end."""
    parser = argparse.ArgumentParser(description="Sampler of megatron_ral; started by the training process")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--engine", required=True, help="Python file with a class Engine")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--options", type=json.loads, required=True, help="JSON mapping for the engine")
    arguments = parser.parse_args()
    sys.path.pop(0)  # the folder of this file, whose names might hide others
    die_with(arguments.parent)
    token = sys.stdin.readline().strip()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(arguments.socket)
        listener.listen(4)
        channel = accept(listener, token)
    try:
        engine = load_engine(arguments.engine, arguments.options)
        channel.send("hello", **engine.describe())
        Server(channel, engine).serve()
    except ChannelClosed as error:
        print(f"the connection ended: {error}", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # without waiting for threads of the engine


if __name__ == "__main__":
    main()
