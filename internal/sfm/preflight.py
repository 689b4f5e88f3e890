"""Writes the report on a posed capture, as JSON and as a picture, and judges its quality."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from .. import configs, datasets
from ..evaluation import results
from ..vis import pictures
from . import diagnosis, moved, picture
from . import photos as photos_lib
from .evidence import BAD, DOUBTFUL, FOLDED, GOOD

FILE = 'preflight'
_OFF_CENTRE = 0.01  # Of the longer side; a principal point nearer to the centre is not mentioned.
_PARALLEL = 0.998  # Mean of the unit directions: within about 4 degrees.


@dataclasses.dataclass(frozen=True)
class Check:
  """A judgement on one aspect of the capture."""

  name: str
  status: str  # GOOD, DOUBTFUL or BAD
  text: str


def write(scene_dir: str, photos: Sequence[photos_lib.Photo], noted: Sequence[str] = ()) -> dict:
  """Writes preflight.json and preflight.png into a capture; returns what the JSON file holds.

  `noted` has the warnings of importing the photographs.
  """
  found = diagnosis.examine(scene_dir, photos)
  checks = all_checks(found)
  refinement = moved.read_report(scene_dir)
  checks += [Check(*values) for values in moved.checks(refinement)] if refinement else []
  report = as_json(scene_dir, found, checks) | {'refinement': refinement, 'warnings': list(noted)}
  results.write_json(os.path.join(scene_dir, f'{FILE}.json'), report)
  warnings = [*noted, *(report['capture'] or {}).get('warnings', ())]
  drawn = picture.draw(scene_dir, found, checks, warnings)
  pictures.write_png(os.path.join(scene_dir, f'{FILE}.png'), drawn)
  return report


def as_json(scene_dir: str, found: diagnosis.Findings, checks: Sequence[Check]) -> dict:
  """Returns the report as a dict; its `capture` is what `train.py --dry_run` reports."""
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
    'evidence': found.evidence.as_json() if found.evidence else None,
    'mapping': found.mapping,
    'checks': [dataclasses.asdict(check) for check in checks],
    'failed': {row.name: row.reason for row in found.rows if row.reason},
    'per_photograph': [dataclasses.asdict(row) for row in found.rows],
    'capture': capture,
  }


def _grade(value: float, good: float, doubtful: float) -> str:
  """Grades a value of which less is better by its two thresholds."""
  return GOOD if value <= good else DOUBTFUL if value <= doubtful else BAD


def all_checks(found: diagnosis.Findings) -> list[Check]:
  """Returns all checks, most important first."""
  if not len(found.poses):
    return [Check('posed', BAD, 'no photograph could be posed; see the likely reasons below')]
  checks = [
    _posed(found),
    *_matches(found),
    _error(found),
    _points(found),
    *_focal(found),
    _spread(found),
  ]
  checks += _link(found)
  return [*checks, _sharp(found), _factor(found)]


def _posed(found) -> Check:
  n, posed = len(found.rows), len(found.poses)
  others = sum(bool(row.model) for row in found.rows)
  text = f'{posed} of {n} photographs' + (f'; {others} in separate models' if others else '')
  return Check('posed', _grade(1 - posed / n, 0.05, 0.25), text)


def _matches(found) -> list[Check]:
  """Checks whether the matches of the photographs speak against the poses."""
  evidence = found.evidence
  if evidence is None:
    return []
  attempts = (found.mapping or {}).get('attempts', ())
  how = f'; best of {len(attempts)} ways, {found.mapping["mapper"]}' if len(attempts) > 1 else ''
  if not evidence.tested:
    text = 'no pair of photographs has enough matches to test the poses'
  elif evidence.contradicted:
    examples = '; '.join(f'{a} and {b}' for a, b in evidence.contradicted[:2])
    text = f'{len(evidence.contradicted):,} of the {evidence.tested:,} strongest pairs contradict '
    text += f'the poses ({examples}): '
    text += 'part of the scene is doubled or torn' if evidence.in_order else _DOUBT
  elif evidence.verdict != GOOD:
    text = f'{_apart(evidence)}. {_FOLDED}'
  else:
    text = f'none of the {evidence.tested:,} strongest pairs contradicts the poses'
  return [Check('matches', evidence.verdict, text + how)]


_DOUBT = 'the scene is doubled or torn, or has places that look alike'
_FOLDED = (
  'Two places that look alike may be one here, unless you came back or things moved: add '
  'photographs of the way between'
)


def _apart(evidence) -> str:
  """Says why one place of the model may be two."""
  reasons = []
  if evidence.jumps:
    others = len(evidence.jumps) - 1
    more = f' (and {others} more jump{"s" if others > 1 else ""})' if others else ''
    reasons.append('{1} follows {0} but shows something else'.format(*evidence.jumps[0]) + more)
  if evidence.folded > FOLDED:
    share = f'{evidence.folded:.0%} of the pairs of photographs from one place'
    reasons.append(f'{share} see different things')
  return '; '.join(reasons)


def _error(found) -> Check:
  scaled = found.error / max(found.factor, 1)  # At the resolution that training uses.
  text = f'{found.error:.2f} px'
  text += f', {scaled:.2f} px at factor {found.factor}' if found.factor else ''
  return Check('reprojection error', _grade(scaled, 0.8, 1.5), text)


def _points(found) -> Check:
  median = float(np.median([row.points for row in found.rows if row.model == 0]))
  text = (
    f'{len(found.xyz):,}; {median:,.0f} in the median photograph; each is seen in '
    f'{found.track_length:.1f} photographs on average'
  )
  return Check('points', _grade(-median, -300, -100), text)


def _focal(found) -> list[Check]:
  """Checks the field of view (25 to 110 degrees), square pixels, and the focal length in EXIF.

  Photographs that are taken in parallel do not tell the focal length from the depth of the scene.
  """
  result = []
  for camera in found.cameras:
    fx, fy = camera['focal']
    status, text = GOOD, f'{fx:.0f} px, field of view {camera["view_degrees"]:.0f} degrees'
    right, down = camera['off_centre']
    if np.hypot(right, down) > _OFF_CENTRE * max(camera['size']):
      across, along = 'left' if right < 0 else 'right', 'above' if down < 0 else 'below'
      text += f'; its axis is {abs(right):.0f} px {across}, {abs(down):.0f} px {along} the centre'
    if not 25 <= camera['view_degrees'] <= 110:
      status, text = BAD, f'{text}: unlikely for a real lens'
    elif abs(fx / fy - 1) > 0.02:
      status, text = DOUBTFUL, f'{text}; fx / fy is {fx / fy:.2f}: were the pictures stretched?'
    elif camera['exif_focal']:
      status = _grade(abs(fx / camera['exif_focal'] - 1), 0.1, 0.25)
      text = f'{text}; EXIF says {camera["exif_focal"]:.0f} px'
    elif np.linalg.norm(found.poses[:, :, 2].mean(0)) > _PARALLEL:
      status, text = DOUBTFUL, f'{text}; a guess, since all photographs look in one direction'
    share = f' of {camera["photographs"]}' if len(found.cameras) > 1 else ''
    result.append(Check(f'focal length{share}', status, text))
  return sorted(result, key=lambda check: (BAD, DOUBTFUL, GOOD).index(check.status))[:3]


_KINDS = {
  'around': 'looking inwards',
  'outwards': 'looking outwards',
  'forward': 'all looking in about the same direction',
  'arc': 'along an arc, looking inwards',
}


def _spread(found) -> Check:
  spread = found.spread
  all_around = spread['directions'] == 360
  over = 'on all sides' if all_around else f'over {spread["directions"]} of 360 degrees'
  text = f'{_KINDS[spread["kind"]]}, {over}; the largest gap is {spread["largest_gap"]} degrees'
  if spread['kind'] in ('forward', 'arc'):
    return Check('spread', DOUBTFUL, f'{text}: new views will be good only from that side')
  return Check('spread', _grade(spread['largest_gap'], 30, 90), text)


def _link(found) -> list[Check]:
  link = found.weakest_link
  if link is None:
    return []
  sides = ' and '.join(map(str, link['photographs']))
  text = f'{link["shared_points"]} points connect parts of {sides} photographs'
  status = _grade(-link['shared_points'], -100, -30)
  warning = '' if status == GOOD else ': the model may be torn there'
  return [Check('weakest link', status, text + warning)]


def _sharp(found) -> Check:
  blurred = sum(row.sharpness < diagnosis.BLURRED for row in found.rows)
  n = len(found.rows)
  text = f'{blurred} of {n} photographs blurred' if blurred else 'no photograph is blurred'
  return Check('sharpness', _grade(blurred / n, 0.05, 0.2), text)


def _factor(found) -> Check:
  sides = [max(1, round(side / max(found.factor, 1))) for side in found.cameras[0]['size']]
  return Check('Config.factor', GOOD, f'{found.factor}: trains on {sides[0]}x{sides[1]} pixels')
