"""Renders a camera path through a trained scene.

    python render.py --checkpoint_dir runs/bonsai
    python render.py --checkpoint_dir runs/bonsai \\
        --gin_bindings "Config.render_path_frames = 240" "Config.render_resolution = (1280, 720)"
    python render.py --checkpoint_dir runs/bonsai --preview

Writes <checkpoint_dir>/render/color/*.png and depth/*.png, then color.mp4 and depth.mp4 (with
Config.vis_normals also normals). Frames that exist are skipped, so an interrupted rendering goes on
where it stopped. Config.render_* in --gin_bindings chooses path, size and lens (docs/paths.md);
--preview draws them into preview.png within seconds, and renders nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable

import jax
import numpy as np

from .. import cli, structs
from ..devices import processes, sharding
from ..errors import UserError
from ..evaluation import html_report, metrics
from ..rendering import preview, renderer, trajectory
from ..system import progress
from ..training import checkpoints, run_folder, train_step
from ..vis import pictures, video

_KINDS = ('color', 'depth', 'normals')
_SURVEY_FRAMES, _SURVEY_SIDE = 8, 96  # Frames and pixels that the depth's scale is taken from.


class RenderError(UserError):
  """What keeps a path from being rendered."""


def digest(tree) -> str:
  """A short fingerprint of all numbers in a pytree."""
  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()[:16]


def describe(cams: structs.Cameras, params, step: int) -> dict:
  """What frames are of; frames of one description belong to one video."""
  return {
    'step': step,
    'weights': digest(params),
    'frames': len(cams.size),
    'size': np.asarray(cams.size)[0].tolist(),
    'lens': structs.LENS_NAMES[cams.lenses[0]],
    'path': digest(cams),
  }


def read_description(folder: str, wanted: dict) -> dict | None:
  """What the folder's frames are of, None where there are none yet.

  Raises:
    RenderError: they are of something else than what is wanted.
  """
  path = os.path.join(folder, 'render.json')
  way_out = (
    'Remove that folder to render anew, or choose another: '
    '--gin_bindings "Config.render_dir=\'...\'".'
  )
  try:
    with open(path) as f:
      found = json.load(f)
    other = [k for k in wanted if found[k] != wanted[k]]
    _ = [float(t) for t in found['depth_range']]
  except FileNotFoundError:
    if any(os.path.exists(os.path.join(folder, kind)) for kind in _KINDS):
      raise RenderError(f'{folder} holds frames of unknown origin. {way_out}') from None
    return None
  except (ValueError, TypeError, KeyError):
    raise RenderError(f'{path} cannot be read. {way_out}') from None
  if other:
    changes = ', '.join(f'{k} {found[k]} (now {wanted[k]})' for k in other)
    raise RenderError(f'{folder} holds other frames: {changes}. {way_out}')
  return found


def survey_depth(
  render_image: Callable, params, cams: structs.Cameras, fraction: float
) -> tuple[float, float]:
  """The distances that all depth frames draw brightest and darkest, from a few small frames."""
  small = trajectory.shrink(cams, _SURVEY_SIDE)
  rows = np.unique(np.linspace(0, len(cams.size) - 1, _SURVEY_FRAMES).round().astype(int))
  seen = [render_image(params, small, int(row), fraction) for row in rows]
  distance, acc = (np.concatenate([s[k].ravel() for s in seen]) for k in ('distance_median', 'acc'))
  return pictures.depth_range(distance, acc)


def picture(kind: str, frame: dict, depth_range: tuple[float, float]) -> np.ndarray:
  """A rendered frame as one of _KINDS."""
  if kind == 'depth':
    return pictures.depth_picture(frame['distance_median'], frame['acc'], depth_range)
  if kind == 'normals':
    return pictures.normal_picture(frame['normals'], frame['acc'])
  return frame['rgb']


def frame_path(folder: str, kind: str, k: int) -> str:
  return os.path.join(folder, kind, f'{k:05d}.png')


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_run_parser(__doc__)
  parser.add_argument(
    '--preview', action='store_true', help='draw the path in the scene, and render nothing'
  )
  args = parser.parse_args(argv)
  run = cli.run_folder(args)
  settings, scene = run_folder.open_run(run, args.gin_bindings)
  config = settings.config
  folder = config.render_dir or os.path.join(run, 'render')
  if args.preview:
    progress.summary({'preview': preview.write(settings, scene, run, folder)})
    return
  cams, fps = trajectory.make_cameras(config, scene), trajectory.frames_per_second(config)
  processes.initialize()
  cli.show_notices(settings)
  mesh = sharding.make_mesh()
  params, step = checkpoints.restore_params(run, settings, mesh=mesh)
  kinds = _KINDS if config.vis_normals else _KINDS[:2]
  render_image = renderer.make_image_renderer(settings, mesh, with_normals=config.vis_normals)
  fraction = float(train_step.train_fraction(step, config.max_steps))

  count = len(cams.size)
  wanted = describe(cams, params, step)
  description = read_description(folder, wanted)
  present = [
    all(os.path.exists(frame_path(folder, kind, k)) for kind in kinds) for k in range(count)
  ]
  missing = [k for k in range(count) if not present[k]]
  if processes.is_main():
    size = wanted['size']
    progress.say(f'{count} frames of {size} at step {step:,}, {len(missing)} to do -> {folder}')
  if description is None:
    description = {**wanted, 'depth_range': survey_depth(render_image, params, cams, fraction)}
    if processes.is_main():
      metrics.write_json(os.path.join(folder, 'render.json'), description)

  for k in progress.track(missing, 'frames', processes.is_main()):
    frame = render_image(params, cams, k, fraction)
    if processes.is_main():
      for kind in kinds:
        shown = picture(kind, frame, tuple(description['depth_range']))
        pictures.write_png(frame_path(folder, kind, k), shown)

  if processes.is_main():
    left = {}
    for kind in kinds:
      frames = [frame_path(folder, kind, k) for k in range(count)]
      path = os.path.join(folder, f'{kind}.mp4')
      video.write_video(frames, path, fps, config.render_video_crf)
      left[kind] = path
    if os.path.exists(os.path.join(run, 'eval', html_report.NAME)):
      left['report'] = html_report.write(run, settings, scene)  # It shows the video.
    progress.summary({**left, 'frames': os.path.join(folder, '*', '*.png')})
