"""Rays against naive float64 ones, lens models by round trips, NDC against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from internal import cameras, structs

# name: (fx, fy, cx, cy), (width, height), k1 k2 k3 k4 p1 p2, fisheye
LENSES = {
  'pinhole': ((500, 510, 321.5, 239), (640, 480), (0, 0, 0, 0, 0, 0), False),
  'simple_radial_phone': ((763, 763, 360, 360), (720, 720), (0.06, 0, 0, 0, 0, 0), False),
  'radial': ((600, 600, 400, 300), (800, 600), (-0.12, 0.03, 0, 0, 0, 0), False),
  'opencv_dslr': ((823.8, 824.1, 400, 266.5), (800, 533), (0.02, -0.02, 0, 0, -4e-4, 7e-4), False),
  'opencv_wide': ((420, 420, 400, 300), (800, 600), (-0.2, 0.06, -0.01, 1e-3, 2e-3, -1e-3), False),
  'fisheye': ((300, 302, 400, 300), (800, 600), (-0.03, 0.01, -0.004, 5e-4, 0, 0), True),
}  # fmt: skip
cast = jax.jit(cameras.pixels_to_rays)  # Without jit it is slow.
distort = jax.jit(cameras.distort, static_argnums=3)
POSE = np.array([[0.36, 0.48, -0.8, 1.5], [-0.8, 0.6, 0, -2.0], [0.48, 0.64, 0.6, 0.25]])
EYE = np.eye(3, 4)
SHIFT = np.eye(4)[3]  # Of a pose: all coordinates of its position.


def make(name, pose=EYE, **overrides):
  intrinsics, size, distortion, fisheye = LENSES[name]
  pixtocam = cameras.pixtocam_from_intrinsics(*intrinsics)
  kwargs = {'distortion': distortion, 'lens': int(fisheye), **overrides}
  return cameras.make_cameras(pixtocam, pose[None], size, **kwargs)


def grid(size, n=9):
  """Returns n x n pixels across an image, including its corners."""
  x, y = np.meshgrid(*(np.linspace(0, s - 1, n).astype(int) for s in size))
  return np.zeros_like(x), x, y


def naive_direction(name, px, py):
  """Computes the OpenCV direction of a pixel position in float64, by scipy's solvers."""
  (fx, fy, cx, cy), _, (k1, k2, k3, k4, p1, p2), fisheye = LENSES[name]
  xd, yd = (px - cx) / fx, (py - cy) / fy
  if fisheye:
    angle_d = np.hypot(xd, yd)
    odd = np.polynomial.Polynomial([-angle_d, 1, 0, k1, 0, k2, 0, k3, 0, k4])
    angle = optimize.brentq(odd, 0, 2.2, xtol=1e-14)
    around = np.arctan2(yd, xd)
    return np.sin(angle) * np.cos(around), np.sin(angle) * np.sin(around), np.cos(angle)

  def error(p):
    x, y = p
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3 + k4 * r2**4
    dx = 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    dy = p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    return [x * radial + dx - xd, y * radial + dy - yd]

  return *optimize.fsolve(error, [xd, yd], xtol=1e-11), 1.0


def naive_ray(name, pose, px, py):
  """Computes (origin, direction, viewdir, radius) of the pixel at column px, row py."""
  world = [
    pose[:, :3] @ (np.array([1, -1, -1]) * naive_direction(name, px + 0.5 + dx, py + 0.5 + dy))
    for dx, dy in ((0, 0), (1, 0), (0, 1))
  ]
  mean = (np.linalg.norm(world[1] - world[0]) + np.linalg.norm(world[2] - world[0])) / 2
  return pose[:, 3], world[0], world[0] / np.linalg.norm(world[0]), mean * 2 / np.sqrt(12)


@pytest.mark.parametrize('name', LENSES)
def test_rays_match_naive_rays(name):
  idx, x, y = grid(LENSES[name][1])
  rays = cast(make(name, POSE), idx, x, y)
  assert rays.radii.shape == (*x.shape, 1)
  for at in np.ndindex(x.shape):
    origin, direction, viewdir, radius = naive_ray(name, POSE, x[at], y[at])
    np.testing.assert_allclose(rays.origins[at], origin, rtol=1e-6)
    np.testing.assert_allclose(rays.directions[at], direction, atol=2e-6)
    np.testing.assert_allclose(rays.viewdirs[at], viewdir, atol=1e-6)
    np.testing.assert_allclose(rays.radii[at], [radius], rtol=2e-3)


@pytest.mark.parametrize('name', LENSES)
def test_distorting_a_ray_returns_its_pixel(name):
  (fx, fy, cx, cy), size, distortion, fisheye = LENSES[name]
  idx, x, y = grid(size)
  d = cast(make(name), idx, x, y).directions
  ahead = d[..., 2] < -0.05  # The plane Z = 1 covers only a half space.
  assert np.mean(ahead) > 0.8
  depth = np.where(ahead, -d[..., 2], 1)
  u, v = distort(d[..., 0] / depth, -d[..., 1] / depth, np.array(distortion), fisheye)
  np.testing.assert_allclose((fx * u + cx)[ahead], x[ahead] + 0.5, atol=2e-3)
  np.testing.assert_allclose((fy * v + cy)[ahead], y[ahead] + 0.5, atol=2e-3)


def test_perspective_directions_have_depth_one_and_fisheye_ones_length_one():
  idx, x, y = grid((640, 480))
  d = cast(make('opencv_wide'), idx, x, y).directions
  np.testing.assert_array_equal(d[..., 2], -1)
  d = cast(make('fisheye'), idx, x, y).directions
  np.testing.assert_allclose(np.linalg.norm(d, axis=-1), 1, atol=1e-6)


def test_fisheye_sees_behind_itself():
  """With 100 pixels per radian, 170 pixels off axis are 1.7 radians."""
  pixtocam = cameras.pixtocam_from_intrinsics(100, 100, 200.5, 200.5)
  cams = cameras.make_cameras(pixtocam, EYE[None], (401, 401), lens=structs.FISHEYE)
  x, y = np.array([200, 370, 200, 600]), np.array([200, 200, 30, 200])
  rays = cast(cams, 0 * x, x, y)
  expected = [[0, 0, -1], [np.sin(1.7), 0, -np.cos(1.7)], [0, np.sin(1.7), -np.cos(1.7)]]
  expected.append([0, 0, 1])  # Angles are clipped to pi; this pixel is 4 radians off axis.
  np.testing.assert_allclose(rays.directions, expected, atol=1e-6)


def test_a_fisheye_has_no_tangential_distortion():
  k = LENSES['fisheye'][2]
  plain, tangential = (
    cast(make('fisheye', distortion=(*k[:4], p, p)), 0, 70, 40).directions for p in (0, 0.1)
  )
  np.testing.assert_array_equal(plain, tangential)


def test_panorama_covers_the_sphere_once():
  w, h = 64, 32
  pixtocam = cameras.pixtocam_from_intrinsics(w / (2 * np.pi), h / np.pi, 0, 0)
  cams = cameras.make_cameras(pixtocam, EYE[None], (w, h), lens=structs.PANORAMA)
  y, x = np.mgrid[:h, :w]
  d = np.asarray(cast(cams, 0 * x, x, y).directions)
  np.testing.assert_allclose(np.linalg.norm(d, axis=-1), 1, atol=1e-6)
  np.testing.assert_allclose(d[15:17, 31:33].mean((0, 1)), [0, 0, -1], atol=0.01)  # ahead
  np.testing.assert_allclose(d[15:17, 47:49].mean((0, 1)), [1, 0, 0], atol=0.01)  # right
  np.testing.assert_allclose(d[0].mean(0), [0, 1, 0], atol=0.01)  # up
  area = np.sin((np.arange(h) + 0.5) * np.pi / h)[:, None, None] * (2 * np.pi / w) * (np.pi / h)
  second_moment = np.einsum('hwi,hwj->ij', d * area, d)
  np.testing.assert_allclose(second_moment, np.eye(3) * 4 * np.pi / 3, atol=0.01)


def test_tables_with_several_lenses_match_single_cameras():
  names = list(LENSES)
  tables = [make(name, POSE + 0.1 * i * SHIFT) for i, name in enumerate(names)]
  fields = ('pixtocam', 'camtoworld', 'size', 'distortion', 'lens')
  rows = (np.concatenate([getattr(t, field) for t in tables]) for field in fields)
  table = cameras.make_cameras(*rows)
  assert table.lenses == (structs.PERSPECTIVE, structs.FISHEYE)
  idx, x, y = np.arange(len(names)), np.full(len(names), 411), np.full(len(names), 99)
  rays = cast(table, idx, x, y)
  for i, single in enumerate(tables):
    expected = cast(single, 0, 411, 99)
    np.testing.assert_allclose(rays.directions[i], expected.directions, atol=1e-6)
    np.testing.assert_allclose(rays.radii[i], expected.radii, rtol=2e-3)
    np.testing.assert_array_equal(rays.origins[i], expected.origins)
  np.testing.assert_array_equal(rays.cam_idx, idx)


def test_undistortion_finds_the_solution_inside_the_fold():
  """This lens folds at radius 1.207; most points have a second preimage beyond it."""
  target = np.linspace(0.02, 1.315, 300)
  pixtocam = cameras.pixtocam_from_intrinsics(1000, 1000, 0.5, 0.5)
  cams = cameras.make_cameras(pixtocam, EYE[None], (9, 9), distortion=(0.5, -0.3, 0, 0, 0, 0))
  x = np.round(1000 * target).astype(int)
  directions = cast(cams, 0 * x, x, 0 * x).directions
  radial = np.polynomial.Polynomial([0, 1, 0, 0.5, 0, -0.3])
  expected = [optimize.brentq(radial - xd / 1000, 0, 1.2071) for xd in x]
  np.testing.assert_allclose(directions[:, 0], expected, atol=1e-4)  # Ill-conditioned on the fold.


def fold_radius(distortion):
  """Returns the radius up to which the radial polynomial of `distortion` increases."""
  r = np.linspace(0, 20, 200001)
  rising = np.diff(r * (1 + sum(k * r ** (2 * i + 2) for i, k in enumerate(distortion[:4])))) > 0
  return r[np.argmin(rising)]


@pytest.mark.parametrize('fisheye', [False, True])
@pytest.mark.parametrize('k', [(-0.1, 0, 0, 0), (-0.3, 0.05, -0.02, 0), (0, 0, 0, -0.01)])
def test_pixels_beyond_the_fold_end_near_it_and_are_not_mirrored(k, fisheye):
  """The lens has no ray there; the result must be finite and on the same side."""
  pixtocam = cameras.pixtocam_from_intrinsics(10, 10, 0, 0)
  cams = cameras.make_cameras(
    pixtocam, EYE[None], (999, 999), distortion=(*k, 1e-4, -1e-4), lens=int(fisheye)
  )
  x = np.array([18, 25, 40, 80, 999, 10**6, 10**9])  # The last overflows, and equals x + 1.
  y = np.array([11, 3, -30, 80, 0, 10**6, 10**9])
  rays = cast(cams, 0 * x, x, y)
  for leaf in jax.tree.leaves(rays):
    assert np.all(np.isfinite(leaf))
  plane = np.asarray(rays.directions[:, :2]) * [1, -1]
  assert np.all(np.sum(plane * np.stack([x, y], -1), -1)[:-1] > 0)
  if not fisheye:
    radius = np.linalg.norm(plane, axis=-1)
    np.testing.assert_allclose(radius[1:-2], fold_radius(k), rtol=0.15)
  assert np.all(np.isfinite(slopes(*differentiable(cams), cams, 0 * x, x, y)[2]))


def differentiable(cams):
  return cams.pixtocam, cams.camtoworld, cams.distortion


@jax.jit
def scalar(pixtocam, camtoworld, distortion, cams, idx, x, y):
  """Returns a scalar that depends on all rays and on every camera parameter."""
  cams = cams.replace(pixtocam=pixtocam, camtoworld=camtoworld, distortion=distortion)
  rays = cameras.pixels_to_rays(cams, idx, x, y)
  return jnp.sum(jnp.cos(rays.directions + rays.origins)) + jnp.sum(rays.viewdirs * rays.radii)


slopes = jax.jit(jax.grad(scalar, (0, 1, 2)))


@pytest.mark.parametrize('name', LENSES)
def test_gradients_are_finite_and_right_at_the_image_centre_and_elsewhere(name):
  cams = make(name, POSE)
  # The first pixel's centre is the principal point, where radius and angle are 0.
  pixtocam = cams.pixtocam.copy()
  pixtocam[0, :2, 2] = -np.diag(pixtocam[0])[:2] * [300.5, 200.5]
  cams = cams.replace(pixtocam=pixtocam)
  pixels = np.zeros(2, int), np.array([300, 520]), np.array([200, 77])
  gradients = slopes(*differentiable(cams), cams, *pixels)
  assert all(np.all(np.isfinite(g)) for g in gradients)
  if not cams.distorted:
    return
  # Finite differences are a valid reference: the gradient does not include the iterations.
  for i in (0, 1, 4):  # k1, k2, p1
    shift = 1e-2 * np.eye(6, dtype=np.float32)[[i]]
    high, low = (
      scalar(cams.pixtocam, cams.camtoworld, cams.distortion + s * shift, cams, *pixels)
      for s in (1, -1)
    )
    np.testing.assert_allclose(gradients[2][0, i], (high - low) / 2e-2, rtol=0.03, atol=1e-4)


@pytest.mark.parametrize('name', ['pinhole', 'opencv_dslr', 'fisheye'])
def test_there_is_no_matmul(name):
  """A dot_general would run in TF32 on a GPU and in bfloat16 on a TPU."""
  cams = make(name, POSE, pixtocam_ndc=make(name).pixtocam[0])
  text = str(jax.make_jaxpr(cameras.pixels_to_rays)(cams, *grid((100, 100))))
  assert 'dot_general' not in text
  assert 'f32' in text
  assert 'f64' not in text


def test_undistorted_tables_skip_newton_iterations():
  trace = jax.make_jaxpr(cameras.pixels_to_rays)
  pinhole, radial = (str(trace(make(name), 0, 1, 2)) for name in ('pinhole', 'radial'))
  assert 'while' not in pinhole
  assert 'scan' not in pinhole
  assert 'while' in radial or 'scan' in radial


def ndc_of_points(points, focal, width, height, near):
  """Projects points by definition: the frustum becomes a cube, linear in inverse depth."""
  x, y, z = np.moveaxis(points, -1, 0)
  return np.stack([2 * focal / width * x / -z, 2 * focal / height * y / -z, 1 + 2 * near / z], -1)


def test_ndc_rays_run_through_the_projected_points():
  rng = np.random.default_rng(0)
  focal, width, height, near = 400, 640, 480, 1.3
  pixtocam = cameras.pixtocam_from_intrinsics(focal, focal, width / 2, height / 2)
  origins = rng.uniform(-0.5, 0.5, (20, 3))
  directions = np.concatenate(
    [rng.uniform(-0.7, 0.7, (20, 2)), rng.uniform(-1.2, -0.8, (20, 1))], -1
  )
  o, d = cameras.convert_to_ndc(
    jnp.asarray(origins, jnp.float32), jnp.asarray(directions, jnp.float32),
    jnp.asarray(pixtocam, jnp.float32), near,
  )  # fmt: skip
  np.testing.assert_allclose(o[:, 2], -1, atol=1e-6)
  np.testing.assert_allclose(o[:, 2] + d[:, 2], 1, atol=1e-6)
  for depth in (near, 2.0, 7.0, 1e5):
    t = (-depth - origins[:, 2:]) / directions[:, 2:]
    expected = ndc_of_points(origins + t * directions, focal, width, height, near)
    s = (expected[:, 2:] + 1) / 2
    np.testing.assert_allclose(o + s * d, expected, atol=2e-5)


def test_ndc_rays_of_the_reference_camera_fill_the_cube_and_have_the_radius_of_their_origins():
  w, h = 64, 48
  pixtocam = cameras.pixtocam_from_intrinsics(40, 40, w / 2, h / 2)
  cams = cameras.make_cameras(pixtocam, EYE[None], (w, h), pixtocam_ndc=pixtocam)
  y, x = np.mgrid[:h, :w]
  rays = cast(cams, 0 * x, x, y)
  np.testing.assert_allclose(rays.origins[..., 0], 2 * (x + 0.5) / w - 1, atol=1e-6)
  np.testing.assert_allclose(rays.origins[..., 1], 1 - 2 * (y + 0.5) / h, atol=1e-6)
  np.testing.assert_allclose(rays.radii, (2 / w + 2 / h) / np.sqrt(12), rtol=1e-3)
  world = cast(cams.replace(pixtocam_ndc=None), 0 * x, x, y)
  np.testing.assert_allclose(rays.viewdirs, world.viewdirs, atol=1e-6)


def test_ndc_of_a_ray_along_the_near_plane_is_finite():
  def convert(direction):
    return cameras.convert_to_ndc(jnp.zeros(3), direction, make('pinhole').pixtocam[0])

  direction = jnp.array([1.0, 0.0, 0.0])
  for value in (*convert(direction), *jax.jacobian(convert)(direction)):
    assert np.all(np.isfinite(value))


def test_pixtocam_inverts_the_intrinsics():
  fx, fy, cx, cy = np.random.default_rng(1).uniform(100, 900, (4, 5, 2))
  inverse = cameras.pixtocam_from_intrinsics(fx, fy, cx, cy)
  assert inverse.shape == (5, 2, 3, 3)
  assert inverse.dtype == np.float64
  k = np.array([[fx[3, 1], 0, cx[3, 1]], [0, fy[3, 1], cy[3, 1]], [0, 0, 1]])
  np.testing.assert_allclose(inverse[3, 1] @ k, np.eye(3), atol=1e-12)
  with pytest.raises(ValueError, match='Focal lengths must be positive, got fx 0'):
    cameras.pixtocam_from_intrinsics(0, 1, 1, 1)


def test_make_cameras_broadcasts_and_sets_the_static_fields():
  pixtocam = cameras.pixtocam_from_intrinsics(10, 10, 5, 5)
  cams = cameras.make_cameras(pixtocam, np.tile(EYE, (4, 1, 1)), (10, 10))
  assert (cams.lenses, cams.distorted) == ((structs.PERSPECTIVE,), False)
  assert [leaf.shape for leaf in jax.tree.leaves(cams)] == [
    (4, 3, 3), (4, 3, 4), (4, 6), (4,), (4, 2)
  ]  # fmt: skip
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(cams)} == {'float32', 'int32'}
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(cams))
  cams = cameras.make_cameras(
    pixtocam, np.tile(EYE, (2, 1, 1)), (10, 10), distortion=[0, 0, 0, 0, 1e-4, 0], lens=[2, 0]
  )
  assert (cams.lenses, cams.distorted) == ((structs.PERSPECTIVE, structs.PANORAMA), True)
  hash(cams.lenses)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'camtoworld': np.eye(4)[None]}, r'camtoworld must be \[n, 3, 4\] .* got \[1, 4, 4\]'),
    ({'camtoworld': np.zeros((0, 3, 4))}, 'n > 0'),
    ({'size': (1, 2, 3)}, r'size must be \[1, 2\], got \[3\]'),
    ({'distortion': np.zeros((2, 6))}, r'distortion must be \[1, 6\], got \[2, 6\]'),
    ({'lens': 3}, r'perspective.*got \[3\]'),
    ({'camtoworld': EYE[None] * np.nan}, 'camtoworld contains NaN or inf'),
    ({'pixtocam': np.full((3, 3), np.inf)}, 'pixtocam contains NaN or inf'),
    ({'distortion': [0, np.nan, 0, 0, 0, 0]}, 'distortion contains NaN or inf'),
    ({'pixtocam_ndc': np.eye(3) * np.nan}, 'pixtocam_ndc contains NaN or inf'),
    ({'size': (8.5, 8)}, 'size must be whole numbers, got 8.5'),
    ({'size': [[8, 0]]}, 'size must be at least 1 pixel a side, got 0'),
    ({'camtoworld': np.stack([EYE, EYE * 2])}, 'pose 1 scales, shears or mirrors'),
    ({'camtoworld': EYE[None] * [-1, 1, 1, 1]}, 'pose 0 scales, shears or mirrors'),
  ],
)
def test_make_cameras_with_invalid_arguments_raises(overrides, message):
  kwargs = {'pixtocam': np.eye(3), 'camtoworld': EYE[None], 'size': (8, 8), **overrides}
  with pytest.raises(ValueError, match=message):
    cameras.make_cameras(**kwargs)
