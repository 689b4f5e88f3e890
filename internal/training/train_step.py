"""Optimizer, schedule, and the jit-compiled training step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from .. import configs, image, losses, math, models, structs
from ..devices import memory, sharding
from . import batches

Array = jax.Array


def learning_rate(config: configs.Config) -> Callable[[Array], Array]:
  """Log-linear decay over max_steps with a sine warm-up (section 4 of arXiv:2111.12077)."""

  def schedule(step):
    rate = math.log_lerp(step / config.max_steps, config.lr_init, config.lr_final)
    if config.lr_delay_steps <= 0:
      return rate
    ramp = jnp.sin(jnp.pi / 2 * jnp.clip(step / config.lr_delay_steps, 0, 1))
    return rate * (config.lr_delay_mult + (1 - config.lr_delay_mult) * ramp)

  return schedule


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
  """Scales a gradient down to the norm `max_norm`."""

  def clip(grads, _):
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1, max_norm / jnp.maximum(norm, math.TINY))
    return jax.tree.map(lambda g: g * scale, grads)

  return optax.stateless(clip)


def make_optimizer(config: configs.Config) -> optax.GradientTransformation:
  """Clipping (entries, then the norm), then Adam, of one part ('prop_mlp', 'nerf_mlp', ...).

  What it gives is to be multiplied by the learning rate and subtracted from the parameters.
  """
  steps = []
  if config.grad_max_val > 0:
    steps.append(optax.clip(config.grad_max_val))
  if config.grad_max_norm > 0:
    steps.append(clip_by_norm(config.grad_max_norm))
  steps.append(optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_eps))
  return optax.chain(*steps)


def update_finite(
  optimizer: optax.GradientTransformation, rate: Array, state: structs.TrainState, grads, loss
) -> structs.TrainState:
  """The state after a step; a part whose gradient is not finite stays as it was, to the bit.

  That is its parameters and its optimizer's state. Where the loss alone is not finite, nobody can
  tell which parts it concerns: all stay.

  Args:
    optimizer: that of `make_optimizer`.
    rate: the learning rate.
    state: before the step.
    grads: of each part, by its name.
    loss: scalar.
  """
  finite = {name: jnp.isfinite(optax.tree.norm(part)) for name, part in grads.items()}
  one_is_not = ~jnp.all(jnp.array([*finite.values()]))
  params, opt_state, skipped = {}, {}, {}
  for name, part in grads.items():
    given = finite[name] & (jnp.isfinite(loss) | one_is_not)
    old = state.params[name], state.opt_state[name]
    steps, opt_after = optimizer.update(part, old[1], old[0])
    new = jax.tree.map(lambda p, s: p - rate * s, old[0], steps), opt_after
    keep = lambda new, old, given=given: jnp.where(given, new, old)  # noqa: E731
    params[name], opt_state[name] = jax.tree.map(keep, new, old)
    skipped[name] = jnp.where(given, 0, state.skipped[name] + 1)
  return structs.TrainState(state.step + 1, params, opt_state, skipped)


def create_state(settings: configs.Settings) -> structs.TrainState:
  """The state before the first step: a pure function of the config's seed."""
  key = jax.random.key(settings.config.seed)
  params = models.init_params(models.build(settings), key)
  optimizer = make_optimizer(settings.config)
  opt_state = {name: optimizer.init(part) for name, part in params.items()}
  skipped = {name: jnp.zeros((), jnp.int32) for name in params}
  return structs.TrainState(jnp.zeros((), jnp.int32), params, opt_state, skipped)


def abstract_state(settings: configs.Settings) -> structs.TrainState:
  """The shapes and types of `create_state`."""
  return jax.eval_shape(lambda: create_state(settings))


def train_fraction(step: Array, max_steps: int) -> Array:
  """The fraction of training done before this step, 0 at the first and 1 at the last."""
  return jnp.clip(step / max(max_steps - 1, 1), 0, 1)


def step_keys(config: configs.Config, step: Array) -> tuple[Array, Array]:
  """The key of a step's batch and those of its rays [batch_size]: pure functions of (seed, step).

  A ray has its own, so that its draws do not depend on how rays are split.
  """
  batch_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
  return batch_key, jax.random.split(model_key, config.batch_size)


def make_draw(
  config: configs.Config, mesh: Mesh, supervision: structs.Supervision | None = None
) -> Callable:
  """The `draw(step, size) -> (cam_idx, x, y)` of the step's pixels, replicated.

  `supervision` is that of the training cameras.
  """

  def draw(step, size, supervision):
    batch_key, _ = step_keys(config, step)
    return batches.draw_pixels(batch_key, size, config.batch_size, config.batching, supervision)

  draw = jax.jit(draw, out_shardings=sharding.replicated(mesh))
  return lambda step, size: draw(step, size, supervision)


def _micro_batch_choices(config: configs.Config, mesh: Mesh, fewest: int) -> list[int]:
  """How many micro-batches a device may take its rays in: as told, or powers of two.

  Raises:
    ConfigError: Config.micro_batches does not divide the rays of a device.
  """
  rays = config.batch_size // mesh.size
  if config.micro_batches == 0:
    powers = [2**k for k in range(rays.bit_length()) if rays % 2**k == 0]
    return [n for n in powers if n >= fewest] or powers[-1:]
  if rays % config.micro_batches:
    raise configs.ConfigError(
      f'Config.micro_batches must divide the rays of a device, got {config.micro_batches} for '
      f'{rays} (Config.batch_size {config.batch_size} on {mesh.size}); 0 chooses by itself.'
    )
  return [config.micro_batches]


def _mean_of_parts(fn: Callable, parts: int, tree):
  """The mean of `fn(part)` over equal parts of the arrays' first axis, one part after the other."""
  if parts == 1:
    return fn(tree)
  stacked = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)
  shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], stacked))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  add = lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None)  # noqa: E731
  total, _ = jax.lax.scan(add, zeros, stacked)
  return jax.tree.map(lambda x: x / parts, total)


def make_loss_gradient(settings: configs.Settings) -> Callable:
  """`(params, keys, batch, frac) -> (grads, seen)` of the mean loss over a batch of rays.

  `keys` are those of the rays, None for no randomness; `seen` are the loss, its terms and the
  squared error.
  """
  config, model = settings.config, models.build(settings)

  def loss_fn(params, keys, batch, frac):
    renderings, history = model.apply({'params': params}, keys, batch.rays, frac)
    loss, terms = losses.total(config, params, renderings, history, batch)
    mse = losses.squared_error(renderings[-1].rgb, batch.rgb)
    return loss, {'loss': loss, 'mse': mse, 'terms': terms}

  return jax.grad(loss_fn, has_aux=True)


def _make_gradient(settings: configs.Settings, mesh: Mesh, micro_batches: int) -> Callable:
  """`make_loss_gradient` of the rays of all devices, of whole parameters.

  Each device takes the gradient on its own rays, in as many parts one after the other, and has of
  the mean over devices what `sharding.specs` gives it.
  """
  loss_gradient = make_loss_gradient(settings)

  def gradient(params, keys, batch, frac):
    of_part = lambda part: loss_gradient(params, *part, frac)  # noqa: E731
    own = _mean_of_parts(of_part, micro_batches, (keys, batch))
    return sharding.mean_over_devices(own)

  whole, split = sharding.WHOLE, sharding.SPLIT
  grads = sharding.specs(abstract_state(settings).params, mesh)
  return sharding.per_device(gradient, mesh, (whole, split, split, whole), (grads, whole))


class TrainStep(memory.FirstFit):
  """`train_step(state, cams, pixels) -> (state, stats)`; its choice is of micro-batches."""

  @property
  def micro_batches(self) -> int | None:
    """In how many parts a device takes its rays; None before the first step."""
    return self.choice


def make_train_step(
  settings: configs.Settings,
  mesh: Mesh,
  free_memory: Callable = memory.free_memory,
  fewest: int = 1,
) -> TrainStep:
  """The training step `train_step(state, cams, pixels) -> (state, stats)`, compiled when called.

  `cams` is the table of training cameras; `pixels` a PixelStore of their images on the device,
  or the [batch_size, 3] uint8 colours that `make_draw`'s pixels have, looked up by the host. The
  state is placed as by `sharding.place`, and its buffers are donated. `stats` are replicated
  structs.Stats: loss, psnr, each loss term, the gradient norm of each part, learning rate, and how
  many updates in a row each part was not given (`update_finite`).

  Each device takes its rays in Config.micro_batches parts, or in the fewest that fit in the
  memory which `free_memory(mesh)` says is free, from `fewest` on: sums in other parts differ in
  their last bits, so a run that goes on takes no fewer than it took.

  Raises:
    ValueError: a batch that the devices do not divide, or a device's rays that
      Config.micro_batches does not.
  """
  config = settings.config
  sharding.check_divisible('Config.batch_size', config.batch_size, mesh)
  optimizer = make_optimizer(config)
  schedule = learning_rate(config)

  def variant(micro_batches):
    gradient = _make_gradient(settings, mesh, micro_batches)

    def train_step(state, cams, pixels):
      batch_key, ray_keys = step_keys(config, state.step)
      ids = batches.draw_pixels(
        batch_key, cams.size, config.batch_size, config.batching, cams.supervision
      )
      ids = sharding.shard_rays(ids, mesh)
      stored = isinstance(pixels, batches.PixelStore)
      rgb = batches.lookup(pixels, cams.size, *ids) if stored else pixels
      batch = batches.make_batch(cams, *ids, rgb)
      keys = ray_keys if config.randomized else None
      frac = train_fraction(state.step, config.max_steps)
      grads, seen = gradient(sharding.whole(state.params, mesh), keys, batch, frac)
      rate = schedule(state.step)
      after = update_finite(optimizer, rate, state, grads, seen['loss'])
      stats = {
        'loss': seen['loss'],
        'psnr': image.mse_to_psnr(seen['mse']),
        'learning_rate': rate,
        **{f'loss_{name}': term for name, term in seen['terms'].items()},
        **{f'grad_norm_{name}': optax.tree.norm(part) for name, part in grads.items()},
        **{f'skipped_{name}': count for name, count in after.skipped.items()},
      }
      return after, structs.Stats(jnp.stack([*stats.values()], dtype=jnp.float32), tuple(stats))

    where = sharding.placement(abstract_state(settings), mesh)
    return jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(where, None, None),
      out_shardings=(where, sharding.replicated(mesh)),
    )

  return TrainStep(variant, _micro_batch_choices(config, mesh, fewest), lambda: free_memory(mesh))


def host_pixels(
  draw: Callable, step: int, store: batches.PixelStore, size: np.ndarray, mesh: Mesh
) -> jax.Array:
  """The step's colours from a host-side store: [batch_size, 3] uint8, sharded.

  Each process looks up only the rays of its own devices.
  """
  ids = [sharding.to_host(a) for a in draw(step, size)]

  def part(index):
    return batches.lookup(store, size, *(a[index[0]] for a in ids))

  return jax.make_array_from_callback((len(ids[0]), 3), sharding.sharded(mesh), part)
