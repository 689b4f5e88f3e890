"""Fetches a published dataset from its authors' address: the 360, LLFF or Blender scenes.

    python scripts/download.py 360 DIR [--scenes garden bonsai]

Start it again after an interruption: it goes on. The 360 dataset is 12.5 GB in one archive and two
more scenes in another, and takes twice that while it is unpacked.
"""

from __future__ import annotations

from .. import cli
from ..datasets import downloads
from ..system import installation


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__)
  parser.add_argument('dataset', choices=list(downloads.ARCHIVES), help='which one')
  parser.add_argument('folder', metavar='DIR', help='where the scenes go, each in its own folder')
  parser.add_argument('--scenes', nargs='+', help='only these')
  parser.add_argument('--mirror', metavar='URL', help='fetch the archives from below this address')
  args = parser.parse_args(argv)
  left = downloads.download(args.dataset, args.folder, args.scenes, args.mirror)
  print(f'{args.folder} is whole.')
  if left:
    print(f'Needed no longer: {" ".join(left)}')
  print(
    f'Next: {installation.command_text("run_dataset")} --dataset {args.dataset} '
    f'--root {args.folder}'
  )
