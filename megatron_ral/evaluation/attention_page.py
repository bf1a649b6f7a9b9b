"""HTML page of `megatron-ral attention`: one file that loads nothing from elsewhere.

Attention masses are stored as 16-bit numbers: for each response token and layer a row over visual tokens, scaled by its
maximum. A few lines of JavaScript draw them as a grid of one pixel per visual token, which the browser stretches over
the picture.
"""

import base64
import io
import json
from dataclasses import dataclass
from html import escape
from typing import Mapping, Sequence

import numpy as np
from PIL import Image

from megatron_ral.evaluation.attention_pictures import Panel

ONE_SIDE, MANY_SIDE = 448, 176
"""Pixels of the longer side of a single image, and of each of several images."""


@dataclass(frozen=True)
class PageSample:
    """Content of one section of the page."""

    key: str
    question: str
    reference: str
    completion: str
    reward: float
    components: Mapping[str, float]
    tokens: Sequence[str]
    deciding_token: int
    """Index of the token whose row predicts the first token of the answer. -1: there is none."""
    masses: Mapping[int, np.ndarray]
    """Layer -> share of each token's attention, [tokens, visual tokens]."""
    target: np.ndarray
    """Visual tokens on the target, [visual tokens] bool."""
    panels: Sequence[Panel]
    """Images and frames to show."""
    num_panels: int
    """Number of all images and frames of the sample."""

    def target_mass(self, layer: int) -> np.ndarray:
        """Return each token's attention mass on the target, [tokens]."""
        return self.masses[layer][:, self.target].sum(axis=1)

    def visual_mass(self, layer: int) -> np.ndarray:
        """Return each token's attention mass on all visual tokens, [tokens]."""
        return self.masses[layer].sum(axis=1)

    def target_share(self, layer: int) -> np.ndarray:
        """Return each token's attention on the target divided by its attention on all visual tokens, [tokens]."""
        return self.target_mass(layer) / np.maximum(self.visual_mass(layer), 1e-30)


def page(samples: Sequence[PageSample], title: str, notes: Sequence[str]) -> str:
    """Return the whole page as HTML.

    Args:
        samples: at least one, all with the same layers.
        title: heading.
        notes: paragraphs below the heading.
    """
    sections = "\n".join(_section(number, sample) for number, sample in enumerate(samples))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        + "".join(f"<p>{escape(note)}</p>\n" for note in notes)
        + _overview(samples)
        + sections
        + f"\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def _overview(samples: Sequence[PageSample]) -> str:
    """Return tables of the mean reward, and of mean masses by layer (over tokens, then over samples)."""
    names = list(samples[0].components)
    columns = [
        [sample.reward for sample in samples],
        *([sample.components[name] for sample in samples] for name in names),
    ]
    rewards = "".join(f"<td>{np.mean(column):.3f}</td>" for column in columns)
    annotated = [sample for sample in samples if sample.target.any()]
    rows = []
    for layer in samples[0].masses:
        visual = np.mean([sample.visual_mass(layer).mean() for sample in samples])
        cells = f"<th>{layer}</th><td>{visual:.4f}</td>"
        if annotated:
            mass = np.mean([sample.target_mass(layer).mean() for sample in annotated])
            share = np.mean([sample.target_share(layer).mean() for sample in annotated])
            peak = np.mean([sample.target_share(layer).max() for sample in annotated])
            chance = np.mean([sample.target.mean() for sample in annotated])
            decided = [sample for sample in annotated if sample.deciding_token >= 0]
            deciding = "–"
            if decided:
                deciding = f"{np.mean([sample.target_share(layer)[sample.deciding_token] for sample in decided]):.4f}"
            cells += f"<td>{mass:.4f}</td><td>{share:.4f}</td><td>{deciding}</td><td>{peak:.4f}</td>"
            cells += f"<td>{chance:.4f}</td>"
        else:
            cells += "<td>–</td>" * 5
        rows.append(f"<tr>{cells}</tr>")
    return (
        f'<table class="rewards"><caption>Mean over {len(samples)} samples</caption><tr><th>reward</th>'
        + "".join(f"<th>{escape(name)}</th>" for name in names)
        + f"</tr><tr>{rewards}</tr></table>\n"
        '<table class="overview"><caption>Attention, mean over response tokens, then over samples (target: over the '
        f"{len(annotated)} annotated)</caption><tr><th>layer</th><th>visual mass</th><th>target mass</th>"
        "<th>target / visual</th><th>at deciding tokens</th><th>largest of a response</th>"
        "<th>target's share of visual tokens</th></tr>" + "".join(rows) + "</table>\n"
    )


def _section(number: int, sample: PageSample) -> str:
    components = "".join(f"<dt>{escape(name)}</dt><dd>{value:g}</dd>" for name, value in sample.components.items())
    tokens = "".join(
        f'<span class="token{" deciding" * (index == sample.deciding_token)}" tabindex="0">'
        f"{escape(_visible(token))}</span>"
        for index, token in enumerate(sample.tokens)
    )
    last = max(sample.masses)
    options = "".join(f"<option{' selected' * (layer == last)}>{layer}</option>" for layer in sample.masses)
    side = ONE_SIDE if sample.num_panels == 1 else MANY_SIDE
    shown = (
        ""
        if len(sample.panels) == sample.num_panels
        else (
            f"<p>{len(sample.panels)} of {sample.num_panels} images and frames are shown: targets, and those with most "
            "attention.</p>"
        )
    )
    return f"""<section class="sample" id="sample-{number}">
<h2>{number + 1}. {escape(sample.key)}</h2>
<dl><dt>question</dt><dd class="question">{escape(sample.question)}</dd>
<dt>reference</dt><dd class="reference">{escape(sample.reference)}</dd>
<dt>completion</dt><dd class="completion">{escape(sample.completion)}</dd></dl>
<dl class="scores"><dt>reward</dt><dd>{sample.reward:g}</dd>{components}</dl>
<p><label>layer <select class="layer">{options}</select></label>
<label>overlay <input class="opacity" type="range" min="0" max="100" value="60"></label>
<button class="mean" type="button">mean of all tokens</button> <output></output></p>
<p class="tokens">{tokens}</p>{shown}
<div class="panels">{"".join(_figure(panel, side) for panel in sample.panels)}</div>
<details><summary>mass per token and layer</summary><div class="wide">{_table(sample)}</div></details>
<script type="application/json" class="masses">{_data(sample)}</script>
</section>"""


def _figure(panel: Panel, side: int) -> str:
    """Return a picture as a data URI with its grid on top and its target boxes framed, in percent of the picture."""
    width, height = panel.image.size
    shown = panel.image if max(width, height) <= side else panel.scaled(side, Image.Resampling.LANCZOS).image
    boxes = "".join(
        f'<span class="target" style="left:{100 * x0 / width:.2f}%;top:{100 * y0 / height:.2f}%;'
        f'width:{100 * (x1 - x0) / width:.2f}%;height:{100 * (y1 - y0) / height:.2f}%"></span>'
        for x0, y0, x1, y1 in panel.boxes
    )
    (rows, columns), cells = panel.cells.shape, " ".join(map(str, panel.cells.flatten()))
    return (
        f'<figure class="{"asked" if panel.boxes else "plain"}" style="width:{round(side * min(1, width / height))}px">'
        f'<div class="picture"><img alt="{escape(panel.label)}" src="{_data_uri(shown)}">'
        f'<canvas width="{columns}" height="{rows}" data-cells="{cells}"></canvas>{boxes}</div>'
        f"<figcaption>{escape(panel.label)}</figcaption></figure>"
    )


def _data_uri(image: Image.Image) -> str:
    """Return an image as a PNG where that is small (drawings), else as a JPEG."""
    stream, kind = io.BytesIO(), "png"
    image.save(stream, "PNG", optimize=True)
    if stream.tell() > 30_000:
        stream, kind = io.BytesIO(), "jpeg"
        image.convert("RGB").save(stream, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _table(sample: PageSample) -> str:
    """Return a table with a row per token: target mass and visual mass of each layer."""
    head = "".join(f'<th colspan="2">layer {layer}</th>' for layer in sample.masses)
    names = "<th>target</th><th>visual</th>" * len(sample.masses)
    columns = [values for layer in sample.masses for values in (sample.target_mass(layer), sample.visual_mass(layer))]
    rows = "".join(
        f"<tr><td>{escape(_visible(token))}</td>"
        + "".join(f"<td>{column[index]:.4f}</td>" for column in columns)
        + "</tr>"
        for index, token in enumerate(sample.tokens)
    )
    return f'<table class="tokens-by-layer"><tr><th rowspan="2">token</th>{head}</tr><tr>{names}</tr>{rows}</table>'


def _data(sample: PageSample) -> str:
    """Return masses by layer as JSON: `peaks` [tokens] and `rows`, base64 of little-endian uint16 [tokens, visual
    tokens].

    mass = rows * peak / 65535.
    """
    layers = {}
    for layer, masses in sample.masses.items():
        peaks = masses.max(axis=1, initial=0.0)
        scaled = np.round(masses / np.maximum(peaks, 1e-30)[:, None] * 65535).astype("<u2")
        layers[str(layer)] = {
            "peaks": [float(f"{peak:.6g}") for peak in peaks],
            "rows": base64.b64encode(scaled).decode(),
        }
    target = np.flatnonzero(sample.target).tolist()
    return json.dumps({"visual": len(sample.target), "target": target, "layers": layers}).replace("</", "<\\/")


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:1.5em auto;max-width:1180px;padding:0 1em;color:#1b1b1b;background:#fff}
section{border-top:1px solid #bbb;margin-top:2em}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15em 1em;margin:.6em 0}
dl.scores{display:flex;flex-wrap:wrap}dl.scores dd{margin-right:1em}
dt{color:#666}dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.15em .6em;text-align:right}
caption{text-align:left;color:#666}.wide{overflow-x:auto}
.tokens{line-height:2}
.token{font-family:monospace;border:1px solid #ccc;border-radius:3px;padding:.1em .2em;margin:1px;cursor:pointer}
.token.deciding{border:3px solid #1b1b1b}
.token.chosen{outline:2px solid #06c}
.panels{display:flex;flex-wrap:wrap;gap:10px}figure{margin:0}figcaption{text-align:center;color:#666;font-size:12px}
figure.asked figcaption{color:#000;font-weight:bold}
.picture{position:relative;line-height:0}.picture img{width:100%;image-rendering:pixelated}
.picture canvas{position:absolute;inset:0;width:100%;height:100%;image-rendering:pixelated;opacity:.6}
.target{position:absolute;box-sizing:border-box;border:3px solid #fff;outline:1px solid #000}
label{margin-right:1.2em}
"""

_SCRIPT = """
for (const section of document.querySelectorAll('section.sample')) {
  const data = JSON.parse(section.querySelector('.masses').textContent);
  const tokens = [...section.querySelectorAll('.token')], select = section.querySelector('.layer');
  const rows = {};
  for (const [layer, part] of Object.entries(data.layers)) {
    const bytes = Uint8Array.from(atob(part.rows), c => c.charCodeAt(0)), view = new DataView(bytes.buffer);
    rows[layer] = part.peaks.map((peak, t) => Float32Array.from({length: data.visual},
      (_, v) => view.getUint16(2 * (t * data.visual + v), true) * peak / 65535));
  }
  const sum = (row, places) => places.reduce((total, place) => total + row[place], 0);
  let chosen = -1;                                   // -1: the mean of all tokens
  function draw(token) {
    const all = rows[select.value], everywhere = [...Array(data.visual).keys()];
    const mean = () => Float32Array.from(everywhere, v => all.reduce((total, row) => total + row[v], 0) / all.length);
    const row = token >= 0 ? all[token] : mean();
    const peak = Math.max(...row, 1e-30);
    for (const canvas of section.querySelectorAll('canvas')) {
      const image = new ImageData(canvas.width, canvas.height), cells = canvas.dataset.cells.split(' ');
      for (let cell = 0; cell < canvas.width * canvas.height; cell++) {
        const level = 3 * row[cells[cell]] / peak;  // black, red, yellow, white
        for (let c = 0; c < 3; c++) image.data[4 * cell + c] = 255 * Math.min(Math.max(level - c, 0), 1);
        image.data[4 * cell + 3] = 255;
      }
      canvas.getContext('2d').putImageData(image, 0, 0);
    }
    const percent = value => (100 * value).toFixed(2) + ' %';
    section.querySelector('output').textContent = (token >= 0 ? 'token ' + (token + 1) : 'mean') + ': visual mass ' +
      percent(sum(row, everywhere)) + (data.target.length ? ', target mass ' + percent(sum(row, data.target)) : '') +
      ', brightest cell ' + percent(peak);
    tokens.forEach((cell, index) => cell.classList.toggle('chosen', index === token));
  }
  tokens.forEach((cell, index) => {
    cell.addEventListener('mouseenter', () => draw(index));
    cell.addEventListener('focus', () => draw(index));
    cell.addEventListener('click', () => { chosen = index; draw(index); });
    cell.addEventListener('mouseleave', () => draw(chosen));
  });
  function tint() {  // redder tokens look more at the target (or, without one, the picture)
    const places = data.target.length ? data.target : [...Array(data.visual).keys()];
    const masses = rows[select.value].map(row => sum(row, places)), most = Math.max(...masses, 1e-30);
    tokens.forEach((cell, index) => { cell.style.background = `rgba(230,80,0,${0.6 * masses[index] / most})`; });
  }
  select.addEventListener('change', () => { tint(); draw(chosen); });
  section.querySelector('.mean').addEventListener('click', () => { chosen = -1; draw(-1); });
  section.querySelector('.opacity').addEventListener('input', event =>
    section.querySelectorAll('canvas').forEach(canvas => { canvas.style.opacity = event.target.value / 100; }));
  tint(); draw(-1);
}
"""
