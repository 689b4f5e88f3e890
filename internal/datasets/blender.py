"""Blender's synthetic scenes: transforms_train.json and transforms_test.json, objects on white.

The capture's world is kept: the object is near the origin, the cameras are 4 units away.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from .. import configs
from . import frames as frames_lib
from . import scenes, transforms


def load(config: configs.Config, read_only: bool = False) -> scenes.Scene:
  """Loads a Blender scene; `Config.factor` uses (and makes) train_<factor>/ and test_<factor>/.

  Raises:
    DataNotFoundError: the folder, a transforms file or a picture is missing.
    DataError: a file is damaged or contradicts another.
  """
  data_dir = frames_lib.capture_dir(config.data_dir)

  def read(part: str) -> list[frames_lib.Frame]:
    path = os.path.join(data_dir, f'transforms_{part}.json')
    return transforms.read_frames(data_dir, path, transforms.read_table(path))

  return assemble('blender', config, read, read_only)


def assemble(
  loader: str,
  config: configs.Config,
  read: Callable[[str], list[frames_lib.Frame]],
  read_only: bool,
) -> scenes.Scene:
  """Assembles the frames `read('train')` and `read('test')`: white background, world as it is."""
  frames, split = frames_lib.train_then_test(read)
  data_dir = config.data_dir
  return frames_lib.assemble(
    loader,
    data_dir,
    frames,
    frames_lib.world_as_is,
    split,
    factor=config.factor,
    background='white',
    read_only=read_only,
    config=config,
  )
