"""Tests of the export of a known scene: a ball, in a capture's own frame."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import trajectory_test
import trimesh

from internal import coord, paths
from internal.commands import export
from internal.datasets import transforms
from internal.export import mesh as mesh_lib
from internal.export import points, shapes, texture
from internal.rendering import renderer, surface_points
from internal.training import checkpoints, run_folder

RADIUS = 0.4


def make_scene():
  """Cameras on the unit circle; the capture's own frame is rotated, shifted and twice as large."""
  transform = np.eye(4)
  transform[:3] = [[0, -0.5, 0, 1], [0.5, 0, 0, 2], [0, 0, 0.5, 3]]
  return dataclasses.replace(trajectory_test.make_scene(12), world_transform=transform)


def render_ball(params, cams, k, fraction):
  """Renders an opaque ball around the origin, coloured by position."""
  origins, directions = (a.astype(np.float64) for a in surface_points.pixel_rays(cams, k))
  a, b = (directions**2).sum(-1), (origins * directions).sum(-1)
  root = b**2 - a * ((origins**2).sum(-1) - RADIUS**2)
  hit = root > 0
  t = np.where(hit, (-b - np.sqrt(np.maximum(root, 0))) / a, 1e3)
  return {
    'rgb': np.where(hit[..., None], 0.5 + (origins + directions * t[..., None]), 1).clip(0, 1),
    'acc': hit.astype(np.float32),
    'distance_median': t,
    'distance_percentiles': t[..., None] * [0.99, 1, 1.01],
  }


@pytest.fixture(scope='module')
def scene():
  return make_scene()


@pytest.fixture(scope='module')
def views(scene):
  return points.render_views(render_ball, None, points.pinhole_views(scene, 11, 120), 1.0)


CUBE = np.array([[-2.0] * 3, [2.0] * 3])


def test_points_lie_on_the_ball_and_have_its_colours(views):
  xyz, rgb = points.point_cloud(views, CUBE, 10_000)
  assert len(xyz) == 10_000
  np.testing.assert_allclose(np.linalg.norm(xyz, axis=-1), RADIUS, atol=1e-5)
  np.testing.assert_allclose(rgb, 255 * (0.5 + xyz), atol=1.0)
  octants = np.unique((xyz > 0) @ [1, 2, 4])
  assert len(octants) == 8
  half = np.array([[0.0, -1, -1], [1, 1, 1]])
  assert (points.point_cloud(views, half, 100)[0][:, 0] >= 0).all()


def test_floaters_are_left_out(views):
  # Two views from the same pose see a patch in front of the ball; most others see through it.
  origins, directions = surface_points.pixel_rays(views.cams, 0)
  t = 0.45 / np.linalg.norm(directions, axis=-1)
  at = origins + directions * t[..., None]
  patch = np.linalg.norm(at - 0.55 * origins / np.linalg.norm(origins[0, 0]), axis=-1) < 0.04
  assert patch.sum() > 100
  floater = dict(views.images[0])
  floater['distance_median'] = np.where(patch, t, floater['distance_median'])
  floater['acc'] = np.where(patch, 1, floater['acc'])
  spread = floater['distance_percentiles']
  floater['distance_percentiles'] = np.where(patch[..., None], t[..., None], spread)
  rows, images = np.array([0, *range(11)]), [floater, floater, *views.images[1:]]
  twice = points.Views(views.cams.take(rows), images)
  votes = points.support(at[patch], twice)
  assert (votes.seen == 2).all()
  assert (votes.through > 2).all()
  xyz, _ = points.point_cloud(twice, CUBE, 10**6)
  assert len(xyz) > 1000
  np.testing.assert_allclose(np.linalg.norm(xyz, axis=-1), RADIUS, atol=1e-5)


def test_fog_gives_no_points(views):
  fog = [
    {**v, 'distance_percentiles': v['distance_percentiles'] * [0.5, 1, 2]} for v in views.images
  ]
  with pytest.raises(points.ExportError, match='No view shows a surface within the box'):
    points.point_cloud(dataclasses.replace(views, images=fog), CUBE, 100)


SPACE = coord.contract, coord.inv_contract


def extract(views, box=CUBE, **more):
  return mesh_lib.extract(SPACE, box, 64, views, **more)


def test_mesh_is_the_ball_seen_from_outside(views):
  mesh = extract(views)
  distance = np.linalg.norm(mesh.vertices, axis=-1)
  # A cell is 0.05 and a pixel 0.01 wide.
  np.testing.assert_allclose(distance, RADIUS, atol=0.05)
  assert np.quantile(np.abs(distance - RADIUS), 0.9) < 0.015
  shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
  outward = (shape.face_normals * shape.triangles_center).sum(-1)
  assert np.mean(outward > 0) > 0.99  # Anticlockwise seen from outside.
  assert shape.area > 0.75 * 4 * np.pi * RADIUS**2  # All but the poles, which no camera sees.
  wrong = np.abs(mesh.colors - 255 * (0.5 + mesh.vertices)).max(-1)
  assert np.quantile(wrong, 0.75) < 12


def test_mesh_is_cropped_by_the_box(views):
  box = np.array([[-1.0, -1, 0.1], [1, 1, 1]])
  assert extract(views, box).vertices[:, 2].min() >= 0.1


def test_an_unseen_surface_is_an_error(views):
  blind = [{**image, 'acc': 0 * image['acc']} for image in views.images]
  with pytest.raises(points.ExportError, match='No view shows a surface in the box'):
    extract(dataclasses.replace(views, images=blind))
  with pytest.raises(points.ExportError, match='No view shows a surface in the box'):
    extract(views, np.array([[0.5, 0.5, 0.5], [1, 1, 1]]))


def test_files_are_in_the_captures_frame(scene, views, tmp_path):
  mesh = extract(views)
  vertices = points.to_capture(scene, mesh.vertices)
  np.testing.assert_allclose(vertices.mean(0), [-4, 2, -6], atol=0.02)  # Where (0, 0, 0) was.
  np.testing.assert_allclose(np.linalg.norm(vertices - [-4, 2, -6], axis=-1), 2 * RADIUS, atol=0.1)
  outward = (vertices - [-4, 2, -6]) / np.linalg.norm(vertices - [-4, 2, -6], axis=-1)[:, None]
  up = np.array([0.6, 0, 0.8])
  cameras = points.to_capture(scene, np.asarray(views.cams.camtoworld)[:, :, 3])
  written = {
    'mesh': shapes.of_mesh(vertices, mesh.faces, mesh.colors),
    'points': shapes.of_points(vertices, mesh.colors, cameras),
  }
  for name, given in written.items():
    cosine = (given.normals * outward).sum(-1)
    # The cameras see the poles of the ball flat, where its mesh is rough.
    assert np.quantile(cosine, 0.15) > 0.9
    shapes.write_ply(str(tmp_path / f'{name}.ply'), given)
    shapes.write_glb(str(tmp_path / f'{name}.glb'), given, up)
    plain = trimesh.load(tmp_path / f'{name}.ply', process=False)
    np.testing.assert_array_equal(plain.vertices, vertices)
    place = trimesh.load(tmp_path / f'{name}.glb', process=False)
    (shape,) = place.geometry.values()
    if name == 'mesh':
      np.testing.assert_allclose(shape.vertices, vertices, rtol=1e-5)
      np.testing.assert_allclose(shape.vertex_normals, given.normals, atol=1e-5)
    else:
      middles = shape.vertices.reshape(-1, 4, 3).mean(1)
      np.testing.assert_allclose(middles, vertices, rtol=1e-5)
    turn, _ = place.graph[place.graph.nodes_geometry[0]]
    np.testing.assert_allclose(turn[:3, :3] @ up, [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(turn[:3, :3] @ turn[:3, :3].T, np.eye(3), atol=1e-6)
    assert np.linalg.det(turn) > 0
  np.testing.assert_array_equal(
    trimesh.load(tmp_path / 'mesh.ply', process=False).visual.vertex_colors[:, :3], mesh.colors
  )
  np.testing.assert_array_equal(shapes._linear(np.array([0, 188, 255])), [0, 128, 255])


@pytest.mark.parametrize('kind', ['points', 'mesh', 'textured'])
def test_glb_shows_its_colours_without_lights(tmp_path, kind):
  path = tmp_path / 'a.glb'
  grey, faces = np.full((3, 3), 128, np.uint8), np.array([[0, 1, 2]])
  shape = shapes.of_mesh(np.eye(3), faces, grey)
  if kind == 'points':
    shape = shapes.of_points(np.eye(3), grey, np.ones((1, 3)))
  elif kind == 'textured':
    picture = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    shape = dataclasses.replace(shape, uv=np.eye(3)[:, :2], texture=picture)
  shapes.write_glb(str(path), shape, np.array([0, 0, 1.0]))
  content = path.read_bytes()
  tree = json.loads(content[20 : 20 + int.from_bytes(content[12:16], 'little')])
  assert tree['extensionsUsed'] == ['KHR_materials_unlit']
  (material,) = tree['materials']
  assert material['extensions'] == {'KHR_materials_unlit': {}}
  assert material['doubleSided']
  (primitive,) = [p for m in tree['meshes'] for p in m['primitives']]
  assert primitive['material'] == 0
  assert primitive.get('mode', 4) == 4  # Triangles, also for points.
  seen_by = 'TEXCOORD_0' if kind == 'textured' else 'COLOR_0'
  assert set(primitive['attributes']) == {'POSITION', 'NORMAL', seen_by}
  if kind == 'textured':
    (loaded,) = trimesh.load(path, process=False).geometry.values()
    np.testing.assert_array_equal(loaded.visual.material.baseColorTexture, picture)
    np.testing.assert_allclose(loaded.visual.uv, shape.uv)


def test_squares_cover_a_plane_without_growing_over_its_edge():
  grid = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), -1).reshape(-1, 2)
  xyz = np.concatenate([grid, np.zeros((400, 1))], -1)
  xyz = np.concatenate([xyz, [[500.0, 0, 0]]])  # Alone: not larger than four others.
  cloud = shapes.of_points(xyz, np.zeros((401, 3), np.uint8), np.array([[5.0, 5, 9]]))
  made = shapes.squares(cloud)
  np.testing.assert_allclose(made.vertices[:1600, 2], 0, atol=1e-9)
  np.testing.assert_allclose(made.normals[:1600], np.tile([0, 0, 1.0], (1600, 1)), atol=1e-9)
  corners = made.vertices[made.faces]
  normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
  assert (normal[:800, 2] > 0).all()  # Anticlockwise seen from the camera.
  side = np.sqrt(np.linalg.norm(normal, axis=-1).reshape(-1, 2).sum(-1) / 2)
  np.testing.assert_allclose(side[:400], 1.4, rtol=0.2)
  assert side[400] < 6


def test_few_points_are_no_error():
  for n in (1, 2):
    cloud = shapes.of_points(np.zeros((n, 3)), np.zeros((n, 3), np.uint8), np.array([[0, 0, 2.0]]))
    np.testing.assert_allclose(cloud.normals, np.tile([0, 0, 1.0], (n, 1)))
    assert np.isfinite(shapes.squares(cloud).vertices).all()


def test_a_simplified_mesh_is_still_the_ball(views):
  full = extract(views)
  mesh = extract(views, most_faces=500)
  assert 450 < len(mesh.faces) <= 500 < len(full.faces) / 4
  np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=-1), RADIUS, atol=0.05)
  wrong = np.abs(mesh.colors - 255 * (0.5 + mesh.vertices)).max(-1)
  assert np.quantile(wrong, 0.75) < 14
  shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
  assert np.mean((shape.face_normals * shape.triangles_center).sum(-1) > 0) > 0.999
  area = trimesh.Trimesh(full.vertices, full.faces, process=False).area
  assert shape.area == pytest.approx(area, rel=0.03)


def test_texels_of_a_face_are_those_with_their_centres_inside():
  uv = np.array([[1.2, 0.7], [9.4, 2.1], [3.3, 8.8], [9.0, 9.5]])
  faces = np.array([[0, 1, 2], [1, 2, 3], [0, 0, 1]])  # The last has no area.
  at, face, weights = texture.texels(uv, faces)
  found = {(x, y, f) for (x, y), f in zip(at.tolist(), face.tolist())}
  expected = set()
  for f, corners in enumerate(uv[faces[:2]]):
    for x in range(11):
      for y in range(11):
        p = np.array([x + 0.5, y + 0.5])
        sides = [
          np.linalg.det(np.stack([corners[(k + 1) % 3] - corners[k], p - corners[k]]))
          for k in range(3)
        ]
        if min(sides) > 0 or max(sides) < 0:
          expected.add((x, y, f))
  assert found == expected
  np.testing.assert_allclose(np.einsum('kc,kcj->kj', weights, uv[faces[face]]), at + 0.5)
  np.testing.assert_allclose(weights.sum(-1), 1)


def test_a_texture_shows_what_vertices_are_too_few_for(views):
  # The ball with stripes finer than the faces of a mesh with few of them.
  def striped(xyz):
    return np.where(np.sin(60 * xyz[..., 2:]) > 0, [1.0, 0.6, 0], [0, 0.2, 0.8])

  images = []
  for k, image in enumerate(views.images):
    origins, directions = surface_points.pixel_rays(views.cams, k)
    xyz = origins + directions * image['distance_median'][..., None]
    images.append({**image, 'rgb': striped(xyz)})
  seen = points.Views(views.cams, images)
  mesh = extract(seen, most_faces=600)
  plain = shapes.of_mesh(mesh.vertices, mesh.faces, mesh.colors)
  shape = texture.textured(plain, mesh, SPACE, seen, 256)
  assert len(shape.faces) == len(mesh.faces)
  corners = shape.vertices[shape.faces]
  np.testing.assert_array_equal(corners, mesh.vertices[mesh.faces])
  # Colours at the middles of faces, looked up as glTF does: v down from the upper edge.
  height, width = shape.texture.shape[:2]
  u, v = shape.uv[shape.faces].mean(1).T
  looked = shape.texture[((1 - v) * height).astype(int), (u * width).astype(int)]
  at = corners.mean(1)
  at *= RADIUS / np.linalg.norm(at, axis=-1, keepdims=True)
  away = np.abs(np.sin(60 * at[:, 2])) > 0.5  # From the edges of the stripes.
  away &= np.abs(at[:, 2]) < 0.7 * RADIUS  # The cameras see the poles flat.
  wrong = np.abs(looked - 255 * striped(at)).max(-1) > 60
  assert wrong[away].mean() < 0.1
  by_vertex = np.abs(mesh.colors[mesh.faces].mean(1) - 255 * striped(at)).max(-1) > 60
  assert by_vertex[away].mean() > 0.3


def test_captures_in_geographic_coordinates_keep_millimetres(tmp_path, monkeypatch):
  """The ball is 40 m across, at 4,500,000 m: steps of float32 would be half a metre."""
  centre, unit = np.array([4_500_000.25, -3_200_000.5, 5_000_000.75]), 50.0
  rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
  transform = np.eye(4)
  transform[:3] = np.concatenate([rotation, -(rotation @ centre)[:, None]], 1) / unit
  far = dataclasses.replace(make_scene(), world_transform=transform)
  settings = tiny.settings()
  monkeypatch.setattr(run_folder, 'open_run', lambda _: (settings, far))
  monkeypatch.setattr(checkpoints, 'restore_params', lambda *_, **__: ({}, 5))
  monkeypatch.setattr(renderer, 'make_image_renderer', lambda *_, **__: render_ball)
  export.main([str(tmp_path), '--views', '8', '--width', '60', '--resolution', '48'])
  folder = tmp_path / 'export'
  offset = np.array(json.loads((folder / 'offset.json').read_text())['offset'])
  np.testing.assert_allclose(offset, centre, atol=0.5)
  clouds = {'ply': trimesh.load(folder / 'points.ply', process=False).vertices}
  glb = trimesh.load(folder / 'points.glb', process=False)
  (shape,) = glb.geometry.values()
  middles = shape.vertices.reshape(-1, 4, 3).mean(1)  # Of the points' squares.
  clouds['glb'] = middles + offset
  node = glb.graph[glb.graph.nodes_geometry[0]][0]
  clouds['node'] = trimesh.transform_points(middles, node) @ node[:3, :3]
  for name, vertices in clouds.items():
    np.testing.assert_allclose(
      np.linalg.norm(vertices - centre, axis=-1), unit * RADIUS, atol=1e-3, err_msg=name
    )
  table = json.loads((folder / 'depth' / 'transforms.json').read_text())
  poses = np.array([frame['transform_matrix'] for frame in table['frames']])
  radii = np.linalg.norm(poses[:, :3, 3] - centre, axis=-1)
  wanted = np.linalg.norm(points.pinhole_views(far, 8, 60).camtoworld[:, :, 3], axis=-1)
  np.testing.assert_allclose(radii, unit * wanted, atol=1e-3)


def test_the_loaded_mesh_looks_like_the_ball(scene, views, tmp_path):
  mesh = extract(views)
  path = str(tmp_path / 'mesh.ply')
  vertices = points.to_capture(scene, mesh.vertices)
  shapes.write_ply(path, shapes.of_mesh(vertices, mesh.faces, mesh.colors))
  shape = trimesh.load(path, process=False)
  inverse = np.linalg.inv(scene.world_transform)
  pose = paths.transform_poses(inverse, np.asarray(views.cams.camtoworld, np.float64))[4]
  # Rasterises the mesh: many points of its surface, of which each pixel shows the nearest.
  dots, of = trimesh.sample.sample_surface(shape, 400_000, seed=0)
  colors = shape.visual.vertex_colors[shape.faces[of, 0], :3]
  x, y, back = ((dots - pose[:, 3]) @ pose[:, :3]).T
  focal = 1 / views.cams.pixtocam[4, 0, 0]
  u, v = (60 - focal * x / back).astype(int), (40 + focal * y / back).astype(int)
  order = np.argsort(back)
  order = order[((u >= 0) & (u < 120) & (v >= 0) & (v < 80))[order]]
  picture = np.full((80, 120, 3), 255.0)
  picture[v[order], u[order]] = colors[order]
  truth = 255 * views.images[4]['rgb']
  assert np.mean(np.abs(picture - truth).max(-1) > 25) < 0.03
  assert (picture[40, 60] < 250).any()


def test_depth_folder_loads_as_a_capture(scene, views, tmp_path):
  points.write_depth_folder(str(tmp_path), scene, views)
  table = transforms.read_table(str(tmp_path / 'transforms.json'))
  frames = transforms.read_frames(str(tmp_path), str(tmp_path / 'transforms.json'), table)
  assert len(frames) == len(views.images)
  k = frames[3].intrinsics
  depth = np.load(tmp_path / table['frames'][3]['depth_file_path'])
  assert depth.shape == (80, 120)
  seen = np.argwhere(depth > 0)
  assert 0 < len(seen) < depth.size
  z = depth[depth > 0] * table['depth_unit_scale_factor']
  at = np.stack([(seen[:, 1] + 0.5 - k.cx) / k.fx * z, -(seen[:, 0] + 0.5 - k.cy) / k.fy * z, -z])
  xyz = (frames[3].pose[:, :3] @ at).T + frames[3].pose[:, 3]
  np.testing.assert_allclose(np.linalg.norm(xyz - [-4, 2, -6], axis=-1), 2 * RADIUS, atol=1e-3)


def test_other_warps_are_refused():
  settings = tiny.settings("NerfMLP.warp_fn = 'donerf'")
  with pytest.raises(points.ExportError, match=r"this run has 'donerf'.*--only points depth"):
    mesh_lib.warps(settings)


def test_forward_facing_runs_are_refused():
  flat = trajectory_test.make_scene(pixtocam_ndc=np.eye(3))
  with pytest.raises(points.ExportError, match='NDC'):
    points.pinhole_views(flat, 3, 20)


def test_views_are_no_wider_than_the_photographs(scene):
  assert points.default_width(scene) == 60
  size = np.asarray(scene.cameras.size) * 10
  size[scene.test[0]] = 9  # Test photographs do not count.
  large = dataclasses.replace(scene, cameras=scene.cameras.replace(size=size))
  assert points.default_width(large) == 400


def test_the_command(scene, tmp_path, monkeypatch, capsys):
  settings = tiny.settings()
  monkeypatch.setattr(run_folder, 'open_run', lambda *_: (settings, scene))
  monkeypatch.setattr(checkpoints, 'restore_params', lambda *_, **__: ({}, 5))
  monkeypatch.setattr(renderer, 'make_image_renderer', lambda *_, **__: render_ball)
  arguments = [str(tmp_path), '--views', '8', '--width', '60', '--resolution', '48']
  # Around the ball, which has the centre (-4, 2, -6) and the radius 0.8 in this frame.
  box = ['--box_units', 'capture', '--box', '-6', '0', '-6', '-2', '4', '-4']
  export.main([*arguments, *box])
  assert 'mesh.glb' in capsys.readouterr().out
  for name in ('mesh', 'points'):
    vertices = trimesh.load(tmp_path / 'export' / f'{name}.ply', process=False).vertices
    assert vertices[:, 2].min() >= -6.001
    assert np.linalg.norm(vertices - [-4, 2, -6], axis=-1) == pytest.approx(0.8, abs=0.05)
  assert len(json.loads((tmp_path / 'export/depth/transforms.json').read_text())['frames']) == 8
  export.main([str(tmp_path), '--views', '2', '--what', 'depth'])
  table = json.loads((tmp_path / 'export/depth/transforms.json').read_text())
  assert (len(table['frames']), table['w'], table['h']) == (2, 60, 40)
  with pytest.raises(points.ExportError, match='--width must be at least 2, got 0'):
    export.main([str(tmp_path), '--width', '0'])
  with pytest.raises(points.ExportError, match='X0 < X1'):
    export.main([*arguments, '--box', '1', '0', '0', '0', '1', '1'])
  export.main([*arguments, *box, '--what', 'mesh', '--simplify', '300', '--texture', '128'])
  assert 'mesh.glb' in capsys.readouterr().out
  (shape,) = trimesh.load(tmp_path / 'export' / 'mesh.glb', process=False).geometry.values()
  assert 200 < len(shape.faces) <= 300
  assert np.asarray(shape.visual.material.baseColorTexture).shape[1] > 64
  with pytest.raises(points.ExportError, match='--texture must be at least 64, got 5'):
    export.main([*arguments, '--texture', '5'])
  with pytest.raises(points.ExportError, match='--simplify is for meshes: add mesh to --what'):
    export.main([*arguments, '--what', 'points', '--simplify', '500'])
