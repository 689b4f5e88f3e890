"""Scenes: round trips are exact; pixels have the size of the camera."""

import dataclasses
import json
import os

import captures
import jax
import numpy as np
import pytest
from scipy.spatial import transform

from internal import cameras, structs
from internal.datasets import images, scenes


def sample(ndc=True) -> scenes.Scene:
  rng = np.random.default_rng(0)
  rotations = transform.Rotation.random(3, random_state=0).as_matrix()
  table = cameras.make_cameras(
    rng.random((3, 3, 3)),  # Focal lengths are positive.
    np.concatenate([rotations, rng.normal(size=(3, 3, 1))], -1),
    [[16, 12]] * 3,
    distortion=rng.normal(size=(3, 6)),
    lens=[structs.FISHEYE, 0, 0],
    pixtocam_ndc=rng.normal(size=(3, 3)) if ndc else None,
  )
  return scenes.Scene(
    loader='llff',
    files=('images/0.png', 'images/\udce4.png', 'images/2.png'),
    names=('0.png', '\udce4.png', 'ü 2.png'),
    cameras=table,
    train=(1, 2),
    test=(0,),
    world_transform=rng.normal(size=(4, 4)),
    background='none',
    bounds=(1 / 3, 7.0) if ndc else None,
    report={'images_found': 3},
  )


@pytest.mark.parametrize('ndc', [True, False])
def test_round_trip_is_exact(tmp_path, ndc):
  path = str(tmp_path / 'scene.json')
  a = sample(ndc)
  scenes.save_scene(path, a)
  b = scenes.load_scene(path)
  for field in dataclasses.fields(scenes.Scene):
    if field.name not in ('cameras', 'world_transform'):
      assert getattr(a, field.name) == getattr(b, field.name), field.name
  np.testing.assert_array_equal(a.world_transform, b.world_transform)
  # The same tree: static fields too, or a compiled program would not fit.
  assert jax.tree.structure(a.cameras) == jax.tree.structure(b.cameras)
  for x, y in zip(jax.tree.leaves(a.cameras), jax.tree.leaves(b.cameras)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)
  assert os.listdir(tmp_path) == ['scene.json']


def test_a_failed_save_keeps_the_old_one(tmp_path):
  path = str(tmp_path / 'scene.json')
  scenes.save_scene(path, sample())
  with pytest.raises(TypeError):
    scenes.save_scene(path, dataclasses.replace(sample(), report={'x': object()}))
  assert scenes.load_scene(path).report == {'images_found': 3}


def test_bad_files_are_named(tmp_path):
  path = str(tmp_path / 'scene.json')
  with pytest.raises(images.DataNotFoundError, match=r'scene\.json'):
    scenes.load_scene(path)
  scenes.save_scene(path, sample())
  fields = json.loads((tmp_path / 'scene.json').read_text())
  for content in ('{', '[]', '{"version": 1}', json.dumps({**fields, 'new': 1})):
    with open(path, 'w') as f:
      f.write(content)
    with pytest.raises(images.DataError, match=r'scene\.json: is no scene'):
      scenes.load_scene(path)
  with open(path, 'w') as f:
    json.dump({**fields, 'version': 99}, f)
  with pytest.raises(images.DataError, match=r'version 99'):
    scenes.load_scene(path)


@pytest.mark.parametrize(
  ('place', 'value'),
  [
    (('train',), [0, 3]),
    (('train',), []),
    (('test',), [-1]),
    (('files',), ['images/0.png'] * 2),
    (('files',), ['/images/0.png'] * 3),
    (('names',), 3),
    (('background',), 'black'),
    (('bounds',), [2, 1]),
    (('bounds',), [1]),
    (('world_transform',), [[1, 2], [3, 4]]),
    (('cameras', 'pixtocam'), float('nan')),
    (('cameras', 'size'), [[16, 0]] * 3),
    (('cameras', 'size'), [[16, 2**40]] * 3),
    (('cameras', 'lens'), [9, 0, 0]),
    (('cameras', 'lenses'), [0]),
    (('cameras', 'distortion'), [[0] * 6] * 2),
    (('cameras', 'camtoworld'), 10**400),
  ],
)
def test_impossible_values_are_refused(tmp_path, place, value):
  path = tmp_path / 'scene.json'
  scenes.save_scene(str(path), sample())
  fields = json.loads(path.read_text())
  holder = fields['cameras'] if len(place) > 1 else fields
  assert place[-1] in holder
  holder[place[-1]] = value
  path.write_text(json.dumps(fields))
  with pytest.raises(images.DataError, match=r'scene\.json: is no scene .*Train anew'):
    scenes.load_scene(str(path))


def test_pixels(tmp_path):
  for i, name in enumerate(('0.png', '2.png')):
    captures.save_image(str(tmp_path / 'images' / name), captures.pixels(i))
  some = sample()
  np.testing.assert_array_equal(scenes.read_image(str(tmp_path), some, 0), captures.pixels(0))
  two = scenes.read_images(str(tmp_path), some, (2, 0), progress=False)
  np.testing.assert_array_equal(two, [captures.pixels(1), captures.pixels(0)])
  with pytest.raises(images.DataNotFoundError, match='no such image'):
    scenes.read_images(str(tmp_path), some, (0, 1), progress=False)
  captures.save_image(str(tmp_path / 'images' / '0.png'), captures.pixels(0, (17, 12)))
  with pytest.raises(images.DataError, match=r'0\.png: is 17x12.*16x12'):
    scenes.read_image(str(tmp_path), some, 0)
  outside = dataclasses.replace(some, files=('../images/0.png',) * 3)
  with pytest.raises(images.DataError, match='not a path inside'):
    scenes.read_image(str(tmp_path), outside, 0)
