"""Renders a camera path through a trained scene.

    python render.py runs/bonsai
    python render.py runs/bonsai --path orbit --frames 240 --size 1280 720
    python render.py runs/bonsai --path runs/bonsai/camera_paths/path.json
    python render.py runs/bonsai --path orbit --preview

Writes RUN/render/color/*.png and depth/*.png, then color.mp4 and depth.mp4 (with Config.vis_normals
also normals). Existing frames are skipped, so the same command resumes an interrupted rendering.
Another path gets a folder of its own name, such as RUN/render_orbit. --preview draws the path to
preview.png within seconds, without rendering frames. docs/paths.md describes paths and lenses.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from .. import cli, configs, plugins
from ..devices import processes
from ..evaluation import html_report
from ..rendering import preview, trained, trajectory, videos
from ..system import bucket, files, progress, warnings
from ..training import run_folder, run_lock


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_run_parser(__doc__)
  parser.add_argument(
    '--path', metavar='NAME|FILE',
    help=f'camera path: {", ".join(plugins.camera_path)}, or a file (docs/paths.md)',
  )  # fmt: skip
  cli.add_setting(parser, '--frames', 'render_path_frames', type=int, metavar='N',
                  help='number of frames of a path that is not a file')  # fmt: skip
  cli.add_setting(parser, '--size', 'render_resolution', type=int, nargs=2, metavar=('W', 'H'),
                  help='size of the frames in pixels')  # fmt: skip
  cli.add_setting(parser, '--out', 'render_dir', metavar='DIR',
                  help='folder of the video (default: RUN/render, or beside it)')  # fmt: skip
  parser.add_argument(
    '--preview', action='store_true', help='draw the path in the scene instead of rendering'
  )
  args = parser.parse_args(argv)
  if args.path:
    args.set_by_flag |= _path_settings(args.path)
  return args


def _path_settings(path: str) -> dict[str, tuple]:
  """Returns the settings that --path stands for.

  Raises:
    TrajectoryError: it is neither a kind of path nor a file.
  """
  chosen = dict.fromkeys(('render_path_type', 'render_path_file', 'render_spline_keyframes'))
  types = plugins.camera_path
  if path not in types and not files.exists(os.path.expanduser(path)):
    raise trajectory.TrajectoryError(
      f'--path {path}: no such file or folder, and not one of {", ".join(types)}.'
    )
  chosen['render_path_type' if path in types else 'render_path_file'] = path
  return {field: (f'--path {path}', value) for field, value in chosen.items()}


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  folder = bucket.local(cli.run_folder(args))
  settings, scene = run_folder.open_run(folder, cli.bindings(args))
  config = settings.config
  bucket.fetch(folder, 'render', 'eval/')  # The frames that there are; pictures for the report.
  with warnings.collect() as path_warnings:
    cams, fps = trajectory.make_path(config, scene)
  if args.preview:
    out, _ = find_folder(config, folder, videos.describe_path(cams))
    picture = preview.write(settings, scene, folder, out)
    bucket.push(folder)
    progress.summary({'preview': picture})
    return
  processes.initialize()
  cli.show_notices(settings, args)
  cli.show_warnings(scene.report)
  cli.show_warnings({'warnings': path_warnings})
  run = trained.restore(folder, settings, scene)
  if run.scene is not scene:  # The path goes along the refined cameras.
    with warnings.collect():  # These have been shown.
      cams, fps = trajectory.make_path(config, run.scene)
  kinds = videos.KINDS if config.vis_normals else videos.KINDS[:2]
  wanted = videos.describe(cams, run.params, run.step)
  out, _ = find_folder(config, folder, wanted)
  with run_lock.output(out, 'Config.render_dir'):
    try:
      render_frames(run, cams, kinds, out, wanted, path_warnings)
      if processes.is_main():
        written = videos.encode(out, kinds, len(cams.size), fps, config)
        if os.path.exists(os.path.join(folder, 'eval', html_report.NAME)):
          # The report embeds the video.
          written['report'] = html_report.write(folder, settings, scene)
        written['frames'] = os.path.join(out, '*', '*.png')
        progress.summary({**written, 'next': cli.run_text('view', folder)})
    finally:  # Also after a signal, so that the same command resumes.
      if processes.is_main():
        bucket.push(folder)


def find_folder(config: configs.Config, run: str, wanted: dict) -> tuple[str, dict | None]:
  """Returns the folder of the video, and the description of its frames if there are any.

  Raises:
    RenderError: the folder that the user chose has frames of another video, or any folder has
      frames of unknown origin.
  """
  if config.render_dir:
    return config.render_dir, videos.check_folder(config.render_dir, wanted)
  return videos.find_folder(os.path.join(run, 'render'), videos.path_name(config), wanted)


def render_frames(
  run: trained.TrainedRun,
  cams,
  kinds: Sequence[str],
  out: str,
  wanted: dict,
  path_warnings: Sequence[str],
) -> None:
  """Renders the frames that are missing in `out`; render.json keeps the warnings.

  Raises:
    RenderError: another program has put frames of another video there.
  """
  config, count, is_main = run.settings.config, len(cams.size), processes.is_main()
  description = videos.check_folder(out, wanted)  # Again, now that nobody else writes there.
  missing = len(videos.missing_frames(out, kinds, count))
  render_image = run.make_image_renderer(with_normals=config.vis_normals)
  if is_main:
    size = wanted['size']
    progress.say(f'{count} frames of {size} at step {run.step:,}, {missing} to do -> {out}')
  frames = videos.render_missing(
    lambda cams, k: render_image(run.params, cams, k, run.train_fraction),
    cams,
    out,
    kinds,
    description or {**wanted, 'warnings': list(path_warnings)},
    writes=is_main,
  )
  for _ in progress.track(frames, 'frames', is_main, missing):
    pass
