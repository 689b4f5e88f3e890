"""Writes report.html: metrics, images, videos and charts of a run in one self-contained file."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from .. import configs
from ..datasets import scenes
from ..system import files, progress
from ..training import runlog
from ..vis import charts
from . import lpips, results, tables
from .metrics import METRICS
from .table_data import digits

NAME = 'report.html'  # In the run's eval/ folder.
VIDEOS = ('color.mp4', 'depth.mp4', 'normals.mp4')  # In its render/ folder.
MAPS = ('depth', 'error', 'opacity', 'normals')  # Optional pictures beside truth and prediction.
_WIDTHS = (960, 640, 480, 320)  # Candidate widths of pictures; the largest that fits is used.
_PICTURE_BYTES = 16_000_000  # Limit on all pictures together, before base64 adds a third.
_VIDEO_BYTES = 10_000_000
_PAGE = os.path.join('export', 'page.html')  # In the run's folder.
_PAGE_BYTES = 10_000_000
_TEMPLATE = 'html_report.html.jinja'
_LABELS = {
  'psnr': 'PSNR',
  'ssim': 'SSIM',
  'cc_psnr': 'PSNR, colour-corrected',
  'cc_ssim': 'SSIM, colour-corrected',
  'lpips_paper': 'LPIPS (paper)',
  'lpips_vgg': 'LPIPS (VGG)',
}


@dataclasses.dataclass(frozen=True)
class Shown:
  """A test image on the page."""

  name: str
  place: str  # 'best', 'median' or 'worst' by PSNR, or ''.
  metrics: Mapping[str, float | None]
  pictures: Mapping[str, str]  # data: URLs by kind.


def write(run: str, settings: configs.Settings, scene: scenes.Scene) -> str:
  """Writes RUN/eval/report.html from the files in a run's folder; returns its path.

  Raises:
    ResultsError: results.json is missing or invalid.
  """
  folder = os.path.join(run, 'eval')
  found = results.read(os.path.join(folder, 'results.json'))
  rows = runlog.read_metrics(os.path.join(run, 'metrics.jsonl'))
  images, notes = _read_images(folder, found['per_image'], scene)
  videos, video_notes = _read_videos(os.path.join(run, 'render'))
  page, link = _read_page(run)
  of_steps, step_notes = results.read_steps(run)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
  )  # fmt: skip
  environment.filters['metric'] = _number
  shown = [name for name, value in found['mean'].items() if value is not None]
  text = environment.get_template(_TEMPLATE).render(
    found=found,
    scene=found['scene'] or 'scene',
    labels=_LABELS,
    better={name: tables.HIGHER_IS_BETTER[name] for name in shown},
    images=images,
    maps=MAPS,
    videos=videos,
    page=page,
    link=link,
    notes=[
      *(f'Warning: {w}' for w in found.get('capture_warnings', ())),
      *(*notes, *video_notes, *step_notes),
    ],
    charts=_make_charts(rows, of_steps),
    facts=_facts(found, rows, scene),
    published=_published(found, os.path.join(folder, 'results.json')),
    config=settings.text,
  )
  path = os.path.join(folder, NAME)
  files.write_text(path, text)
  return path


def _number(value: float | None, name: str) -> str:
  """Formats a metric with the usual number of digits."""
  return '–' if value is None else f'{value:.{digits(name)}f}'


def _webp(path: str, width: int) -> bytes:
  """Encodes a picture at most `width` wide; b'' if it cannot be read."""
  out = io.BytesIO()
  try:
    with open(path, 'rb') as f:  # Damaged lengths cannot read beyond the content.
      content = io.BytesIO(f.read())
    with Image.open(content) as picture:
      picture = picture.convert('RGB')
      if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
      picture.save(out, 'webp', quality=82, method=2)
  except Exception:  # Decoders raise many types.
    return b''
  return out.getvalue()


def _data(kind: str, content: bytes) -> str:
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def _read_images(
  folder: str, per_image: Sequence[Mapping[str, Any]], scene: scenes.Scene
) -> tuple[list[Shown], list[str]]:
  """Reads the test images with their pictures, and notes on pictures left out.

  The best, the median and the worst come first, then the others, worst first.
  """
  stems = {name: scene.stem(i) for i, name in enumerate(scene.names)}
  paths = []
  for k, row in enumerate(per_image):
    stem = os.path.join(folder, f'{k:03d}_{stems.get(row["name"])}_')
    kinds = {kind: f'{stem}{kind}.png' for kind in ('truth', 'prediction', *MAPS)}
    kinds = {kind: path for kind, path in kinds.items() if os.path.exists(path)}
    if 'opacity' in kinds and _is_constant(kinds['opacity']):
      del kinds['opacity']
    paths.append(kinds)
  width = _choose_width([path for of_one in paths for path in of_one.values()])
  shown, used, without, damaged = [], 0, 0, []
  places = _places([row['psnr'] for row in per_image])
  for k, place in progress.track(places, 'report'):
    pictures = {kind: _webp(path, width) for kind, path in paths[k].items()}
    damaged += [paths[k][kind] for kind, content in pictures.items() if not content]
    pictures = {kind: content for kind, content in pictures.items() if content}
    used += sum(map(len, pictures.values()))
    if used > _PICTURE_BYTES or 'prediction' not in pictures:
      pictures, without = {}, without + 1
    addresses = {kind: _data('image/webp', content) for kind, content in pictures.items()}
    row = per_image[k]
    metrics = {name: row[name] for name in (*METRICS, *lpips.METRICS)}
    shown.append(Shown(row['name'], place, metrics, addresses))
  notes = []
  if without:
    notes.append(
      f'{without} of {len(paths)} test images are listed without pictures: the page would be too '
      'large, or there are none (Config.eval_save_output). What there is lies beside this file.'
    )
  if damaged:
    notes.append(f'Pictures that cannot be read are left out: {", ".join(damaged)}.')
  return shown, notes


def _places(psnr: Sequence[float | None]) -> list[tuple[int, str]]:
  """Returns the rows in the order of the page, each with its place.

  Args:
    psnr: of each image; None is infinite.
  """
  worst_first = sorted(range(len(psnr)), key=lambda k: math.inf if psnr[k] is None else psnr[k])
  if len(psnr) < 2:
    return [(k, '') for k in worst_first]
  first = {worst_first[-1]: 'best', worst_first[len(psnr) // 2]: 'median', worst_first[0]: 'worst'}
  first[worst_first[-1]] = 'best'  # Of two images, it is also the median.
  return [*first.items(), *((k, '') for k in worst_first if k not in first)]


def _is_constant(path: str) -> bool:
  """Returns whether a picture has one grey level, up to rounding; False if it cannot be read."""
  try:
    with Image.open(path) as picture:
      low, high = picture.convert('L').getextrema()
  except Exception:  # Decoders raise many types; the page names damaged pictures.
    return False
  return high - low <= 1


def _choose_width(paths: Sequence[str]) -> int:
  """Returns the largest of _WIDTHS with which all pictures should fit, judged by a sample."""
  sample = paths[:: max(1, len(paths) // 12)]
  for width in _WIDTHS:
    if sum(len(_webp(path, width)) for path in sample) / max(len(sample), 1) * len(paths) < (
      _PICTURE_BYTES * 0.9
    ):
      return width
  return _WIDTHS[-1]


def _read_videos(folder: str) -> tuple[dict[str, str], list[str]]:
  """Reads the rendered videos that are small enough, by name, and notes on those left out."""
  videos, notes = {}, []
  for name in VIDEOS:
    path = os.path.join(folder, name)
    if not os.path.exists(path):
      continue
    size = os.path.getsize(path)
    if size > _VIDEO_BYTES:
      notes.append(f'The video {path} is too large for this page ({size / 1e6:.0f} MB).')
      continue
    with open(path, 'rb') as f:
      videos[name.removesuffix('.mp4')] = _data('video/mp4', f.read())
  return videos, notes


def _read_page(run: str) -> tuple[str, str]:
  """Returns the exported page's text, if it is small enough to embed, and its relative address.

  Without a page, both are ''.
  """
  path = os.path.join(run, _PAGE)
  if not os.path.exists(path):
    return '', ''
  small = os.path.getsize(path) <= _PAGE_BYTES
  return files.read_text(path) if small else '', f'../{_PAGE}'.replace(os.sep, '/')


def _make_charts(
  rows: Sequence[Mapping[str, Any]], of_steps: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Draws PSNR and loss over steps.

  Args:
    rows: what training logged.
    of_steps: results of evaluated checkpoints.

  Returns:
    Title, series names and SVG of each chart.
  """

  def series(key: str, name: str, dots: bool = False) -> charts.Series:
    points = [(row['step'], row[key]) for row in rows if row.get(key) is not None]
    return charts.Series(name, points, dots)

  terms = [key for row in rows[:1] for key in row if key.startswith('loss_')]
  psnr = [series('psnr', 'training rays'), series('test_psnr', 'test images', dots=True)]
  if of_steps:
    means = [(results['step'], results['mean']['psnr']) for results in of_steps]
    psnr.append(charts.Series(f'mean of {of_steps[-1]["num_images"]} test images', means))
  losses = [series('loss', 'sum'), *(series(key, key.removeprefix('loss_')) for key in terms)]
  made = []
  for title, unit, lines, log in (
    ('PSNR over steps', 'dB', psnr, False),
    ('Loss over steps', '', losses, True),
  ):
    lines = [line for line in lines if line.points]
    svg = charts.line_chart(lines, unit, log)
    if svg:
      names = [line.name for line in lines]
      made.append({'title': title, 'names': names, 'svg': markupsafe.Markup(svg)})
  return made


def _facts(
  found: Mapping[str, Any], rows: Sequence[Mapping], scene: scenes.Scene
) -> dict[str, str]:
  """Returns facts on data, training, evaluation and software, by label."""
  device = found['device']
  facts = {
    'images': f'{len(scene.train)} for training, {found["num_images"]} for testing',
    'size': ', '.join(found['image_sizes']),
    'parameters': f'{found["num_params"]:,}',
    'trained': f'{found["step"]:,} steps',
    'evaluated on': f'{device["count"]} x {device["kind"]}, hidden layers in {found["mlp_dtype"]}',
    'a test image': f'{found["seconds_per_image"]:.2f} s',
    'software': ', '.join(f'{name} {version}' for name, version in found['software'].items()),
    'protocol': '; '.join([found['protocol']['name'], *found['protocol']['departures']]),
  }
  if found['train_seconds'] is not None:
    facts['trained'] += f' in {progress.duration(found["train_seconds"])}'
  if speed := runlog.median_speed(rows):
    facts['trained'] += f', {speed:,.0f} rays/s'
  if found.get('train_peak_bytes'):  # Older files lack it.
    facts['trained'] += f', {found["train_peak_bytes"] / 1e9:.1f} GB'
  if found['lpips']['absent']:
    facts['LPIPS'] = found['lpips']['absent']
  return facts


def _published(found: Mapping[str, Any], path: str) -> dict[str, Any] | None:
  """Returns published rows (method, metrics) on this scene, or why they are not comparable."""
  run = tables.Run(path, dict(found))
  try:
    benchmark = tables.find_benchmark([run])
  except tables.TablesError:
    return None  # Ambiguous: several datasets have a scene of this name.
  if benchmark is None:
    return None
  try:
    table = tables.make({'this run': [run]}, benchmark)
  except tables.TablesError as reason:
    return {'title': benchmark.title, 'reason': str(reason), 'rows': [], 'metrics': []}
  rows = [
    (row.method, {m: table.value(row, m, run.scene) for m in table.metrics}, row.ours)
    for row in table.rows
  ]
  return {'title': benchmark.title, 'reason': None, 'rows': rows, 'metrics': table.metrics}
