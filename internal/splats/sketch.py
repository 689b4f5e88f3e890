"""A run's Gaussians for the viewer's page, which draws them while its camera moves."""

from __future__ import annotations

import json
import os

from ..datasets import scenes
from ..export import points
from ..viewer import additions
from . import formats, page, rounding

_FILES = {'splats.ply': formats.read_ply, 'splats.spz': formats.read_spz}  # The exact one first.


def find(run: str, scene: scenes.Scene) -> additions.Additions | None:
  """Returns what the viewer's page needs, or None if RUN/export has no Gaussians.

  Raises:
    SplatFileError: their file is damaged.
  """
  paths = {os.path.join(run, 'export', name): read for name, read in _FILES.items()}
  path = next(filter(os.path.exists, paths), None)
  if path is None:
    return None
  to_world = scene.world_transform.copy()
  to_world[:3, 3] += to_world[:3, :3] @ points.offset(scene)  # To which the file is relative.
  splats = formats.moved(paths[path](path), to_world)
  packed = formats.pack_spz(splats, rounding.fixed(len(splats.means)))
  look = f'const look = {json.dumps(page.look(scene))};'
  script = '\n'.join([page.read_scripts('splats.js'), look, page.read_scripts('sketch.js')])
  return additions.Additions(script, {'splats.spz': packed})
