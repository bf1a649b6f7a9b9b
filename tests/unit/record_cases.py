"""Records as other programs write them, with the sample that each becomes, or the reason and the whole message."""

import base64
import json
from pathlib import Path
from typing import Any

from tests.unit.shard_faults import picture
from tests.unit.test_video import clip

RED, BLUE, JPEG = picture(56, 56), picture(56, 56, colour="blue"), picture(56, 56, "jpg", "green")
DATA_URL = "data:image/png;base64," + base64.b64encode(RED).decode()
FILES = {
    "red.png": RED,
    "blue.png": BLUE,
    "sub/green.jpg": JPEG,
    "with space.png": BLUE,
    "v.mp4": clip("mp4", 20),
    "f/1.png": RED,
    "f/2.png": BLUE,
    "f/10.png": RED,
    "f/.hidden.png": b"",
    "f/notes.txt": b"",
    "mixed/1.png": RED,
    "mixed/2.bmp": b"BM",
    "none/notes.txt": b"",
    "no_suffix": RED,
    "named.webp": JPEG,
    "clip": clip("webm", 20),
}
"""Files of --media."""


def write_media(folder: Path) -> Path:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def chat(user: Any, reply: str = "7", **more) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}], **more}


def llava(question: str, reply: str = "7", **more) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}], **more}


def asked(**more) -> dict:
    return {"question": "What?", "answer": "7", **more}


def video_r1(**more) -> dict:
    return {"problem": "What?", "solution": "<answer>7</answer>", "data_type": "image", "path": "red.png", **more}


def parts(*media: dict, text: str = "What?") -> list[dict]:
    return [*media, {"type": "text", "text": text}]


def image(value: Any = None, **more) -> dict:
    return {"type": "image", **({} if value is None else {"image": value}), **more}


def video(value: Any = None, **more) -> dict:
    return {"type": "video", **({} if value is None else {"video": value}), **more}


USER = [{"role": "user", "content": "What?"}]

# name -> record, and its sample: problem, answers, and members besides the JSON (suffix -> content)
READ: dict[str, tuple[dict, tuple[str, str], dict[str, bytes]]] = {
    # conversations of from/value
    "llava": (llava("<image>\nWhat?", image="red.png"), ("What?", "<answer>7</answer>"), {"png": RED}),
    "llava-two": (
        llava("Is <image> like <image>?", image=["red.png", "blue.png"]),
        ("Is [image 1] like [image 2]?", "<answer>7</answer>"),
        {"0.png": RED, "1.png": BLUE},
    ),
    "llava-video": (llava("<video>\nWhat?", video="v.mp4"), ("What?", "<answer>7</answer>"), {"mp4": FILES["v.mp4"]}),
    "sharegpt-system": (
        {
            "conversations": [
                {"from": "system", "value": "Look."},
                {"from": "user", "value": "<image>What?"},
                {"from": "assistant", "value": "<think>hm</think><answer>7</answer>"},
            ],
            "images": ["red.png"],
        },
        ("Look.\nWhat?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "sharegpt-column-system": (
        llava("What?", system="Look.", image="red.png"),
        ("Look.\nWhat?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "sharegpt-pairs": (
        {"system": "Look.", "conversation": [{"human": "What?", "assistant": "7"}]},
        ("Look.\nWhat?", "<answer>7</answer>"),
        {},
    ),
    "conversations-as-json-text": (
        {"conversations": json.dumps(llava("<image>What?")["conversations"]), "image": "red.png"},
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "conversations-as-columns": (
        {"conversations": {"from": ["human", "gpt"], "value": ["What?", "7"]}, "image": "red.png"},
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    # verl, TRL, ms-swift, alpaca
    "verl": (
        {
            "data_source": "geo3k",
            "prompt": [{"role": "user", "content": "<image>What?"}],
            "images": ["red.png"],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "extra_info": {"split": "train", "index": 3, "answer": "seven", "question": "?"},
        },
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "verl-text-prompt": (
        {"prompt": "What?", "reward_model": {"ground_truth": "7"}},
        ("What?", "<answer>7</answer>"),
        {},
    ),
    "verl-entries": (
        {"prompt": USER, "images": [{"image": "red.png"}], "reward_model": {"ground_truth": 7.0}},
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "verl-options": (
        {"prompt": USER, "options": ["red", "blue"], "reward_model": {"ground_truth": "blue"}},
        ("What?\nOptions:\nA. red\nB. blue", "<answer>B</answer>"),
        {},
    ),
    "verl-several-truths": (
        {"prompt": USER, "reward_model": {"ground_truth": ["7", "seven"]}},
        ("What?", "<answer>7</answer><answer>seven</answer>"),
        {},
    ),
    "trl-grpo": (
        {"prompt": USER, "image": "red.png", "solution": "<answer> 7 </answer>"},
        ("What?", "<answer> 7 </answer>"),
        {"png": RED},
    ),
    "trl-completion": (
        {
            "prompt": [{"role": "user", "content": parts(image())}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "<think>hm</think> 7"}]}],
            "images": ["red.png"],
        },
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "trl-texts": ({"prompt": "What? ", "completion": " 7"}, ("What?", "<answer>7</answer>"), {}),
    "swift-query": (
        {"query": "<image>What?", "response": "7", "images": ["red.png"], "system": "Look.", "history": []},
        ("Look.\nWhat?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "swift-messages": (
        chat("<video>What?", videos=["v.mp4"], system="Look."),
        ("Look.\nWhat?", "<answer>7</answer>"),
        {"mp4": FILES["v.mp4"]},
    ),
    "swift-grpo": (
        {"messages": USER, "solution": "7", "images": ["red.png"]},
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "roles-of-others": (
        {"messages": [{"role": "developer", "content": "Look."}, {"role": "User", "content": "What?"}]}
        | {"solution": "7"},
        ("Look.\nWhat?", "<answer>7</answer>"),
        {},
    ),
    "bot": (
        {"conversations": [{"from": "Human", "value": "What?"}, {"from": "bot", "value": "7"}]},
        ("What?", "<answer>7</answer>"),
        {},
    ),
    "empty-reply": (chat("What?", "", solution="7"), ("What?", "<answer>7</answer>"), {}),
    "system-prompt-of-a-benchmark": (
        asked(system_prompt="Look.", image="red.png"),
        ("Look.\nWhat?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "system-of-video-r1": (video_r1(system="Look."), ("Look.\nWhat?", "<answer>7</answer>"), {"png": RED}),
    "verl-with-a-problem": (
        {"problem": "How?", "prompt": USER, "reward_model": {"ground_truth": "7"}},
        ("What?", "<answer>7</answer>"),
        {},
    ),
    "verl-reward-model-as-json-text": (
        {"prompt": USER, "reward_model": json.dumps({"style": "rule", "ground_truth": "7"})},
        ("What?", "<answer>7</answer>"),
        {},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "3 and 4", "output": "7", "text": "Add. 3 and 4. 7"},
        ("Add.\n3 and 4", "<answer>7</answer>"),
        {},
    ),
    "alpaca-picture": (
        {"instruction": "<image>What?", "input": "", "output": "7", "images": ["red.png"]},
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "easy-r1": (
        {"images": ["red.png"], "problem": "<image>What?", "answer": "7"},
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "working-and-result": (
        {"problem": "What?", "solution": "3 and 4 are 7.", "answer": "7"},
        ("What?", "<answer>7</answer>"),
        {},
    ),
    "mmbench": (
        {"question": "Which?", "A": "red", "B": "blue", "C": None, "D": None, "answer": "B", "image": "red.png"},
        ("Which?\nOptions:\nA. red\nB. blue", "<answer>B</answer>"),
        {"png": RED},
    ),
    # media inside the record
    "data-url": (asked(image=DATA_URL), ("What?", "<answer>7</answer>"), {"png": RED}),
    "data-url-part": (
        chat(parts({"type": "image_url", "image_url": {"url": DATA_URL, "detail": "high"}})),
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "data-url-video": (
        asked(video="data:video/mp4;base64," + base64.b64encode(FILES["v.mp4"]).decode()),
        ("What?", "<answer>7</answer>"),
        {"mp4": FILES["v.mp4"]},
    ),
    "base64": (
        llava("<image>What?", image=base64.b64encode(JPEG).decode()),
        ("What?", "<answer>7</answer>"),
        {"jpg": JPEG},
    ),
    "base64-broken-in-lines": (
        asked(image=base64.encodebytes(RED).decode()),
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "file-url": (asked(image="file://red.png"), ("What?", "<answer>7</answer>"), {"png": RED}),
    "file-url-absolute": (asked(image="file://MEDIA/sub/green.jpg"), ("What?", "<answer>7</answer>"), {"jpg": JPEG}),
    "file-url-host": (asked(image="file://localhostMEDIA/red.png"), ("What?", "<answer>7</answer>"), {"png": RED}),
    "file-url-escaped": (asked(image="file://MEDIA/with%20space.png"), ("What?", "<answer>7</answer>"), {"png": BLUE}),
    # a list of frames as a video
    "frames-part": (
        chat(parts(video(["file://f/1.png", "f/2.png", "f/10.png"], sample_fps=2.0))),
        ("What?", "<answer>7</answer>"),
        {"frames/000000.png": RED, "frames/000001.png": BLUE, "frames/000002.png": RED},
    ),
    "frames-folder": (
        asked(video="f", fps=2.0),
        ("What?", "<answer>7</answer>"),
        {"frames/000000.png": RED, "frames/000001.png": BLUE, "frames/000002.png": RED},
    ),
    "frames-with-a-rate-as-text": (  # so written in Qwen3-VL's examples
        chat(parts(video(["f/1.png", "f/2.png"], sample_fps="2"))),
        ("What?", "<answer>7</answer>"),
        {"frames/000000.png": RED, "frames/000001.png": BLUE},
    ),
    "frames-column": (
        asked(video=["f/1.png", "f/2.png"], fps=2.0),
        ("What?", "<answer>7</answer>"),
        {"frames/000000.png": RED, "frames/000001.png": BLUE},
    ),
    "frames-nested": (
        chat("<video>What?", videos=[["f/2.png", "f/1.png"]], fps=2.0),
        ("What?", "<answer>7</answer>"),
        {"frames/000000.png": BLUE, "frames/000001.png": RED},
    ),
    "frames-video-r1": (
        video_r1(data_type="video", path=["f/1.png", "f/2.png"], fps=2.0),
        ("What?", "<answer>7</answer>"),
        {"frames/000000.png": RED, "frames/000001.png": BLUE},
    ),
    "frames-data-urls": (
        asked(video=[DATA_URL, DATA_URL], fps=2.0),
        ("What?", "<answer>7</answer>"),
        {"frames/000000.png": RED, "frames/000001.png": RED},
    ),
    # names of files say nothing
    "no-suffix": (asked(image="no_suffix"), ("What?", "<answer>7</answer>"), {"png": RED}),
    "wrong-suffix": (asked(image="named.webp"), ("What?", "<answer>7</answer>"), {"jpg": JPEG}),
    "video-without-suffix": (asked(video="clip"), ("What?", "<answer>7</answer>"), {"webm": FILES["clip"]}),
    "video-by-name": (
        {"problem": "What?", "solution": "7", "path": "v.mp4"},
        ("What?", "<answer>7</answer>"),
        {"mp4": FILES["v.mp4"]},
    ),
    # fields that would change the media, where they change nothing
    "whole-clip": (
        chat(parts(video("v.mp4", video_start=0.0, video_end=None, fps=1.0))),
        ("What?", "<answer>7</answer>"),
        {"mp4": FILES["v.mp4"]},
    ),
    "start-of-a-picture": (video_r1(start=3, end=9), ("What?", "<answer>7</answer>"), {"png": RED}),
    "rate-that-is-read": (asked(video="v.mp4", fps=1), ("What?", "<answer>7</answer>"), {"mp4": FILES["v.mp4"]}),
    # the same picture twice
    "part-and-column": (
        chat(parts(image("red.png")), images=["./red.png"]),
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "part-and-column-bytes": (
        chat(parts(image(DATA_URL)), images=[base64.b64encode(RED).decode()]),
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "two-columns": (asked(image="red.png", images=["red.png"]), ("What?", "<answer>7</answer>"), {"png": RED}),
    "path-and-column": (video_r1(images=["file://red.png"]), ("What?", "<answer>7</answer>"), {"png": RED}),
    "parts-of-columns": (
        chat(parts(image(), image()), images=["blue.png", "red.png"]),
        ("What?", "<answer>7</answer>"),
        {"0.png": BLUE, "1.png": RED},
    ),
    "twice-on-purpose": (
        asked(question="Are <image> and <image> the same?", images=["red.png", "red.png"]),
        ("Are [image 1] and [image 2] the same?", "<answer>7</answer>"),
        {"0.png": RED, "1.png": RED},
    ),
    # pictures between the texts of a message
    "parts-between-texts": (
        chat([{"type": "text", "text": "Is"}, image("red.png"), {"type": "text", "text": "like"}, image("blue.png")]),
        ("Is [image 1] like [image 2]", "<answer>7</answer>"),
        {"0.png": RED, "1.png": BLUE},
    ),
    "one-part-between-texts": (
        chat([{"type": "text", "text": "Is"}, image("red.png"), {"type": "text", "text": "red?"}]),
        ("Is red?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "parts-and-their-tags": (
        chat(parts(image("red.png"), image("blue.png"), text="Is <image> like <image>?")),
        ("Is [image 1] like [image 2]?", "<answer>7</answer>"),
        {"0.png": RED, "1.png": BLUE},
    ),
    "parts-with-an-index": (
        chat(parts(image(index=0), image(index=1), text="What?"), images=["red.png", "blue.png"]),
        ("What?", "<answer>7</answer>"),
        {"0.png": RED, "1.png": BLUE},
    ),
    "parts-without-a-type": (
        chat([{"image": "red.png"}, {"text": "What?"}]),
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "an-empty-part": (
        chat(parts(image("red.png"), {"type": "text", "text": ""})),
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    # text that speaks of the tags
    "speaks-of-the-tag": (
        asked(question="What does <image> mean in HTML, and <video>?"),
        ("What does <image> mean in HTML, and <video>?", "<answer>7</answer>"),
        {},
    ),
    "option-is-the-tag": (
        asked(question="Which is a tag?", options=["<image>", "<red>"], answer="B"),
        ("Which is a tag?\nOptions:\nA. <image>\nB. <red>", "<answer>B</answer>"),
        {},
    ),
    "declared-text": (
        video_r1(problem="<video> is a tag of what?", data_type="text", path=[]),
        ("<video> is a tag of what?", "<answer>7</answer>"),
        {},
    ),
    "escaped-beside-a-picture": (
        llava("<image>\nWho uses \\<image> here?", image="red.png"),
        ("Who uses <image> here?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "escaped-at-the-begin": (
        chat("\\<image> is a tag of what?"),
        ("<image> is a tag of what?", "<answer>7</answer>"),
        {},
    ),
    # answers
    "number-of-an-option": (
        asked(options=["red", "blue", "green"], answer=2),
        ("What?\nOptions:\nA. red\nB. blue\nC. green", "<answer>C</answer>"),
        {},
    ),
    "float-number-of-an-option": (
        asked(options=["red", "blue"], answer=1.0),
        ("What?\nOptions:\nA. red\nB. blue", "<answer>B</answer>"),
        {},
    ),
    "number-that-is-both": (
        asked(options=[0, 1, 2], answer=1),
        ("What?\nOptions:\nA. 0\nB. 1\nC. 2", "<answer>B</answer>"),
        {},
    ),
    "number-that-is-only-a-text": (
        asked(options=["3", "7"], answer=7),
        ("What?\nOptions:\nA. 3\nB. 7", "<answer>B</answer>"),
        {},
    ),
    "number-in-quotes": (
        asked(options=[1, 2, 3], answer="2"),
        ("What?\nOptions:\nA. 1\nB. 2\nC. 3", "<answer>B</answer>"),
        {},
    ),
    "options-by-letter": (
        asked(options={"A": "red", "B": "blue"}, answer="blue"),
        ("What?\nOptions:\nA. red\nB. blue", "<answer>B</answer>"),
        {},
    ),
    "options-by-letter-with-gaps-at-the-end": (  # a column of objects has all letters in every row
        asked(choices={"a": "red", "b": "blue", "c": None, "d": None}, answer="b"),
        ("What?\nOptions:\nA. red\nB. blue", "<answer>B</answer>"),
        {},
    ),
    "letter-that-is-its-own-text": (
        asked(options=["A", "B"], answer="B"),
        ("What?\nOptions:\nA. A\nB. B", "<answer>B</answer>"),
        {},
    ),
    "several-tags-with-options": (
        asked(options=["red", "blue", "green"], answer="<answer>A</answer><answer>C</answer>"),
        ("What?\nOptions:\nA. red\nB. blue\nC. green", "<answer>A</answer><answer>C</answer>"),
        {},
    ),
    "box-as-text": (asked(answer="[10, 20, 30, 40]"), ("What?", "<answer>[10, 20, 30, 40]</answer>"), {}),
    "names-in-a-description": (
        asked(image="red.png", image_info={"file_name": "coco/7.jpg", "width": 56}),
        ("What?", "<answer>7</answer>"),
        {"png": RED},
    ),
    "list-in-tags": (asked(answer='<answer>["7"]</answer>'), ("What?", '<answer>["7"]</answer>'), {}),
    "true": (asked(answer=True), ("What?", "<answer>true</answer>"), {}),
    "false-of-video-r1": (video_r1(solution=False), ("What?", "<answer>false</answer>"), {"png": RED}),
    "true-of-yes-or-no": (asked(answer=True, problem_type="yes/no"), ("What?", "<answer>yes</answer>"), {}),
    "false-among-options": (
        asked(answer=False, options=["Yes", "No"]),
        ("What?\nOptions:\nA. Yes\nB. No", "<answer>B</answer>"),
        {},
    ),
    "whole-float": (asked(answer=3.0), ("What?", "<answer>3</answer>"), {}),
    "float": (asked(answer=0.57), ("What?", "<answer>0.57</answer>"), {}),
    "zero": (asked(answer=0), ("What?", "<answer>0</answer>"), {}),
    "first-answer-is-null": (asked(answer=None, label="7"), ("What?", "<answer>7</answer>"), {}),
}

NOT_LOCAL = "is not a local file; only paths inside --media are read, so put it there and give its path"
FRAMES = "asks for other frames than the 1 per second that are read"
AS_LIST = "remove the field, or give the frames as a list of pictures"
SIZE = "asks for another size, which is the image processor's choice here"
CHANGE = "change the file itself if it is needed, and remove the field"
UNKNOWN = "which is not known here and may change the image; remove it, and change the file itself if it is meant to"
BOTH = "both name media, and not the same; remove those of one of them"
COLUMNS = "image, images, image_list, image_path, imgname"
UNREAD = f"seems to name media, but is none that is read ({COLUMNS}, video, videos, video_path); rename or remove it"
NO_PLACE = "where none is meant, or give the record data_type 'text'"
COUNTED = "and, counted from 0, the number of option"
BY_NUMBER = "; write the number of the option, counted from 0"
NO_ANSWER = "is no answer; it must be a text, a number, true or false, or a list of texts"
OTHER_OPTIONS = (
    "seem to be options, which are read from options, candidates, choices or the fields A, B, ..; rename or remove them"
)
BY_LETTER = "; write it as a letter, or as text in quotes"
_CUT = "which is not cut here; cut the file (ffmpeg -ss START -to END) and remove the field"
_ONE_TURN = "only conversations of one turn are read"
# name -> record, reason, and the message after "sample 'NAME': "
REFUSED: dict[str, tuple[dict, str, str]] = {
    "two-questions": (
        {"conversations": [{"from": role, "value": "a"} for role in ("human", "gpt", "human", "gpt")]},
        "wrong_field",
        f"more than one question; {_ONE_TURN}",
    ),
    "two-questions-in-history": (
        {"query": "What?", "response": "7", "history": [["a", "b"]]},
        "wrong_field",
        f"more than one question (in 'history'); {_ONE_TURN}",
    ),
    "assistant-first": (
        {"conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "What?"}]},
        "wrong_field",
        "the assistant speaks before the question; only one question and its answer are read",
    ),
    "role": (
        {"conversations": [{"from": "function_call", "value": "a"}]},
        "wrong_field",
        "a message has the role 'function_call', none of system, developer, user, human, assistant, gpt, chatgpt, bot, "
        "model",
    ),
    "no-answer": (
        {"prompt": USER},
        "missing_field",
        "no message of the assistant and no field 'solution'",
    ),
    "no-ground-truth": (
        {"prompt": USER, "reward_model": {"style": "rule"}},
        "missing_field",
        "no field 'ground_truth' in 'reward_model'",
    ),
    "two-replies": (
        {"messages": [*USER, {"role": "assistant", "content": "7"}, {"role": "assistant", "content": "8"}]},
        "wrong_field",
        "more than one message of the assistant; only one answer is read",
    ),
    "reply-that-calls": (
        {"messages": [*USER, {"role": "assistant", "content": "7", "tool_calls": [{"name": "zoom"}]}]},
        "wrong_field",
        "the assistant's message calls a function ('tool_calls'), which is not learned",
    ),
    "functions": (
        chat("What?", tools=[{"name": "zoom"}]),
        "wrong_field",
        "its field 'tools' lists functions, which are not shown here; remove it",
    ),
    "reply-that-is-not-learned": (
        {"messages": [*USER, {"role": "assistant", "content": "7", "loss": False}]},
        "wrong_field",
        "'loss' = False marks the assistant's message as one not to learn; remove the field, or leave the record out",
    ),
    "place-in-the-reply": (
        llava("What?", "<image> 7", image="red.png"),
        "wrong_field",
        "the assistant's message has the tag of a picture or video, but only text is learned; give the answer as "
        "'solution' if the tag is meant as text",
    ),
    "bad-reply": (
        chat("What?", label=False),
        "wrong_field",
        "its 'label' is false, which marks the reply as a bad one; leave it out",
    ),
    "layout": (
        {"caption": "red", "file": "x"},
        "missing_field",
        "the record has none of the fields of a layout that is read (chat 'messages'; verl 'prompt', "
        "'reward_model'; Video-R1 'problem'; LLaVA and ShareGPT 'conversations'; TRL 'prompt', 'completion' or "
        "'solution'; ms-swift "
        "'query', 'response'; alpaca 'instruction', 'output'; benchmarks 'question' (or 'text', 'query'), 'answer'); "
        "its fields are 'caption', 'file', 'id'",
    ),
    "http": (
        asked(image="https://host/a.png"),
        "refused_path",
        f"'https://host/a.png' {NOT_LOCAL}",
    ),
    "http-part": (
        chat(parts({"type": "image_url", "image_url": {"url": "http://host/a.png"}})),
        "refused_path",
        f"'http://host/a.png' {NOT_LOCAL}",
    ),
    "file-url-outside": (asked(image="file:///etc/hosts"), "refused_path", "'file:///etc/hosts' leads out of --media"),
    "file-url-up": (
        asked(image="file://%2e%2e/secret.png"),
        "refused_path",
        "'file://%2e%2e/secret.png' leads out of --media",
    ),
    "pipe-after-file": (
        asked(image="file://pipe:cat"),
        "refused_path",
        f"'file://pipe:cat' {NOT_LOCAL}",
    ),
    "broken-data-url": (
        asked(image="data:image/png;base64,????"),
        "wrong_field",
        "the base64 text or data: URL in 'image' is broken (Only base64 data is allowed)",
    ),
    "empty-data-url": (
        asked(image="data:image/png;base64,"),
        "wrong_field",
        "the base64 text or data: URL in 'image' is broken (it is empty)",
    ),
    "frames-and-file": (
        asked(video=["f/1.png", "v.mp4"]),
        "wrong_field",
        "'video' mixes pictures and other files; a list of pictures is one video, a list of video files several",
    ),
    "frame-outside": (asked(video=["f/1.png", "../a.png"]), "refused_path", "'../a.png' leads out of --media"),
    "frame-of-a-url": (
        asked(video=["f/1.png", "http://host/a.png"]),
        "refused_path",
        f"'http://host/a.png' {NOT_LOCAL}",
    ),
    "frame-that-is-not-there": (
        asked(video=["f/1.png", "f/3.png"]),
        "missing_media",
        "'f/3.png' cannot be read in --media (No such file or directory)",
    ),
    "two-lists-of-frames": (
        asked(videos=[["f/1.png"], ["f/2.png"]]),
        "wrong_field",
        "frames must be the only video of a sample",
    ),
    # another part, rate, size of the media
    "cut-part": (
        chat(parts(video("v.mp4", video_start=1.0, video_end=3.5))),
        "wrong_field",
        f"the question is about a part of its video ('video_start' = 1.0, 'video_end' = 3.5), {_CUT}s",
    ),
    "cut-end": (
        chat(parts(video("v.mp4", video_end=3.5))),
        "wrong_field",
        f"the question is about a part of its video ('video_end' = 3.5), {_CUT}",
    ),
    "cut-video-r1": (
        video_r1(data_type="video", path="v.mp4", start=1, end=2),
        "wrong_field",
        f"the question is about a part of its video ('start' = 1, 'end' = 2), {_CUT}s",
    ),
    "cut-llava": (
        llava("<video>What?", video="v.mp4", start_time="00:00:01"),
        "wrong_field",
        f"the question is about a part of its video ('start_time' = '00:00:01'), {_CUT}",
    ),
    "cut-verl": (
        {"prompt": USER, "videos": [{"video": "v.mp4", "video_start": 1}], "reward_model": {"ground_truth": "7"}},
        "wrong_field",
        f"the question is about a part of its video ('video_start' = 1), {_CUT}",
    ),
    "cut-swift": (
        {"query": "What?", "response": "7", "videos": ["v.mp4"], "end_frame": 4},
        "wrong_field",
        f"the question is about a part of its video ('end_frame' = 4), {_CUT}",
    ),
    "cut-message": (
        {
            **chat("<video>What?", videos=["v.mp4"]),
            "messages": [{**USER[0], "clip_start": 2}, {"role": "gpt", "content": "7"}],
        },
        "wrong_field",
        f"the question is about a part of its video ('clip_start' = 2), {_CUT}",
    ),
    "cut-camel-case": (
        asked(video="v.mp4", startTime=1, endTime=2),
        "wrong_field",
        f"the question is about a part of its video ('startTime' = 1, 'endTime' = 2), {_CUT}s",
    ),
    "cut-range": (
        asked(video="v.mp4", clip=[1, 2]),
        "wrong_field",
        f"the question is about a part of its video ('clip' = [1, 2]), {_CUT}",
    ),
    "cut-range-as-text": (
        video_r1(data_type="video", path="v.mp4", time_range="00:01-00:05"),
        "wrong_field",
        f"the question is about a part of its video ('time_range' = '00:01-00:05'), {_CUT}",
    ),
    "frames-at-no-rate": (
        asked(video=["f/1.png", "f/2.png"], fps=0),
        "wrong_field",
        "field 'fps' must be a number from 1e-06 to 1e+06, not 0",
    ),
    "folder-with-other-pictures": (
        asked(video="mixed"),
        "broken_video",
        "the folder of frames 'mixed' holds '2.bmp'; only png, jpg, jpeg, webp are read as frames",
    ),
    "folder-without-pictures": (
        asked(video="none"),
        "missing_media",
        "the folder of frames 'none' holds no picture; only png, jpg, jpeg, webp are read as frames",
    ),
    "rate-part": (
        chat(parts(video("v.mp4", fps=2.0))),
        "wrong_field",
        f"'fps' = 2.0 of its video {FRAMES}; {AS_LIST}",
    ),
    "rate-record": (
        asked(video="v.mp4", fps=30),
        "wrong_field",
        f"'fps' = 30 of its video {FRAMES}; {AS_LIST}",
    ),
    "two-rates": (
        chat(parts(video(["f/1.png"], fps=2)), fps=3),
        "wrong_field",
        "its video has several rates ('fps' = 2, 3); keep one",
    ),
    "number-of-frames": (
        chat(parts(video("v.mp4", nframes=8))),
        "wrong_field",
        f"'nframes' = 8 of 'video' {FRAMES}; {CHANGE}",
    ),
    "most-frames-of-verl": (
        {"prompt": USER, "videos": [{"video": "v.mp4", "max_frames": 8}], "reward_model": {"ground_truth": "7"}},
        "wrong_field",
        f"'max_frames' = 8 of 'videos' {FRAMES}; {CHANGE}",
    ),
    "size-part": (
        chat(parts(image("red.png", resized_height=280, resized_width=420))),
        "wrong_field",
        f"'resized_height' = 280, 'resized_width' = 420 of 'image' {SIZE}; {CHANGE}s",
    ),
    "size-place": (
        chat(parts(image(max_pixels=50176)), images=["red.png"]),
        "wrong_field",
        f"'max_pixels' = 50176 of 'image' {SIZE}; {CHANGE}",
    ),
    "size-record": (
        video_r1(min_pixels=3136),
        "wrong_field",
        f"'min_pixels' = 3136 of the record {SIZE}; {CHANGE}",
    ),
    "size-column": (
        asked(images=[{"path": "red.png", "max_pixels": 3136}]),
        "wrong_field",
        f"'max_pixels' = 3136 of 'images' {SIZE}; {CHANGE}",
    ),
    "processor-arguments": (
        chat(parts(image("red.png")), mm_processor_kwargs={"max_pixels": 3136}),
        "wrong_field",
        "'mm_processor_kwargs' = {'max_pixels': 3136} of the record asks for another treatment than the file's own "
        f"picture; {CHANGE}",
    ),
    "low-detail": (
        chat(parts({"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}})),
        "wrong_field",
        f"'image' has the field 'detail' = 'low', {UNKNOWN}",
    ),
    "turned": (
        chat(parts(image("red.png", rotate=90))),
        "wrong_field",
        f"'image' has the field 'rotate' = 90, {UNKNOWN}",
    ),
    # pictures named twice, or nowhere
    "part-and-other-column": (
        chat(parts(image("red.png")), images=["blue.png"]),
        "wrong_field",
        f"a message and a field of the record ({COLUMNS}) {BOTH}",
    ),
    "two-other-columns": (
        asked(image="red.png", images=["red.png", "blue.png"]),
        "wrong_field",
        f"the field 'image' and the field 'images' {BOTH}",
    ),
    "path-and-other-column": (
        video_r1(image="blue.png"),
        "wrong_field",
        f"the field 'path' and the field 'image' {BOTH}",
    ),
    "places-of-columns": (
        chat(parts(image(), image()), images=["red.png"]),
        "missing_media",
        f"its messages have 2 parts of type image without a file but there are 1 in the fields ({COLUMNS})",
    ),
    "unread-picture": (
        llava("What?", photo="red.png"),
        "missing_media",
        f"field 'photo' {UNREAD}",
    ),
    "unread-second-picture": (
        asked(image="red.png", image_2="blue.png"),
        "missing_media",
        f"field 'image_2' {UNREAD}",
    ),
    "unread-picture-of-a-message": (
        {"messages": [{**USER[0], "images": ["red.png"]}, {"role": "assistant", "content": "7"}]},
        "missing_media",
        f"field 'images' {UNREAD}",
    ),
    "unread-sound": (
        chat("What?", audios=["a.wav"]),
        "missing_media",
        f"field 'audios' {UNREAD}",
    ),
    "unread-pictures-of-verl": (
        {"prompt": USER, "multi_modal_data": {"image": ["red.png"]}, "reward_model": {"ground_truth": "7"}},
        "missing_media",
        f"field 'multi_modal_data' {UNREAD}",
    ),
    "index-of-another-picture": (
        chat(parts(image(index=1), image(index=0)), images=["red.png", "blue.png"]),
        "wrong_field",
        "a part of a message has 'index' = 1 but is number 0 of its kind; files are taken in the order of the parts, "
        "so put them in that order",
    ),
    "picture-in-html": (
        llava('<img src="red.png">What?'),
        "missing_media",
        "the text shows a picture ('<img src=\"red.png\">') but the record names none; name it in 'images', or give "
        "the record data_type 'text'",
    ),
    "picture-in-markdown": (
        asked(question="Look:\n![a dog](red.png)\nWhat?"),
        "missing_media",
        "the text shows a picture ('![a dog](red.png)') but the record names none; name it in 'images', or give the "
        "record data_type 'text'",
    ),
    "something-else-than-files": (
        asked(images=["red.png", None]),
        "wrong_field",
        "'images' must name files, which ['red.png', None] does not",
    ),
    "video-as-a-picture": (
        asked(image="v.mp4"),
        "broken_image",
        r"image cannot be decoded: its bytes begin with b'\x00\x00\x00 ftypisom' (an mp4 or mov video); PNG, JPEG and "
        "WebP are read",
    ),
    "picture-in-the-text": (
        llava("Picture 1: <img>red.png</img>\nWhat?"),
        "missing_media",
        "the text names a picture in <img>..</img>; name it in 'images'",
    ),
    "boxes-of-swift": (
        chat(
            "<image>Find <ref-object>.", "<bbox>", images=["red.png"], objects={"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}
        ),
        "wrong_field",
        "its text has places of its field 'objects' (<bbox>, <ref-object>), which are not filled in here; write the "
        "boxes into the text",
    ),
    "lost-picture": (
        llava("<image>\nWhat?"),
        "missing_media",
        f"the text has <image> 1 times but there are 0; write \\<image> {NO_PLACE}",
    ),
    "lost-pictures-at-the-end": (
        {"query": "Which is it? <video>", "response": "7"},
        "missing_media",
        f"the text has <video> 1 times but there are 0; write \\<video> {NO_PLACE}",
    ),
    "tag-beside-a-picture": (
        llava("<image>\nWhat does <image> mean?", image="red.png"),
        "missing_media",
        "the text has <image> 2 times but there are 1; write \\<image> where none is meant",
    ),
    "other-tag-beside-a-picture": (
        asked(question="What does <video> mean?", image="red.png"),
        "missing_media",
        "the text has <video> 1 times but there are 0; write \\<video> where none is meant",
    ),
    "declared-text-with-a-picture": (
        asked(data_type="text", image="red.png"),
        "wrong_field",
        "data_type is 'text' but the record names media",
    ),
    "declared-video": (
        asked(data_type="video", image="red.png"),
        "missing_media",
        "data_type is 'video' but the record names no video",
    ),
    # answers
    "ambiguous-number": (
        asked(options=[1, 2, 3], answer=2),
        "wrong_field",
        f"the answer 2 is the text of option B {COUNTED} C{BY_LETTER}",
    ),
    "ambiguous-number-of-lettered-options": (
        asked(options=["A. 1", "B. 2", "C. 0"], answer=1),
        "wrong_field",
        f"the answer 1 is the text of option A {COUNTED} B{BY_LETTER}",
    ),
    "ambiguous-number-of-video-r1": (
        video_r1(options=["1", "2", "3"], solution=2),
        "wrong_field",
        f"the answer 2 is the text of option B {COUNTED} C{BY_LETTER}",
    ),
    "ambiguous-number-of-verl": (
        {"prompt": USER, "options": ["1.0", "2.0"], "reward_model": {"ground_truth": 1}},
        "wrong_field",
        f"the answer 1 is the text of option A {COUNTED} B{BY_LETTER}",
    ),
    "number-of-no-option": (
        asked(options=["red", "blue"], answer=2),
        "answer_not_in_options",
        "answer 2 is none of the 2 options",
    ),
    "negative-number": (
        asked(options=["red", "blue"], answer=-1),
        "answer_not_in_options",
        "answer -1 is none of the 2 options",
    ),
    "true-of-no-option": (
        asked(options=["red", "blue"], answer=True),
        "answer_not_in_options",
        "the answer true is none of the 2 options; write it as a letter",
    ),
    "null-answer": (asked(answer=None), "missing_field", "no field 'answer'"),
    "object-as-answer": (asked(answer={"target": 7}), "wrong_field", f"'answer' = {{'target': 7}} {NO_ANSWER}"),
    "object-as-ground-truth": (
        {"prompt": USER, "reward_model": {"ground_truth": {"target": 7}}},
        "wrong_field",
        f"'ground_truth' = {{'target': 7}} {NO_ANSWER}",
    ),
    "box-as-answer": (  # VLM-R1
        asked(answer=[10, 20.5, 30, 40]),
        "wrong_field",
        "'answer' = [10, 20.5, 30, 40] is a list of numbers, one answer or several; write it as text, or "
        "<answer>..</answer> around each if one is enough",
    ),
    "infinite-answer": (asked(answer=float("inf")), "wrong_field", f"'answer' = inf {NO_ANSWER}"),
    "list-written-as-text": (
        asked(answer="['7']"),
        "wrong_field",
        "'answer' = \"['7']\" is a list written as text; give a list, or put <answer>..</answer> around a text that is "
        "meant itself",
    ),
    "list-of-answers-with-options": (
        asked(options=["red", "blue", "green"], answer=["A", "C"]),
        "wrong_field",
        "'answer' = ['A', 'C'] is a list of answers to a question with options; write 'A, C' if they are right "
        "together, or <answer>..</answer> around each if one is enough",
    ),
    "letter-that-is-the-text-of-another": (
        asked(options=["B", "A"], answer="A"),
        "wrong_field",
        f"the answer A is the letter of option A and the text of option B{BY_NUMBER}",
    ),
    "letter-in-a-tag-that-is-the-text-of-another": (
        video_r1(options=["b", "c", "a"], solution="<answer>B</answer>"),
        "wrong_field",
        f"the answer B is the letter of option B and the text of option A{BY_NUMBER}",
    ),
    "number-of-numbered-options": (
        asked(options=["1. red", "2. blue", "3. green"], answer=2),
        "wrong_field",
        "the answer 2 may count from 0 or be a number of the options' own ('1. red'); write it as a letter",
    ),
    "options-in-another-order": (
        asked(options=["B. red", "A. blue"], answer="A"),
        "wrong_field",
        "the options have the letters B, A; put them in the order of the letters",
    ),
    "columns-with-a-gap": (
        asked(A="red", B="", C="blue", answer="C"),
        "wrong_field",
        "its options have the letters A, C, with a gap; letter them anew, the answer too",
    ),
    "columns-of-another-name": (
        asked(option_a="red", option_b="blue", answer="b"),
        "wrong_field",
        f"the fields 'option_a', 'option_b' {OTHER_OPTIONS}",
    ),
    "columns-of-next-qa": (
        asked(a0="red", a1="blue", answer=0),
        "wrong_field",
        f"the fields 'a0', 'a1' {OTHER_OPTIONS}",
    ),
    "list-of-options-of-another-name": (
        video_r1(answer_choices=["red", "blue"]),
        "wrong_field",
        f"the fields 'answer_choices' {OTHER_OPTIONS}",
    ),
    "options-as-text": (  # MMMU
        asked(options="['red', 'blue']", answer="A"),
        "wrong_field",
        "'options' must be a list of texts, or an object of the letters A, B, .., not \"['red', 'blue']\"",
    ),
    "options-of-arc": (
        asked(choices={"text": ["red"], "label": ["A"]}, answer="A"),
        "wrong_field",
        "'options' must be a list of texts, or an object of the letters A, B, .., "
        "not {'text': ['red'], 'label': ['A']}",
    ),
}
