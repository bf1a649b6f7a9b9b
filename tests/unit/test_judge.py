"""The judge of the example, against a small server: ratings, retries, time limit, and what is counted as an error."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_ral.config.sections import RewardConfig, RewardFunctionConfig
from megatron_ral.demo import judge
from megatron_ral.rewards.score import reward_parts, score_response

GOOD = "<think>red</think><answer>7</answer>"


class Server(ThreadingHTTPServer):
    """Server that gives the answers it was told, one after the other, and the last one for ever."""

    daemon_threads = True
    answers: list
    requests: list


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if answer == "hang":
            time.sleep(30)
        status, text = (answer, "{}") if isinstance(answer, int) else (200, answer)
        if status == 200 and not text.startswith("raw:"):
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.removeprefix("raw:").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server(("127.0.0.1", 0), Handler)
    server.answers, server.requests = ["8"], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("JUDGE_MODEL", "a-judge")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(judge, "BACKOFF_SECONDS", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_rating_is_asked_for_and_read(server, monkeypatch):
    assert judge.rating(GOOD, "<answer>7</answer>", "") == 0.8
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    assert judge.rating(GOOD, "7", "", "Which digit is red?") == 0.8
    (path, without, body), (_, with_key, asked) = server.requests
    assert (path, without, with_key) == ("/v1/chat/completions", None, "Bearer word")
    assert body["model"] == "a-judge" and body["temperature"] == 0.0
    assert "Which digit is red?" in asked["messages"][0]["content"]
    assert GOOD in body["messages"][0]["content"] and "<answer>7</answer>" in body["messages"][0]["content"]


@pytest.mark.parametrize("answers", [[503, 429, "8"], ["8"], [500, 502, 504, "8"]])
def test_a_server_that_answers_later_is_asked_again(server, answers):
    server.answers = list(answers)
    assert judge.rating(GOOD, "7", "") == 0.8 and len(server.requests) == len(answers)


@pytest.mark.parametrize(
    "answer, times, said",
    [
        (503, 4, "no answer of the judge in time (status 503)"),
        (401, 1, "the judge refused the request (status 401)"),
        (404, 1, "the judge refused the request (status 404)"),
        ("no idea", 1, "the judge replied 'no idea', which is no number from 0 to 10"),
        ("11", 1, "the judge replied '11', which is no number from 0 to 10"),
        ("raw:<html>", 1, "the judge answered b'<html>', which is no chat completion"),
        ('raw:{"choices": []}', 1, "the judge answered b'{\"choices\": []}', which is no chat completion"),
    ],
)
def test_what_is_no_rating_is_told(server, answer, times, said):
    server.answers = [answer]
    with pytest.raises(judge.NoRating) as error:
        judge.rating(GOOD, "7", "")
    assert str(error.value) == said and len(server.requests) == times


def test_a_server_that_does_not_answer_costs_the_time_limit(server, monkeypatch):
    server.answers = ["hang"]
    monkeypatch.setenv("JUDGE_SECONDS", "0.2")
    with pytest.raises(judge.NoRating, match=r"no answer of the judge in time \(TimeoutError: timed out\)"):
        judge.rating(GOOD, "7", "")


def test_no_server_is_told(monkeypatch, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(judge.NoRating, match=r"no answer of the judge in time \(URLError: .*refused"):
        judge.rating(GOOD, "7", "")


@pytest.mark.parametrize(
    "reply, value", [("8", 0.8), (" 10 ", 1.0), ("0", 0.0), ("7.5", 0.75), ("Rating: 6/10.", 0.6), ("**9**", 0.9)]
)
def test_replies_that_are_read(reply, value):
    assert judge.read_rating(reply) == pytest.approx(value)


@pytest.mark.parametrize("reply", ["", "12", "10.5", "-1", "7 or 8", "8 apples and 3 pears", "8 of 100"])
def test_replies_that_are_none(reply):
    with pytest.raises(judge.NoRating):
        judge.read_rating(reply)


def test_a_rating_that_failed_is_a_counted_error(server, monkeypatch):
    """The reward runs in a process of its own, which began before this test: its environment has no judge."""
    settings = RewardConfig(functions={"judge": RewardFunctionConfig("megatron_ral.demo.judge:rating", 0.5)})
    from megatron_ral.rewards import score

    monkeypatch.setattr(score, "_OWN", score.FunctionProcess())
    server.answers = ["8", 400]
    parts = reward_parts(settings, time_limit=60.0)
    rated, failed = (score_response(GOOD, "7", "", parts) for _ in range(2))
    assert rated.reward == pytest.approx(1.0 + 0.5 * 0.8) and rated.components["error"] == 0.0
    assert failed.reward == pytest.approx(1.0) and failed.components["error"] == 1.0
    assert failed.problems == ("reward 'judge': NoRating: the judge refused the request (status 400)",)
