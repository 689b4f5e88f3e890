"""All that is known of a capture but its pixels, and the pixels of one picture at a time.

A scene is saved beside the checkpoints, so what is rendered later can never mismatch what was
trained. `n` is the number of images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from internal import files, structs
from internal.datasets import images

_VERSION = 1  # Of scene.json.
_ARRAYS = {
  'pixtocam': np.float32,
  'camtoworld': np.float32,
  'distortion': np.float32,
  'lens': np.int32,
  'size': np.int32,
}


@dataclasses.dataclass(frozen=True)
class Scene:
  """A capture: its pictures' files, their cameras in the normalised world, and the split."""

  loader: str  # The format's name, as Config.dataset_loader has it.
  files: tuple[str, ...]  # [n] the pictures as used, relative to data_dir, '/' between folders.
  names: tuple[str, ...]  # [n] their names in the capture's model.
  cameras: structs.Cameras  # numpy leaves, n rows.
  train: tuple[int, ...]  # Rows of the training images.
  test: tuple[int, ...]  # Rows of the held-out images.
  world_transform: np.ndarray  # [4, 4] float64, the capture's world to the normalised one.
  background: str  # 'white': alpha is composited on white; 'none': pictures have no alpha.
  bounds: tuple[float, float] | None  # Near and far of a forward-facing capture, normalised.
  report: dict[str, Any]  # What a preflight prints.

  def stem(self, i: int) -> str:
    """Image i's name as a piece of a file's: no ending, no folders."""
    return images.stem(self.names[i]).replace('/', '_')


def save_scene(path: str, scene: Scene) -> None:
  """Writes a scene as JSON, whole or not at all; numbers come back exactly."""
  cameras = scene.cameras
  fields = {field.name: getattr(scene, field.name) for field in dataclasses.fields(scene)}
  fields['version'] = _VERSION
  fields['world_transform'] = np.asarray(scene.world_transform, np.float64).tolist()
  fields['cameras'] = {
    # A float32 is a float64 too, of which repr() gives all digits.
    **{name: np.asarray(getattr(cameras, name), dtype).tolist() for name, dtype in _ARRAYS.items()},
    'pixtocam_ndc': None if cameras.pixtocam_ndc is None else cameras.pixtocam_ndc.tolist(),
    'lenses': cameras.lenses,
    'distorted': cameras.distorted,
  }
  with files.whole(path) as temporary, open(temporary, 'w') as f:
    json.dump(fields, f)


def load_scene(path: str) -> Scene:
  """Reads what `save_scene` wrote.

  Raises:
    DataNotFoundError: no such file.
    DataError: not a scene, or one of another version of this program.
  """
  try:
    with open(path) as f:
      fields = json.load(f)
    version = fields.pop('version')
    if version != _VERSION:
      raise images.DataError(
        f'{path}: is of version {version}, this program reads {_VERSION}. Train anew, or use the '
        'version of the program that wrote it.'
      )
    table = fields.pop('cameras')
    for name, dtype in _ARRAYS.items():
      table[name] = np.asarray(table[name], dtype)
    if table['pixtocam_ndc'] is not None:
      table['pixtocam_ndc'] = np.asarray(table['pixtocam_ndc'], np.float32)
    table['lenses'] = tuple(table['lenses'])
    for name in ('files', 'names', 'train', 'test'):
      fields[name] = tuple(fields[name])
    fields['bounds'] = fields['bounds'] and tuple(fields['bounds'])
    fields['world_transform'] = np.asarray(fields['world_transform'], np.float64)
    return Scene(cameras=structs.Cameras(**table), **fields)
  except FileNotFoundError:
    raise images.DataNotFoundError(f'No such file: {path!r}. Training writes it.') from None
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
    raise images.DataError(
      f'{path}: is no scene ({type(e).__name__}: {e}). Train anew to have it written.'
    ) from None


def read_image(data_dir: str, scene: Scene, i: int) -> np.ndarray:
  """The pixels of image i, uint8 [h, w, 3], in the size that its camera has.

  Raises:
    DataError, DataNotFoundError: the picture is missing, damaged or another than before.
  """
  path = images.inside(data_dir, scene.files[i])
  width, height = scene.cameras.size[i].tolist()
  return images.decode(path, scene.background, (width, height))


def read_images(
  data_dir: str, scene: Scene, indices: Sequence[int], progress: bool = True
) -> list[np.ndarray]:
  """The pixels of several images, read by threads: a list of uint8 [h, w, 3]."""
  label = 'reading images' if progress else None
  return images.in_threads(lambda i: read_image(data_dir, scene, i), list(indices), label)
