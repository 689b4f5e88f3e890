"""Tests of the files of Gaussians, read back by this package and by an independent reader."""

import gzip
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import plyfile
import pytest
import splats_naive
from scipy import spatial
from scipy.spatial import transform

from internal.splats import formats, gaussians, rounding


def make_splats(n=200, seed=0):
  rng = np.random.default_rng(seed)
  return gaussians.Splats(
    means=rng.normal(size=(n, 3)) * 5,
    log_scales=rng.normal(-3, 1, (n, 3)),
    quaternions=rng.normal(size=(n, 4)),
    opacity_logits=rng.normal(0, 2, n),
    sh=rng.normal(0, 0.25, (n, 16, 3)),
  )


def covariance(splats):
  as_float = gaussians.Splats(
    *(jnp.float32(getattr(splats, name)) for name in splats.__dataclass_fields__)
  )
  return splats_naive.covariances(as_float)


def test_plyfile_reads_every_field_where_splat_programs_look_for_it(tmp_path):
  splats, path = make_splats(), str(tmp_path / 'a.ply')
  formats.write_ply(path, splats)
  ply = plyfile.PlyData.read(path)
  assert (ply.text, ply.byte_order, len(ply.elements)) == (False, '<', 1)
  rows = ply['vertex']
  names = [p.name for p in rows.properties]
  assert len(rows) == 200
  assert {p.val_dtype for p in rows.properties} == {'f4'}
  assert names[:9] == ['x', 'y', 'z', 'nx', 'ny', 'nz', 'f_dc_0', 'f_dc_1', 'f_dc_2']
  assert names[9:54] == [f'f_rest_{k}' for k in range(45)]
  assert names[54:] == [
    *('opacity', 'scale_0', 'scale_1', 'scale_2', 'rot_0', 'rot_1', 'rot_2', 'rot_3')
  ]
  unit = splats.quaternions / np.linalg.norm(splats.quaternions, axis=-1, keepdims=True)
  for k in range(3):
    np.testing.assert_allclose(rows['xyz'[k]], splats.means[:, k], rtol=1e-6)
    np.testing.assert_allclose(rows[f'scale_{k}'], splats.log_scales[:, k], rtol=1e-6)
    np.testing.assert_allclose(rows[f'f_dc_{k}'], splats.sh[:, 0, k], rtol=1e-6)
    for j in range(15):  # All coefficients of red, then of green, then of blue.
      np.testing.assert_allclose(rows[f'f_rest_{15 * k + j}'], splats.sh[:, 1 + j, k], rtol=1e-6)
  for k in range(4):
    np.testing.assert_allclose(rows[f'rot_{k}'], unit[:, k], rtol=1e-5)
  np.testing.assert_allclose(rows['opacity'], splats.opacity_logits, rtol=1e-6)
  assert not np.any(rows['nx'])


def test_ply_round_trip(tmp_path):
  splats, path = make_splats(), str(tmp_path / 'a.ply')
  formats.write_ply(path, splats)
  read = formats.read_ply(path)
  for name in ('means', 'log_scales', 'opacity_logits', 'sh'):
    np.testing.assert_array_equal(getattr(read, name), np.float32(getattr(splats, name)))
  np.testing.assert_allclose(covariance(read), covariance(splats), rtol=1e-3, atol=1e-6)


def test_spz_round_trip_keeps_what_its_bits_can_hold(tmp_path):
  splats, path = make_splats(), str(tmp_path / 'a.spz')
  formats.write_spz(path, splats)
  read = formats.read_spz(path)
  farthest = np.abs(splats.means).max()
  np.testing.assert_allclose(read.means, splats.means, atol=farthest / 2**22)
  np.testing.assert_allclose(read.log_scales, splats.log_scales, atol=1 / 32 + 1e-9)
  opacity = [1 / (1 + np.exp(-s.opacity_logits)) for s in (read, splats)]
  np.testing.assert_allclose(*opacity, atol=0.5001 / 255)
  np.testing.assert_allclose(read.sh[:, 0], splats.sh[:, 0], atol=0.51 / 255 / 0.15)
  inside = np.abs(splats.sh[:, 1:]) < 0.9
  assert np.abs(read.sh[:, 1:] - splats.sh[:, 1:])[inside].max() <= 0.51 / 128
  turns = [transform.Rotation.from_quat(s.quaternions, scalar_first=True) for s in (read, splats)]
  assert np.degrees((turns[0].inv() * turns[1]).magnitude()).max() < 0.3


def test_spz_is_rounded_as_coarsely_as_allowed_and_neighbours_stand_together():
  splats, rng = make_splats(4000), np.random.default_rng(1)
  splats = splats.replace(sh=0.5 * splats.sh)
  steps = (10 ** rng.uniform(-2.5, 0, 4000) for _ in range(3))
  allowed = rounding.Steps(*steps, seen=np.zeros((4000, 15)))
  plain, packed = formats.pack_spz(splats), formats.pack_spz(splats, allowed)
  assert len(packed) < 0.75 * len(plain)
  read = formats.unpack_spz(packed)
  # Those whose positions are still near their own tell which is which.
  far, row = spatial.cKDTree(splats.means).query(read.means)
  row, read = row[far < 0.01], jax.tree.map(lambda x: x[far < 0.01], read)
  assert len(set(row)) == len(row) > 500
  for found, own, step, unit in (
    (read.means, splats.means, allowed.means, 2**-18),
    (read.log_scales, splats.log_scales, allowed.log_scales, 1 / 16),
    (read.sh[:, 0], splats.sh[:, 0], allowed.color, 1 / 255 / 0.15),
    (read.sh[:, 1:].reshape(-1, 45), splats.sh[:, 1:].reshape(-1, 45), allowed.harmonics, 1 / 128),
  ):
    error = np.abs(found - own.reshape(len(own), -1)[row]).max(-1)
    inside = np.abs(own.reshape(len(own), -1)[row]).max(-1) < (0.9 if unit == 1 / 128 else np.inf)
    half = np.maximum(step[row], unit) / 2
    assert (error <= 1.01 * half)[inside].all()
    assert np.mean((error > 0.2 * half)[inside]) > 0.5
  # Those of one step follow a curve through space.
  apart = np.linalg.norm(np.diff(read.means, axis=0), axis=-1)
  assert np.median(apart) < 0.5 * np.median(np.linalg.norm(np.diff(splats.means, axis=0), axis=-1))


def test_spz_keeps_the_colour_of_the_mean_view_when_harmonics_are_lost():
  splats, turn = make_splats(1), transform.Rotation.random(random_state=2).as_matrix()
  splats = splats.replace(sh=0.5 * splats.sh)
  seen_along = jnp.float32([[0.6, -0.64, 0.48]])
  basis = np.asarray(gaussians.sh_basis(seen_along))
  steps = rounding.Steps(*np.float64([[1e-6], [1e-6], [1e9]]), seen=basis[:, 1:] / basis[0, 0])
  matrix = np.eye(4)
  matrix[:3, :3] = 3 * turn
  read = formats.unpack_spz(formats.pack_spz(formats.moved(splats, matrix), steps.moved(matrix)))
  assert not np.abs(read.sh[:, 1:]).max()
  colors = gaussians.sh_colors(jnp.float32(splats.sh), seen_along)
  np.testing.assert_allclose(0.5 + gaussians.SH_0 * read.sh[:, 0], colors, atol=0.6 / 255 * 2)


def test_gzip_in_pieces_is_one_member_of_the_same_bytes(monkeypatch):
  monkeypatch.setattr(formats, '_PIECE', 100)
  data = np.random.default_rng(0).integers(0, 9, 1000).astype(np.uint8).tobytes()
  for size in (0, 1, 100, 101, 1000):
    packed, reader = formats._gzip(data[:size]), zlib.decompressobj(zlib.MAX_WBITS | 16)
    assert reader.decompress(packed) == data[:size]
    assert reader.eof
    assert not reader.unused_data  # Browsers read one member only.


def test_spz_has_the_described_layout():
  """Bytes counted by hand: a Gaussian of a known value, in axes with y up."""
  one = gaussians.Splats(
    means=np.array([[1.0, 2, -3]]),
    log_scales=np.array([[-2.0, -1, 0]]),
    quaternions=np.array([[np.sqrt(0.7), np.sqrt(0.3), 0, 0]]),
    opacity_logits=np.array([0.0]),
    sh=np.concatenate([np.full((1, 1, 3), [1.0, 0, -1]), np.zeros((1, 15, 3))], 1),
  )
  data = gzip.decompress(formats.pack_spz(one))
  magic, version, count, degree, bits, flags, _ = struct.unpack_from('<IIIBBBB', data)
  assert (magic, version, count, degree, flags) == (0x5053474E, 3, 1, 3, 1)
  assert len(data) == 16 + 9 + 1 + 3 + 3 + 4 + 45
  position = [
    int.from_bytes(data[16 + 3 * k : 19 + 3 * k], 'little', signed=True) for k in range(3)
  ]
  assert [p / 2**bits for p in position] == [1, -2, 3]
  assert data[25] == 128
  assert list(data[26:29]) == [166, 128, 89]
  assert list(data[29:32]) == [128, 144, 160]
  # A turn about x by 2 acos(sqrt 0.7), then by half a turn.
  packed = int.from_bytes(data[32:36], 'little')
  expected = transform.Rotation.from_euler('x', np.pi) * transform.Rotation.from_quat(
    [np.sqrt(0.3), 0, 0, np.sqrt(0.7)]
  )
  x, _, _, w = expected.as_quat()
  assert abs(x) > abs(w)  # x is left out: index 0, then y, z, w.
  assert packed >> 30 == 0
  assert packed >> 10 & 511 == packed >> 20 & 511 == 0
  assert (packed & 511) == round(abs(w) * np.sqrt(2) * 511)
  assert bool(packed & 512) == (w * x < 0)
  assert set(data[36:]) == {128}


@pytest.mark.parametrize('cut', [0, 10, 200])
def test_damaged_files_are_named(tmp_path, cut):
  splats = make_splats(20)
  ply, spz = tmp_path / 'a.ply', tmp_path / 'a.spz'
  formats.write_ply(str(ply), splats)
  formats.write_spz(str(spz), splats)
  for path, read in ((ply, formats.read_ply), (spz, formats.read_spz)):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(formats.SplatFileError, match=path.name):
      read(str(path))


def test_a_moved_copy_looks_the_same_from_the_moved_camera():
  splats = make_splats(50)
  rng = np.random.default_rng(3)
  turn = transform.Rotation.random(random_state=1).as_matrix()
  matrix = np.eye(4)
  matrix[:3, :3], matrix[:3, 3] = 2.5 * turn, rng.normal(size=3)
  moved = formats.moved(splats, matrix)
  expected = 2.5**2 * turn @ covariance(splats) @ turn.T
  np.testing.assert_allclose(covariance(moved), expected, rtol=2e-3, atol=1e-4)
  np.testing.assert_allclose(moved.means, 2.5 * splats.means @ turn.T + matrix[:3, 3], atol=1e-9)
  direction = rng.normal(size=(50, 3))
  direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
  colors = [
    gaussians.sh_colors(jnp.float32(s.sh), jnp.float32(d))
    for s, d in ((splats, direction), (moved, direction @ turn.T))
  ]
  np.testing.assert_allclose(*colors, atol=1e-4)
