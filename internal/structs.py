"""Data structures of the pipeline: frozen pytrees with the shape of each field.

`...` is any batch shape, `n` the number of cameras or of bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import flax.struct
import jax
import numpy as np

Array = jax.Array

# Codes of the lens models in `Cameras.lens` and `Cameras.lenses`.
PERSPECTIVE, FISHEYE, PANORAMA = 0, 1, 2
LENS_NAMES = ('perspective', 'fisheye', 'panorama')


@flax.struct.dataclass
class Tracks:
  """Pixels of training images that see a point whose distance is known, m of them."""

  cam_idx: Array  # [m] int32, row among the training images.
  x: Array  # [m] int32, column.
  y: Array  # [m] int32, row.
  distance: Array  # [m] metric distance, the ray's t at the point.
  certainty: Array  # [m] in (0, 1].


@flax.struct.dataclass
class Supervision:
  """Training pixels of n images, their weights, and what their learned parameters need.

  The pixels are run-length encoded: r runs of neighbours in row-major order, image after image.
  Without runs all pixels are used.
  """

  weight: Array | None = None  # [n] weight of an image's pixels in the loss; None: 1 each.
  run_start: Array | None = None  # [r] int32, row-major index of a run's first pixel.
  pixels_before: Array | None = None  # [r] int32, pixels in earlier runs of the same image.
  pixels: Array | None = None  # [n] int32, training pixels of each image, at least one.
  first_run: Array | None = None  # [n + 1] int32, index of each image's first run.
  tracks: Tracks | None = None
  track_rays: int = flax.struct.field(pytree_node=False, default=0)  # Of a batch, from `tracks`.
  preconditioner: Array | None = None  # [n, k, k] of camera refinement; None: cameras are fixed.
  log_gain: Array | None = None  # [n] start of the logs of exposures; None: none are learned.
  camera: Array | None = None  # [n] int32, first image of the same camera, to learn its colours.


@flax.struct.dataclass
class Cameras:
  """Table of n posed cameras: all that converts pixels to rays.

  `pixtocam` maps pixels to the OpenCV camera plane (x right, y down, z forward). There they are
  undistorted, then flipped to the OpenGL axes (x right, y up, z back) of `camtoworld`.
  """

  pixtocam: Array  # [n, 3, 3] inverse intrinsics, at the resolution in use (downsampled).
  camtoworld: Array  # [n, 3, 4] OpenGL camera axes to (normalised) world.
  distortion: Array  # [n, 6] k1, k2, k3, k4, p1, p2; zeros for none.
  lens: Array  # [n] int32, PERSPECTIVE, FISHEYE or PANORAMA.
  size: Array  # [n, 2] int32, width and height in pixels.
  pixtocam_ndc: Array | None = None  # [3, 3] for rays in NDC (LLFF), otherwise None.
  supervision: Supervision | None = None  # Training only. None: all pixels, equal weights.
  lenses: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(PERSPECTIVE,))
  distorted: bool = flax.struct.field(pytree_node=False, default=False)  # any distortion != 0.

  def take(self, rows) -> Cameras:
    """Returns a table of these rows, without supervision."""
    names = ('pixtocam', 'camtoworld', 'distortion', 'lens', 'size')
    rows_of = {name: getattr(self, name)[rows] for name in names}
    return self.replace(**rows_of, supervision=None)


def are_rigid(poses: np.ndarray) -> np.ndarray:
  """Returns [n] bool: whether each pose [n, 3, 4] is rigid, without scale, shear or reflection."""
  rotation = poses[:, :, :3]
  with np.errstate(all='ignore'):
    skew = np.abs(np.swapaxes(rotation, -1, -2) @ rotation - np.eye(3)).max((-1, -2))
    return (skew < 0.01) & (np.linalg.det(rotation) > 0)


@flax.struct.dataclass
class Rays:
  """Rays and the radii of their cones."""

  origins: Array  # [..., 3] world units.
  directions: Array  # [..., 3] not normalised: z is -1 in the camera (perspective).
  viewdirs: Array  # [..., 3] unit.
  radii: Array  # [..., 1] cone radius at t = 1.
  cam_idx: Array  # [...] int32 image index, for appearance embeddings.


@flax.struct.dataclass
class Batch:
  """Ray batch of a training step: rays and their ground-truth colours."""

  rays: Rays
  rgb: Array  # [..., 3] in [0, 1].
  weight: Array | None = None  # [...] weights in the loss with mean 1; None: 1 each.
  distance: Array | None = None  # [...] known distance t of what the ray sees; None: of none.
  certainty: Array | None = None  # [...] of that distance, 0 where it is not known.
  # [...] x and y, if cameras are refined or their colours learned.
  pixel: tuple[Array, Array] | None = None


@flax.struct.dataclass
class Gaussians:
  """Gaussians of n intervals of each ray."""

  mean: Array  # [..., n, 3]
  cov: Array  # [..., n, 3, 3]


@flax.struct.dataclass
class RayHistory:
  """Histogram of one sampling level along each ray, and the colours of its bins."""

  sdist: Array  # [..., n + 1] endpoints in normalised distance, in [0, 1].
  tdist: Array  # [..., n + 1] endpoints in metric distance.
  weights: Array  # [..., n] compositing weights.
  rgb: Array | None  # [..., n, 3]; None for proposal levels, whose MLP has no colour.


@flax.struct.dataclass
class Rendering:
  """Rendered colour, opacity and distance of each ray."""

  rgb: Array  # [..., 3] composited on the background.
  acc: Array  # [...] opacity.
  distance_mean: Array  # [...] geometric mean, exp(E[log t]).
  distance_percentiles: Array  # [..., 3] metric distance at 5, 50 and 95 percent.

  @property
  def distance_median(self) -> Array:
    return self.distance_percentiles[..., 1]


@flax.struct.dataclass
class TrainState:
  """Training state: the contents of a checkpoint."""

  step: Array  # [] int32, number of updates so far.
  params: Any  # {'prop_mlp': ..., 'nerf_mlp': ..., ...}
  opt_state: Any  # Optimizer state of each module, by the same names.
  skipped: Any  # {'prop_mlp': [] int32, ...}, consecutive updates skipped as non-finite.


@flax.struct.dataclass
class Stats(Mapping):
  """Named scalars of a training step.

  They share one array, because transferring one scalar to the host takes as long as many.
  """

  numbers: Array  # [k] float32; [n, k] of n steps, of which a row is one step's.
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)

  def __getitem__(self, name: str) -> Array:
    if name not in self.names:
      raise KeyError(name)
    return self.numbers[self.names.index(name)]

  def __iter__(self) -> Iterator[str]:
    return iter(self.names)

  def __len__(self) -> int:
    return len(self.names)
