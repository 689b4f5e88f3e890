"""Makes the demo capture: a still life in an endless landscape, as a COLMAP folder.

    python scripts/make_demo_scene.py OUT_DIR [--width 160 --height 120 --images 72 --seed 0]

Cameras circle the still life at two heights. With --passers_by 0.3, people walk through 30% of the
photographs that are not held out for tests. OUT_DIR gets images/ and sparse/0/, and appears when
it is complete. A second run with the same settings keeps it.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from ..demo import capture
from ..system import installation


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(  # Not cli.make_parser: cli imports JAX.
    description=installation.examples(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out_dir', type=pathlib.Path, metavar='OUT_DIR', help='the capture')
  parser.add_argument('--width', type=int, default=160, help='image width in pixels')
  parser.add_argument('--height', type=int, default=120, help='image height in pixels')
  parser.add_argument('--images', type=int, default=72, help='number of images')
  parser.add_argument('--seed', type=int, default=0, help='seed of the landscape')
  parser.add_argument(
    '--passers_by', type=float, default=0.0, metavar='FRACTION',
    help='fraction of the training photographs that people walk into',
  )  # fmt: skip
  args = parser.parse_args(argv)
  out = args.out_dir.resolve()
  try:
    made = capture.make_demo_scene(
      out, args.width, args.height, args.images, args.seed, args.passers_by
    )
  except capture.DemoSceneError as error:
    sys.exit(f'Error: {error}')
  if made:
    print(f'{out}: {args.images} images of {args.width} x {args.height}.')
  else:
    print(f'{out} already exists with these settings.')
