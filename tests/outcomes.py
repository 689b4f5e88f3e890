"""results.json files as evaluation writes them, with numbers made up."""

import json
from pathlib import Path

import tiny

from internal.evaluation import benchmarks, results


def outcome(scene, psnr=25.0, ssim=0.75, lpips=None, factor=4, n=3, size=(40, 30), bindings=()):
  """The content of a results.json; `lpips` is both of its metrics, or None for absent."""
  row = {'psnr': psnr, 'ssim': ssim, 'cc_psnr': psnr + 1, 'cc_ssim': ssim}
  if lpips is not None:
    row |= {'lpips_paper': lpips, 'lpips_vgg': lpips + 0.05}
  width, height = size
  row |= {'width': width, 'height': height, 'masked': False, 'seconds': 1.0}
  rows = [{'name': f'{k}.png', **row} for k in range(n)]
  here = (f"Config.data_dir = 'captures/{scene}'", f'Config.factor = {factor}')
  settings = tiny.settings(*here, *bindings)
  absent = 'not installed' if lpips is None else None
  own = settings.config.dataset_loader != 'llff'
  split = results.OWN_SPLIT if own else results.every(settings.config.llffhold)
  return results.make(settings, split, rows, 250_000, 9_007_493, absent, 3600.0)


def published_scene(scene, dataset='360', **change):
  """The same with images as the published scene has them."""
  facts = benchmarks.load(dataset).scenes[scene]
  size = tuple(round(side) for side in facts.used_size)
  given = {'factor': facts.factor, 'n': facts.test, 'size': size, **change}
  return outcome(scene, **given)


def write(path, content):
  """Writes it to a file, whose folder is made; returns the file's name."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))
  return str(path)
