"""Example of a reward function: a judge behind an OpenAI-compatible server (vLLM, SGLang, ..) rates each response.

    JUDGE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=NAME ... reward.functions='{judge:
        {path: "megatron_ral.demo.judge:rating", weight: 0.2}}'

Environment: JUDGE_URL, JUDGE_MODEL, JUDGE_SECONDS (limit of one rating with its retries, 20 by default), JUDGE_RETRIES
(3 by default) and OPENAI_API_KEY where the server wants one. Keep JUDGE_SECONDS below 70 % of
watchdog.timeout_seconds, so that a server that does not answer costs a rating and not the run.

A rating that cannot be had raises. Its part of the reward is then 0, the response counts in `rewards/error/mean`, and
the log shows the reason. Copy the file, and change `question` and `read_rating` to your needs.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request

BACKOFF_SECONDS = 0.5
"""Wait before the first retry. It doubles with each."""
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer later. Others will not change."""


class NoRating(Exception):
    """The judge gave no rating. The text says why."""


def rating(completion: str, solution: str, problem_type: str, problem: str = "") -> float:
    """Return the judge's rating of a response, in [0, 1].

    Raises:
        NoRating: The judge did not answer in time, refused the request, or gave no rating.
    """
    deadline = time.monotonic() + float(os.environ.get("JUDGE_SECONDS", "20"))
    wait, reason = BACKOFF_SECONDS, ""
    for attempt in range(1 + int(os.environ.get("JUDGE_RETRIES", "3"))):
        if attempt:
            time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
            wait *= 2
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return read_rating(_ask(question(completion, solution, problem), left))
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}"
            if error.code not in _RETRIED:
                raise NoRating(f"the judge refused the request ({reason})") from None
        except (OSError, http.client.HTTPException) as error:  # no connection, no answer in time
            reason = f"{type(error).__name__}: {error}"
    raise NoRating(f"no answer of the judge in time ({reason or 'JUDGE_SECONDS is too short'})")


def question(completion: str, solution: str, problem: str) -> str:
    """Return the text that the judge is asked."""
    return (
        "Rate how well the reasoning of the response supports its answer, from 0 (not at all) to 10 (fully). Reply "
        f"with the number alone.\n\nQuestion: {problem}\n\nReference answer: {solution}\n\nResponse:\n{completion}"
    )


def read_rating(reply: str) -> float:
    """Return the rating in a reply, a number from 0 to 10, as a number in [0, 1].

    Raises:
        NoRating: The reply is no such number.
    """
    found = re.fullmatch(r"[^\d-]{0,20}(10|[0-9])(?:\.([0-9]{1,4}))?(?:\s*/\s*10)?\W*", reply.strip())
    value = float(f"{found[1]}.{found[2] or 0}") if found else -1.0
    if not 0.0 <= value <= 10.0:
        raise NoRating(f"the judge replied {reply[:80]!r}, which is no number from 0 to 10")
    return value / 10


def _ask(text: str, seconds: float) -> str:
    """Return the judge's reply to one message.

    Raises:
        OSError: no connection, or no answer in time; an HTTPError for a status other than 200.
        NoRating: the answer is not that of a chat completion.
    """
    body = {
        "model": os.environ["JUDGE_MODEL"],
        "messages": [{"role": "user", "content": text}],
        "temperature": 0.0,
        "max_tokens": 16,
    }
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    request = urllib.request.Request(
        f"{os.environ['JUDGE_URL'].rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        deadline, content = time.monotonic() + seconds, b""
        while part := answer.read1():
            content += part
            if time.monotonic() > deadline:
                raise TimeoutError("the answer comes too slowly")
    try:
        return str(json.loads(content)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError):
        raise NoRating(f"the judge answered {content[:80]!r}, which is no chat completion") from None
