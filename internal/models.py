"""The model: the proposal loop, from rays to renderings and ray histories.

Shapes: [...] are rays, n the intervals along a ray at the current level.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from . import configs, coord, math, render, stepfun, structs
from .fields.mlp import MLP

Array = jax.Array


class Model(nn.Module):
  """The proposal loop (section 3): each level resamples the histogram of the level before.

  Attributes:
    config: sampling and compositing.
    prop_config: the proposal MLPs.
    nerf_config: the last level's MLP.
    near, far: distances along a ray where sampling starts and ends.
  """

  config: configs.Model
  prop_config: configs.PropMLP
  nerf_config: configs.NerfMLP
  near: float
  far: float

  def setup(self):
    cfg = self.config

    def field(config: configs.MLP, level: int | None = None, last: bool = False) -> MLP:
      dtype, multisampled = mlp_dtype(cfg.mlp_dtype), cfg.multisampled(last)
      config = config.for_level(level)
      return MLP(config, dtype, cfg.use_gpu_kernels, multisampled, cfg.deterministic_grid)

    self.nerf_mlp = field(self.nerf_config, last=True)
    if cfg.separate_prop_mlps:  # Flax names them prop_mlp_0, prop_mlp_1, ...
      self.prop_mlp = [field(self.prop_config, i) for i in range(cfg.num_levels - 1)]
    elif not cfg.single_mlp:
      self.prop_mlp = field(self.prop_config)
    if cfg.outside_mlps:
      outside = {'warp_fn': 'inverted_sphere'}
      self.nerf_mlp_outside = field(dataclasses.replace(self.nerf_config, **outside), last=True)
      if not cfg.single_mlp:
        self.prop_mlp_outside = field(dataclasses.replace(self.prop_config, **outside))
    if cfg.num_glo_features > 0:
      self.glo = nn.Embed(cfg.num_glo_embeddings, cfg.num_glo_features)

  def __call__(
    self,
    key: Array | None,
    rays: structs.Rays,
    train_frac: float | Array,
    use_glo: bool = True,
    proposals_every: int = 1,
  ) -> tuple[list[structs.Rendering | None], list[structs.RayHistory]]:
    """Renders rays.

    Args:
      key: PRNG key for jitter, noise and random backgrounds; None disables all three. With one key
        per ray [...], a ray's result does not depend on the other rays of the batch.
      rays: rays with leading axes [...].
      train_frac: fraction of training completed, in [0, 1], for annealing.
      use_glo: use each image's appearance vector; otherwise zeros.
      proposals_every: gradients reach the proposals through every n-th ray along the first axis,
        whose length must be a multiple of n. With a key per ray, or none, it does not change the
        result.

    Returns:
      A Rendering (None if the level has no colour) and a RayHistory for each level.
    """
    cfg = self.config
    _, s_to_t = coord.ray_warps(cfg.raydist_fn, self.near, self.far, cfg.raydist_options)
    last_rays, rays = rays, jax.lax.stop_gradient(rays)  # The last level alone moves cameras.
    glo = self._appearance(rays, use_glo)
    start = jnp.zeros_like(rays.radii) + self._first_endpoint(train_frac)  # [..., 1]
    one = jnp.ones_like(start)
    sdist, weights = jnp.concatenate([start, one], -1), one  # [..., 2], [..., 1]: a single bin.
    renderings, history = [], []
    for level in range(cfg.num_levels):
      rays = last_rays if level == cfg.num_levels - 1 else rays
      key, sample_key, mlp_key, bg_key = math.split_keys(key, 4)
      sdist = self._resample(sample_key, level, sdist, weights, train_frac)  # [..., n + 1]
      tdist = s_to_t(sdist)  # [..., n + 1]
      gaussians = self._cast(sample_key, level, rays, tdist)  # [..., n]
      # [..., n], [..., n, 3]
      every = proposals_every if level < cfg.num_levels - 1 else 1
      density, rgb = self._query_in_parts(every, mlp_key, level, rays, gaussians, glo, train_frac)
      if cfg.gradient_scaling > 0:
        scale = render.gradient_scale(tdist, rays.directions, cfg.gradient_scaling)  # [..., n]
        density = math.scale_gradient(density, scale)
        rgb = None if rgb is None else math.scale_gradient(rgb, scale[..., None])
      weights = render.compute_alpha_weights(density, tdist, rays.directions, cfg.opaque_background)
      history.append(structs.RayHistory(sdist, tdist, weights, rgb))
      background = self._background(bg_key, rays)
      renderings.append(
        None if rgb is None
        else render.volumetric_rendering(rgb, weights, tdist, background, self.far)
      )  # fmt: skip
    return renderings, history

  def last_density(
    self, rays: structs.Rays, tdist: Array, shift: Array, train_frac: float | Array = 1.0
  ) -> Array:
    """Returns density [..., n] of the last level at shifted positions.

    Args:
      rays: rays with leading axes [...].
      tdist: [..., n + 1] endpoints of the intervals.
      shift: [..., n, 3] added to the means of the intervals' Gaussians.
      train_frac: fraction of training completed, in [0, 1].
    """
    level = self.config.num_levels - 1
    gaussians = self._cast(None, level, rays, tdist)
    extra_axes = gaussians.mean.ndim - shift.ndim  # 1 if multisampled: [..., n, k, 3].
    shift = shift.reshape(*shift.shape[:-1], *(1,) * extra_axes, 3)
    gaussians = gaussians.replace(mean=gaussians.mean + shift)
    return self._query(None, level, rays, gaussians, self._appearance(rays, False), train_frac)[0]

  def _num_samples(self, level: int) -> int:
    """Returns the number of intervals n at a level."""
    last = level == self.config.num_levels - 1
    return self.config.num_nerf_samples if last else self.config.num_prop_samples

  def _first_endpoint(self, train_frac) -> float | Array:
    """Returns the start of rays in s: 0, or during near annealing a value that falls to 0."""
    cfg = self.config
    if cfg.near_anneal_rate is None:
      return 0.0
    return jnp.clip(1 - train_frac / cfg.near_anneal_rate, 0, cfg.near_anneal_init)

  def _resample(self, key, level: int, sdist: Array, weights: Array, train_frac) -> Array:
    """Draws a level's endpoints [..., n + 1] from the histogram of the level before."""
    cfg = self.config
    domain = (self._first_endpoint(train_frac), 1.0)
    if level > 0 and (cfg.dilation_bias > 0 or cfg.dilation_multiplier > 0):
      # Each level divides the intervals of the one before: their mean width is 1 / product.
      product = 1
      for previous in range(level):
        product *= self._num_samples(previous)
      dilation = cfg.dilation_bias + cfg.dilation_multiplier / product
      sdist, weights = stepfun.max_dilate_weights(sdist, weights, dilation, domain, True)
      sdist, weights = sdist[..., 1:-1], weights[..., 1:-1]
    if level > 0 and cfg.resample_blur:
      weights = stepfun.blur_weights(weights)
    slope = cfg.anneal_slope
    anneal = slope * train_frac / ((slope - 1) * train_frac + 1) if slope > 0 else 1.0  # Eq. 18
    logits = stepfun.anneal_logits(sdist, weights, anneal, cfg.resample_padding)
    sdist = stepfun.sample_intervals(
      key, sdist, logits, self._num_samples(level), cfg.single_jitter, domain
    )
    if cfg.stop_level_grad:
      sdist = jax.lax.stop_gradient(sdist)
    # Without the barrier, XLA may fuse sampling into the MLP's inputs and compile for minutes.
    return jax.lax.optimization_barrier(sdist)

  def _cast(self, key, level: int, rays: structs.Rays, tdist: Array) -> structs.Gaussians:
    """Returns the Gaussian of each interval [..., n], or k of them [..., n, k] if multisampled."""
    cfg = self.config
    cone = rays.origins, rays.directions, rays.radii, cfg.ray_shape
    if cfg.multisampled(level == cfg.num_levels - 1):
      key = None if key is None else math.fold_in(key, 1)  # `key` itself drew the jitter.
      gaussians = render.multisample(key, tdist, *cone)
    else:
      gaussians = render.cast_rays(tdist, *cone)
    if cfg.disable_integration:
      gaussians = gaussians.replace(cov=jnp.zeros_like(gaussians.cov))
    return gaussians

  def _query_in_parts(self, every: int, key, level: int, rays, gaussians, glo, train_frac):
    """As `_query`, with gradients through every n-th ray only."""
    if every == 1:
      return self._query(key, level, rays, gaussians, glo, train_frac)

    def part(last: bool):  # The last ray of each n neighbours, or the others.
      def take(x):
        groups = x.reshape(-1, every, *x.shape[1:])
        return groups[:, -1] if last else groups[:, :-1].reshape(-1, *x.shape[1:])

      own_key = key if key is None or key.ndim == 0 else take(key)
      return self._query(own_key, level, *jax.tree.map(take, (rays, gaussians, glo)), train_frac)

    def join(others, last):
      groups = others.reshape(-1, every - 1, *others.shape[1:]), last[:, None]
      return jnp.concatenate(groups, 1).reshape(-1, *last.shape[1:])

    # Evaluated apart: of what has no gradient, the backward pass computes nothing.
    return jax.tree.map(join, jax.lax.stop_gradient(part(False)), part(True))

  def _query(
    self, key, level: int, rays: structs.Rays, gaussians: structs.Gaussians, glo, train_frac
  ):
    """Evaluates the level's MLP: density [..., n], and colour [..., n, 3] or None."""
    cfg = self.config
    args = key, gaussians, rays.viewdirs if cfg.use_viewdirs else None, glo, train_frac
    nerf = level == cfg.num_levels - 1 or cfg.single_mlp
    if cfg.separate_prop_mlps and not nerf:
      return self.prop_mlp[level](*args)
    density, rgb = (self.nerf_mlp if nerf else self.prop_mlp)(*args)
    if cfg.outside_mlps:
      other = (self.nerf_mlp_outside if nerf else self.prop_mlp_outside)(*args)
      outside = jnp.sum(gaussians.mean**2, -1) > 1  # [..., n]
      density = jnp.where(outside, other[0], density)
      rgb = None if rgb is None else jnp.where(outside[..., None], other[1], rgb)
    return density, rgb

  def _appearance(self, rays: structs.Rays, use_glo: bool) -> Array | None:
    """Returns the appearance vectors [..., g] of the rays' images, zeros, or None if unused."""
    features = self.config.num_glo_features
    if features == 0:
      return None
    if use_glo:
      return self.glo(rays.cam_idx)  # [..., g]
    return jnp.zeros((*rays.cam_idx.shape, features), rays.origins.dtype)

  def _background(self, key, rays: structs.Rays) -> Array:
    """Returns a grey level [..., 1] per ray: random with a key, else the middle of the range."""
    low, high = self.config.bg_intensity_range
    if key is None or low == high:
      return jnp.full_like(rays.radii, (low + high) / 2)
    return math.draw(jax.random.uniform, key, rays.radii.shape, minval=low, maxval=high)


def mlp_dtype(name: str) -> jnp.dtype:
  """Returns the dtype of the MLPs' hidden layers; 'auto' depends on the platform."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def build(settings: configs.Settings) -> Model:
  """Builds the model that the settings describe."""
  cfg = settings.config
  return Model(settings.model, settings.prop_mlp, settings.nerf_mlp, cfg.near, cfg.far)


def init_params(model: Model, key: Array) -> dict:
  """Initializes the parameters: a dict of 'nerf_mlp', 'prop_mlp' (or 'prop_mlp_0', ...), 'glo'."""
  one = jnp.ones((1, 1), jnp.float32)
  vec = jnp.ones((1, 3), jnp.float32) / jnp.sqrt(3.0)
  rays = structs.Rays(vec, vec, vec, 1e-3 * one, jnp.zeros((1,), jnp.int32))
  init = jax.jit(lambda k: model.init(k, None, rays, 1.0)['params'])
  return init(key)


def num_params(params) -> int:
  """Counts the scalars in the parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
