"""Estimates the camera poses of photographs or of a video with COLMAP, ready for train.py.

    pip install -r requirements-poses.txt
    pip install -r requirements-heic.txt    # For HEIC photographs only.
    python scripts/poses.py PHOTOS_OR_VIDEO SCENE

Writes upright copies of the photographs, downsampled copies, the sparse model and a report,
preflight.png, to the folder SCENE. Your own files are not changed. Run the same command again to
resume after an interruption, or to add new photographs. --from refines poses that you have instead
of estimating them. docs/poses.md explains the report.
"""

from __future__ import annotations

import argparse
import collections
import os

from .. import cli
from ..devices import starting
from ..sfm import mapping, moved, pipeline
from ..system import warnings


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.make_parser(__doc__)
  parser.add_argument('source', metavar='PHOTOS_OR_VIDEO', help='folder of photographs, or a video')
  parser.add_argument('scene', metavar='SCENE', help='folder to write the capture to')
  parser.add_argument(
    '--frames', type=int, help='frames to extract from a video (default: two a second, 100 to 300)'
  )
  parser.add_argument(
    '--masks',
    metavar='DIR',
    help='masks, such as a.jpg.png or a.png for a.jpg, black where the photograph is to be ignored',
  )
  parser.add_argument(
    '--matching',
    choices=pipeline.MATCHING,
    default='auto',
    help='which pairs of photographs to match: all of them (exhaustive), neighbours in time and '
    'similar ones (sequential), or only similar ones (alike); auto takes exhaustive up to 60 '
    'photographs, or 200 in no order, above that sequential if they are in order, else alike',
  )
  parser.add_argument(
    '--mapper',
    choices=mapping.MAPPERS,
    default='auto',
    help='how poses are estimated from the matches: all at once (global), photograph by photograph '
    '(incremental), or in parts that are joined (hierarchical); auto maps globally, and where the '
    'matches contradict the poses or many photographs have none, tries others and keeps the best',
  )
  parser.add_argument(
    '--camera_model',
    metavar='NAME',
    help="COLMAP's camera model (default: OPENCV, or SIMPLE_RADIAL for fewer than 20 photographs)",
  )
  parser.add_argument(
    '--from',
    dest='given',
    metavar='POSES',
    help='poses to refine: a transforms.json (nerfstudio, Polycam, instant-ngp), the folder of a '
    'COLMAP model, or a folder that has either',
  )
  parser.add_argument(
    '--fix_intrinsics', action='store_true', help='keep the intrinsics that --from gives'
  )
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
  args = _parse_arguments(argv)
  options = pipeline.Options(
    frames=args.frames,
    masks=args.masks,
    matching=args.matching,
    mapper=args.mapper,
    camera_model=args.camera_model,
    given=args.given,
    fix_intrinsics=args.fix_intrinsics,
  )
  report = pipeline.make(args.source, args.scene, options)
  for check in report['checks']:
    print(f'{check["status"]:>8}  {check["name"]}: {check["text"]}')
  for line in moved.lines(report['refinement']) if report['refinement'] else ():
    print(line)
  failed = collections.defaultdict(list)
  for name, reason in report['failed'].items():
    failed[reason].append(name)
  for reason, names in failed.items():
    print(f'  failed  {warnings.some(names)}: {reason}')
  cli.show_warnings(report['capture'] or {})
  print(f'\nLook at {os.path.join(args.scene, "preflight.png")}.')
  if report['cameras']:
    size = max((camera['size'] for camera in report['cameras']), key=max)
    print(f'If it looks right, train with:\n{starting.advice(args.scene, size)}')
