"""One HTML file that shows Gaussians in any browser with WebGL 2, from disk and without a network.

The file holds the Gaussians as a .spz and a small viewer: splats.js draws, page.js moves. The
client of the viser package can embed a static scene too, but its colours do not depend on the
direction, it keeps covariances in half precision, and it has neither the anti-aliasing filter nor
the capture's cameras as stops.
"""

from __future__ import annotations

import base64
import json
import os

import jinja2
import numpy as np

from .. import paths, structs
from ..datasets import scenes
from ..rendering import orbits
from ..system import files
from . import formats, gaussians, rounding

_HERE = os.path.dirname(os.path.abspath(__file__))
_TEMPLATE, _SCRIPTS = 'page.html.jinja', ('splats.js', 'page.js')
# The page's axes are those of the .spz: y and z with the other sign.
_FLIP = np.array([1.0, -1, -1])


def write(
  path: str,
  splats: gaussians.Splats,
  scene: scenes.Scene,
  title: str,
  steps: rounding.Steps | None = None,
) -> None:
  """Writes the page, atomically.

  Args:
    path: the .html file.
    splats: Gaussians in the normalised world, whose units suit the range of numbers of a .spz.
    scene: the capture, for its cameras.
    title: the window's title.
    steps: how coarsely the Gaussians may be rounded, see `formats.pack_spz`.
  """
  packed = formats.pack_spz(splats, steps)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE), autoescape=False, undefined=jinja2.StrictUndefined
  )
  size = len(packed) * 4 / 3 / 1e6  # Base64 needs four letters for three bytes.
  text = environment.get_template(_TEMPLATE).render(
    title=_escaped(title),
    about=f'{len(splats.means):,} Gaussians, {size:.1f} MB',
    # In a script element only `</` could end it.
    scene=json.dumps(describe(scene)).replace('</', '<\\/'),
    splats=base64.b64encode(packed).decode(),
    script=read_scripts(*_SCRIPTS),
  )
  files.write_text(path, text)


def read_scripts(*names: str) -> str:
  """Returns JavaScript files of this folder, one after the other."""
  return '\n'.join(files.read_text(os.path.join(_HERE, name)) for name in names)


def look(scene: scenes.Scene) -> dict:
  """Returns how splats.js draws."""
  return {
    'background': [1.0] * 3 if scene.background == 'white' else [0.0] * 3,
    'low_pass': gaussians.LOW_PASS,
    'near': gaussians.NEAR,
  }


def _escaped(text: str) -> str:
  return str(jinja2.filters.do_forceescape(text))


def describe(scene: scenes.Scene) -> dict:
  """Returns what the page knows besides the Gaussians: cameras, up, focus, ..., in its axes."""
  poses = np.asarray(scene.cameras.camtoworld, np.float64)
  train = poses[list(scene.train)]
  return {
    **look(scene),
    'up': (_FLIP * orbits.mean_up(train)).tolist(),
    'focus': (_FLIP * paths.focus_point(train)).tolist(),
    'stops': [_stop(scene, row, poses[row]) for row in range(len(scene.names))],
  }


def _stop(scene: scenes.Scene, row: int, pose: np.ndarray) -> dict:
  """Returns a camera [3, 4] of the capture; other lenses become 90 degrees wide."""
  camera = gaussians.pinhole(scene.cameras, row)
  focal, centre, size = camera.focal, camera.centre, np.array(camera.size)
  if scene.cameras.lens[row] != structs.PERSPECTIVE:
    focal, centre = np.repeat(size[0] / 2, 2), size / 2
  return {
    'name': scene.names[row],
    'eye': (_FLIP * pose[:, 3]).tolist(),
    'right': (_FLIP * pose[:, 0]).tolist(),
    'forward': (-_FLIP * pose[:, 2]).tolist(),
    'focal': np.asarray(focal, float).tolist(),
    'centre': np.asarray(centre, float).tolist(),
    'size': size.tolist(),
  }
