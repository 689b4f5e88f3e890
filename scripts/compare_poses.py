"""How two posings of the same photographs differ: rotations and positions, after alignment.

    python scripts/compare_poses.py A/sparse/0 B/sparse/0 [--json out.json]

Both are COLMAP models (.bin or .txt). A is laid on B by the similarity that brings their cameras
closest. The radius is the median distance of B's cameras from their mean.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from internal import cli, colmap
from internal.evaluation import metrics
from internal.sfm import align


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__)
  parser.add_argument('first', metavar='A', help='the folder of a sparse model')
  parser.add_argument('second', metavar='B', help='of another, the one to hold A against')
  parser.add_argument('--json', metavar='FILE', help='write the errors of each photograph as well')
  args = parser.parse_args(argv)
  comparison = align.compare(colmap.read_model(args.first), colmap.read_model(args.second))
  print(align.table(comparison))
  if args.json:
    metrics.write_json(args.json, align.as_json(comparison))


if __name__ == '__main__':
  cli.run(main)
