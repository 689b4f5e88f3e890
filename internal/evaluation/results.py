"""Makes, writes, reads and validates results.json (docs/results.md, results.schema.json)."""

from __future__ import annotations

import collections
import functools
import glob
import hashlib
import json
import math
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from .. import configs, models
from ..datasets import pyramid, scenes
from ..errors import UserError
from ..system import files
from ..training import method
from . import lpips
from .metrics import METRICS
from .table_data import mean

_ALL_METRICS = (*METRICS, *lpips.METRICS)
SCHEMA_VERSION = 2  # Of results.json.
OWN_SPLIT = "the capture's own"

_DESCRIPTION = (
  'Test images rendered at full size, clipped and quantised to 8 bits. PSNR: -10 log10 of the mean '
  'squared error over the image, peak 1. SSIM: Gaussian window 11, sigma 1.5, k1 0.01, k2 0.03, on '
  'RGB, valid region. cc_: after five rounds of a least-squares quadratic colour fit to the true '
  'image. Means are over images.'
)

# The departure of Config.eval_refine_cameras.
REFINED = 'test cameras are refined on left halves, metrics are of right halves'
MULTISCALE = ', multi-scale test'  # Of the protocol's name.
_OF_SCALES = (
  ' At the scales {}: cameras and pixel cones are scaled, true images reduced by an area filter '
  'from the full size and rounded to 8 bits. Means are over scales.'
)

_SCHEMA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results.schema.json')
_TYPES = {
  'object': dict,
  'array': list,
  'string': str,
  'integer': int,
  'number': (int, float),
  'boolean': bool,
  'null': type(None),
}


class ResultsError(UserError):
  """A file that is not a valid results.json of this version."""


@functools.cache
def schema() -> dict[str, Any]:
  """Returns the JSON Schema of results.json."""
  return files.read_json(_SCHEMA)


def _is_of(value: Any, kind: str) -> bool:
  if isinstance(value, bool):
    return kind == 'boolean'
  return isinstance(value, _TYPES[kind])


def check(value: Any, rule: dict[str, Any], where: str = '') -> None:
  """Validates a value; supports the JSON Schema keywords that results.schema.json uses.

  Args:
    value: parsed JSON.
    rule: a JSON Schema.
    where: dotted name of the value, for messages.

  Raises:
    ResultsError: a field is missing, unknown or has the wrong type.
  """
  at = where or 'the file'
  if 'const' in rule and value != rule['const']:
    raise ResultsError(f'{at} must be {rule["const"]!r}, got {value!r}')
  kinds = rule.get('type', ())
  kinds = [kinds] if isinstance(kinds, str) else kinds
  if kinds and not any(_is_of(value, kind) for kind in kinds):
    raise ResultsError(f'{at} must be {" or ".join(kinds)}, got {value!r:.60}')
  if isinstance(value, list):
    for i, item in enumerate(value):
      check(item, rule.get('items', {}), f'{where}[{i}]')
  if not isinstance(value, dict):
    return
  prefix = f'{where}.' if where else ''
  for name in rule.get('required', ()):
    if name not in value:
      raise ResultsError(f'{prefix}{name} is missing')
  others = rule.get('additionalProperties', {})
  for name, item in value.items():
    known = rule.get('properties', {}).get(name, others)
    if known is False:
      raise ResultsError(f'{prefix}{name} is unknown')
    check(item, known, f'{prefix}{name}')


def read(path: str) -> dict[str, Any]:
  """Reads and validates a results.json.

  Raises:
    ResultsError: the file is missing or does not match the schema.
  """
  try:
    found = files.read_json(path, dict, ResultsError, 'Run eval.py again.')
  except FileNotFoundError:
    raise ResultsError(f'No such file: {path!r}; eval.py writes RUN/eval/results.json.') from None
  version = schema()['properties']['schema_version']['const']
  if found.get('schema_version') != version:
    raise ResultsError(
      f'{path}: has schema_version {found.get("schema_version")!r}, this program reads {version}; '
      'run eval.py again on that run.'
    )
  try:
    check(found, schema())
  except ResultsError as e:
    raise ResultsError(f'{path}: {e}; run eval.py again on that run.') from None
  return found


def test_split(config: configs.Config, scene: scenes.Scene) -> str:
  """Describes how the scene's test images were chosen; tables compare these texts."""
  if scene.test != tuple(range(0, len(scene.names), config.llffhold)):
    return OWN_SPLIT
  by_name = list(scene.names) == sorted(scene.names)
  return every(config.llffhold) if by_name else f'every {config.llffhold}th image, not by name'


def every(hold: int) -> str:
  """Describes the split with every `hold`-th image for testing."""
  return f'every {hold}th image by name'


def scale_name(n: int) -> str:
  """Returns '1', or '1/n' for images of 1/n of the width and height."""
  return '1' if n == 1 else f'1/{n}'


def protocol(
  config: configs.Config, split: str, scales: Collection[int] | None = None
) -> dict[str, Any]:
  """Returns the evaluation protocol: name, description, settings and departures.

  `split` is a result of `test_split`, `scales` are the factors of a multi-scale evaluation.
  """
  departures = []
  if not config.eval_quantize_metrics:
    departures.append('predictions are not quantised')
  if config.eval_crop_borders:
    departures.append(f'{config.eval_crop_borders} pixels are cropped off each side')
  if config.eval_refine_cameras:
    departures.append(REFINED)
  if config.eval_render_interval > 1:
    departures.append(f'one in {config.eval_render_interval} test images')
  if config.eval_dataset_limit is not None:
    departures.append(f'at most {config.eval_dataset_limit} test images')
  if split not in (every(8), OWN_SPLIT):
    departures.append(f'test images: {split}; published: {every(8)}')
  name = 'mip-NeRF 360' + (MULTISCALE if scales else '')
  shown = ', '.join(map(scale_name, scales or ()))
  return {
    'name': name + (', modified' if departures else ''),
    'description': _DESCRIPTION + (_OF_SCALES.format(shown) if scales else ''),
    'departures': departures,
    'quantized': config.eval_quantize_metrics,
    'crop_borders': config.eval_crop_borders,
    'test_split': split,
    'render_interval': config.eval_render_interval,
    'lpips': dict(lpips.METRICS),
  }


def config_hash(settings: configs.Settings, with_seed: bool = True) -> str:
  """Returns 16 hex digits that identify the method, independent of scene and machine.

  Only values that differ from the default count, so that a new knob keeps existing hashes. With the
  default seed, the hashes with and without it are the same.
  """
  chosen = method.chosen(settings)
  if not with_seed:
    chosen.pop('Config.seed', None)
  return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _with_all_metrics(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  return [{**dict.fromkeys(lpips.METRICS), **row} for row in rows]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  return {name: mean([row[name] for row in rows]) for name in _ALL_METRICS}


def _sizes(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  return dict(sorted(collections.Counter(f'{r["width"]}x{r["height"]}' for r in rows).items()))


def _across(by_scale: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
  """Returns each image's entry at the first scale, with means over scales and all the time."""
  images = zip(*map(_with_all_metrics, by_scale.values()), strict=True)
  return [
    {**same[0], **_means(same), 'seconds': sum(row['seconds'] for row in same)} for same in images
  ]


def _of_scale(n: int, per_image: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns an entry of `scales` in results.json."""
  rows = _with_all_metrics(per_image)
  metrics = [{name: row[name] for name in _ALL_METRICS} for row in rows]
  return {
    'reduction': n, 'image_sizes': _sizes(rows), 'mean': _means(rows), 'per_image': metrics
  }  # fmt: skip


def make(
  settings: configs.Settings,
  split: str,
  per_image: Sequence[Mapping[str, Any]],
  step: int,
  num_params: int,
  lpips_absent: str | None = None,
  train_seconds: float | None = None,
  capture_warnings: Sequence[str] = (),
  reduction: str | None = None,
  by_scale: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
  train_peak_bytes: int | None = None,
) -> dict[str, Any]:
  """Makes the content of results.json.

  Args:
    settings: the run's settings.
    split: the scene's `test_split`.
    per_image: for each image its name, width, height, masked, METRICS, LPIPS if measured, and
      rendering time `seconds`.
    step: the checkpoint's step.
    num_params: number of the model's parameters.
    lpips_absent: why LPIPS was not measured, if so.
    train_seconds: training time up to the step, if known.
    capture_warnings: warnings of loading the capture for training, and of the training itself.
    reduction: how the pictures were reduced (`pyramid.Pictures`); None if unknown.
    by_scale: of a multi-scale evaluation the `per_image` of each factor, instead of `per_image`.
    train_peak_bytes: memory of training, if known.
  """
  config, devices = settings.config, jax.devices()
  packages = ('jax', 'jaxlib', 'flax', 'numpy')
  rows = _with_all_metrics(_across(by_scale) if by_scale else per_image)
  scales = {'scales': [_of_scale(n, images) for n, images in by_scale.items()]} if by_scale else {}
  return {
    'schema_version': SCHEMA_VERSION,
    'protocol': protocol(config, split, by_scale),
    'scene': os.path.basename(os.path.abspath(config.data_dir)) if config.data_dir else None,
    'dataset_loader': config.dataset_loader,
    'factor': config.factor,
    'reduction': reduction or (pyramid.NOT_REDUCED if config.factor <= 1 else None),
    'capture_warnings': list(capture_warnings),
    'config_hash': config_hash(settings),
    'method_hash': config_hash(settings, with_seed=False),
    'seed': config.seed,
    'step': step,
    'num_images': len(rows),
    'image_sizes': _sizes(rows),
    'masked_images': sum(row['masked'] for row in rows),
    'mean': _means(rows),
    'lpips': {'weights': lpips.WEIGHTS, 'absent': lpips_absent},
    # The median, since the first image's time includes compilation.
    'seconds_per_image': float(np.median([row['seconds'] for row in rows])),
    'train_seconds': train_seconds,
    'train_peak_bytes': train_peak_bytes,
    'num_params': num_params,
    'mlp_dtype': str(models.mlp_dtype(settings.model.mlp_dtype)),
    'device': {'kind': devices[0].device_kind, 'count': len(devices)},
    'software': {
      'python': platform.python_version(),
      **{name: metadata.version(name) for name in packages},
    },
    'per_image': rows,
    **scales,
  }


def _strict(value: Any) -> Any:
  """Replaces numbers that JSON cannot represent (NaN, infinity) by null."""
  if isinstance(value, Mapping):
    return {key: _strict(v) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_strict(v) for v in value]
  if isinstance(value, np.generic):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def path_of_step(run: str, step: int) -> str:
  """Returns the path of the results at one of several evaluated steps."""
  return os.path.join(run, 'eval', f'results_{step:06d}.json')


def read_steps(run: str) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the results at all evaluated steps, by step, and why others cannot be read."""
  found, notes = [], []
  for path in glob.glob(os.path.join(glob.escape(run), 'eval', 'results_[0-9]*.json')):
    try:
      found.append(read(path))
    except ResultsError as reason:
      notes.append(str(reason))
  return sorted(found, key=lambda results: results['step']), notes


def write_json(path: str, value: Any) -> None:
  """Writes strict JSON atomically; creates the folder if necessary."""
  files.write_text(path, json.dumps(_strict(value), indent=2, allow_nan=False) + '\n')
