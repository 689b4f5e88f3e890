"""A model, a capture and meshes small enough to compile in seconds."""

import jax
import numpy as np

from internal import cameras, configs
from internal.devices import sharding

TINY = (
  'Config.batch_size = 64',
  'Config.max_steps = 100',
  'Config.near = 0.2',
  'Config.far = 1e6',
  'Config.render_chunk_size = 64',
  'Model.raydist_fn = @jnp.reciprocal',
  'Model.opaque_background = True',
  'Model.num_prop_samples = 8',
  'Model.num_nerf_samples = 4',
  'PropMLP.warp_fn = @coord.contract',
  'PropMLP.net_depth = 2',
  'PropMLP.net_width = 16',
  'PropMLP.disable_rgb = True',
  'NerfMLP.warp_fn = @coord.contract',
  'NerfMLP.net_depth = 2',
  'NerfMLP.net_width = 16',
)


def settings(*bindings):
  return configs.load_config([], [*TINY, *bindings])


def capture(n=3, width=12, height=8, seed=0):
  """Cameras around the origin and random pictures of their own size each."""
  rng = np.random.default_rng(seed)
  poses = np.concatenate([np.eye(3)[None].repeat(n, 0), rng.normal(size=(n, 3, 1)) / 3], -1)
  sizes = np.array([[width + i, height] for i in range(n)])
  inverse = cameras.pixtocam_from_intrinsics(10.0, 10.0, width / 2, height / 2)
  cams = cameras.make_cameras(inverse, poses, sizes)
  images = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in sizes]
  return cams, images


def mesh(n):
  return sharding.make_mesh(jax.devices()[:n])
