"""Heat maps of the row that predicts the answer, over the picture of a search task.

Shared by `tools/attention_before_after.py` and `tools/explore_tiny.py`.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # importing them loads the engine
    from megatron_ral.evaluation.attention_page import PageSample
    from megatron_ral.evaluation.attention_pictures import Panel


def picture_shares(sample: "PageSample", layer: int) -> np.ndarray:
    """Return [visual tokens] shares, sum 1, of the deciding row's attention to the picture."""
    row = sample.masses[layer][sample.deciding_token]
    return row / row.sum()


def given_answer(sample: "PageSample") -> str:
    """Return the text between the answer tags, or a question mark."""
    found = re.search(r"<answer>(.*?)</answer>", sample.completion)
    return found[1] if found else "?"


def is_right(sample: "PageSample") -> bool:
    """Return whether the answer is the reference."""
    return given_answer(sample) == sample.reference


def draw_picture(axis: Any, panel: "Panel", grey: bool = False) -> None:
    """Draw the picture with the asked cell framed.

    Args:
        axis: axes of matplotlib.
    """
    from matplotlib.patches import Rectangle

    axis.set(xticks=[], yticks=[])
    x0, y0, x1, y1 = panel.boxes[0]
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec="w", lw=4))
    image = panel.image.convert("L") if grey else panel.image
    axis.imshow(image, extent=(0, panel.image.width, panel.image.height, 0), cmap="gray" if grey else None)


def draw_heat_map(axis: Any, sample: "PageSample", layer: int, font_size: float) -> Any:
    """Draw a response's attention over its picture, with the verdict below; return the image for a colour bar.

    Args:
        axis: axes of matplotlib.
        sample: a response with a deciding row.
        font_size: points, of the shares in the cells and of the verdict.
    """
    panel = sample.panels[0]
    draw_picture(axis, panel, grey=True)
    width, height = panel.image.size
    cells = panel.tokens(picture_shares(sample, layer))
    heat = axis.imshow(cells, extent=(0, width, height, 0), cmap="inferno", vmin=0, vmax=1, alpha=0.75)
    for (y, x), share in np.ndenumerate(cells):
        place = ((x + 0.5) * width / cells.shape[1], (y + 0.9) * height / cells.shape[0])
        colour = "black" if share > 0.7 else "white"
        axis.text(*place, f"{share:.0%}", color=colour, ha="center", fontsize=font_size, fontweight="bold")
    right = is_right(sample)
    verdict = f"answers {given_answer(sample)}: {'right' if right else 'wrong'}"
    axis.set_xlabel(verdict, fontsize=font_size, color="tab:green" if right else "tab:red")
    return heat
