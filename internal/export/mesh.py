"""Extracts a mesh of what rendered views show, by marching cubes in contracted space.

In contracted space, cells are small near the cameras and grow with distance, as does the model's
own resolution. scikit-image extracts the surface, and fast_simplification thins it out; both are
optional packages.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from scipy import spatial

from .. import configs, coord
from ..system import installation
from . import fusion, holes, points

_MIN_FACES = 50  # Smaller connected parts are removed.


@dataclasses.dataclass(frozen=True)
class Mesh:
  """A triangle mesh in the world."""

  vertices: np.ndarray  # [m, 3]
  faces: np.ndarray  # [f, 3] indices of vertices, anticlockwise seen from outside.
  colors: np.ndarray  # [m, 3] uint8


def library(name: str):
  """Imports an optional package.

  Raises:
    ExportError: the package is not installed.
  """
  try:
    return importlib.import_module(name)
  except ImportError:
    raise points.ExportError(
      f'{name.split(".")[0]} is not installed: {installation.install_text("export")}.'
    ) from None


def warps(settings: configs.Settings) -> tuple[Callable, Callable]:
  """Returns the functions from the world to mesh space and back, both of points [..., 3].

  Mesh space is contracted space if the model contracts, and the world otherwise.

  Raises:
    ExportError: the model has another warp function.
  """
  warp = settings.nerf_mlp.warp_fn
  if warp == 'contract':
    return coord.contract, coord.inv_contract
  if warp is None:
    return (lambda x: x), (lambda z: z)
  raise points.ExportError(
    f"A mesh needs NerfMLP.warp_fn = 'contract' or None; this run has {warp!r}. Export points and "
    'depth maps instead: --only points depth.'
  )


def grid_of(box: np.ndarray, contract: Callable, resolution: int) -> tuple[np.ndarray, float]:
  """Returns the bounds of a grid in mesh space that covers a box, and the width of its cells.

  Args:
    box: [2, 3] lower and upper corner in the world.
    contract: from the world to mesh space.
    resolution: number of cells along the longest side.

  Returns:
    The lower and upper bound along each axis, [3, 2], found by sampling the box, and the width.
  """
  side = np.linspace(0, 1, 33)
  samples = np.stack(np.meshgrid(side, side, side, indexing='ij'), -1).reshape(-1, 3)  # [33^3, 3]
  z = np.asarray(contract(jnp.asarray(box[0] + samples * (box[1] - box[0]), jnp.float32)))
  low, high = z.min(0).astype(np.float64), z.max(0).astype(np.float64)
  return np.stack([low, high], -1), float((high - low).max() / resolution)


def extract(
  space: tuple[Callable, Callable],
  box: np.ndarray,
  resolution: int,
  views: points.Views,
  most_faces: int | None = None,
) -> Mesh:
  """Extracts the surface by marching cubes; removes what no view sees, and small parts.

  Args:
    space: functions to mesh space and back, from `warps`.
    box: [2, 3] world; the mesh is cropped to it.
    resolution: number of cells along the longest side.
    views: v rendered views, whose surfaces are fused; see `fusion.distances`.
    most_faces: merges edges until about so many faces are left; None: keeps all.

  Raises:
    ExportError: the box has no surface.
  """
  measure = library('skimage.measure')
  contract, to_world = space
  bounds, width = grid_of(box, contract, resolution)
  axes = [np.arange(low, high + width, width) for low, high in bounds]  # Each is [cells + 1].
  volume, known = fusion.distances(views, axes, to_world, box, width)
  no_surface = points.ExportError(
    f'No view shows a surface in the box {np.round(box, 3).tolist()} (normalised units). '
    'Choose a larger --box, or train longer.'
  )
  if not known.any() or not volume[known].min() < 0 < volume[known].max():
    raise no_surface
  # A vertex between a corner that is known and one that is not has no place, and is removed below.
  index, faces, _, _ = measure.marching_cubes(np.where(known, -volume, np.nan), 0)
  faces = faces[:, ::-1]  # scikit-image orders them clockwise, seen from the outside.
  z = bounds[:, 0] + width * index  # [m, 3]
  xyz = np.asarray(to_world(jnp.asarray(z, jnp.float32)), np.float64)  # nan stays nan.
  slack = 2 * fusion.TRUNCATION * width * fusion.stretch(z, to_world)
  votes = points.support(xyz, views, 0.05, slack)
  kept = points.in_box(xyz, box) & (votes.seen > 0)  # [m]
  faces = _large_parts(faces[kept[faces].all(-1)], len(xyz))
  if not len(faces):
    raise no_surface
  used, faces = np.unique(holes.closed(faces, len(xyz)), return_inverse=True)
  # Where views agree closely, only their colours count.
  close = points.support(xyz[used], views, 0.05)
  colors = np.where(close.seen[:, None] > 0, close.colors, votes.colors[used])
  mesh = Mesh(xyz[used], faces.reshape(-1, 3), colors)
  if most_faces is None or len(mesh.faces) <= most_faces:
    return mesh
  return _simplified(mesh, z[used], to_world, most_faces)


def _simplified(mesh: Mesh, z: np.ndarray, to_world: Callable, most_faces: int) -> Mesh:
  """Merges edges by quadric errors (Garland and Heckbert 1997) in mesh space, at z [m, 3].

  There an error is as visible far away as near the cameras. A vertex has the colour of the nearest
  one before.
  """
  simplify = library('fast_simplification').simplify
  merged, faces = simplify(np.float32(z), np.int32(mesh.faces), target_count=most_faces)
  xyz = np.asarray(to_world(jnp.asarray(merged, jnp.float32)), np.float64)
  nearest = spatial.cKDTree(z).query(merged)[1]
  return Mesh(xyz, faces.astype(np.int64), mesh.colors[nearest])


def _large_parts(faces: np.ndarray, count: int) -> np.ndarray:
  """Returns the faces of connected parts that have at least `_MIN_FACES` of them."""
  part = holes.parts(faces, count)[faces[:, 0]]  # [f]
  return faces[np.bincount(part, minlength=1)[part] >= _MIN_FACES]
