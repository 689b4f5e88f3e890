"""Renders the video of a camera path for the viewer, in parts between which views are shown."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator

from .. import structs
from ..datasets import scenes
from ..rendering import trajectory, videos
from ..system import progress, warnings
from ..training import run_lock


def make(
  run: str, scene: scenes.Scene, path: str, say: Callable[[str], None], stop: threading.Event
) -> Callable[..., Iterator[None]]:
  """Returns a task for `session.Session.start` that renders what `render.py RUN --path FILE` does.

  Args:
    run: the run's folder; the video gets a folder of its own in it.
    scene: the run's scene.
    path: the file of the camera path.
    say: shows a line on what has been done.
    stop: ends the task after the frame in progress; the same path resumes it.
  """

  def task(renderer, params, train_frac: float, step: int, pause: Callable) -> Iterator[None]:
    given = dict.fromkeys(('render_path_type', 'render_spline_keyframes'))
    config = dataclasses.replace(renderer.settings.config, render_path_file=path, **given)
    with warnings.collect() as path_warnings:
      cams, fps = trajectory.make_path(config, scene)
    wanted = videos.describe(cams, params, step)
    root, name = config.render_dir or os.path.join(run, 'render'), videos.path_name(config)
    folder, _ = videos.find_folder(root, name, wanted)
    with run_lock.output(folder, 'Config.render_dir'):
      description = videos.check_folder(folder, wanted)  # Again, now that nobody else writes there.
      kinds, count = videos.KINDS[:2], len(cams.size)
      missing = len(videos.missing_frames(folder, kinds, count))
      say(f'Rendering {missing} of {count} frames to {folder}')
      yield

      def render(cams: structs.Cameras, row: int) -> dict:
        return renderer.frame(params, train_frac, cams, row, pause)

      made = description or {**wanted, 'warnings': path_warnings}
      start = time.monotonic()
      for done, _ in enumerate(videos.render_missing(render, cams, folder, kinds, made), 1):
        if stop.is_set():
          say(f'Stopped; {missing - done} of {count} frames are missing in {folder}')
          return
        left = (time.monotonic() - start) / done * (missing - done)
        say(
          f'{count - missing + done} of {count} frames, {progress.duration(left)} left -> {folder}'
        )
        yield
      written = videos.encode(folder, kinds, count, fps, config)
      say(f'Video of step {step:,}: {" and ".join(written.values())}')

  return task
