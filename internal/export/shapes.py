"""Writes points and meshes as .ply (float64) and .glb (float32).

A .glb shows its colours without lights (KHR_materials_unlit), and points in it are small squares,
since glTF's own points have no size: most programs draw them as single pixels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import spatial

from .. import image
from ..system import files
from .mesh import library

_NEIGHBOURS = 8  # A point's normal is that of the plane through so many others.
_SIDE = 1.4  # Side of a point's square in mean distances to its three nearest neighbours.


@dataclasses.dataclass(frozen=True)
class Shape:
  """Points, or a mesh, in the capture's frame."""

  vertices: np.ndarray  # [m, 3] float64
  normals: np.ndarray  # [m, 3] of length 1.
  colors: np.ndarray  # [m, 3] uint8 sRGB
  faces: np.ndarray | None = None  # [f, 3] indices of vertices; None: points.
  uv: np.ndarray | None = None  # [m, 2] places in the texture, from the lower left corner.
  texture: np.ndarray | None = None  # [h, w, 3] uint8 sRGB, which replaces the colours.


def of_mesh(vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray) -> Shape:
  """Makes a mesh whose normals are the means of the faces', weighted by their areas."""
  corners = vertices[faces]  # [f, 3, 3]
  of_faces = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
  sums = [np.bincount(faces.ravel(), np.repeat(n, 3), len(vertices)) for n in of_faces.T]
  return Shape(vertices, _unit(np.stack(sums, -1)), colors, faces)


def of_points(xyz: np.ndarray, colors: np.ndarray, cameras: np.ndarray) -> Shape:
  """Makes points; a point's normal is that of the plane through its nearest neighbours.

  Args:
    xyz: [m, 3].
    colors: [m, 3] uint8.
    cameras: [c, 3] positions; a normal points to the side of the nearest.
  """
  if len(xyz) < 3:
    normals = np.zeros_like(xyz)
  else:
    rows = spatial.cKDTree(xyz).query(xyz, min(_NEIGHBOURS + 1, len(xyz)), workers=-1)[1]
    around = xyz[rows] - xyz[rows].mean(1, keepdims=True)  # [m, k, 3]
    normals = np.linalg.eigh(np.einsum('mki,mkj->mij', around, around))[1][:, :, 0]
  toward = cameras[spatial.cKDTree(cameras).query(xyz)[1]] - xyz
  normals = np.where((normals * toward).sum(-1, keepdims=True) < 0, -normals, normals)
  blind = np.linalg.norm(normals, axis=-1, keepdims=True) < 0.5
  return Shape(xyz, _unit(np.where(blind, toward, normals)), colors)


def _unit(x: np.ndarray) -> np.ndarray:
  """Normalises vectors [m, 3]; zeros become z."""
  length = np.linalg.norm(x, axis=-1, keepdims=True)
  return np.where(length > 0, x / np.where(length > 0, length, 1), [0.0, 0, 1])


def squares(points: Shape) -> Shape:
  """Returns a mesh with a square for each point, across its normal and as large as it needs to be.

  Neighbours touch: the half diagonal is the mean distance to the three nearest points, but at most
  four times the median of all.
  """
  xyz, n = points.vertices, len(points.vertices)
  reach = np.ones(n)
  if n > 1:
    others = np.arange(2, min(4, n) + 1)  # The nearest is the point itself.
    reach = spatial.cKDTree(xyz).query(xyz, others, workers=-1)[0].mean(-1)
  reach = _SIDE / np.sqrt(2) * np.minimum(reach, 4 * np.median(reach))[:, None]
  # Any two directions across the normal: from the axis that is farthest from it.
  first = _unit(np.cross(points.normals, np.eye(3)[np.abs(points.normals).argmin(-1)]))
  second = np.cross(points.normals, first)
  corners = xyz[:, None] + reach[:, None] * np.stack([first, second, -first, -second], 1)
  faces = 4 * np.arange(n)[:, None, None] + np.array([[0, 1, 2], [0, 2, 3]])
  of_corner = np.repeat(np.arange(n), 4)
  return Shape(
    corners.reshape(-1, 3), points.normals[of_corner], points.colors[of_corner],
    faces.reshape(-1, 3),
  )  # fmt: skip


def write_ply(path: str, shape: Shape) -> None:
  """Writes points or a mesh with vertex colours; trimesh would round the vertices to float32."""
  fields = [('xyz', '<f8', 3), ('normal', '<f4', 3), ('rgb', 'u1', 3)]
  table = np.empty(len(shape.vertices), fields)
  table['xyz'], table['normal'], table['rgb'] = shape.vertices, shape.normals, shape.colors
  header = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(table)}']
  header += [f'property double {name}' for name in 'xyz']
  header += [f'property float n{name}' for name in 'xyz']
  header += [f'property uchar {name}' for name in ('red', 'green', 'blue')]
  content = table.tobytes()
  if shape.faces is not None:
    triangles = np.empty(len(shape.faces), [('count', 'u1'), ('rows', '<i4', 3)])
    triangles['count'], triangles['rows'] = 3, shape.faces
    header += [f'element face {len(shape.faces)}', 'property list uchar int vertex_indices']
    content += triangles.tobytes()
  with files.whole(path) as temporary, open(temporary, 'wb') as f:
    f.write('\n'.join([*header, 'end_header', '']).encode() + content)


def write_glb(path: str, shape: Shape, up: np.ndarray, offset=(0, 0, 0)) -> None:
  """Writes a mesh, or points as squares.

  Args:
    path: the file.
    shape: its colours become linear, as glTF specifies for vertices.
    up: [3] unit vector, which the node rotates to y, as glTF requires.
    offset: [3], subtracted from the vertices and added by the node, whose numbers are float64. It
      keeps the detail of vertices far from the origin; see `points.offset`.
  """
  trimesh = library('trimesh')
  shape = squares(shape) if shape.faces is None else shape
  if shape.texture is None:
    alpha = np.full((len(shape.colors), 1), 255, np.uint8)
    look = {'vertex_colors': np.concatenate([_linear(shape.colors), alpha], -1)}
  else:
    from PIL import Image

    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(shape.texture))
    look = {'visual': trimesh.visual.TextureVisuals(uv=shape.uv, material=material)}
  made = trimesh.Trimesh(
    shape.vertices - offset, shape.faces, vertex_normals=shape.normals, process=False, **look
  )
  shift = np.eye(4)
  shift[:3, 3] = offset
  scene = trimesh.Scene()
  scene.add_geometry(made, node_name='capture', transform=_y_up(up) @ shift)
  with files.whole(path) as temporary:
    scene.export(temporary, include_normals=True, tree_postprocessor=_unlit)


def _unlit(tree: dict) -> None:
  """Makes the shape of a glTF tree show its colours as they are, without lights, from both sides.

  Without a material glTF has bare metal, which is black where nothing is reflected.
  """
  (material,) = tree.setdefault('materials', [{}])
  material['extensions'] = {'KHR_materials_unlit': {}}
  # For programs that do not know the extension: no metal, rough.
  material.setdefault('pbrMetallicRoughness', {}).update(metallicFactor=0, roughnessFactor=1)
  material['doubleSided'] = True
  tree['extensionsUsed'] = ['KHR_materials_unlit']
  for shape in tree['meshes']:
    for primitive in shape['primitives']:
      primitive['material'] = 0


def _linear(colors: np.ndarray) -> np.ndarray:
  """Converts sRGB to linear light, both uint8."""
  light = np.asarray(image.srgb_to_linear(np.float32(colors) / 255))
  return np.round(255 * light).astype(np.uint8)


def _y_up(up: np.ndarray) -> np.ndarray:
  """Returns a rotation [4, 4] that turns the unit vector `up` to y."""
  side = np.eye(3)[np.argmin(np.abs(up))]  # The axis farthest from up.
  x = np.cross(up, side)
  x /= np.linalg.norm(x)
  rotation = np.eye(4)
  rotation[:3, :3] = [x, up, np.cross(x, up)]
  return rotation
