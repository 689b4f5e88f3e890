"""Renders a camera path through a trained scene.

    python render.py --checkpoint_dir runs/bonsai
    python render.py --checkpoint_dir runs/bonsai \\
        --gin_bindings "Config.render_path_frames = 240" "Config.render_resolution = (1280, 720)"
    python render.py --checkpoint_dir runs/bonsai --preview

Writes <checkpoint_dir>/render/color/*.png and depth/*.png, then color.mp4 and depth.mp4 (with
Config.vis_normals also normals). Existing frames are skipped, so the same command resumes an
interrupted rendering. Config.render_* in --gin_bindings selects path, size and lens
(docs/paths.md); --preview draws the path to preview.png within seconds, without rendering frames.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from .. import cli, structs
from ..devices import processes
from ..errors import UserError
from ..evaluation import html_report, results
from ..rendering import preview, trained, trajectory
from ..system import files, progress, warnings
from ..training import run_folder
from ..vis import pictures, video

_KINDS = ('color', 'depth', 'normals')
_SURVEY_FRAMES, _SURVEY_SIDE = 8, 96  # Small frames that set the range of the depth colours.


class RenderError(UserError):
  """A render folder whose frames do not belong to this video."""


def digest(tree) -> str:
  """Returns a short hash of all arrays in a pytree."""
  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()[:16]


def describe(cams: structs.Cameras, params, step: int) -> dict:
  """Describes a video; only frames with equal descriptions belong together."""
  return {
    'step': step,
    'weights': digest(params),
    'frames': len(cams.size),
    'size': np.asarray(cams.size)[0].tolist(),
    'lens': structs.LENS_NAMES[cams.lenses[0]],
    'path': digest(cams),
  }


def read_description(folder: str, wanted: dict) -> dict | None:
  """Reads the description of the folder's frames; None if there are no frames yet.

  Raises:
    RenderError: the frames do not match the `wanted` description.
  """
  path = os.path.join(folder, 'render.json')
  way_out = (
    'Remove the folder to render again, or choose another one: '
    '--gin_bindings "Config.render_dir=\'...\'".'
  )
  try:
    found = files.read_json(path)
    changed = [k for k in wanted if found[k] != wanted[k]]
    near, far = map(float, found['depth_range'])
    if not 0 <= near <= far < float('inf'):
      raise ValueError
  except FileNotFoundError:
    if any(os.path.exists(os.path.join(folder, kind)) for kind in _KINDS):
      raise RenderError(f'{folder} has frames but no render.json. {way_out}') from None
    return None
  except (ValueError, TypeError, KeyError, OverflowError):
    raise RenderError(f'{path} cannot be read. {way_out}') from None
  if changed:
    changes = ', '.join(f'{k} {found[k]} (now {wanted[k]})' for k in changed)
    raise RenderError(f'{folder} has frames of another video: {changes}. {way_out}')
  return found


def survey_depth(
  run: trained.TrainedRun, render_image: Callable, cams: structs.Cameras
) -> tuple[float, float]:
  """Estimates the near and far distance of the whole video from a few small frames."""
  small = trajectory.shrink(cams, _SURVEY_SIDE)
  rows = np.unique(np.linspace(0, len(cams.size) - 1, _SURVEY_FRAMES).round().astype(int))
  frames = [render_image(run.params, small, int(row), run.train_fraction) for row in rows]
  distance, acc = (
    np.concatenate([frame[k].ravel() for frame in frames]) for k in ('distance_median', 'acc')
  )
  return pictures.depth_range(distance, acc)


def picture(kind: str, frame: dict, depth_range: tuple[float, float]) -> np.ndarray:
  """Returns the picture of one of _KINDS of a rendered frame."""
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
    '--preview', action='store_true', help='draw the path in the scene instead of rendering'
  )
  args = parser.parse_args(argv)
  folder = cli.run_folder(args)
  settings, scene = run_folder.open_run(folder, args.gin_bindings)
  out = settings.config.render_dir or os.path.join(folder, 'render')
  if args.preview:
    progress.summary({'preview': preview.write(settings, scene, folder, out)})
    return
  with warnings.collect() as path_warnings:
    cams, fps = trajectory.make_path(settings.config, scene)
  processes.initialize()
  cli.show_notices(settings)
  cli.show_warnings(scene.report)
  cli.show_warnings({'warnings': path_warnings})
  run = trained.restore(folder, settings, scene)
  kinds = _KINDS if settings.config.vis_normals else _KINDS[:2]
  render_frames(run, cams, out, kinds, path_warnings)
  if processes.is_main():
    write_videos(run, out, kinds, len(cams.size), fps)


def render_frames(
  run: trained.TrainedRun, cams: structs.Cameras, out: str, kinds, path_warnings: Sequence[str]
) -> None:
  """Renders the frames that are missing in the folder `out`; render.json keeps the warnings.

  Raises:
    RenderError: the folder has frames of another video.
  """
  wanted = describe(cams, run.params, run.step)
  description = read_description(out, wanted)
  count, main_process = len(cams.size), processes.is_main()
  missing = [
    k for k in range(count) if not all(os.path.exists(frame_path(out, kind, k)) for kind in kinds)
  ]
  if main_process:
    size = wanted['size']
    progress.say(f'{count} frames of {size} at step {run.step:,}, {len(missing)} to do -> {out}')
  render_image = run.make_image_renderer(with_normals=run.settings.config.vis_normals)
  if description is None:
    description = {
      **wanted,
      'warnings': list(path_warnings),
      'depth_range': survey_depth(run, render_image, cams),
    }
    if main_process:
      results.write_json(os.path.join(out, 'render.json'), description)
  for k in progress.track(missing, 'frames', main_process):
    frame = render_image(run.params, cams, k, run.train_fraction)
    if main_process:
      for kind in kinds:
        shown = picture(kind, frame, tuple(description['depth_range']))
        pictures.write_png(frame_path(out, kind, k), shown)


def write_videos(run: trained.TrainedRun, out: str, kinds, count: int, fps: float) -> None:
  """Encodes the `count` frames of each kind and prints what was written."""
  written = {}
  for kind in kinds:
    frames = [frame_path(out, kind, k) for k in range(count)]
    written[kind] = os.path.join(out, f'{kind}.mp4')
    video.write_video(frames, written[kind], fps, run.settings.config.render_video_crf)
  if os.path.exists(os.path.join(run.folder, 'eval', html_report.NAME)):
    # The report embeds the video.
    written['report'] = html_report.write(run.folder, run.settings, run.scene)
  progress.summary({**written, 'frames': os.path.join(out, '*', '*.png')})
