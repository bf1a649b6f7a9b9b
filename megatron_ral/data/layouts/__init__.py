"""Records of published data sets -> fields and media of a sample: one function per layout, chosen by the fields.

`registry.py` lists the layouts, and `draft.py` is the one way from what a layout finds to a sample.

- chat: `messages` of a user and an assistant, content as text or as parts (`text`, `image`, `video`); or text with
  `<image>` and `<video>` and the files in `images`, `videos`. Text of the system is put before the question.
- Video-R1: `problem`, `solution`, `path` (one or several files), `options`, `process`, `problem_type`, `data_type`;
  EasyR1: `problem`, `answer`, `images`.
- LLaVA, ShareGPT: `conversations` of `from` and `value`, `image`, `video`.
- verl: `prompt`, `images`, `reward_model.ground_truth`. TRL: `prompt`, `completion` or `solution`, `images`.
- ms-swift: `query`, `response`, `images`. Alpaca: `instruction`, `input`, `output`, `images`.
- V* and the other benchmarks: `question` (V* also `text`, ChartQA `query`) and `image` (MuirBench `image_list`, ChartQA
  `imgname`) or `video`; `answer` (or `label`) as text, letter or number of an option, or a list (VizWiz: `answers`) of
  several right ones; options as `options` (MVBench `candidates`, `choices`, MMBench `A`, `B`, ..); boxes as
  `target_boxes`, [x0, y0, x1, y1], or as `bbox`, [x, y, width, height].

The fields `category` (MuirBench `task`), `question_group`, `problem_type`, `fps`, `target_boxes` and `target_frames`
are copied. Several `<image>` in a text become "[image 1]", "[image 2]", because all pictures are shown before it.
"""

from megatron_ral.data.layouts.draft import RawSample
from megatron_ral.data.layouts.media import File, names_media
from megatron_ral.data.layouts.registry import read_record
from megatron_ral.data.layouts.values import record_id

__all__ = ["File", "RawSample", "names_media", "read_record", "record_id"]
