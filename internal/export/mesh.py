"""A mesh of a trained density: marching cubes in contracted space, mapped back to the world.

Contracted space has fine cells where the capture is and ever larger ones outside, as the model
itself has. scikit-image makes the surface, trimesh writes it; both are optional.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .. import configs, coord, models, structs
from ..system import files, progress
from . import points

_CHUNK = 65536  # Points at once.


@dataclasses.dataclass(frozen=True)
class Mesh:
  """A triangle mesh in the world."""

  vertices: np.ndarray  # [m, 3]
  faces: np.ndarray  # [f, 3] rows of vertices, anticlockwise from outside.
  colors: np.ndarray  # [m, 3] uint8


def library(name: str):
  """An optional package.

  Raises:
    ExportError: it is not installed; says how to.
  """
  try:
    return importlib.import_module(name)
  except ImportError:
    raise points.ExportError(
      f'{name.split(".")[0]} is not installed: pip install -r requirements-export.txt.'
    ) from None


def make_field(settings: configs.Settings) -> Callable:
  """`field(params, z, width) -> density [m]`, numpy, in chunks.

  z [m, 3] are points of the space that is meshed: contracted where the model contracts, else the
  world; width is of their cells.
  """
  model, to_world = models.build(settings), warps(settings)[1]

  @jax.jit
  def query(params, z, width):
    cov = jnp.broadcast_to(width**2 / 12 * jnp.eye(3), (len(z), 3, 3))
    mean, cov = coord.linearize(to_world, z, cov)
    ahead = jnp.broadcast_to(jnp.array([0.0, 0, -1]), mean.shape)  # Density looks the same.
    one = jnp.ones((len(z), 1))
    rays = structs.Rays(mean, ahead, ahead, one, jnp.zeros(len(z), jnp.int32))
    gaussians = structs.Gaussians(mean[:, None], cov[:, None])
    return model.apply({'params': params}, rays, gaussians, method='field')[0][:, 0]

  def field(params, z, width):
    parts = []
    for start in range(0, len(z), _CHUNK):
      part = np.asarray(z[start : start + _CHUNK], np.float32)
      padded = np.pad(part, ((0, _CHUNK - len(part)), (0, 0)), 'edge')
      parts.append(np.asarray(query(params, padded, np.float32(width)))[: len(part)])
    return np.concatenate(parts)

  return field


def warps(settings: configs.Settings) -> tuple[Callable, Callable]:
  """From the world to the space that is meshed, and back, both of [..., 3].

  Raises:
    ExportError: the model warps in another way than by contraction.
  """
  warp = settings.nerf_mlp.warp_fn
  if warp == 'contract':
    return coord.contract, coord.inv_contract
  if warp is None:
    return (lambda x: x), (lambda z: z)
  raise points.ExportError(
    f"A mesh needs NerfMLP.warp_fn = 'contract' or None; this run has {warp!r}. Points and depth "
    'maps can be exported: --only points depth.'
  )


def grid_of(box: np.ndarray, contract: Callable, resolution: int) -> tuple[np.ndarray, float]:
  """The corner [3, 2] of a grid that covers the world's `box` [2, 3], and the width of its cells.

  The corner is that of lower and upper coordinates along each axis, in the space that is meshed;
  the longest side has `resolution` cells. The box's image under a contraction along coordinates is
  largest on its surface, which is sampled.
  """
  side = np.linspace(0, 1, 33)
  mesh = np.stack(np.meshgrid(side, side, side, indexing='ij'), -1).reshape(-1, 3)
  z = np.asarray(contract(jnp.asarray(box[0] + mesh * (box[1] - box[0]), jnp.float32)))
  low, high = z.min(0).astype(np.float64), z.max(0).astype(np.float64)
  return np.stack([low, high], -1), float((high - low).max() / resolution)


def extract(
  field: Callable,
  params,
  space: tuple[Callable, Callable],
  box: np.ndarray,
  resolution: int,
  views: points.Views,
  level: float,
  min_faces: int = 50,
) -> Mesh:
  """Marching cubes, cropped, without what no view sees and without crumbs.

  Colours are those of the views: the field's own, seen from where no camera was, may be anything.

  Args:
    field: `make_field`'s.
    params: the model's.
    space: `warps`'.
    box: [2, 3] world.
    resolution: cells along the longest side.
    views: faces stay where at least one of them sees a surface.
    level: density of the surface.
    min_faces: connected parts with fewer are left out.

  Raises:
    ExportError: no surface at this level in the box.
  """
  measure = library('skimage.measure')
  contract, to_world = space
  bounds, width = grid_of(box, contract, resolution)
  axes = [np.arange(low, high + width, width) for low, high in bounds]
  volume = np.empty([len(axis) for axis in axes], np.float32)
  for i, x in enumerate(progress.track(axes[0], 'density')):
    z = np.stack(np.meshgrid([x], axes[1], axes[2], indexing='ij'), -1).reshape(-1, 3)
    volume[i] = field(params, z, width).reshape(volume.shape[1:])
  nothing = points.ExportError(
    f'No view shows a surface of density {level:g} in the box {np.round(box, 3).tolist()} '
    '(normalised units): choose a larger --box or a lower --density.'
  )
  if not volume.min() < level < volume.max():
    raise nothing
  index, faces, _, _ = measure.marching_cubes(volume, level)
  faces = faces[:, ::-1]  # scikit-image has them clockwise from where density is low.
  z = bounds[:, 0] + width * index
  xyz = np.asarray(to_world(jnp.asarray(z, jnp.float32)), np.float64)
  told = points.support(xyz, views, 0.05)
  kept = points.in_box(xyz, box) & (told.seen > 0)
  faces = _large_parts(faces[kept[faces].all(-1)], len(xyz), min_faces)
  if not len(faces):
    raise nothing
  used, faces = np.unique(faces, return_inverse=True)
  return Mesh(xyz[used], faces.reshape(-1, 3), told.colors[used])


def _large_parts(faces: np.ndarray, count: int, min_faces: int) -> np.ndarray:
  """The faces of connected parts that have at least so many."""
  from scipy import sparse

  ends = np.concatenate([faces[:, :2], faces[:, 1:]])
  links = sparse.coo_matrix((np.ones(len(ends), bool), tuple(ends.T)), (count, count))
  part = sparse.csgraph.connected_components(links, directed=False)[1][faces[:, 0]]
  return faces[np.bincount(part, minlength=1)[part] >= min_faces]


def write(path: str, vertices: np.ndarray, colors: np.ndarray, faces=None, up=None) -> None:
  """Writes points or, with faces, a mesh: .ply as they are, .glb turned so that `up` [3] is y.

  In a .glb the vertices are as they are, too: the turn is the transform of their node, and colours
  are linear, as glTF has them.
  """
  trimesh = library('trimesh')
  glb = path.endswith('.glb')
  rgb = _linear(colors) if glb else colors
  rgba = np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], -1)
  if faces is None:
    shape = trimesh.PointCloud(vertices, rgba)
  else:
    shape = trimesh.Trimesh(vertices, faces, vertex_colors=rgba, process=False)
  with files.whole(path) as temporary:
    if glb:
      place = trimesh.Scene()
      place.add_geometry(shape, node_name='capture', transform=_y_up(up))
      place.export(temporary)
    else:
      shape.export(temporary)


def _linear(colors: np.ndarray) -> np.ndarray:
  """sRGB uint8 as linear light, uint8 (IEC 61966-2-1)."""
  c = np.asarray(colors) / 255
  light = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
  return np.round(255 * light).astype(np.uint8)


def _y_up(up: np.ndarray) -> np.ndarray:
  """A rotation [4, 4] that takes the unit vector `up` to y."""
  side = np.eye(3)[np.argmin(np.abs(up))]
  x = np.cross(up, side)
  x /= np.linalg.norm(x)
  turn = np.eye(4)
  turn[:3, :3] = [x, up, np.cross(x, up)]
  return turn
