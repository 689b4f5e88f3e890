"""Exports a trained scene as points, a mesh, depth maps, 3D Gaussians, a web page, or cameras.

    python scripts/export.py runs/garden
    python scripts/export.py runs/garden --what page
    python scripts/export.py runs/garden --what splats --max_splats 300000
    python scripts/export.py runs/garden --what mesh --resolution 512 --box -1 -1 -0.5 1 1 0.8
    python scripts/export.py runs/garden --what mesh --simplify 100000 --texture 4096
    python scripts/export.py runs/garden --box_units capture --box -3 -3 -3 3 3 3

Writes points.ply and .glb, mesh.ply and .glb, and depth/ (transforms.json, images/, depths/) to
RUN/export, all in the capture's own frame; a .glb is rotated so that y is up. offset.json has what
the node of a .glb adds to its vertices. Points and meshes need optional packages: pip install -r
requirements-export.txt.

`splats` fits 3D Gaussians to the trained field and writes splats.ply and .spz for splat programs;
`page` does the same and also writes page.html, one file that shows the scene in any browser. They
are made only when named: the fit takes minutes on a GPU. splats.json has the number of Gaussians
and their PSNR on the test photographs; splats.png shows what they lose on two of these. `cameras`
writes the cameras to sparse/0 as a COLMAP model, as training has refined them
(Config.refine_cameras). docs/export.md explains the files.
"""

from __future__ import annotations

import dataclasses
import os
import time

import numpy as np

from .. import cli, colmap, configs, paths
from ..datasets import scenes
from ..evaluation import html_report
from ..export import cameras, points, shapes, texture
from ..export import mesh as mesh_lib
from ..rendering import orbits, trained
from ..splats import backdrop, comparison, distil, formats, gaussians, page
from ..system import files, progress
from ..training import run_folder, run_lock
from ..vis import pictures

_KINDS = ('points', 'mesh', 'depth')
_SPLAT_KINDS = ('splats', 'page')
_SPLAT_FILES, _PAGE = ('splats.ply', 'splats.spz'), 'page.html'
_CAMERAS = 'cameras'
_TEXTURED_FACES = 50_000  # Of a mesh with a texture, unless --simplify says otherwise.


def parse(argv: list[str] | None):
  parser = cli.make_parser(__doc__)
  add = parser.add_argument
  add('run', metavar='RUN', help="the training run's folder")
  add('--out', metavar='DIR', help='output folder (default: RUN/export)')
  what = 'what to export (default: points mesh depth)'
  add(
    '--what',
    '--only',
    nargs='+',
    choices=(*_KINDS, *_SPLAT_KINDS, _CAMERAS),
    default=_KINDS,
    help=what,
  )
  add('--views', type=int, default=48, help='maximum number of training poses to render')
  width = 'width of the rendered views in pixels (default: 400, or that of smaller photographs)'
  add('--width', type=int, help=width)
  add('--points', type=int, default=1_000_000, help='maximum number of points')
  corners = ('X0', 'Y0', 'Z0', 'X1', 'Y1', 'Z1')
  cube = [-2.0] * 3 + [2.0] * 3
  add('--box', nargs=6, type=float, default=cube, metavar=corners, help='lower and upper corner')
  units = "units of the box: normalized (training cameras fill [-1, 1]) or the capture's own"
  add('--box_units', choices=('normalized', 'capture'), default='normalized', help=units)
  add('--resolution', type=int, default=256, help='mesh cells along the longest side of the box')
  add('--simplify', type=int, metavar='FACES', help='merge faces until about so many are left')
  text = f'side of a texture for mesh.glb, e.g. 2048; keeps {_TEXTURED_FACES:,} faces by default'
  add('--texture', type=int, metavar='TEXELS', help=text)
  splats = distil.Options()
  add('--max_splats', type=int, default=splats.max_splats, help='maximum number of Gaussians')
  add('--splat_steps', type=int, default=splats.steps, help='steps of fitting the Gaussians')
  add('--splat_views', type=int, default=splats.views, help='views of the field to fit them to')
  cli.add_plugins_argument(parser)
  return parser.parse_args(argv)


def read_box(args, scene) -> np.ndarray:
  """Returns the box [2, 3] in the world; one in the capture's frame is enclosed by a larger one."""
  box = np.array(args.box).reshape(2, 3)
  if not (box[0] < box[1]).all():
    raise points.ExportError('--box must be X0 Y0 Z0 X1 Y1 Z1 with X0 < X1, Y0 < Y1, Z0 < Z1.')
  if args.box_units == 'normalized':
    return box
  corners = np.stack(np.meshgrid(*box.T, indexing='ij'), -1).reshape(-1, 3)
  corners = paths.transform_points(scene.world_transform, corners)
  return np.stack([corners.min(0), corners.max(0)])


def make_mesh(args, settings, scene, views, box) -> tuple[shapes.Shape, shapes.Shape]:
  """Returns the mesh in the capture's frame, and the same with a texture if there is to be one."""
  space = mesh_lib.warps(settings)
  most = args.simplify or (_TEXTURED_FACES if args.texture else None)
  mesh = mesh_lib.extract(space, box, args.resolution, views, most_faces=most)
  shape = shapes.of_mesh(points.to_capture(scene, mesh.vertices), mesh.faces, mesh.colors)
  if not args.texture:
    return shape, shape
  return shape, texture.textured(shape, mesh, space, views, args.texture)


def splat_options(args) -> distil.Options:
  """Returns the options of the fit.

  Raises:
    ExportError: one is too small.
  """
  for name, least in (('max_splats', 1), ('splat_steps', 0), ('splat_views', 1)):
    if getattr(args, name) < least:
      raise points.ExportError(f'--{name} must be at least {least}, got {getattr(args, name)}.')
  return distil.Options(args.max_splats, args.splat_steps, args.splat_views)


def export_views(args, run: trained.TrainedRun, box, out: str, offset) -> dict[str, str]:
  """Writes what is made from rendered views: points, mesh, depth; returns what to print of each."""
  scene, written = run.scene, {}
  cams = points.pinhole_views(scene, args.views, args.width or points.default_width(scene))
  views = points.render_views(run.render_image, run.params, cams, run.train_fraction)
  train = np.asarray(scene.cameras.camtoworld, np.float64)[list(scene.train)]
  up = orbits.mean_up(paths.transform_poses(np.linalg.inv(scene.world_transform), train))

  def write(name, plain, shown):
    paths = [os.path.join(out, f'{name}.{ending}') for ending in ('ply', 'glb')]
    shapes.write_ply(paths[0], plain)
    shapes.write_glb(paths[1], shown, up, offset)
    faces = plain.faces
    what = f'{len(plain.vertices):,} points' if faces is None else f'{len(faces):,} faces'
    for path in paths:
      note = f'{what}, {os.path.getsize(path) / 1e6:.1f} MB'
      written[os.path.basename(path)] = f'{path}  ({note})'

  if 'points' in args.what:
    xyz, rgb = points.point_cloud(views, box, args.points)
    positions = points.to_capture(scene, np.asarray(cams.camtoworld, np.float64)[:, :, 3])
    cloud = shapes.of_points(points.to_capture(scene, xyz), rgb, positions)
    write('points', cloud, cloud)
  if 'mesh' in args.what:
    write('mesh', *make_mesh(args, run.settings, scene, views, box))
  if 'depth' in args.what:
    folder = os.path.join(out, 'depth')
    points.write_depth_folder(folder, scene, views)
    written['depth'] = os.path.join(folder, 'transforms.json')
  return written


def closed_splats(run: trained.TrainedRun, options: distil.Options) -> gaussians.Splats:
  """Distils Gaussians and closes the background where no camera looked."""
  train = run.scene.cameras.take(np.array(run.scene.train))
  gaps = backdrop.unseen(train, options.max_splats)
  fitted = dataclasses.replace(options, max_splats=options.max_splats - int(gaps.sum()))
  centre = np.asarray(train.camtoworld, np.float64)[:, :, 3].mean(0)
  return backdrop.closed(distil.distil(run, fitted), gaps, centre)


def export_splats(args, run: trained.TrainedRun, out: str, offset: np.ndarray) -> dict[str, str]:
  """Makes Gaussians and writes their files; returns what to print of each file."""
  options = splat_options(args)
  to_file = np.linalg.inv(run.scene.world_transform)
  to_file[:3, 3] -= offset
  began = time.monotonic()
  splats = closed_splats(run, options)
  about = {'splats': len(splats.means), 'step': run.step, 'seconds': time.monotonic() - began}
  path = {name: os.path.join(out, name) for name in _SPLAT_FILES}
  in_capture = formats.moved(splats, to_file)
  formats.write_ply(path['splats.ply'], in_capture)
  coarse = distil.rounding_steps(run, splats, options)
  formats.write_spz(path['splats.spz'], in_capture, coarse.moved(to_file))
  if 'page' in args.what:
    path[_PAGE] = os.path.join(out, _PAGE)
    page.write(path[_PAGE], splats, run.scene, os.path.basename(os.path.abspath(args.run)), coarse)
  # Last, since it renders the test images with the field too.
  scores, lost = comparison.compare(splats, run)
  about |= dataclasses.asdict(options) | scores
  files.write_json(os.path.join(out, 'splats.json'), about, 1)
  note = f'{len(splats.means):,} Gaussians'
  written = {k: f'{v}  ({note}, {os.path.getsize(v) / 1e6:.1f} MB)' for k, v in path.items()}
  if 'psnr' in about:
    text = (
      '{psnr:.2f} dB PSNR, SSIM {ssim:.4f} (the field: {field_psnr:.2f}, {field_ssim:.4f}); '
      '{pictures_per_second:.1f} pictures/s'
    )
    written['test images'] = text.format(**about)
    written['what is lost'] = os.path.join(out, 'splats.png')
    pictures.write_png(written['what is lost'], lost)
  return written


def check_shape_options(args) -> None:
  """Raises ExportError if an option is out of range, has no use, or lacks its package."""
  for name, least in (('simplify', 4), ('texture', 64)):
    value = getattr(args, name)
    if value is not None and value < least:
      raise points.ExportError(f'--{name} must be at least {least}, got {value}.')
    if value is not None and 'mesh' not in args.what:
      raise points.ExportError(f'--{name} is for meshes: add mesh to --what.')
  if set(args.what) & {'points', 'mesh'}:
    mesh_lib.library('trimesh')
  if 'mesh' in args.what:
    mesh_lib.library('skimage.measure')
  if args.simplify or args.texture:
    mesh_lib.library('fast_simplification')
  if args.texture:
    mesh_lib.library('xatlas')


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  for name in ('views', 'width', 'points', 'resolution'):
    value = getattr(args, name)
    if value is not None and value < 2:
      raise points.ExportError(f'--{name} must be at least 2, got {value}.')
  splat_options(args)  # Checked before the slow part.
  check_shape_options(args)
  settings, scene = run_folder.open_run(args.run)
  out = args.out or os.path.join(args.run, 'export')
  read_box(args, scene)  # Checked before the slow part.
  with run_lock.output(out, '--out'):
    export(args, settings, scene, out)


def export(args, settings: configs.Settings, scene: scenes.Scene, out: str) -> None:
  """Writes all that is asked for to the folder `out`, and prints where it is."""
  run = trained.restore(args.run, settings, scene)
  box, offset, written = read_box(args, run.scene), points.offset(run.scene), {}
  if offset.any() or set(args.what) & {'points', 'mesh'}:
    path = written['offset.json'] = os.path.join(out, 'offset.json')
    files.write_json(path, {'offset': offset.tolist()})
  if set(args.what) & set(_KINDS):
    written |= export_views(args, run, box, out, offset)
  if set(args.what) & set(_SPLAT_KINDS):
    written |= export_splats(args, run, out, offset)
    if not args.out and os.path.exists(os.path.join(args.run, 'eval', html_report.NAME)):
      written['report'] = html_report.write(args.run, settings, scene)  # It shows the page.
  if _CAMERAS in args.what:
    written['cameras'] = os.path.join(out, 'sparse', '0')
    colmap.write_model(written['cameras'], cameras.model(run.scene, settings.config.factor))
  progress.summary(written)
