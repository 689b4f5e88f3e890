"""Fits Gaussians to pictures: loss, step, and where to spend Gaussians.

All arrays have as many rows as there may be Gaussians; a row whose opacity has fallen below a
threshold is dead, and becomes half of a split Gaussian that the pictures need (the relocation of
Kheradmand et al. 2024, "3D Gaussian Splatting as Markov Chain Monte Carlo", section 4.2).
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import image
from . import gaussians, rasterizer

Array = jax.Array

DEAD = 0.005  # A fainter Gaussian is removed.
_SSIM_SHARE = 0.2  # Kerbl et al. 2023, Eq. 7.
_OPACITY_COST = 0.002  # Times the mean opacity: lets useless Gaussians die.
_SPLIT_OFFSET = 0.5  # Halves stand so many deviations from the middle.
_GROWTH = 0.1  # At most so many Gaussians are split at once, as a part of the living.
# Step sizes of Adam at the start of a long fit. Means move in units of their own
# Gaussian's size, so that near and far ones need no rates of their own.
_RATES = gaussians.Splats(
  means=0.05, log_scales=0.01, quaternions=0.005, opacity_logits=0.05, sh=0.005
)
_LAST_RATE = 0.05  # At the end, as a part of those at the start.
_LONG_FIT, _MOST_RATE = 10_000, 5.0  # Shorter fits take larger steps, at most by this factor.
_SH_REST = 0.2  # Rate of degrees 1 to 3 as a part of that of the colour.
_adam = optax.scale_by_adam(eps=1e-15)


@flax.struct.dataclass
class State:
  """Gaussians in a fit, all with n rows."""

  splats: gaussians.Splats
  moments: optax.OptState
  need: Array  # [n] sum over steps of |d loss / d position| in pixels, since the last relocation.
  overflow: Array  # [] int32, the most pairs of a step that did not fit, see rasterizer.Picture.


def start(splats: gaussians.Splats) -> State:
  """Returns the state before the first step."""
  splats = jax.tree.map(jnp.array, splats)  # A copy, since steps reuse the memory of their state.
  return State(splats, _adam.init(splats), jnp.zeros(len(splats.means)), jnp.int32(0))


def loss_of(picture: Array, target: Array) -> Array:
  """Computes 0.8 L1 + 0.2 (1 - SSIM) of pictures [h, w, 3] (Kerbl et al. 2023, Eq. 7)."""
  difference = jnp.mean(jnp.abs(picture - target))
  return (1 - _SSIM_SHARE) * difference + _SSIM_SHARE * (1 - image.ssim(picture, target))


def rate(k: int, steps: int) -> np.float32:
  """Returns the factor of all step sizes in step k of a fit of `steps` steps.

  It falls exponentially. What a parameter can move in a fit grows with the square root of its
  number of steps, so that a quarter of the steps has twice the step sizes.
  """
  start = np.clip(np.sqrt(_LONG_FIT / steps), 1, _MOST_RATE)
  return np.float32(start * _LAST_RATE ** (k / steps))


@functools.partial(jax.jit, static_argnames='capacity', donate_argnums=0)
def step(
  state: State,
  camera: gaussians.Pinhole,
  target: Array,
  background: Array,
  rate: Array,
  capacity: int,
) -> tuple[State, Array]:
  """Takes one step of Adam on one picture.

  Args:
    state: n Gaussians.
    camera: the picture's camera.
    target: [h, w, 4] uint8, what the picture should be; pixels of alpha 0 do not count.
    background: [3] colour behind all Gaussians.
    rate: factor of the step sizes, see `rate`.
    capacity: see `rasterizer.render`.

  Returns:
    The new state and the mean squared error of the picture.
  """
  truth, counts = target[..., :3].astype(jnp.float32) / 255, target[..., 3:] > 0

  def cost(splats):
    picture = rasterizer.render(splats, camera, background, capacity)
    wanted = jnp.where(counts, truth, jax.lax.stop_gradient(picture.rgb))
    total = loss_of(picture.rgb, wanted)
    total += _OPACITY_COST * jnp.mean(jax.nn.sigmoid(splats.opacity_logits))
    return total, (jnp.mean((picture.rgb - wanted) ** 2), picture.overflow)

  gradient, (error, overflow) = jax.grad(cost, has_aux=True)(state.splats)
  direction, moments = _adam.update(gradient, state.moments)
  splats = _moved(state.splats, direction, rate)
  distance = jnp.linalg.norm(state.splats.means - camera.position[None], axis=-1)
  need = state.need + jnp.linalg.norm(gradient.means, axis=-1) * distance / camera.focal[0]
  overflow = jnp.maximum(state.overflow, overflow)
  return State(splats, moments, need, overflow), error


def _moved(splats: gaussians.Splats, direction: gaussians.Splats, rate: Array):
  """Moves parameters against `direction` with the rates of their groups times `rate`."""
  size = jnp.exp(jnp.mean(splats.log_scales, -1, keepdims=True))
  steps = jax.tree.map(lambda own, d: -own * rate * d, _RATES, direction)
  rest = jnp.arange(gaussians.SH_COEFFICIENTS)[None, :, None] > 0
  steps = steps.replace(means=size * steps.means, sh=jnp.where(rest, _SH_REST, 1) * steps.sh)
  return optax.apply_updates(splats, steps)


@jax.jit
def relocate(state: State, key: Array) -> State:
  """Gives dead rows to halves of Gaussians that are needed, and starts `need` anew.

  Gaussians are drawn without replacement with probabilities proportional to `need`. The halves of
  one stand half a deviation to each side of its middle along its longest axis. They are shorter, so
  that the variance stays, and together as opaque at the middle.
  """
  splats, n = state.splats, len(state.need)
  alive = jax.nn.sigmoid(splats.opacity_logits) >= DEAD
  # The largest keys of Gumbel noise on log-probabilities are a draw without replacement.
  score = jnp.log(jnp.maximum(state.need, 1e-30)) + jax.random.gumbel(key, (n,))
  ranked = jnp.argsort(jnp.where(alive, -score, jnp.inf))  # [n] parents, the most wanted first.
  free = jnp.argsort(alive, stable=True)  # [n] dead rows first.
  living = jnp.sum(alive)
  count = jnp.minimum(n - living, (_GROWTH * living).astype(jnp.int32))
  used = jnp.arange(n) < count
  parent, child = (jnp.where(used, rows, n) for rows in (ranked, free))  # n: none.
  low, high = _halves(jax.tree.map(lambda x: x[ranked], splats))

  def placed(old, first, second):
    return old.at[parent].set(first, mode='drop').at[child].set(second, mode='drop')

  def reset(moment):
    if moment.ndim == 0:
      return moment
    return moment.at[parent].set(0, mode='drop').at[child].set(0, mode='drop')

  moments = jax.tree.map(reset, state.moments)
  return State(jax.tree.map(placed, splats, low, high), moments, jnp.zeros(n), state.overflow)


def _halves(splats: gaussians.Splats) -> tuple[gaussians.Splats, gaussians.Splats]:
  """Splits each Gaussian along its longest axis."""
  longest = jax.nn.one_hot(jnp.argmax(splats.log_scales, -1), 3)  # [n, 3]
  axis = jnp.einsum('nij,nj->ni', gaussians.axes(splats), longest)
  shrunk = splats.log_scales + longest * 0.5 * jnp.log(1 - _SPLIT_OFFSET**2)
  at_middle = jnp.exp(-0.5 * _SPLIT_OFFSET**2 / (1 - _SPLIT_OFFSET**2))
  opacity = (1 - jnp.sqrt(1 - jax.nn.sigmoid(splats.opacity_logits))) / at_middle
  logits = jax.scipy.special.logit(jnp.clip(opacity, DEAD, 0.99))
  half = splats.replace(log_scales=shrunk, opacity_logits=logits)
  return tuple(half.replace(means=splats.means + side * _SPLIT_OFFSET * axis) for side in (-1, 1))


def bury(splats: gaussians.Splats, smallest: Array) -> gaussians.Splats:
  """Removes dead Gaussians and limits the others' deviations from below.

  Args:
    splats: n Gaussians.
    smallest: [n] least deviation, in world units: the 3D filter of Mip-Splatting (Yu et al. 2024,
      Eq. 9) in its simplest form, against needles that appear when one zooms in.
  """
  alive = jax.nn.sigmoid(splats.opacity_logits) >= DEAD
  floor = jnp.log(jnp.maximum(smallest, 1e-20))[:, None]
  limited = splats.replace(log_scales=jnp.maximum(splats.log_scales, floor))
  return jax.tree.map(lambda x: x[alive], limited)


def least_scales(means: Array, cameras: list[gaussians.Pinhole]) -> Array:
  """Returns [n] a fifth of a pixel at the nearest camera, in world units."""
  pixels = [
    jnp.linalg.norm(means - camera.position[None], axis=-1) / camera.focal[0] for camera in cameras
  ]
  return 0.2 * functools.reduce(jnp.minimum, pixels)
