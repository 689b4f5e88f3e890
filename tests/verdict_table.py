"""Poses scenes that mislead pose estimation, and compares the verdict with the true errors.

    python tests/verdict_table.py OUT [SCENE ...] [--photographs N] [--features N]
    python tests/verdict_table.py OUT [SCENE ...] [--photographs N] --command [--exif]

Renders the scenes of pose_scenes.py into OUT, maps each globally, incrementally and in the way that
`--mapper auto` chooses, and prints what the matches say about each model, beside its true errors.
Resumes. With --command it runs scripts/poses.py on the photographs instead, which --exif gives a
focal length, and prints what its report says. Minutes for each scene.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import compare_poses
import pose_scenes

from internal import cli, colmap
from internal.sfm import diagnosis, evidence, mapping, pairs, photos, preflight, reconstruction

PROGRAM = pathlib.Path(__file__).resolve().parent.parent / 'scripts' / 'poses.py'
RIGHT = (2.0, 0.05)  # Largest error of right poses: degrees, and of the radius.


def prepare(folder: pathlib.Path, scene: str, count: int, features: int) -> list[str]:
  """Renders a scene and matches its photographs; returns their names."""
  pycolmap, source = reconstruction.colmap(), folder / 'photographs'
  if len(list(source.glob('*.png'))) < count:
    pose_scenes.make(scene, source, count)
  (folder / photos.STAGING).mkdir(exist_ok=True)
  names = [photo.name for photo in photos.import_photos(str(source), str(folder))]
  if not (folder / reconstruction.DATABASE).exists():
    reader, options = pycolmap.ImageReaderOptions(), pycolmap.FeatureExtractionOptions()
    reader.camera_model, options.sift.max_num_features = 'SIMPLE_RADIAL', features
    single = pycolmap.CameraMode.SINGLE
    pycolmap.extract_features(*reconstruction.folders(str(folder)), names, single, reader, options)
  reconstruction.match_pairs(str(folder), names, pairs.exhaustive(len(names)))
  return names


def row(folder: pathlib.Path, scene: str, names: list[str], mapper: str) -> str:
  """Maps a scene in one way; returns a row of the table."""
  models, account = mapping.reconstruct(str(folder), names, mapper, {'photographs': names})
  if not models:
    return f'| {scene} | {mapper} | 0 | | | |'
  mapping.write_models(str(folder), f'{mapper}', models[:1], {})
  found = evidence.Matches(str(folder), names).test(models[0])
  compared = compare_poses.compare(
    colmap.read_model(str(folder / mapper / '0')), pose_scenes.true_model(scene, len(names))
  )
  worst = np.percentile(compared.rotation, 90), np.percentile(compared.position, 90)
  truth = 'right' if worst[0] < RIGHT[0] and worst[1] < RIGHT[1] else 'wrong'
  how = f'auto: {account["mapper"]}' if mapper == 'auto' else mapper
  return (
    f'| {scene} | {how} | {models[0].num_reg_images()} of {len(names)} | {truth} '
    f'({worst[0]:.1f} degrees, {worst[1]:.1%}) | {len(found.contradicted)} of {found.tested}, '
    f'{found.in_order} in order | {len(found.jumps)} | {found.verdict} |'
  )


def command_row(folder: pathlib.Path, scene: str, count: int, exif: bool) -> str:
  """Runs scripts/poses.py on a scene; returns a row: true errors, what the report says, seconds.

  The errors are the largest ones. The way that was kept is bold. The seconds are those of all
  threads, which a busy machine hardly changes.
  """
  kind = 'exif' if exif else 'plain'
  source, capture = folder / f'photographs_{kind}', folder / f'capture_{kind}'
  pose_scenes.make(scene, source, count, exif)
  shutil.rmtree(capture, ignore_errors=True)
  before = os.times()
  with open(folder / f'{kind}.log', 'w') as log:
    subprocess.run([sys.executable, PROGRAM, source, capture], stdout=log, stderr=log, check=False)
  seconds = sum(os.times()[2:4]) - sum(before[2:4])
  report = json.loads((capture / f'{preflight.FILE}.json').read_text())
  if not report['posed']:
    return f'| {scene} | {"yes" if exif else "no"} | 0 of {count} | | | | | {seconds:.0f} |'
  compared = compare_poses.compare(
    colmap.read_model(str(capture / diagnosis.MODELS / '0')),
    pose_scenes.true_model(scene, count, exif),
  )
  # Cameras that only turn have no radius: no poses of theirs serve.
  still = compared.radius < 1e-6
  worst = compared.rotation.max(), np.nan if still else compared.position.max()
  truth = 'right' if worst[0] < RIGHT[0] and worst[1] < RIGHT[1] else 'wrong'
  checks = {check['name']: check for check in report['checks']}
  others = [f'{name} {c["status"]}' for name, c in checks.items() if c['status'] != evidence.GOOD]
  tried = report['mapping']
  ways = [f'**{a["mapper"]}**' if a['mapper'] == tried['mapper'] else a['mapper']
          for a in tried['attempts']]  # fmt: skip
  return (
    f'| {scene} | {"yes" if exif else "no"} | {report["posed"]} of {count} | {truth} '
    f'({worst[0]:.2f} degrees, {worst[1]:.2%}) | {checks["matches"]["status"]}: '
    f'{checks["matches"]["text"]} | {", ".join(others)} | {"; ".join(ways)} | {seconds:.0f} |'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('scenes', nargs='*', default=list(pose_scenes.SCENES))
  parser.add_argument('--photographs', type=int, default=48)
  parser.add_argument('--features', type=int, default=2500)
  parser.add_argument('--command', action='store_true')
  parser.add_argument('--exif', action='store_true')
  args = parser.parse_args()
  columns = 'mapper | posed | poses (90% of photographs) | contradicted pairs | jumps | verdict'
  if args.command:
    columns = 'EXIF | posed | poses (all) | matches | not good | ways | CPU seconds'
  print(f'| scene | {columns} |\n|{"---|" * (columns.count("|") + 2)}')
  for scene in args.scenes:
    folder = args.out / scene
    folder.mkdir(parents=True, exist_ok=True)
    if args.command:
      print(command_row(folder, scene, args.photographs, args.exif), flush=True)
      continue
    names = prepare(folder, scene, args.photographs, args.features)
    for mapper in ('global', 'incremental', 'auto'):
      print(row(folder, scene, names, mapper), flush=True)


if __name__ == '__main__':
  cli.run(main)
