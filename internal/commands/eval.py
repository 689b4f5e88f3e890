"""Evaluates a trained scene on its test images.

    python eval.py runs/bonsai
    python eval.py runs/bonsai --gin_bindings Config.vis_normals=True
    python eval.py runs/bonsai --multiscale
    python eval.py runs/bonsai --steps 25000 100000

Writes to RUN/eval: results.json, report.html (--report_only only rewrites it) and, as
PNG files, the prediction, truth, error, depth and opacity of each test image. Settings and cameras
are the run's own; --gin_bindings override settings. With Config.eval_only_once = False it waits for
further checkpoints and evaluates those as well.

--multiscale measures each test image at 1, 1/2, 1/4 and 1/8 of its size instead, which shows
aliasing, and writes to eval/multiscale.

--steps measures earlier checkpoints, which training keeps with Config.checkpoint_keep. It writes
only eval/results_STEP.json of each, and the report's chart then shows them.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .. import cli, configs, models
from ..datasets import scenes
from ..devices import processes
from ..errors import UserError
from ..evaluation import html_report, left_halves, lpips, multiscale
from ..evaluation import metrics as metrics_lib
from ..evaluation import results as results_lib
from ..rendering import trained
from ..system import bucket, files, progress
from ..training import checkpoints, run_folder, run_lock, run_seal, runlog
from ..vis import pictures

_POLL_SECONDS = 10
_PAIR_WIDTH = 480  # Pixels of truth and prediction side by side on the contact sheet.
_WRITERS = 4  # Threads that compress and write pictures.


class EvalError(UserError):
  """A run that cannot be evaluated."""


def steps_to_evaluate(run: str, config: configs.Config) -> Iterator[int]:
  """Yields the newest complete checkpoint's step, and those of later checkpoints if configured.

  Raises:
    EvalError: there is no complete checkpoint yet, with Config.eval_only_once.
  """
  checked = step = done = None
  while True:
    # All processes must evaluate the same checkpoint, even if one of them lists the folder later.
    latest = processes.from_main(checkpoints.latest_step(run) or 0)
    if latest != checked:
      checked, step = latest, checkpoints.newest(run) or 0
    if config.eval_only_once and not step:
      state = 'No intact' if latest else 'No complete'
      raise EvalError(f'{state} checkpoint in {run}/checkpoints; train first, or copy one there.')
    if step and step != done:
      yield step
      done = step
    if config.eval_only_once or (done or 0) >= config.last_step:
      return
    time.sleep(_POLL_SECONDS)


def check_steps(run: str, steps: Sequence[int]) -> None:
  """Checks that the run has checkpoints of these steps.

  Raises:
    EvalError: one is missing.
  """
  found = checkpoints.all_steps(run)
  missing = [step for step in steps if step not in found]
  if missing:
    raise EvalError(
      f'--steps {missing[0]}: {run}/checkpoints has no such checkpoint, but {found or "none"}. '
      'Training keeps the newest Config.checkpoint_keep; 0 keeps all.'
    )


def select_images(config: configs.Config, scene: scenes.Scene) -> list[int]:
  """Returns the rows of the test images to render.

  Raises:
    EvalError: there are no test images, or a file of one is missing.
  """
  rows = list(scene.test[:: config.eval_render_interval][: config.eval_dataset_limit])
  if not rows:
    raise EvalError(
      'There are no test images; change Config.llffhold or Config.eval_dataset_limit.'
    )
  for row in rows:
    path = os.path.join(config.data_dir or '', scene.files[row])
    if not files.is_file(path):
      raise EvalError(
        f'No such image: {path}. If the photographs have moved, set Config.data_dir to the folder '
        'of the capture.'
      )
  return rows


def save_pictures(stem: str, rendering: dict, truth, note: str) -> None:
  """Writes a test image's pictures, one per file, and a sheet of them."""
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
  """Returns the function that computes LPIPS, or None and the reason why it is unavailable."""
  try:
    return lpips.load(), None
  except lpips.LpipsUnavailableError as reason:
    return None, str(reason)


def train_costs(run: str, step: int) -> tuple[float | None, int | None]:
  """Returns training time and peak memory up to `step` as logged by the run, None if unknown."""
  rows = runlog.read_metrics(os.path.join(run, 'metrics.jsonl'))
  rows = [row for row in rows if row['step'] <= step]
  peaks = [int(row['peak_bytes']) for row in rows if row.get('peak_bytes')]
  return rows[-1].get('train_seconds') if rows else None, max(peaks, default=None)


def evaluate(
  run: trained.TrainedRun, rows: Sequence[int], render_image: Callable, numbers_only: bool = False
) -> dict | None:
  """Renders the test images in `rows` and writes metrics, pictures and report.

  Args:
    run: the run at the checkpoint to evaluate.
    rows: the test images.
    render_image: see `TrainedRun.make_image_renderer`.
    numbers_only: write only results_STEP.json.

  Returns:
    The content of results.json; None on processes other than the main one.
  """
  compute_lpips, lpips_absent = load_lpips() if processes.is_main() else (None, None)
  per_image, pairs, written = [], [], collections.deque()
  refine = left_halves.make_refiner(run) if run.settings.config.eval_refine_cameras else None
  # Only compressing and writing run beside the loop: no threads compute with JAX.
  with concurrent.futures.ThreadPoolExecutor(_WRITERS) as writers:
    for k, row in enumerate(progress.track(rows, 'evaluating', processes.is_main())):
      cams, at = run.scene.cameras, row
      if refine:
        cams, at = refine(row), 0
      began = time.monotonic()
      rendering = render_image(run.params, cams, at, run.train_fraction)
      seconds = time.monotonic() - began
      if not processes.is_main():
        continue
      scores, truth = score_image(run, row, rendering, compute_lpips)
      per_image.append({**scores, 'seconds': seconds})
      line = f'{scores["name"]}  {metrics_lib.format_metrics(scores)}'
      progress.say(f'{k + 1}/{len(rows)} {line}  {seconds:.1f}s')
      if numbers_only:
        continue
      if run.settings.config.eval_save_output:
        stem = os.path.join(run.folder, 'eval', f'{k:03d}_{run.scene.stem(row)}')
        note = f'PSNR {scores["psnr"]:.2f}   SSIM {scores["ssim"]:.3f}'
        written.append(writers.submit(save_pictures, stem, rendering, truth, note))
        if len(written) > _WRITERS:  # No more pictures wait in memory.
          written.popleft().result()
        pair = np.concatenate([truth, pictures.to_uint8(rendering['rgb'])], 1)
        pairs.append(pictures.shrink(pair, _PAIR_WIDTH))
    for job in written:
      job.result()
  if not processes.is_main():
    return None
  results = make_results(run, per_image, lpips_absent)
  if numbers_only or not run.settings.config.eval_only_once:
    results_lib.write_json(results_lib.path_of_step(run.folder, run.step), results)
  mean = metrics_lib.format_metrics(results['mean'])
  print(f'mean of {len(per_image)} images at step {run.step:,}: {mean}')
  if lpips_absent:
    print(f'LPIPS is null: {lpips_absent}')
  if not numbers_only:
    write_outputs(run, results, pairs)
  return results


def score_image(run: trained.TrainedRun, row: int, rendering: dict, compute_lpips) -> tuple:
  """Returns an image's entry of results.json, without its time, and the true image."""
  data_dir = run.settings.config.data_dir
  truth = scenes.read_image(data_dir, run.scene, row)
  mask = scenes.read_mask(data_dir, run.scene, row)
  counted = slice(None)
  if run.settings.config.eval_refine_cameras:
    counted = left_halves.measured(truth)
  metrics = metrics_lib.image_metrics(
    rendering['rgb'][:, counted],
    truth[:, counted],
    run.settings.config,
    None if mask is None else mask[:, counted],
    compute_lpips,
  )
  height, width = truth.shape[:2]
  about = {'width': width, 'height': height, 'masked': mask is not None}
  return {'name': run.scene.names[row], **about, **metrics}, truth


def evaluate_scales(
  run: trained.TrainedRun, rows: Sequence[int], render_image: Callable
) -> dict | None:
  """Evaluates at several scales and writes eval/multiscale/results.json; see `multiscale`.

  Returns:
    The content of results.json; None on processes other than the main one.
  """
  compute_lpips, lpips_absent = load_lpips() if processes.is_main() else (None, None)
  folder = os.path.join(run.folder, 'eval', 'multiscale')
  found = multiscale.evaluate(run, rows, render_image, folder, compute_lpips)
  if not processes.is_main():
    return None
  results = make_results(run, (), lpips_absent, found)
  path = os.path.join(folder, 'results.json')
  results_lib.write_json(path, results)
  for scale in results['scales']:
    name = results_lib.scale_name(scale['reduction'])
    print(f'{name:>4}  {metrics_lib.format_metrics(scale["mean"])}')
  print(f'mean of scales  {metrics_lib.format_metrics(results["mean"])}')
  progress.summary({'results': path})
  return results


def make_results(
  run: trained.TrainedRun, per_image, lpips_absent: str | None, by_scale=None
) -> dict:
  """Returns the content of results.json; arguments are those of `results.make`."""
  report = run.scene.report
  seconds, peak_bytes = train_costs(run.folder, run.step)
  return results_lib.make(
    run.settings,
    results_lib.test_split(run.settings.config, run.scene),
    per_image,
    run.step,
    models.num_params(run.params),
    lpips_absent,
    seconds,
    (*report.get('warnings', ()), *run_seal.warnings(run.folder)),
    report.get('reduction'),
    by_scale,
    peak_bytes,
  )


def write_outputs(run: trained.TrainedRun, results: dict, pairs: Sequence[np.ndarray]) -> None:
  """Writes results.json, contact sheet and report, and prints where they are."""
  folder = os.path.join(run.folder, 'eval')
  written = {'results': os.path.join(folder, 'results.json')}
  results_lib.write_json(written['results'], results)
  if pairs:
    named = [f'{r["name"]}: truth, prediction   PSNR {r["psnr"]:.2f}' for r in results['per_image']]
    sheet_path = os.path.join(folder, 'contact_sheet.png')
    pictures.write_png(sheet_path, pictures.contact_sheet(pairs, named, _PAIR_WIDTH))
    written |= {'pictures': os.path.join(folder, '*.png'), 'all of them': sheet_path}
  if run.settings.config.eval_report:
    written['report'] = html_report.write(run.folder, run.settings, run.scene)
  bucket.push(run.folder)
  progress.summary({**written, 'next': cli.run_text('render', run.folder)})


def add_to_report(run: str, settings: configs.Settings, scene: scenes.Scene) -> None:
  """Writes an existing report anew, after --steps, and prints where the files are."""
  written = {'results': os.path.join(run, 'eval', 'results_*.json')}
  bucket.fetch(run, 'eval/')
  if os.path.exists(os.path.join(run, 'eval', html_report.NAME)):
    written['report'] = html_report.write(run, settings, scene)
  bucket.push(run)
  progress.summary(written)


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_run_parser(__doc__)
  one = parser.add_mutually_exclusive_group()
  one.add_argument(
    '--report_only',
    action='store_true',
    help='only rewrite report.html',
  )
  one.add_argument(
    '--multiscale', action='store_true', help='measure at 1, 1/2, 1/4 and 1/8 of the size'
  )
  one.add_argument(
    '--steps', type=int, nargs='+', metavar='STEP', help='measure these checkpoints, in this order'
  )
  args = parser.parse_args(argv)
  folder = bucket.local(cli.run_folder(args))
  settings, scene = run_folder.open_run(folder, cli.bindings(args))
  bucket.fetch(folder, *(f'render/{name}' for name in html_report.VIDEOS))
  if args.report_only:
    bucket.fetch(folder, 'eval/')
    report = html_report.write(folder, settings, scene)
    bucket.push(folder)
    progress.summary({'report': report})
    return
  processes.initialize()
  cli.show_notices(settings, args)
  cli.show_warnings(scene.report)
  rows = select_images(settings.config, scene)
  if args.multiscale:
    multiscale.check_sizes(scene, rows)
    if settings.config.eval_refine_cameras:
      raise EvalError(
        'Config.eval_refine_cameras measures halves of pictures, --multiscale whole ones; choose '
        'one of them.'
      )
  if args.steps:
    check_steps(folder, args.steps)
  with run_lock.output(os.path.join(folder, 'eval', *['multiscale'] * args.multiscale)):
    evaluate_steps(args, folder, settings, scene, rows)


def evaluate_steps(
  args, folder: str, settings: configs.Settings, scene: scenes.Scene, rows
) -> None:
  """Evaluates the checkpoints that the arguments choose on the test images in `rows`."""
  render_image = mesh = None
  for step in args.steps or steps_to_evaluate(folder, settings.config):
    # The newest checkpoint now: training may already have replaced the one that was found.
    run = trained.restore(folder, settings, scene, step if args.steps else None, mesh)
    # One renderer for all checkpoints, so that it is compiled only once.
    render_image = render_image or run.make_image_renderer(settings.config.vis_normals)
    mesh = run.mesh
    if args.multiscale:
      evaluate_scales(run, rows, render_image)
    else:
      evaluate(run, rows, render_image, numbers_only=bool(args.steps))
  if args.steps and processes.is_main():
    add_to_report(folder, settings, scene)
