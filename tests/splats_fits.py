"""Fits Gaussians to one trained run in several ways, and compares what comes out.

    python tests/splats_fits.py RUN OUT --fits 12000:0.8 12000:0.5 12000:0.8:20

The field is rendered once. A fit is STEPS:SHARE, the number of steps and the share of photographs
among them (see distil.Options), or STEPS:SHARE:DEVIATION: then each photograph keeps its detail,
but has the colours of the field's picture from the same camera once both are blurred with this
deviation in pixels. So photographs of different exposure get the field's. All fits begin with the
Gaussians that suit the first one's number of steps. Writes the mean scores on the test images to
OUT/fits.json, and the comparison of each fit as a picture.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import jax
import numpy as np
from scipy import ndimage

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from internal import cli
from internal.datasets import images
from internal.rendering import trained
from internal.splats import comparison, distil, views
from internal.system import files
from internal.vis import pictures


def with_colors_of(field: views.Views, photos: views.Views, deviation: float) -> views.Views:
  """Returns the photographs with the low frequencies of the field's pictures of their cameras."""

  def blurred(picture: np.ndarray, counts: np.ndarray) -> np.ndarray:
    sums = ndimage.gaussian_filter(picture * counts, (deviation, deviation, 0))
    return sums / np.maximum(ndimage.gaussian_filter(counts, (deviation, deviation, 0)), 1e-3)

  def corrected(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    photo, own = (np.float32(picture) for picture in pair)
    counts = np.float32(photo[..., 3:] > 0)
    photo[..., :3] += blurred(own[..., :3], counts) - blurred(photo[..., :3], counts)
    return np.clip(np.rint(photo), 0, 255).astype(np.uint8)

  pairs = list(zip(photos.colors, field.colors))
  return dataclasses.replace(photos, colors=images.in_threads(corrected, pairs))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('run')
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('--fits', nargs='+', default=['12000:0.8'], metavar='STEPS:SHARE[:DEVIATION]')
  parser.add_argument('--views', type=int, default=distil.Options.views)
  parser.add_argument('--max_splats', type=int, default=distil.Options.max_splats)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  run, began = trained.open_trained(args.run), time.monotonic()
  fits = {text: [float(x) for x in text.split(':')] for text in args.fits}
  options = {
    text: distil.Options(args.max_splats, int(steps), args.views, share)
    for text, (steps, share, *_) in fits.items()
  }
  material = distil.prepare(run, options[args.fits[0]])
  print(f'{time.monotonic() - began:.0f} s before the fits', flush=True)
  found, at_photos = {}, None
  for text, (_, _, *deviation) in fits.items():
    own = material
    if deviation:
      if at_photos is None:
        there = views.without_distortion(run.scene.cameras.take(material.rows))
        at_photos = views.render_teacher(run, there)[0]
      photos = with_colors_of(at_photos, material.photos, deviation[0])
      own = dataclasses.replace(material, photos=photos)
    began = time.monotonic()
    splats = jax.block_until_ready(distil.fitted(run, own, options[text]))
    seconds = time.monotonic() - began
    scores, picture = comparison.compare(jax.tree.map(np.asarray, splats), run)
    found[text] = scores | {'seconds': seconds, 'splats': len(splats.means)}
    files.write_text(str(args.out / 'fits.json'), json.dumps(found, indent=1))
    if picture is not None:
      pictures.write_png(str(args.out / f'fit_{text.replace(":", "_")}.png'), picture)
    print(f'== {text}: {seconds:.0f} s, {json.dumps(scores)}', flush=True)


if __name__ == '__main__':
  cli.run(main)
