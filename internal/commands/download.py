"""Downloads a published dataset from its authors: the 360, LLFF or Blender scenes.

    python scripts/download.py 360 DIR [--scenes garden bonsai]

Run the same command again to resume after an interruption. The 360 dataset is two archives, one of
12.5 GB with seven scenes and one with two more; unpacking needs twice that space.
"""

from __future__ import annotations

from .. import cli
from ..datasets import downloads
from ..system import installation


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__)
  parser.add_argument('dataset', choices=list(downloads.ARCHIVES), help='the dataset')
  parser.add_argument('folder', metavar='DIR', help='gets a folder for each scene')
  parser.add_argument('--scenes', nargs='+', help='scenes to download; default: all')
  parser.add_argument('--mirror', metavar='URL', help='base URL to fetch the archives from')
  args = parser.parse_args(argv)
  left = downloads.download(args.dataset, args.folder, args.scenes, args.mirror)
  print(f'{args.folder} is complete.')
  if left:
    print(f'No longer needed: {" ".join(left)}')
  words = ('--dataset', args.dataset, '--root', args.folder)
  print(f'Next: {installation.command_text("run_dataset", *words)}')
