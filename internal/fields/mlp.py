"""One radiance field: Gaussians and view directions in, density and colour out.

Shapes: [...] are rays, n the intervals along a ray at this level, f an encoding's features. Inside
the trunk all intervals of all rays are flattened to m = [...] * n rows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import configs, coord, math, plugins, structs
from . import dense, encodings, hopper

Array = jax.Array

_WARPS = {
  None: None,
  'contract': coord.contract,
  'donerf': coord.donerf,
  'inverted_sphere': coord.inverted_sphere,
}
_DENSITIES = {'softplus': nn.softplus, 'exp': math.truncated_exp}


class _Linear(nn.Module):
  """Parameters of a dense layer, named as nn.Dense names them."""

  width: int
  init: str

  @nn.compact
  def __call__(self, fan_in: int) -> tuple[Array, Array]:
    """Returns kernel [fan_in, width] and bias [width], float32."""
    kernel = self.param('kernel', getattr(nn.initializers, self.init)(), (fan_in, self.width))
    return kernel, self.param('bias', nn.initializers.zeros, (self.width,))


class MLP(nn.Module):
  """A radiance field.

  Hidden layers compute in `dtype`; the density and colour outputs and all parameters are float32.

  Attributes:
    config: the architecture.
    dtype: float32 or bfloat16.
    gpu_kernels: use the GPU-specific code paths when running on a GPU.
    multisampled: each interval has k Gaussians, on an extra axis: [..., n, k, 3].
    deterministic: make the hash grid's gradient bitwise reproducible on GPUs (slower).
  """

  config: configs.MLP
  dtype: jnp.dtype = jnp.float32
  gpu_kernels: bool = True
  multisampled: bool = False
  deterministic: bool = False

  def _linear(self, name: str, fan_in: int, width: int) -> tuple[Array, Array]:
    return _Linear(width, self.config.weight_init, name=name)(fan_in)

  @nn.compact
  def __call__(
    self,
    key: Array | None,
    gaussians: structs.Gaussians,
    viewdirs: Array | None = None,
    glo: Array | None = None,
    train_frac: float | Array = 1.0,
  ) -> tuple[Array, Array | None]:
    """Evaluates the field.

    Args:
      key: PRNG key for the configured noise, or one key per ray [...]; None disables noise.
      gaussians: mean [..., n, 3] and cov [..., n, 3, 3] in world space, with an axis k after n if
        `multisampled`.
      viewdirs: [..., 3] unit vectors, or None for view-independent colour.
      glo: [..., g] appearance vectors, or None.
      train_frac: fraction of training completed, in [0, 1], for encodings that grow in detail.

    Returns:
      Density [..., n], and rgb [..., n, 3] (None if `config.disable_rgb`).
    """
    cfg = self.config
    density_key, bottleneck_key = math.split_keys(key, 2)
    raw, x = self._trunk(gaussians, viewdirs is not None, train_frac)  # [..., n], [..., n, c]
    raw = _add_noise(density_key, raw, cfg.density_noise)
    density = _DENSITIES[cfg.density_activation](raw + cfg.density_bias)
    if cfg.disable_rgb:
      return density, None
    if viewdirs is not None and x is not None:  # x is the bottleneck.
      x = _add_noise(bottleneck_key, x, cfg.bottleneck_noise)
    x = self._view_layers(x, viewdirs, glo, density.shape)  # [..., n, c]
    kernel, bias = self._linear('rgb', x.shape[-1], 3)
    raw_rgb = math.narrow_dot(x, kernel) + _as_row(bias, x.ndim)  # [..., n, 3], float32
    rgb = nn.sigmoid(cfg.rgb_premultiplier * raw_rgb + cfg.rgb_bias)
    # Padding lets a sigmoid reach 0 and 1 at finite inputs.
    return density, rgb * (1 + 2 * cfg.rgb_padding) - cfg.rgb_padding

  def _encode(self, gaussians: structs.Gaussians, train_frac) -> tuple[Array, encodings.Encoding]:
    """Returns features [..., n, f] of the warped Gaussians in `dtype`, and the encoding."""
    cfg = self.config
    warp = _WARPS[cfg.warp_fn]
    if warp is not None:
      gaussians = structs.Gaussians(*coord.linearize(warp, gaussians.mean, gaussians.cov))
    encoding = self._encoding()
    features, lead = encoding(gaussians), gaussians.mean.shape[:-1]
    allowed = (lead, lead[:-1]) if self.multisampled else (lead,)
    rule = f'return features {[*lead, "f"]} for means {[*gaussians.mean.shape]}'.replace("'", '')
    shape = getattr(features, 'shape', ())
    plugins.encoding.check(cfg.encoding, features, shape[:-1] in allowed and shape != (), rule)
    if self.multisampled and features.ndim == gaussians.mean.ndim:
      features = jnp.mean(features, -2)  # A plug-in's features are of each Gaussian [..., n, k, f].
    detail = encoding.detail(train_frac)
    if detail is not None:
      features *= _as_row(detail, features.ndim)
    return features.astype(self.dtype), encoding

  def _encoding(self) -> encodings.Encoding:
    """Returns the configured encoding.

    Raises:
      ConfigError: encoding_options has arguments that the encoding does not take.
      PluginError: the encoding is not a subclass of `Encoding`.
    """
    cfg = self.config
    kind = plugins.encoding[cfg.encoding]
    fits = isinstance(kind, type) and issubclass(kind, encodings.Encoding)
    rule = 'be a subclass of fields.encodings.Encoding'
    plugins.encoding.check(cfg.encoding, kind, fits, rule)
    try:
      return kind(**{**kind.arguments(self), **cfg.encoding_options})
    except TypeError as e:
      raise configs.ConfigError(
        f'{type(cfg).__name__}.encoding_options must be arguments of the encoding '
        f'{cfg.encoding!r}, got {cfg.encoding_options} ({e}).'
      ) from None

  def _trunk(
    self, gaussians: structs.Gaussians, by_view: bool, train_frac
  ) -> tuple[Array, Array | None]:
    """Evaluates the hidden layers and the heads.

    Returns:
      Raw density [..., n] (float32), and the input of the colour layers [..., n, c]: the bottleneck
      if colour depends on the view, else the last hidden layer; None if neither is configured.
    """
    cfg = self.config
    encoded, encoding = self._encode(gaussians, train_frac)
    bins = encoded.shape[:-1]
    encoded = encoded.reshape(-1, encoded.shape[-1])  # [m, f]
    bottleneck_width = cfg.bottleneck_width if by_view and not cfg.disable_rgb else 0
    num_features = encoding.num_features or encoded.shape[-1]
    layers, heads = self._trunk_parameters(encoding, num_features, bottleneck_width)
    fused = self.gpu_kernels and self.dtype == jnp.bfloat16 and hopper.available()
    if by_view or cfg.disable_rgb:  # The hidden layer itself is not needed, only its heads.
      raw, colour = dense.trunk_with_heads(layers, heads, encoded, fused)
    else:
      colour = dense.trunk(layers, None, encoded, fused)
      raw, _ = dense.apply_heads(heads, colour, encoded)
      if heads.density.of_encoded is not None:  # A skip connection ends at the last layer.
        colour = jnp.concatenate([colour, encoded], -1)
    return raw.reshape(bins), None if colour is None else colour.reshape(*bins, -1)

  def _trunk_parameters(
    self, encoding: encodings.Encoding, num_features: int, bottleneck_width: int
  ) -> tuple[tuple[dense.Layer, ...], dense.HeadLayers]:
    """Declares the parameters of the hidden layers and the heads (width 0: no bottleneck)."""
    cfg = self.config

    def linear(name: str, width: int, from_x: bool, from_encoded: bool) -> dense.Layer:
      rows = cfg.net_width * from_x  # One kernel for both inputs, as if they were concatenated.
      kernel, bias = self._linear(name, rows + num_features * from_encoded, width)
      of_encoded = encoding.arrange(kernel[rows:]) if from_encoded else None
      return dense.Layer(kernel[:rows] if from_x else None, of_encoded, bias)

    layers, skip = [], True  # The first layer sees the encoding alone.
    for i in range(cfg.net_depth):
      layers.append(linear(f'trunk_{i}', cfg.net_width, i > 0, skip))
      skip = i > 0 and i % cfg.skip_layer == 0
    density = linear('density', 1, True, skip)
    bottleneck = linear('bottleneck', bottleneck_width, True, skip) if bottleneck_width else None
    return tuple(layers), dense.HeadLayers(density, bottleneck)

  def _view_layers(
    self, x: Array | None, viewdirs: Array | None, glo: Array | None, bins: tuple[int, ...]
  ) -> Array:
    """Evaluates the view-dependent layers: x [..., n, c'] to the rgb layer's input [..., n, c].

    Args:
      x: output of the trunk, or None.
      viewdirs: [..., 3] or None.
      glo: [..., g] or None.
      bins: the shape [..., n].
    """
    cfg = self.config
    per_ray = [] if viewdirs is None else [coord.pos_enc(viewdirs, 0, cfg.deg_view)]
    per_ray += [] if glo is None else [glo]
    per_ray = [v.astype(self.dtype)[..., None, :] for v in per_ray]  # [..., 1, c]
    parts = inputs = [v for v in (x, *per_ray) if v is not None]
    for i in range(cfg.net_depth_viewdirs):
      fan_in = sum(v.shape[-1] for v in parts)
      kernel, bias = self._linear(f'view_{i}', fan_in, cfg.net_width_viewdirs)
      x, row = _as_row(bias.astype(self.dtype), len(bins) + 1), 0
      # Instead of concatenating, each part is multiplied by its own rows of the kernel: parts that
      # all intervals of a ray share are multiplied once per ray.
      for v in parts:
        x += v @ kernel[row : row + v.shape[-1]].astype(self.dtype)
        row += v.shape[-1]
      x = nn.relu(jnp.broadcast_to(x, (*bins, x.shape[-1])))  # [..., n, c]
      skip = cfg.skip_layer_dir > 0 and i > 0 and i % cfg.skip_layer_dir == 0
      parts = [x, *inputs] if skip else [x]
    parts = [jnp.broadcast_to(v, (*bins, v.shape[-1])) for v in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


def _as_row(x: Array, ndim: int) -> Array:
  """Reshapes a vector to [1, ..., 1, c] with `ndim` axes."""
  return x.reshape((1,) * (ndim - 1) + x.shape)


def _add_noise(key: Array | None, x: Array, scale: float) -> Array:
  """Adds Gaussian noise with standard deviation `scale`; returns x unchanged without a key."""
  if key is None or scale == 0:
    return x
  return x + scale * math.draw(jax.random.normal, key, x.shape, x.dtype)
