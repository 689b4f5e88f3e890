"""Poses scenes that mislead pose estimation, and compares the verdict with the true errors.

    python tests/verdict_table.py OUT [SCENE ...] [--photographs N] [--features N]

Renders the scenes of pose_scenes.py into OUT, maps each globally, incrementally and in the way that
`--mapper auto` chooses, and prints what the matches say about each model, beside its true errors.
Resumes. Minutes for each scene.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import compare_poses
import pose_scenes

from internal import cli, colmap
from internal.sfm import evidence, mapping, pairs, photos, reconstruction

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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('scenes', nargs='*', default=list(pose_scenes.SCENES))
  parser.add_argument('--photographs', type=int, default=48)
  parser.add_argument('--features', type=int, default=2500)
  args = parser.parse_args()
  print(
    '| scene | mapper | posed | poses (90% of photographs) | contradicted pairs | jumps | verdict |'
  )
  print('|---|---|---|---|---|---|---|')
  for scene in args.scenes:
    folder = args.out / scene
    folder.mkdir(parents=True, exist_ok=True)
    names = prepare(folder, scene, args.photographs, args.features)
    for mapper in ('global', 'incremental', 'auto'):
      print(row(folder, scene, names, mapper), flush=True)


if __name__ == '__main__':
  cli.run(main)
