"""Evaluates a trained scene on its test images.

    python eval.py --checkpoint_dir runs/bonsai
    python eval.py --checkpoint_dir runs/bonsai --gin_bindings "Config.vis_normals = True"

Writes <checkpoint_dir>/eval/results.json, report.html to look at (--report_only makes it anew) and,
as PNG files, every test image's prediction, truth, error, depth and opacity. The run's own config
and cameras are used, with --gin_bindings on top. With Config.eval_only_once = False it goes on with
every further checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .. import cli, configs, models
from ..datasets import scenes
from ..devices import processes, sharding
from ..errors import UserError
from ..evaluation import html_report, lpips
from ..evaluation import metrics as metrics_lib
from ..rendering import renderer
from ..system import progress
from ..training import checkpoints, run_folder, runlog, train_step
from ..vis import pictures

_POLL_SECONDS = 10
_PAIR_WIDTH = 480  # Of truth and prediction together, on the contact sheet.


class EvalError(UserError):
  """What keeps a run from being evaluated."""


def steps_to_evaluate(run: str, config: configs.Config) -> Iterator[int]:
  """The newest whole checkpoint's step; in the waiting mode later ones' too, until the last."""
  seen = step = done = None
  while True:
    # Every process must take the same one, however late it looks.
    latest = processes.from_main(checkpoints.latest_step(run) or 0)
    if latest != seen:
      seen, step = latest, checkpoints.newest(run) or 0
    if config.eval_only_once and not step:
      raise EvalError(f'No whole checkpoint in {run}/checkpoints yet: train first.')
    if step and step != done:
      yield step
      done = step
    if config.eval_only_once or (done or 0) >= config.last_step:
      return
    time.sleep(_POLL_SECONDS)


def select_images(config: configs.Config, scene: scenes.Scene) -> list[int]:
  """Rows of the test images to render.

  Raises:
    EvalError: there are none, or their files are not where the config says.
  """
  rows = list(scene.test[:: config.eval_render_interval][: config.eval_dataset_limit])
  if not rows:
    raise EvalError('There are no test images (Config.llffhold, Config.eval_dataset_limit).')
  for row in rows:
    path = os.path.join(config.data_dir or '', scene.files[row])
    if not os.path.isfile(path):
      raise EvalError(
        f'No such image: {path}. If the photographs have moved, say where they are: '
        '--gin_bindings "Config.data_dir=\'...\'".'
      )
  return rows


def save_pictures(stem: str, rendering: dict, truth, note: str) -> None:
  """Writes prediction, truth, error, depth and opacity, each alone; a sheet; normals if there."""
  pictures.write_png(f'{stem}_prediction.png', rendering['rgb'])
  pictures.write_png(f'{stem}_truth.png', truth)
  pictures.write_png(f'{stem}_error.png', pictures.error_picture(rendering['rgb'], truth))
  depth = pictures.depth_picture(rendering['distance_median'], rendering['acc'])
  pictures.write_png(f'{stem}_depth.png', depth)
  pictures.write_png(f'{stem}_opacity.png', pictures.opacity_picture(rendering['acc']))
  if 'normals' in rendering:
    picture = pictures.normal_picture(rendering['normals'], rendering['acc'])
    pictures.write_png(f'{stem}_normals.png', picture)
  pictures.write_png(f'{stem}_sheet.png', pictures.comparison_sheet(rendering, truth, note))


def load_lpips() -> tuple[Callable | None, str | None]:
  """The function that measures LPIPS, or why there is none."""
  try:
    return lpips.load(), None
  except lpips.LpipsUnavailableError as reason:
    return None, str(reason)


def train_seconds(run: str, step: int) -> float | None:
  """How long training took up to the step, by the run's own record."""
  rows = runlog.read_metrics(os.path.join(run, 'metrics.jsonl'))
  told = [row['train_seconds'] for row in rows if row.get('step', step + 1) <= step]
  return told[-1] if told else None


def evaluate(
  settings: configs.Settings,
  scene: scenes.Scene,
  rows: Sequence[int],
  render_image: Callable,
  params: dict,
  step: int,
  run: str,
) -> None:
  """Renders the rows' images with one checkpoint and writes all that is said of them."""
  config, folder = settings.config, os.path.join(run, 'eval')
  measure_lpips, lpips_absent = load_lpips() if processes.is_main() else (None, None)
  per_image, pairs = [], []
  fraction = float(train_step.train_fraction(step, config.max_steps))
  for k, row in enumerate(progress.track(rows, 'evaluating', processes.is_main())):
    began = time.time()
    rendering = render_image(params, scene.cameras, row, fraction)
    seconds = time.time() - began
    if not processes.is_main():
      continue
    truth = scenes.read_image(config.data_dir, scene, row)
    mask = scenes.read_mask(config.data_dir, scene, row)
    metrics = metrics_lib.image_metrics(rendering['rgb'], truth, config, mask, measure_lpips)
    name, (height, width) = scene.names[row], truth.shape[:2]
    about = {'width': width, 'height': height, 'masked': mask is not None}
    per_image.append({'name': name, **about, **metrics, 'seconds': seconds})
    progress.say(
      f'{k + 1}/{len(rows)} {name}  {metrics_lib.format_metrics(metrics)}  {seconds:.1f}s'
    )
    if config.eval_save_output:
      stem = f'{k:03d}_{scene.stem(row)}'
      note = f'PSNR {metrics["psnr"]:.2f}   SSIM {metrics["ssim"]:.3f}'
      save_pictures(os.path.join(folder, stem), rendering, truth, note)
      pair = np.concatenate([truth, pictures.to_uint8(rendering['rgb'])], 1)
      pairs.append(pictures.shrink(pair, _PAIR_WIDTH))
  if not processes.is_main():
    return
  results = metrics_lib.make_results(
    settings,
    metrics_lib.test_split(config, scene),
    per_image,
    step,
    models.num_params(params),
    lpips_absent,
    train_seconds(run, step),
  )
  metrics_lib.write_json(os.path.join(folder, 'results.json'), results)
  if not config.eval_only_once:
    metrics_lib.write_json(os.path.join(folder, f'results_{step:06d}.json'), results)
  if pairs:
    captions = [f'{r["name"]}: truth, prediction   PSNR {r["psnr"]:.2f}' for r in per_image]
    sheet = pictures.contact_sheet(pairs, captions, _PAIR_WIDTH)
    sheet_path = os.path.join(folder, 'contact_sheet.png')
    pictures.write_png(sheet_path, sheet)
  print(
    f'mean of {len(rows)} images at step {step:,}: {metrics_lib.format_metrics(results["mean"])}'
  )
  if lpips_absent:
    print(f'LPIPS is null: {lpips_absent}')
  left = {'results': os.path.join(folder, 'results.json')}
  if pairs:
    left |= {'pictures': os.path.join(folder, '*.png'), 'all of them': sheet_path}
  if config.eval_report:
    left['report'] = html_report.write(run, settings, scene)
  progress.summary(left)


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_run_parser(__doc__)
  parser.add_argument(
    '--report_only', action='store_true', help='make report.html anew, of what is there'
  )
  args = parser.parse_args(argv)
  run = cli.run_folder(args)
  settings, scene = run_folder.open_run(run, args.gin_bindings)
  if args.report_only:
    progress.summary({'report': html_report.write(run, settings, scene)})
    return
  processes.initialize()
  cli.show_notices(settings)
  mesh = sharding.make_mesh()
  rows = select_images(settings.config, scene)
  normals = settings.config.vis_normals
  render_image = renderer.make_image_renderer(settings, mesh, with_normals=normals)
  for step in steps_to_evaluate(run, settings.config):
    params, _ = checkpoints.restore_params(run, settings, step, mesh)
    evaluate(settings, scene, rows, render_image, params, step, run)
