"""Photographs or a video to a posed capture that train.py takes, by COLMAP.

    pip install -r requirements-poses.txt
    python scripts/poses.py PHOTOS_OR_VIDEO SCENE

SCENE gets the photographs (upright; yours are never changed), smaller ones, the sparse model, and a
report to look at, preflight.png. The same command again goes on where it was stopped, and takes in
photographs that were added to the folder since.
"""

from __future__ import annotations

import argparse
import os

from .. import cli
from ..sfm import pipeline
from ..system import installation


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument('source', metavar='PHOTOS_OR_VIDEO', help='a folder, or a video file')
  parser.add_argument('scene', metavar='SCENE', help='the folder to make')
  parser.add_argument(
    '--frames', type=int, help='pictures to take of a video; else two a second, 100 to 300'
  )
  parser.add_argument(
    '--masks', metavar='DIR', help='a.jpg.png or a.png for a.jpg: black where it is to be ignored'
  )
  parser.add_argument(
    '--matching',
    choices=pipeline.MATCHING,
    default='auto',
    help='which photographs to compare: all (auto, up to 200), those near in the order and those '
    'alike, or only those alike; auto finds out whether the order means something',
  )
  parser.add_argument(
    '--camera_model', metavar='NAME', help="COLMAP's; else OPENCV, of few photographs SIMPLE_RADIAL"
  )
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
  args = _parse_arguments(argv)
  options = pipeline.Options(args.frames, args.masks, args.matching, args.camera_model)
  told = pipeline.make(args.source, args.scene, options)
  for check in told['checks']:
    print(f'{check["status"]:>8}  {check["name"]}: {check["text"]}')
  for name, reason in told['failed'].items():
    print(f'  failed  {name}: {reason}')
  print(f'\nLook at {os.path.join(args.scene, "preflight.png")}, then:')
  print(
    f'  {installation.command_text("train")} --gin_configs configs/360_fast.gin --gin_bindings '
    f'"Config.data_dir=\'{args.scene}\'" "Config.checkpoint_dir=\'runs/'
    f'{os.path.basename(os.path.realpath(args.scene))}\'" Config.factor={told["factor"]}'
  )
