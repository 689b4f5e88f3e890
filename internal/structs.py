"""The data that flows through the system: frozen pytrees, the shape beside each field.

`...` stands for any leading batch shape; `n` for the number of cameras or bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import flax.struct
import jax

Array = jax.Array

# Codes of the lens models in `Cameras.lens`; also the values that `Cameras.lenses` lists.
PERSPECTIVE, FISHEYE, PANORAMA = 0, 1, 2
LENS_NAMES = ('perspective', 'fisheye', 'panorama')


@flax.struct.dataclass
class Supervision:
  """Which pixels of n images are trained on, and how much they count.

  Pixels that may be drawn are listed as r runs of neighbours, row by row, image after image; where
  there is no list, all of them may.
  """

  weight: Array | None = None  # [n] of an image's pixels in the data loss; None: all alike.
  run_start: Array | None = None  # [r] int32, a run's first pixel, counted in its image.
  pixels_before: Array | None = None  # [r] int32, pixels in the image's runs before.
  pixels: Array | None = None  # [n] int32, how many of an image's may be drawn, at least one.
  first_run: Array | None = None  # [n + 1] int32, where each image's runs begin.


@flax.struct.dataclass
class Cameras:
  """A table of n posed cameras: all that is needed to turn pixels into rays.

  Pixels go through `pixtocam` to the OpenCV camera plane (x right, y down, z forward), are
  undistorted there, and are flipped to the OpenGL axes (x right, y up, z back) of `camtoworld`.
  """

  pixtocam: Array  # [n, 3, 3] inverse intrinsics, of the image as it is used (downsampled).
  camtoworld: Array  # [n, 3, 4] OpenGL camera axes to (normalised) world.
  distortion: Array  # [n, 6] k1, k2, k3, k4, p1, p2; zeros for none.
  lens: Array  # [n] int32, PERSPECTIVE, FISHEYE or PANORAMA.
  size: Array  # [n, 2] int32, width and height in pixels.
  pixtocam_ndc: Array | None = None  # [3, 3] if rays are to be in NDC (LLFF), else None.
  supervision: Supervision | None = None  # Of training cameras; None: all pixels, all alike.
  lenses: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(PERSPECTIVE,))
  distorted: bool = flax.struct.field(pytree_node=False, default=False)  # any distortion != 0.

  def take(self, rows) -> Cameras:
    """The table of some of the cameras, without supervision."""
    names = ('pixtocam', 'camtoworld', 'distortion', 'lens', 'size')
    rows_of = {name: getattr(self, name)[rows] for name in names}
    return self.replace(**rows_of, supervision=None)


@flax.struct.dataclass
class Rays:
  """Rays with the cone that each pixel subtends."""

  origins: Array  # [..., 3] world units.
  directions: Array  # [..., 3] not normalised: z is -1 in the camera (perspective).
  viewdirs: Array  # [..., 3] unit.
  radii: Array  # [..., 1] cone radius at t = 1.
  cam_idx: Array  # [...] int32, the image that the ray is of (appearance vectors).


@flax.struct.dataclass
class Batch:
  """What one training step compares: rays and the colours seen along them."""

  rays: Rays
  rgb: Array  # [..., 3] in [0, 1].
  weight: Array | None = None  # [...] in the data loss, 1 in the mean; None: 1 each.


@flax.struct.dataclass
class Gaussians:
  """A Gaussian for each interval of each ray."""

  mean: Array  # [..., n, 3]
  cov: Array  # [..., n, 3, 3]


@flax.struct.dataclass
class RayHistory:
  """One sampling level along each ray: a histogram and the colours of its bins."""

  sdist: Array  # [..., n + 1] endpoints in normalised distance, in [0, 1].
  tdist: Array  # [..., n + 1] endpoints in metric distance.
  weights: Array  # [..., n] compositing weights.
  rgb: Array | None  # [..., n, 3], None where the level's MLP has no colour.


@flax.struct.dataclass
class Rendering:
  """What a pixel shows."""

  rgb: Array  # [..., 3] composited on the background.
  acc: Array  # [...] opacity.
  distance_mean: Array  # [...] exp of the expectation of log t.
  distance_percentiles: Array  # [..., 3] metric distance at 5, 50 and 95 percent.

  @property
  def distance_median(self) -> Array:
    return self.distance_percentiles[..., 1]


@flax.struct.dataclass
class TrainState:
  """All that changes during training: what a checkpoint holds."""

  step: Array  # [] int32, updates done so far.
  params: Any  # {'prop_mlp': ..., 'nerf_mlp': ..., ...}
  opt_state: Any  # Of each part by itself, by the same names.
  skipped: Any  # {'prop_mlp': [] int32, ...}, updates in a row that the part was not given.


@flax.struct.dataclass
class Stats(Mapping):
  """What is told of a training step: scalars by their names.

  They are one array, since fetching a scalar takes a host as long as fetching many.
  """

  numbers: Array  # [k] float32.
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)

  def __getitem__(self, name: str) -> Array:
    if name not in self.names:
      raise KeyError(name)
    return self.numbers[self.names.index(name)]

  def __iter__(self) -> Iterator[str]:
    return iter(self.names)

  def __len__(self) -> int:
    return len(self.names)
