"""Extracts a mesh of a trained density by marching cubes in contracted space.

In contracted space, cells are small near the cameras and grow with distance, as does the model's
own resolution. scikit-image extracts the surface and trimesh writes it; both are optional packages.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .. import configs, coord, models, structs
from ..system import files, installation, progress
from . import points

_CHUNK = 65536  # Points per batch.


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


def make_field(settings: configs.Settings) -> Callable:
  """Returns a function `field(params, z, width) -> density [m]`.

  `z`, [m, 3], are points in mesh space (see `warps`), and `width` is the width of their cells.
  """
  model, to_world = models.build(settings), warps(settings)[1]

  @jax.jit
  def query(params, z, width):
    # The variance of a uniform distribution over the cell.
    cov = jnp.broadcast_to(width**2 / 12 * jnp.eye(3), (len(z), 3, 3))
    mean, cov = coord.linearize(to_world, z, cov)
    direction = jnp.broadcast_to(jnp.array([0.0, 0, -1]), mean.shape)  # Density ignores it.
    one = jnp.ones((len(z), 1))
    rays = structs.Rays(mean, direction, direction, one, jnp.zeros(len(z), jnp.int32))
    gaussians = structs.Gaussians(mean[:, None], cov[:, None])  # [m, 1, 3], [m, 1, 3, 3]
    return model.apply({'params': params}, rays, gaussians, method='field')[0][:, 0]

  def field(params, z, width):
    parts = []
    for start in range(0, len(z), _CHUNK):
      part = np.asarray(z[start : start + _CHUNK], np.float32)
      # All batches have the same shape, so that only one program is compiled.
      padded = np.pad(part, ((0, _CHUNK - len(part)), (0, 0)), 'edge')
      parts.append(np.asarray(query(params, padded, np.float32(width)))[: len(part)])
    return np.concatenate(parts)

  return field


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
  field: Callable,
  params,
  space: tuple[Callable, Callable],
  box: np.ndarray,
  resolution: int,
  views: points.Views,
  level: float,
  min_faces: int = 50,
) -> Mesh:
  """Extracts the surface by marching cubes, and removes what no view sees and small parts.

  Colours come from the views, since the model's own are arbitrary for directions without cameras.

  Args:
    field: density, from `make_field`.
    params: the model's parameters.
    space: functions to mesh space and back, from `warps`.
    box: [2, 3] world; the mesh is cropped to it.
    resolution: number of cells along the longest side.
    views: a face is kept if at least one view sees a surface at each of its vertices.
    level: density of the surface.
    min_faces: connected parts with fewer faces are removed.

  Raises:
    ExportError: the box has no surface of this density.
  """
  measure = library('skimage.measure')
  contract, to_world = space
  bounds, width = grid_of(box, contract, resolution)
  axes = [np.arange(low, high + width, width) for low, high in bounds]  # Each is [cells + 1].
  volume = np.empty([len(axis) for axis in axes], np.float32)
  for i, x in enumerate(progress.track(axes[0], 'density')):
    z = np.stack(np.meshgrid([x], axes[1], axes[2], indexing='ij'), -1).reshape(-1, 3)
    volume[i] = field(params, z, width).reshape(volume.shape[1:])
  no_surface = points.ExportError(
    f'No view shows a surface of density {level:g} in the box {np.round(box, 3).tolist()} '
    '(normalised units). Choose a larger --box or a lower --density.'
  )
  if not volume.min() < level < volume.max():
    raise no_surface
  index, faces, _, _ = measure.marching_cubes(volume, level)
  faces = faces[:, ::-1]  # scikit-image orders them clockwise, seen from low density.
  z = bounds[:, 0] + width * index  # [m, 3]
  xyz = np.asarray(to_world(jnp.asarray(z, jnp.float32)), np.float64)
  votes = points.support(xyz, views, 0.05)
  kept = points.in_box(xyz, box) & (votes.seen > 0)  # [m]
  faces = _large_parts(faces[kept[faces].all(-1)], len(xyz), min_faces)
  if not len(faces):
    raise no_surface
  used, faces = np.unique(faces, return_inverse=True)
  return Mesh(xyz[used], faces.reshape(-1, 3), votes.colors[used])


def _large_parts(faces: np.ndarray, count: int, min_faces: int) -> np.ndarray:
  """Returns the faces of connected parts that have at least `min_faces` of them."""
  from scipy import sparse

  edges = np.concatenate([faces[:, :2], faces[:, 1:]])  # [2 f, 2]; two of three edges suffice.
  graph = sparse.coo_matrix((np.ones(len(edges), bool), tuple(edges.T)), (count, count))
  part = sparse.csgraph.connected_components(graph, directed=False)[1][faces[:, 0]]  # [f]
  return faces[np.bincount(part, minlength=1)[part] >= min_faces]


def write(path: str, vertices, colors, faces=None, up=None, offset=(0, 0, 0)) -> None:
  """Writes points or, with faces, a mesh, as .ply (float64) or .glb (float32).

  Args:
    path: the file.
    vertices: [m, 3] float64.
    colors: [m, 3] uint8 sRGB; linear in a .glb, as glTF specifies.
    faces: [f, 3] indices of vertices.
    up: [3] unit vector, which the node of a .glb rotates to y, as glTF requires.
    offset: [3], subtracted from the vertices of a .glb and added by its node, whose numbers are
      float64. It keeps the detail of vertices far from the origin; see `points.offset`.
  """
  with files.whole(path) as temporary:
    if path.endswith('.ply'):
      with open(temporary, 'wb') as f:
        f.write(_ply(vertices, colors, faces))
      return
    trimesh = library('trimesh')
    rgba = np.concatenate([_linear(colors), np.full((len(colors), 1), 255, np.uint8)], -1)
    if faces is None:
      shape = trimesh.PointCloud(vertices - offset, rgba)
    else:
      shape = trimesh.Trimesh(vertices - offset, faces, vertex_colors=rgba, process=False)
    shift = np.eye(4)
    shift[:3, 3] = offset
    scene = trimesh.Scene()
    scene.add_geometry(shape, node_name='capture', transform=_y_up(up) @ shift)
    scene.export(temporary, tree_postprocessor=_unlit)


def _unlit(tree: dict) -> None:
  """Makes all shapes of a glTF tree show their colours as they are, without lights.

  Without a material glTF has bare metal, which is black where nothing is reflected.
  """
  material = {'extensions': {'KHR_materials_unlit': {}}}
  # For programs that do not know the extension: no metal, rough.
  material['pbrMetallicRoughness'] = {'metallicFactor': 0, 'roughnessFactor': 1}
  tree['materials'] = [material]
  tree['extensionsUsed'] = ['KHR_materials_unlit']
  for shape in tree['meshes']:
    for primitive in shape['primitives']:
      primitive['material'] = 0


def _ply(vertices: np.ndarray, colors: np.ndarray, faces: np.ndarray | None) -> bytes:
  """Encodes points or a mesh as binary PLY; trimesh would round the vertices to float32."""
  table = np.empty(len(vertices), [('xyz', '<f8', 3), ('rgb', 'u1', 3)])
  table['xyz'], table['rgb'] = vertices, colors
  header = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(table)}']
  header += [f'property double {name}' for name in 'xyz']
  header += [f'property uchar {name}' for name in ('red', 'green', 'blue')]
  content = table.tobytes()
  if faces is not None:
    triangles = np.empty(len(faces), [('count', 'u1'), ('rows', '<i4', 3)])
    triangles['count'], triangles['rows'] = 3, faces
    header += [f'element face {len(faces)}', 'property list uchar int vertex_indices']
    content += triangles.tobytes()
  return '\n'.join([*header, 'end_header', '']).encode() + content


def _linear(colors: np.ndarray) -> np.ndarray:
  """Converts sRGB to linear light, both uint8 (IEC 61966-2-1)."""
  c = np.asarray(colors) / 255
  light = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
  return np.round(255 * light).astype(np.uint8)


def _y_up(up: np.ndarray) -> np.ndarray:
  """Returns a rotation [4, 4] that turns the unit vector `up` to y."""
  side = np.eye(3)[np.argmin(np.abs(up))]  # The axis farthest from up.
  x = np.cross(up, side)
  x /= np.linalg.norm(x)
  rotation = np.eye(4)
  rotation[:3, :3] = [x, up, np.cross(x, up)]
  return rotation
