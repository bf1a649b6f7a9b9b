"""Server of a sampler without a model: messages, pushes of weights, failures. Each server is a process of its own."""

import ast
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ral.rollout.served import client as client_file
from megatron_ral.rollout.served import sampler as served
from megatron_ral.rollout.served.background import BackgroundRequests
from megatron_ral.rollout.served.channel import Channel, ChannelClosed
from megatron_ral.rollout.served.client import SERVER, SamplerClient, ServerProgram
from megatron_ral.rollout.served.errors import RequestRefused, RequestTimeout, ServerLost
from megatron_ral.rollout.served.push import WeightPush
from megatron_ral.rollout.served.request import SamplingRequest
from megatron_ral.runtime.progress import progress

PROJECT = Path(__file__).parents[2]
ENGINE = PROJECT / "tests" / "small_engine.py"
WEIGHTS = {
    "head.weight": torch.arange(40.0).view(5, 8),
    "norm.weight": torch.ones(7, dtype=torch.bfloat16),
    "embed.weight": torch.linspace(-1, 1, 6000).view(60, 100),
}
SETTINGS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "max_length": 6,
    "end_token": 3,
    "forbidden": [500],
    "num_tokens": 0,
}


@pytest.fixture
def started(tmp_path):
    """Function from options of the engine to a client whose server runs."""
    clients = []

    def start(start_seconds=30.0, **options):
        options.setdefault("names", list(WEIGHTS))
        program = ServerProgram(sys.executable, str(ENGINE), options, tmp_path / "server.log", start_seconds)
        clients.append(SamplerClient(program))
        clients[-1].start()
        return clients[-1]

    yield start
    for client in clients:
        client.end()


def push(client, version, weights=WEIGHTS, whole=True, bucket_bytes=1 << 14):
    pushed = client.push(version, whole, bucket_bytes)
    try:
        for name, value in weights.items():
            pushed.add(name, value)
        return pushed.finish()
    finally:
        pushed.close()


def request(count=3, group=2):
    """Prompts of different sizes, one in two with two pictures."""
    sizes = [(4 + number, 2 * (number % 2), 10 * (number % 2)) for number in range(count)]
    patches = sum(size[2] for size in sizes)
    return SamplingRequest(
        sizes,
        np.arange(sum(size[0] for size in sizes), dtype=np.int32),
        np.array([[1, 2, 3], [1, 2, 2]] * (count // 2), np.int64).reshape(-1, 3),
        (np.arange(patches * 12) % 256).astype(np.uint8).reshape(patches, 12),
        np.array([[2**62 + 10 * row + column for column in range(group)] for row in range(count)], np.uint64),
        SETTINGS,
    )


def sample(client, version, asked=None, seconds=30.0):
    """Tokens, log-probabilities and versions by prompt."""
    found = {}

    def take(number, group):
        found[number] = (group.tokens.tolist(), group.logprobs.tolist(), group.lengths, group.ended, group.version)

    client.sample(asked or request(), version, seconds, take)
    return found


# --- answers in the background ----------------------------------------------------------------------------------------


def in_background(client, version, parts, seconds=30.0):
    """Requests of one prompt or more that a thread sends, as `ServedSampler` does it."""

    def ask(asked, groups):
        client.sample(asked, version, seconds, lambda number, group: groups.update({number: group}))

    names = [tuple(f"{number} {row}" for row in range(len(part.sizes))) for number, part in enumerate(parts)]
    return names, BackgroundRequests(names, parts, ask)


def test_answers_are_taken_while_nobody_asks_for_them(started):
    """More than a socket holds: a server that could not send would end."""
    client = started()
    push(client, 1)
    parts = [request(40, group=300), request(4)]
    names, background = in_background(client, 1, parts)
    until = time.monotonic() + 60.0
    while background.is_running and time.monotonic() < until:
        time.sleep(0.02)
    assert not background.is_running and 0 < background.seconds < 60.0 and not background.is_collected
    found = [{}, {}]
    for number, groups in enumerate(found):
        background.collect(background.next(names[number]), groups, lambda: None)
    assert background.is_collected and [len(groups) for groups in found] == [40, 4]
    wanted = sample(client, 1, parts[1])
    assert {number: group.tokens.tolist() for number, group in found[1].items()} == {
        number: row[0] for number, row in wanted.items()
    }
    with pytest.raises(AssertionError, match="other prompts than were begun"):
        in_background(client, 1, parts)[1].next(names[1])


@pytest.mark.parametrize("moment", range(10))
def test_a_server_killed_at_any_moment_is_one_failure_and_loses_no_answer_that_came(started, moment):
    client = started(seconds=0.15)
    push(client, 1)
    parts = [request(3) for _ in range(3)]
    names, background = in_background(client, 1, parts)
    time.sleep(random.Random(moment).uniform(0.0, 0.7))
    os.kill(client.pid, signal.SIGKILL)
    answers, failures = [], []
    for number in range(3):
        groups = {}
        try:
            background.collect(background.next(names[number]), groups, lambda: None)
        except ServerLost as error:
            failures.append(str(error))
        answers.append(groups)
    assert len(failures) == 1 and "signal 9 ended it" in failures[0] and not background.is_running
    assert all(group.version == 1 for groups in answers for group in groups.values())
    came = [len(groups) for groups in answers]
    assert came == sorted(came, reverse=True) and sum(came) < 9 and sum(0 < count < 3 for count in came) <= 1


def test_answers_in_the_background_are_no_progress_of_the_main_thread():
    before = progress.ticks
    thread = threading.Thread(target=served._tick)
    thread.start()
    thread.join()
    assert progress.ticks == before
    served._tick()
    assert progress.ticks == before + 1


# --- weights and responses --------------------------------------------------------------------------------------------


def test_responses_follow_from_weights_prompts_and_seeds_alone(started):
    client = started()
    assert client.description["engine"] == "small" and client.description["pid"] == client.pid
    assert push(client, 4) == 4
    whole = sample(client, 4)
    assert whole.keys() == {0, 1, 2} and all(row[-1] == 4 for row in whole.values())
    for tokens, logprobs, lengths, ended, _ in whole.values():
        assert len(tokens) == len(logprobs) == sum(lengths) and len(lengths) == len(ended) == 2
    some = sample(client, 4, request().only([2, 1]))
    assert (some[0], some[1]) == (whole[2], whole[1]), "a prompt's responses do not depend on its neighbours"
    again = started()
    push(again, 4, bucket_bytes=64)  # every tensor in a bucket of its own, larger than asked for
    assert sample(again, 4) == whole
    assert push(again, 5, {"norm.weight": torch.zeros(7)}, whole=False) == 5
    assert sample(again, 5) != whole, "a part of the weights has been replaced"
    assert not list(Path("/dev/shm").glob("sampler-*")), "shared memory is left behind"


def test_requests_without_weights_or_with_others_are_refused(started):
    client = started()
    with pytest.raises(RequestRefused, match="no weights are in place"):
        sample(client, 0)
    client.sample(request(), -1, 10.0, lambda *_: pytest.fail("an answer"), warms_up=True)
    push(client, 1)
    with pytest.raises(RequestRefused, match="are of version 1 and not 2"):
        sample(client, 2)
    assert sample(client, 1)


def test_a_push_that_is_cut_short_is_refused_and_leaves_no_weights(started, monkeypatch):
    client = started()
    push(client, 1)
    cut = client.push(2, True, 1 << 14)
    for name, value in WEIGHTS.items():
        cut.add(name, value)
    cut._tensors.pop()  # the last bucket loses a tensor on the way
    with pytest.raises(RequestRefused, match=r"not complete: 2 tensors of \d+ bytes came, and 3 of \d+ were sent"):
        cut.finish()
    with pytest.raises(RequestRefused, match="no weights are in place"):
        sample(client, 1)
    with pytest.raises(RequestRefused, match=r"left out 1 weights, the first of them norm\.weight"):
        push(client, 2, {name: value for name, value in WEIGHTS.items() if name != "norm.weight"})

    def flips_a_byte(self):
        self._map[5] ^= 1
        original(self)

    original = WeightPush.flush
    monkeypatch.setattr(WeightPush, "flush", flips_a_byte)
    with pytest.raises(RequestRefused, match=r"the bytes of head\.weight are not those that were sent"):
        push(client, 2)
    monkeypatch.undo()
    with pytest.raises(RequestRefused, match="no weights are in place"):
        sample(client, 2)
    assert push(client, 2) == 2 and sample(client, 2)


def test_normalised_pixels_are_refused(started):
    client, whole = started(), request()
    push(client, 1)
    floats = SamplingRequest(
        whole.sizes, whole.ids, whole.grids, whole.patches.astype(np.float32), whole.seeds, whole.settings
    )
    with pytest.raises(RequestRefused, match="patches are of type float32 and not uint8; normalised pixels"):
        sample(client, 1, floats)
    other = SamplingRequest(whole.sizes, whole.ids, whole.grids[:, ::-1] + 1, whole.patches, whole.seeds, SETTINGS)
    with pytest.raises(RequestRefused, match="10 patches came for grids of"):
        sample(client, 1, other)


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("expands twice", "read a prompt of 5 tokens where 4 were sent; are its image tokens expanded twice"),
        ("draws pads", "drew the token 500, which stands for visual input"),
    ],
)
def test_responses_to_another_prompt_or_with_visual_tokens_are_refused(started, fault, reason):
    client = started(faults=[fault])
    push(client, 1)
    with pytest.raises(RequestRefused, match=reason):
        sample(client, 1)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_stalled_request_is_given_up_and_asked_again(started, tmp_path):
    client = started(faults=["stalls"], once=str(tmp_path / "stalled"))
    push(client, 1)
    pid = client.pid
    with pytest.raises(RequestTimeout, match=r"took more than 0\.3 s"):
        sample(client, 1, seconds=0.3)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # a scheduler's, which the run itself answers
        os.kill(pid, number)
    assert client.pid == pid and len(sample(client, 1)) == 3


def test_a_server_that_does_not_give_up_a_request_is_ended(started, monkeypatch):
    monkeypatch.setattr(client_file, "_GRACE", 0.5)
    client = started(faults=["freezes"])
    push(client, 1)
    pid = client.pid
    with pytest.raises(ServerLost, match="did not give it up"):
        sample(client, 1, seconds=0.3)
    assert client.pid == 0 and not Path(f"/proc/{pid}").exists()


def test_a_server_that_is_not_ready_in_time_or_cannot_start_is_lost(started, tmp_path):
    with pytest.raises(ServerLost, match=r"was not ready after 0\.2 s"):
        started(start_seconds=0.2, sleeps=60.0)
    log = tmp_path / "broken.log"
    with pytest.raises(ServerLost, match=r"ended with status 1; see .*broken\.log \(.*no_engine\.py"):
        SamplerClient(ServerProgram(sys.executable, str(tmp_path / "no_engine.py"), {}, log, 30.0)).start()
    with pytest.raises(ServerLost, match="cannot be started"):
        SamplerClient(ServerProgram(str(tmp_path / "no_python"), str(ENGINE), {}, log, 30.0)).start()


def test_a_server_that_is_killed_at_random_moments_is_started_again_and_gives_the_same(started):
    """What the sampler does after a failure: start, all weights again, the unfinished prompts again."""
    client, asked, draw = started(), request(count=6), random.Random(5)
    push(client, 1)
    wanted, ready, kills = sample(client, 1, asked), True, 0
    for number in range(2, 12):
        found, left = {}, draw.randint(0, 9)  # 3 tensors, the end of the push, and 6 answers

        def moment():
            nonlocal left
            left -= 1
            if left == -1:
                os.kill(client.pid, signal.SIGKILL)

        while len(found) < len(asked.sizes):
            try:
                if not ready:
                    client.start()
                pushed = client.push(number, True, 1 << 14)
                for name, value in WEIGHTS.items():
                    moment()
                    pushed.add(name, value)
                moment()
                assert pushed.finish() == number
                ready, missing = True, [row for row in range(len(asked.sizes)) if row not in found]

                def take(row, group, missing=missing, found=found, number=number):
                    assert group.version == number, "responses of other weights"
                    found[missing[row]] = (group.tokens.tolist(), group.logprobs.tolist())
                    moment()

                client.sample(asked.only(missing), number, 30.0, take)
            except ServerLost as error:
                kills, ready = kills + 1, False
                assert "signal 9 ended it" in str(error) and client.pid == 0
        assert found == {row: value[:2] for row, value in wanted.items()}
    assert kills == 10


def test_a_server_dies_with_its_parent(tmp_path):
    code = f"""
import sys, time
from megatron_ral.rollout.served.client import SamplerClient, ServerProgram
from pathlib import Path
client = SamplerClient(ServerProgram(sys.executable, {str(ENGINE)!r}, {{}}, Path({str(tmp_path / "log")!r}), 30.0))
client.start()
print(client.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=PROJECT) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        assert Path(f"/proc/{server}").exists()
        os.kill(server, signal.SIGSTOP)  # it could not read that its connection has ended
        parent.kill()
        deadline = time.monotonic() + 10.0
        while (status := process_state(server)) not in ("", "Z") and time.monotonic() < deadline:
            time.sleep(0.02)
    assert status in ("", "Z")


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


# --- the connection ---------------------------------------------------------------------------------------------------


def test_only_the_connection_with_the_token_is_served(tmp_path):
    address = str(tmp_path / "socket")
    server = subprocess.Popen(
        [sys.executable, str(SERVER), "--socket", address, "--engine", str(ENGINE)]
        + ["--parent", str(os.getpid()), "--options", "{}"],
        stdin=subprocess.PIPE,
    )
    assert server.stdin is not None
    server.stdin.write(b"secret\n")
    server.stdin.close()

    def connect() -> socket.socket:
        deadline = time.monotonic() + 20.0
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(address)
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                assert time.monotonic() < deadline
                time.sleep(0.02)

    for wrong in ("", "secre", "other", None, 7):
        channel = Channel(connect())
        channel.send("hello", token=wrong)
        with pytest.raises(ChannelClosed):
            channel.receive(20.0)
    raw = connect()
    raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100)  # lengths that no message has
    assert raw.recv(10) == b""
    channel = Channel(connect())
    channel.send("hello", token="secret")
    reply = channel.receive(20.0)
    assert reply is not None and reply.kind == "hello"
    channel.send("made up")
    reply = channel.receive(20.0)
    assert reply is not None and reply.header["reason"] == "there is no request of kind made up"
    channel.close()
    assert server.wait(20.0) == 0, "the server ends with its client's connection"


@pytest.mark.parametrize(
    "header, body",
    [
        (b"{", b""),
        (b'{"kind": "a"}', b""),
        (b'{"kind": 3, "arrays": []}', b""),
        (b'{"kind": "a", "arrays": []}', b"rest"),
        (b'{"kind": "a", "arrays": [["int32", [2]]]}', b"1234"),
        (b'{"kind": "a", "arrays": [["object", [1]]]}', b"12345678"),
        (b'{"kind": "a", "arrays": [["uint8", [-1]]]}', b"1234"),
    ],
)
def test_what_is_no_message_closes_the_channel(header, body):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">IQ", len(header), len(body)) + header + body)
        with pytest.raises(ChannelClosed, match="cannot be read"):
            Channel(ours).receive(5.0)


def test_messages_arrive_whole_in_any_pieces():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        array, ticks = np.arange(300_000, dtype=np.int64).reshape(3, -1), []
        sender = Channel(theirs)
        thread = threading.Thread(target=lambda: [sender.send("a", [array[:, ::2]], name="\u00e9"), sender.send("b")])
        channel = Channel(ours, lambda: ticks.append(1))
        assert channel.receive(0.0) is None
        thread.start()
        message = channel.receive(20.0)
        assert message is not None and message.header["name"] == "\u00e9"
        assert np.array_equal(message.arrays[0], array[:, ::2])
        message = channel.receive(20.0)
        assert message is not None and message.kind == "b" and not message.arrays
        assert channel.receive(1.2) is None and ticks, "the watchdog hears of a process that waits"
        thread.join()


def test_the_files_of_the_other_environment_import_nothing_that_it_lacks():
    """They run where neither this package nor torch may be there."""
    allowed = {"channel", "numpy", *sys.stdlib_module_names}
    for name in ("server.py", "channel.py", "vllm_engine.py"):
        tree = ast.parse(SERVER.with_name(name).read_text())
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert {module.split(".")[0] for module in modules} <= allowed, name
