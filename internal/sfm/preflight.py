"""The report on a posed capture, as JSON and as a picture: what was found, and how good it is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from .. import configs, datasets
from ..evaluation import metrics
from ..vis import pictures
from . import diagnosis, picture
from . import photos as photos_lib

GOOD, DOUBTFUL, BAD = 'good', 'doubtful', 'bad'
FILE = 'preflight'


@dataclasses.dataclass(frozen=True)
class Check:
  """One thing that was looked at."""

  name: str
  status: str  # GOOD, DOUBTFUL or BAD
  text: str


def write(scene_dir: str, photos: Sequence[photos_lib.Photo]) -> dict:
  """Examines a capture, writes preflight.json and preflight.png into it, and returns the former."""
  found = diagnosis.examine(scene_dir, photos)
  checks = all_checks(found)
  told = as_json(scene_dir, found, checks)
  metrics.write_json(os.path.join(scene_dir, f'{FILE}.json'), told)
  drawn = picture.draw(scene_dir, found, checks)
  pictures.write_png(os.path.join(scene_dir, f'{FILE}.png'), drawn)
  return told


def as_json(scene_dir: str, found: diagnosis.Findings, checks: Sequence[Check]) -> dict:
  """Everything in the report; `capture` is what `train.py --dry_run` says of it."""
  capture = None
  if len(found.poses):
    config = configs.Config(data_dir=scene_dir, factor=found.factor)
    capture = datasets.load_dataset(config, read_only=True).report
  return {
    'photographs': len(found.rows),
    'posed': len(found.poses),
    'models': list(found.model_sizes),
    'factor': found.factor,
    'reprojection_error': found.error,
    'points': len(found.xyz),
    'track_length': found.track_length,
    'cameras': list(found.cameras),
    'spread': found.spread,
    'weakest_link': found.weakest_link,
    'checks': [dataclasses.asdict(check) for check in checks],
    'failed': {row.name: row.reason for row in found.rows if row.reason},
    'per_photograph': [dataclasses.asdict(row) for row in found.rows],
    'capture': capture,
  }


def _grade(value: float, good: float, doubtful: float) -> str:
  """Where less is better."""
  return GOOD if value <= good else DOUBTFUL if value <= doubtful else BAD


def all_checks(found: diagnosis.Findings) -> list[Check]:
  """What the report judges, most important first."""
  if not len(found.poses):
    return [Check('posed', BAD, 'No photograph could be placed. See why below.')]
  checks = [_posed(found), _error(found), _points(found), *_focal(found), _spread(found)]
  checks += _link(found)
  return [*checks, _sharp(found), _factor(found)]


def _posed(found) -> Check:
  n, posed = len(found.rows), len(found.poses)
  others = sum(bool(row.model) for row in found.rows)
  text = f'{posed} of {n} photographs' + (f'; {others} in models apart' if others else '')
  return Check('posed', _grade(1 - posed / n, 0.05, 0.25), text)


def _error(found) -> Check:
  used = found.error / max(found.factor, 1)
  text = f'{found.error:.2f} px' + (
    f', {used:.2f} at factor {found.factor}' if found.factor else ''
  )
  return Check('reprojection error', _grade(used, 0.8, 1.5), text)


def _points(found) -> Check:
  median = float(np.median([row.points for row in found.rows if row.model == 0]))
  text = (
    f'{len(found.xyz):,}; a photograph sees {median:,.0f}, a point is in {found.track_length:.1f}'
  )
  return Check('points', _grade(-median, -300, -100), text)


def _focal(found) -> list[Check]:
  """Views of 25 to 110 degrees are a lens's; pixels are square; EXIF agrees within 10%."""
  result = []
  for camera in found.cameras:
    fx, fy = camera['focal']
    status, text = GOOD, f'{fx:.0f} px, {camera["view_degrees"]:.0f} degrees across'
    if not 25 <= camera['view_degrees'] <= 110:
      status, text = BAD, f'{text}: hardly a real lens'
    elif abs(fx / fy - 1) > 0.02:
      status, text = DOUBTFUL, f'{text}; pixels {fx / fy:.2f} times as wide as high: stretched?'
    elif camera['exif_focal']:
      off = fx / camera['exif_focal'] - 1
      status = _grade(abs(off), 0.1, 0.25)
      text = f'{text}; EXIF says {camera["exif_focal"]:.0f}'
    several = f' of {camera["photographs"]}' if len(found.cameras) > 1 else ''
    result.append(Check(f'focal length{several}', status, text))
  return sorted(result, key=lambda check: (BAD, DOUBTFUL, GOOD).index(check.status))[:3]


_KINDS = {
  'around': 'all round, looking in',
  'outwards': 'looking outwards',
  'forward': 'all looking one way',
  'arc': 'an arc',
}


def _spread(found) -> Check:
  spread = found.spread
  text = f'{_KINDS[spread["kind"]]}; looks in {spread["directions"]} of 360 degrees'
  if spread['kind'] in ('forward', 'arc'):
    return Check('spread', DOUBTFUL, f'{text}: free views only from that side')
  return Check('spread', _grade(spread['largest_gap'], 30, 90), text)


def _link(found) -> list[Check]:
  link = found.weakest_link
  if link is None:
    return []
  sides = ' and '.join(map(str, link['photographs']))
  text = f'{link["shared_points"]} points join the parts of {sides} photographs'
  status = _grade(-link['shared_points'], -100, -30)
  return [Check('weakest link', status, text + ('' if status == GOOD else ': may be torn there'))]


def _sharp(found) -> Check:
  soft = [row for row in found.rows if row.sharpness < diagnosis.BLURRED]
  text = f'{len(soft)} of {len(found.rows)} photographs blurred' if soft else 'none is blurred'
  return Check('sharpness', _grade(len(soft) / len(found.rows), 0.05, 0.2), text)


def _factor(found) -> Check:
  sides = [max(1, round(side / max(found.factor, 1))) for side in found.cameras[0]['size']]
  return Check('Config.factor', GOOD, f'{found.factor}: pictures of {sides[0]}x{sides[1]}')
