"""Files of Gaussians: .ply, which every splat program reads, and the compressed .spz.

The .ply has one row of float32 for each Gaussian: position, an unused normal, `f_dc` and `f_rest`
(harmonics, channel after channel), the opacity's logit, log-scales and a quaternion, w first. The
.spz follows the public description of version 3 (github.com/nianticlabs/spz): a gzip stream with a
header of 16 bytes, then each attribute of all Gaussians, in 8 to 30 bits a number. Its axes are x
right, y up, z back where those of a .ply are x right, y down, z forward, so writing turns by half a
turn about x, and reading turns back.
"""

from __future__ import annotations

import gzip
import itertools
import struct
import zlib

import numpy as np
from scipy.spatial import transform as rotation_lib

from ..datasets import images
from ..errors import UserError
from ..system import files, progress
from . import gaussians, rounding

_REST = gaussians.SH_COEFFICIENTS - 1
_COLUMNS = (
  *('x', 'y', 'z', 'nx', 'ny', 'nz'),
  *(f'f_dc_{k}' for k in range(3)),
  *(f'f_rest_{k}' for k in range(3 * _REST)),
  'opacity',
  *(f'scale_{k}' for k in range(3)),
  *(f'rot_{k}' for k in range(4)),
)
_HALF_TURN = np.diag([1.0, -1, -1, 1])  # Between the axes of .ply and .spz.

_SPZ_MAGIC, _SPZ_VERSION, _SPZ_ANTIALIASED = 0x5053474E, 3, 1
_SPZ_HEADER = '<IIIBBBB'  # Magic, version, count, SH degree, fractional bits, flags, reserved.
# What a unit of a byte stands for; a byte of colour is 255 (0.15 f_dc + 0.5).
_SPZ_COLOR, _SPZ_LOG_SCALE, _SPZ_SH = 1 / (0.15 * 255), 1 / 16, 1 / 128
_SPZ_LARGEST = 255 * _SPZ_LOG_SCALE - 10  # Log-scale.
_GZIP_HEADER = b'\x1f\x8b\x08' + bytes(6) + b'\xff'  # Deflate; no name, no time, any system.
_PIECE = 2**20  # Bytes that a thread compresses at once.
_SPZ_ROTATION = 511 * np.sqrt(2)  # Of a component that is at most sqrt(1/2), in 9 bits and a sign.


class SplatFileError(UserError):
  """A file of Gaussians that cannot be read."""


def moved(splats: gaussians.Splats, transform: np.ndarray) -> gaussians.Splats:
  """Applies a similarity [4, 4] to Gaussians and their harmonics; the result is float64."""
  linear = np.asarray(transform, np.float64)[:3, :3]
  scale = np.cbrt(np.linalg.det(linear))
  turn = rotation_lib.Rotation.from_matrix(linear / scale)
  own = rotation_lib.Rotation.from_quat(_unit(splats.quaternions), scalar_first=True)
  means = np.asarray(splats.means, np.float64) @ linear.T + transform[:3, 3]
  return gaussians.Splats(
    means=means,
    log_scales=np.asarray(splats.log_scales, np.float64) + np.log(scale),
    quaternions=(turn * own).as_quat(scalar_first=True),
    opacity_logits=np.asarray(splats.opacity_logits, np.float64),
    sh=gaussians.rotate_sh(splats.sh, linear / scale),
  )


def _unit(quaternions) -> np.ndarray:
  """Normalises quaternions [n, 4]; zeros become the identity, as in `gaussians.rotations`."""
  q = np.array(quaternions, np.float64)
  length = np.linalg.norm(q, axis=-1, keepdims=True)
  return np.where(length > 1e-12, q / np.maximum(length, 1e-12), [1.0, 0, 0, 0])


def write_ply(path: str, splats: gaussians.Splats) -> None:
  """Writes Gaussians as they are, atomically."""
  n = len(splats.means)
  sh = np.asarray(splats.sh).transpose(0, 2, 1)  # [n, 3, 16]
  columns = (
    splats.means, np.zeros((n, 3)), sh[:, :, 0], sh[:, :, 1:].reshape(n, -1),
    np.asarray(splats.opacity_logits)[:, None], splats.log_scales, _unit(splats.quaternions),
  )  # fmt: skip
  header = ['ply', 'format binary_little_endian 1.0', f'element vertex {n}']
  header += [f'property float {name}' for name in _COLUMNS]
  with files.whole(path) as temporary, open(temporary, 'wb') as f:
    f.write('\n'.join([*header, 'end_header', '']).encode())
    f.write(np.concatenate(columns, 1).astype('<f4').tobytes())


def read_ply(path: str) -> gaussians.Splats:
  """Reads what `write_ply` wrote.

  Raises:
    SplatFileError: the file has other columns, or is cut.
  """
  with open(path, 'rb') as f:
    head, _, body = f.read().partition(b'end_header\n')
  lines = head.decode('ascii', 'replace').split('\n')
  names = tuple(line.split()[-1] for line in lines if line.startswith('property float '))
  counts = [line.split()[-1] for line in lines if line.startswith('element vertex ')]
  n = int(counts[0]) if counts and counts[0].isdigit() else -1
  if names != _COLUMNS or len(body) != 4 * n * len(names):
    raise SplatFileError(
      f'{path}: is no whole .ply of Gaussians with harmonics of degree 3. Export it again.'
    )
  table = np.frombuffer(body, '<f4').reshape(n, -1)
  sh = np.concatenate([table[:, 6:9, None], table[:, 9:54].reshape(n, 3, _REST)], -1)
  return gaussians.Splats(
    means=table[:, :3],
    sh=sh.transpose(0, 2, 1),
    opacity_logits=table[:, 54],
    log_scales=table[:, 55:58],
    quaternions=table[:, 58:],
  )


def pack_spz(splats: gaussians.Splats, steps: rounding.Steps | None = None) -> bytes:
  """Encodes Gaussians in the axes of a .ply as a .spz of version 3.

  Positions have as many of their 24 bits after the point as the farthest allows; log-scales are
  rounded to 1/16, harmonics are clipped to [-1, 1]. With `steps`, of the same frame, only multiples
  of powers of two up to these are used, which compress better, and the constant harmonic takes what
  the others lose in the mean view. Gaussians of equal steps then stand together, in the order of a
  curve through space.
  """
  splats = moved(splats, _HALF_TURN)
  n = len(splats.means)
  farthest = max(float(np.abs(splats.means).max(initial=0)), 1e-6)
  bits = int(np.clip(np.floor(np.log2((2**23 - 1) / farthest)), 0, 23))
  order = np.arange(n)
  if steps is not None:
    splats = _coarser(splats, steps.moved(_HALF_TURN), 2.0**-bits)
    order = np.lexsort((_curve(splats.means * 2.0**bits), _power(steps.harmonics, _SPZ_SH)))
  fixed = np.clip(np.round(splats.means * 2.0**bits), -(2**23), 2**23 - 1).astype('<i4')
  header = struct.pack(
    _SPZ_HEADER, _SPZ_MAGIC, _SPZ_VERSION, n, 3, bits, _SPZ_ANTIALIASED, 0
  )  # fmt: skip
  parts = [
    np.ascontiguousarray(fixed[..., None].view(np.uint8)[..., :3]),
    _bytes(255 / (1 + np.exp(-splats.opacity_logits))),
    _bytes(splats.sh[:, 0] / _SPZ_COLOR + 127.5),
    _bytes((splats.log_scales + 10) / _SPZ_LOG_SCALE),
    _pack_rotations(splats.quaternions),
    _bytes(splats.sh[:, 1:] / _SPZ_SH + 128),
  ]
  return _gzip(header + b''.join(part[order].tobytes() for part in parts))


def _coarser(splats: gaussians.Splats, steps: rounding.Steps, unit: float) -> gaussians.Splats:
  """Rounds Gaussians to multiples of `_power` of the steps; positions are stored in `unit`."""
  sh = np.clip(_rounded(splats.sh[:, 1:], steps.harmonics, _SPZ_SH), -1, 1 - _SPZ_SH)
  lost = splats.sh[:, 1:] - sh
  zero = _SPZ_COLOR / 2  # What the byte 128 stands for, from which multiples are counted.
  constant = splats.sh[:, 0] + np.einsum('nkc,nk->nc', lost, steps.seen) - zero
  constant = _rounded(constant, steps.color, _SPZ_COLOR) + zero
  return splats.replace(
    means=_rounded(splats.means, steps.means, unit),
    log_scales=_rounded(splats.log_scales, steps.log_scales, _SPZ_LOG_SCALE),
    sh=np.concatenate([constant[:, None], sh], 1),
  )


def _power(steps: np.ndarray, unit: float) -> np.ndarray:
  """Returns the largest powers of two times `unit` up to steps, at least `unit`."""
  return unit * 2.0 ** np.floor(np.log2(np.fmax(steps, unit) / unit))


def _rounded(x: np.ndarray, steps: np.ndarray, unit: float) -> np.ndarray:
  """Rounds [n, ...] to multiples of `_power` of steps [n]."""
  power = _power(steps, unit).reshape(-1, *[1] * (x.ndim - 1))
  return np.round(x / power) * power


def _curve(fixed: np.ndarray) -> np.ndarray:
  """Returns the places of 24-bit positions [n, 3] on a curve through space: bits in turns, [n]."""
  whole = np.int64(np.clip(fixed, -(2**23), 2**23 - 1)) + 2**23 >> 3  # 3 x 21 bits fit.
  place = np.zeros(len(whole), np.int64)
  for bit in range(21):
    for axis in range(3):
      place |= (whole[:, axis] >> bit & 1) << (3 * bit + axis)
  return place


def _gzip(data: bytes) -> bytes:
  """Compresses like gzip.compress, in threads: one member of pieces that end at whole bytes.

  It has no time in its header, so the same Gaussians give the same file. Level 9 would take three
  times as long for 1% less.
  """
  starts = range(0, max(len(data), 1), _PIECE)

  def deflated(start: int) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    last = start == starts[-1]
    return packer.compress(data[start : start + _PIECE]) + packer.flush(
      zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH
    )

  trailer = struct.pack('<2I', zlib.crc32(data), len(data) % 2**32)
  return _GZIP_HEADER + b''.join(images.in_threads(deflated, starts)) + trailer


def _bytes(x: np.ndarray) -> np.ndarray:
  return np.clip(np.round(x), 0, 255).astype(np.uint8)


def _pack_rotations(quaternions: np.ndarray) -> np.ndarray:
  """Packs unit quaternions [n, 4], w first, into [n] 32 bits.

  In the order x, y, z, w, the largest component is left out, and its number is in the upper 2 bits.
  Each of the others has a sign and 9 bits; the signs are those that make the largest positive.
  """
  q = np.roll(quaternions, -1, -1)
  largest = np.argmax(np.abs(q), -1)
  q = q * np.where(np.take_along_axis(q, largest[:, None], -1) < 0, -1, 1)
  packed = largest.astype(np.uint32)
  for k in range(4):
    size = np.minimum(np.round(_SPZ_ROTATION * np.abs(q[:, k])), 511).astype(np.uint32)
    bits = packed << 10 | (q[:, k] < 0).astype(np.uint32) << 9 | size
    packed = np.where(largest == k, packed, bits).astype('<u4')
  return packed


def _unpack_rotations(packed: np.ndarray) -> np.ndarray:
  """Reverses `_pack_rotations`."""
  packed = packed.astype(np.uint32)
  largest, q = packed >> 30, np.zeros((len(packed), 4))
  for k in (3, 2, 1, 0):  # The last was packed into the lowest bits.
    value = np.where(packed & 512, -1, 1) * (packed & 511) / _SPZ_ROTATION
    q[:, k] = np.where(largest == k, 0, value)
    packed = np.where(largest == k, packed, packed >> 10)
  missing = np.sqrt(np.maximum(1 - (q**2).sum(-1), 0))
  np.put_along_axis(q, largest[:, None].astype(np.int64), missing[:, None], -1)
  return np.roll(q, 1, -1)


def unpack_spz(content: bytes, name: str = '.spz') -> gaussians.Splats:
  """Decodes what `pack_spz` encoded, in the axes of a .ply. Errors start with `name`.

  Raises:
    SplatFileError: it is no .spz of version 3 and degree 3, or is cut.
  """
  try:
    data = gzip.decompress(content)
    magic, version, n, degree, bits, _, _ = struct.unpack_from(_SPZ_HEADER, data)
  except (OSError, EOFError, struct.error) as error:
    raise SplatFileError(f'{name}: is no whole .spz ({error}). Export it again.') from None
  sizes = 9, 1, 3, 3, 4, 3 * _REST  # Bytes of each attribute.
  found = magic, version, degree, len(data) - struct.calcsize(_SPZ_HEADER)
  if found != (_SPZ_MAGIC, _SPZ_VERSION, 3, n * sum(sizes)):
    raise SplatFileError(f'{name}: is no whole .spz of version 3, degree 3. Export it again.')
  ends = np.cumsum([struct.calcsize(_SPZ_HEADER), *(n * size for size in sizes)])
  raw = [np.frombuffer(data[a:b], np.uint8).reshape(n, -1) for a, b in itertools.pairwise(ends)]
  low = np.concatenate([raw[0].reshape(n, 3, 1, 3), np.zeros((n, 3, 1, 1), np.uint8)], -1)
  fixed = np.roll(low, 1, -1).copy().view('<i4')[..., 0, 0] >> 8  # Keeps the sign.
  opacity = np.clip(raw[1][:, 0] / 255, 1e-3 / 255, 1 - 1e-3 / 255)
  color = (raw[2] - 127.5) * _SPZ_COLOR
  rest = (raw[5].reshape(n, _REST, 3) - 128.0) * _SPZ_SH
  splats = gaussians.Splats(
    means=fixed / 2.0**bits,
    log_scales=raw[3] * _SPZ_LOG_SCALE - 10,
    quaternions=_unpack_rotations(raw[4].copy().view('<u4')[:, 0]),
    opacity_logits=np.log(opacity / (1 - opacity)),
    sh=np.concatenate([color[:, None], rest], 1),
  )
  return moved(splats, _HALF_TURN)


def write_spz(path: str, splats: gaussians.Splats, steps: rounding.Steps | None = None) -> None:
  """Writes `pack_spz`, atomically; tells how many Gaussians are too large for it."""
  large = int(np.sum(np.max(splats.log_scales, -1, initial=0) > _SPZ_LARGEST))
  if large:
    progress.say(f'{large:,} Gaussians are larger than a .spz can say. Prefer the .ply.')
  with files.whole(path) as temporary, open(temporary, 'wb') as f:
    f.write(pack_spz(splats, steps))


def read_spz(path: str) -> gaussians.Splats:
  """Reads what `write_spz` wrote; see `unpack_spz`."""
  with open(path, 'rb') as f:
    return unpack_spz(f.read(), path)
