"""Optimizer, schedule, and the jit-compiled training steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from .. import configs, image, losses, math, models, structs
from ..devices import memory, sharding
from . import batches, camera_refinement, exposure, per_camera, robust

Array = jax.Array

MOST_STEPS = 100  # Of one call of the compiled steps; each takes a row of its stats.
_ONE = np.int32(1)


def learning_rate(config: configs.Config) -> Callable[[Array], Array]:
  """Returns the schedule: log-linear decay with a sine warm-up (arXiv:2111.12077, section 4).

  With `lr_cooldown`, the rate also falls linearly to 0 at the end.
  """

  def schedule(step):
    # max_steps, not last_step: a run that exits early keeps the rates of the whole schedule.
    done = step / config.max_steps
    rate = math.log_lerp(done, config.lr_init, config.lr_final)
    if config.lr_cooldown > 0:
      rate *= jnp.clip((1 - done) / config.lr_cooldown, 0, 1)
    if config.lr_delay_steps <= 0:
      return rate
    ramp = jnp.sin(jnp.pi / 2 * jnp.clip(step / config.lr_delay_steps, 0, 1))
    return rate * (config.lr_delay_mult + (1 - config.lr_delay_mult) * ramp)

  return schedule


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
  """Scales gradients down to a global norm of at most `max_norm`."""

  def clip(grads, _):
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1, max_norm / jnp.maximum(norm, math.TINY))  # Zero gradients stay zero.
    return jax.tree.map(lambda g: g * scale, grads)

  return optax.stateless(clip)


def make_optimizer(config: configs.Config) -> optax.GradientTransformation:
  """Creates the optimizer of one part ('prop_mlp', 'nerf_mlp', ...): clipping, then Adam.

  Clips entries first, then the norm. Multiply its updates by the learning rate and subtract them
  from the parameters.
  """
  steps = []
  if config.grad_max_val > 0:
    steps.append(optax.clip(config.grad_max_val))
  if config.grad_max_norm > 0:
    steps.append(clip_by_norm(config.grad_max_norm))
  steps.append(optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_eps))
  return optax.chain(*steps)


def update_finite(
  optimizer: optax.GradientTransformation,
  rate: Array,
  state: structs.TrainState,
  grads,
  loss,
  own: Mapping[str, per_camera.Part] | None = None,
) -> structs.TrainState:
  """Updates the state, skipping parts whose gradient is non-finite.

  Skipped parts keep their parameters and optimizer state bit for bit. If only the loss is
  non-finite, all parts are skipped, since it is unknown which ones it affects.

  Args:
    optimizer: the optimizer from `make_optimizer`.
    rate: the learning rate.
    state: the state before the step.
    grads: gradients of each part, by name.
    loss: scalar loss.
    own: the parts that have an optimizer and a learning rate of their own, by name.

  Returns:
    The state after the step.
  """
  finite = {name: jnp.isfinite(optax.tree.norm(part)) for name, part in grads.items()}
  # If no gradient explains a non-finite loss, every part is suspect.
  any_non_finite = ~jnp.all(jnp.array([*finite.values()]))
  params, opt_state, skipped = {}, {}, {}
  for name, part in grads.items():
    apply = finite[name] & (jnp.isfinite(loss) | any_non_finite)
    old = state.params[name], state.opt_state[name]
    optimizer_of, rate_of = optimizer, rate
    if own and name in own:
      optimizer_of, rate_of = own[name].optimizer, own[name].rate(state.step)
    # Always computed and then selected: a branch would keep XLA from fusing the update.
    steps, opt_after = optimizer_of.update(part, old[1], old[0])
    new = jax.tree.map(lambda p, s, rate=rate_of: p - rate * s, old[0], steps), opt_after
    select = functools.partial(jnp.where, apply)
    params[name], opt_state[name] = jax.tree.map(select, new, old)
    skipped[name] = jnp.where(apply, 0, state.skipped[name] + 1)  # Counts consecutive steps.
  return structs.TrainState(state.step + 1, params, opt_state, skipped)


def creation(settings: configs.Settings) -> Callable[[], structs.TrainState]:
  """Returns a jitted function that creates the initial state, a pure function of Config.seed."""
  create = jax.jit(functools.partial(_create_state, settings))
  return functools.partial(create, seed_of(settings.config))


def create_state(settings: configs.Settings) -> structs.TrainState:
  """Creates the initial training state."""
  return creation(settings)()


def seed_of(config: configs.Config) -> np.int32:
  """Returns Config.seed as an argument of programs: as a constant, each would be compiled anew."""
  return np.int64(config.seed).astype(np.int32)  # As `jax.random.key` does.


def _create_state(settings: configs.Settings, seed: Array) -> structs.TrainState:
  key = jax.random.key(seed)
  params = models.init_params(models.build(settings), key)
  optimizer = make_optimizer(settings.config)
  # One optimizer state per part, so that each is clipped by its own norm and skipped alone.
  opt_state = {name: optimizer.init(part) for name, part in params.items()}
  for name, part in per_camera.parts(settings.config).items():
    rows = part.rows or settings.model.num_glo_embeddings
    params[name] = {'rows': jnp.zeros((rows, part.width))}
    opt_state[name] = part.optimizer.init(params[name])
  skipped = {name: jnp.zeros((), jnp.int32) for name in params}
  return structs.TrainState(jnp.zeros((), jnp.int32), params, opt_state, skipped)


def abstract_state(settings: configs.Settings) -> structs.TrainState:
  """Returns the shapes and dtypes of `create_state`."""
  # Allocates nothing, so it can be asked about models that do not fit.
  return jax.eval_shape(creation(settings))


def train_fraction(step: Array, max_steps: int) -> Array:
  """Returns the fraction of training before a step: 0 at the first, 1 at the last."""
  return jnp.clip(step / max(max_steps - 1, 1), 0, 1)


def step_keys(config: configs.Config, step: Array, seed: Array) -> tuple[Array, Array]:
  """Returns the keys of a step's batch and of its rays [batch_size], functions of (seed, step).

  Each ray has its own key, so that its samples do not depend on sharding.
  """
  # Folding in the step, instead of a running key, lets a resumed run draw the same rays.
  batch_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
  return batch_key, jax.random.split(model_key, config.batch_size)


def draw_pixels(
  config: configs.Config, key: Array, size: Array, supervision: structs.Supervision | None
) -> tuple[Array, Array, Array]:
  """Draws a batch as configured; see `batches.draw_pixels`."""
  return batches.draw_pixels(
    key, size, config.batch_size, config.batching, supervision, config.patch_size
  )


def make_draw(
  config: configs.Config, mesh: Mesh, supervision: structs.Supervision | None = None
) -> Callable:
  """Returns a jitted `draw(step, size) -> (cam_idx, x, y)` of a step's pixels, replicated.

  `supervision` is that of the training cameras.
  """

  # Arguments of the jitted function, because a closure would compile them in as constants.
  def draw(step, size, supervision, seed):
    batch_key, _ = step_keys(config, step, seed)
    return draw_pixels(config, batch_key, size, supervision)

  draw = jax.jit(draw, out_shardings=sharding.replicated(mesh))
  return lambda step, size: draw(step, size, supervision, seed_of(config))


def _micro_batch_choices(config: configs.Config, mesh: Mesh, fewest: int) -> list[int]:
  """Returns candidate numbers of micro-batches: the configured one, or powers of two.

  Raises:
    ConfigError: the rays, or patches, of a device are not divisible by Config.micro_batches, or the
      rays of a part by Config.interlevel_every.
  """
  rays, every = config.batch_size // mesh.size, config.interlevel_every
  count = rays // config.patch_size**2
  what = 'patches' if config.patch_size > 1 else 'rays'
  if config.micro_batches and count % config.micro_batches:
    raise configs.ConfigError(
      f'Config.micro_batches must divide the {what} of a device, got {config.micro_batches} for '
      f'{count} (Config.batch_size {config.batch_size} on {mesh.size}); 0 chooses automatically.'
    )
  part = rays // max(1, config.micro_batches)
  if part % every:
    raise configs.ConfigError(
      f'Config.interlevel_every must divide the {part} rays of a device (or of its micro-batch), '
      f'got {every}.'
    )
  if config.micro_batches:
    return [config.micro_batches]
  # Powers of two halve the memory from one candidate to the next.
  powers = [2**k for k in range(count.bit_length()) if count % 2**k == 0]
  powers = [n for n in powers if rays // n % every == 0]
  return [n for n in powers if n >= fewest] or powers[-1:]


def _mean_of_parts(fn: Callable, parts: int, tree):
  """Averages `fn(part)` over equal parts of the arrays' first axis, sequentially."""
  if parts == 1:
    return fn(tree)
  # [parts * n, ...] -> [parts, n, ...]
  stacked = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)
  shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], stacked))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  # A scan keeps the activations of only one part in memory, and sums in a fixed order.
  add = lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None)  # noqa: E731
  total, _ = jax.lax.scan(add, zeros, stacked)
  return jax.tree.map(lambda x: x / parts, total)


def make_loss_gradient(settings: configs.Settings) -> Callable:
  """Returns `loss_gradient(params, keys, batch, frac, cams) -> (grads, aux)` of the mean loss.

  `keys` are the rays' keys, None for no randomness. `cams` are the training cameras. `aux` holds
  the loss, its terms and the mean squared error.
  """
  config, model = settings.config, models.build(settings)

  def loss_fn(params, keys, batch, frac, cams):
    rays, own_terms = batch.rays, {}
    if config.refine_cameras:  # Rays are cast here, so that gradients reach the cameras.
      rows = params[camera_refinement.PART]['rows']
      rays, own_terms['camera_prior'] = camera_refinement.cast(
        config, cams, rows, rays.cam_idx, *batch.pixel
      )
      batch = batch.replace(rays=rays)
    renderings, history = model.apply(
      {'params': params}, keys, rays, frac, proposals_every=config.interlevel_every
    )
    if config.exposure != 'none':
      renderings = exposure.develop(cams, params[exposure.PART]['rows'], renderings, batch)
    robustly = config.robust_quantile > 0 and renderings[-1] is not None
    if robustly:
      rows = params[robust.PART]['rows']
      batch, fit = robust.weigh(
        rows, config.robust_quantile, config.patch_size, renderings[-1].rgb, batch
      )
    # rgb: [rays, 3] of each level; only the last level's is the image.
    loss, terms = losses.total(config, params, renderings, history, batch)
    if robustly:
      loss += fit  # 0, so it is no term to log.
    for name, term in own_terms.items():
      loss, terms[name] = loss + term, term
    mse = losses.squared_error(renderings[-1].rgb, batch.rgb)
    return loss, {'loss': loss, 'mse': mse, 'terms': terms}

  return jax.grad(loss_fn, has_aux=True)


def _make_gradient(
  settings: configs.Settings, mesh: Mesh, micro_batches: int, shapes: structs.TrainState
) -> Callable:
  """Returns the loss gradient over the rays of all devices, for gathered parameters.

  Each device computes the gradient of its own rays in `micro_batches` parts. Gradients are averaged
  over devices and sharded by `sharding.specs`.
  """
  loss_gradient = make_loss_gradient(settings)

  def gradient(params, keys, batch, frac, cams):
    # keys [rays / devices], batch.rgb [rays / devices, 3]
    own = _mean_of_parts(
      lambda part: loss_gradient(params, *part, frac, cams), micro_batches, (keys, batch)
    )
    return sharding.mean_over_devices(own)

  # Parameters, training fraction and cameras are replicated; keys and batch are split by rays.
  whole, split = sharding.WHOLE, sharding.SPLIT
  grads = sharding.specs(shapes.params, mesh)
  return sharding.per_device(gradient, mesh, (whole, split, split, whole, whole), (grads, whole))


def _make_step(
  settings: configs.Settings, mesh: Mesh, micro_batches: int, shapes: structs.TrainState
) -> Callable:
  """Returns `train_step(state, cams, pixels, seed) -> (state, stats)`, one step, not jitted."""
  config = settings.config
  gradient = _make_gradient(settings, mesh, micro_batches, shapes)
  optimizer, placement = make_optimizer(config), sharding.placement(shapes, mesh)
  schedule, own = learning_rate(config), per_camera.parts(config)

  def train_step(state, cams, pixels, seed):
    batch_key, ray_keys = step_keys(config, state.step, seed)
    ids = draw_pixels(config, batch_key, cams.size, cams.supervision)  # cam_idx, x, y
    known = batches.known_distances(batch_key, config.batch_size, cams.supervision)
    # Each device looks up and casts its own rays.
    ids, known = sharding.shard_rays((ids, known), mesh)
    stored = isinstance(pixels, batches.PixelStore)
    rgb = batches.lookup(pixels, cams.size, *ids) if stored else pixels  # [batch_size, 3]
    batch = batches.make_batch(cams, *ids, rgb, *known, patches=config.patch_size > 1)
    keys = ray_keys if config.randomized else None
    frac = train_fraction(state.step, config.max_steps)
    # Without parameters of each image, the cameras' work is done once the rays are cast.
    table = cams if own else None
    # Gathered once a step: the state is sharded between steps to save memory.
    grads, aux = gradient(sharding.whole(state.params, mesh), keys, batch, frac, table)
    rate = schedule(state.step)
    after = update_finite(optimizer, rate, state, grads, aux['loss'], own)
    stats = {
      'loss': aux['loss'],
      'psnr': image.mse_to_psnr(aux['mse']),
      'learning_rate': rate,
      **{f'loss_{name}': term for name, term in aux['terms'].items()},
      **{f'grad_norm_{name}': optax.tree.norm(part) for name, part in grads.items()},
      **{f'skipped_{name}': count for name, count in after.skipped.items()},
    }
    after = jax.lax.with_sharding_constraint(after, placement)
    # One array [k], because each transfer to the host has a latency.
    return after, structs.Stats(jnp.stack([*stats.values()], dtype=jnp.float32), tuple(stats))

  return train_step


class TrainStep(memory.FirstFit):
  """The compiled `train_steps(state, cams, pixels, count) -> (state, stats)`.

  `count` is the number of steps: from 1 to `most` if `pixels` is a PixelStore on the device, or 1
  if they are the colours of one step's pixels. The first `count` rows of the stats' numbers are
  those of the steps, and the others mean nothing. Without `count`, a call takes one step, and its
  stats are scalars.

  One program takes any number of steps. So the bits of a run do not depend on how its steps were
  grouped into calls.

  Attributes:
    most: the most steps of one call.
    fixed: whether each call computes `most` steps and drops those beyond `count`.
    seed: the last argument of the variants.
  """

  def __init__(
    self, variant: Callable, choices: list[int], free: Callable, most: int, fixed: bool,
    seed: np.int32,
  ):  # fmt: skip
    super().__init__(variant, choices, free)
    self.most, self.fixed, self.seed = most, fixed, seed

  def __call__(self, state: structs.TrainState, cams, pixels, count: int | None = None):
    state, stats = super().__call__(state, cams, pixels, np.int32(count or 1), self.seed)
    return state, stats if count else stats.replace(numbers=stats.numbers[0])

  def lower(self, state, cams, pixels, count=_ONE, seed=_ONE) -> jax.stages.Lowered:
    """Lowers the chosen variant; before the first call, the first one."""
    return super().lower(state, cams, pixels, count, seed)

  def fit(self, state, cams, pixels, count=_ONE, seed=_ONE, on_lowered=None) -> jax.stages.Compiled:
    """Returns the program for arguments of these shapes, compiling it if necessary."""
    return super().fit(state, cams, pixels, count, seed, on_lowered=on_lowered)

  @property
  def micro_batches(self) -> int | None:
    """The number of micro-batches per device; None before the first step."""
    return self.choice


def make_train_step(
  settings: configs.Settings,
  mesh: Mesh,
  free_memory: Callable = memory.free_memory,
  fewest: int = 1,
  most: int = MOST_STEPS,
  fixed: bool = False,
  shapes: structs.TrainState | None = None,
) -> TrainStep:
  """Creates the compiled training steps, `TrainStep`.

  `cams` are the training cameras. `pixels` is either a PixelStore on the device, or the
  [batch_size, 3] uint8 colours of a single step's pixels (`host_pixels`). The state is sharded as
  by `sharding.place`, and its buffers are donated. `stats` is a replicated structs.Stats: loss,
  psnr, loss terms, gradient norms, learning rate, and each part's number of consecutive skipped
  updates.

  Args:
    settings: the run's settings.
    mesh: the devices.
    free_memory: returns the free bytes per device of a mesh, or None.
    fewest: minimum number of micro-batches if Config.micro_batches is 0. Fewer sum in another order
      and change the last bits, so a resumed run uses at least as many as before.
    most: the most steps of one call.
    fixed: compute `most` steps in each call, and drop those from `count` on. For GPUs, where the
      host must otherwise wait for the device after each step to learn whether another one follows.
    shapes: `abstract_state(settings)`, if it is known already.

  Raises:
    UserError: the batch is not divisible by the devices, a device's rays by the micro-batches, or
      the rays of one of these by Config.interlevel_every.
  """
  config = settings.config
  sharding.check_divisible('Config.batch_size', config.batch_size, mesh, config.patch_size**2)
  shapes = shapes or abstract_state(settings)
  placement = sharding.placement(shapes, mesh)

  def variant(micro_batches):
    step = _make_step(settings, mesh, micro_batches, shapes)
    return jax.jit(
      _repeated(jax.jit(step, inline=True), most, fixed),  # Traced once for both uses in there.
      donate_argnums=0,  # The new state reuses the buffers of the old one.
      in_shardings=(placement, None, None, None, None),
      out_shardings=(placement, sharding.replicated(mesh)),
    )

  choices = _micro_batch_choices(config, mesh, fewest)
  return TrainStep(variant, choices, lambda: free_memory(mesh), most, fixed, seed_of(config))


def _repeated(train_step: Callable, most: int, fixed: bool) -> Callable:
  """Returns `train_steps(state, cams, pixels, count, seed)`, which repeats a step: `TrainStep`."""

  def train_steps(state, cams, pixels, count, seed):
    shape = jax.eval_shape(train_step, state, cams, pixels, seed)[1]  # [k]
    length = most if isinstance(pixels, batches.PixelStore) else 1

    def take(i, carry):
      state, numbers = carry
      after, stats = train_step(state, cams, pixels, seed)
      if fixed and length > 1:
        after = jax.tree.map(functools.partial(jnp.where, i < count), after, state)
      return after, jax.lax.dynamic_update_index_in_dim(numbers, stats.numbers, i, 0)

    carry = state, jnp.zeros((length, *shape.numbers.shape))
    state, numbers = jax.lax.fori_loop(0, length if fixed else count, take, carry)
    return state, shape.replace(numbers=numbers)

  return train_steps


def host_pixels(
  draw: Callable, step: int, store: batches.PixelStore, size: np.ndarray, mesh: Mesh
) -> jax.Array:
  """Looks up a step's colours in a host-side store; returns [batch_size, 3] uint8, sharded.

  Each process looks up only the rays of its own devices.
  """
  ids = [sharding.to_host(a) for a in draw(step, size)]  # cam_idx, x, y, each [batch_size]

  def part(index):  # -> [rays of a device, 3]
    return batches.lookup(store, size, *(a[index[0]] for a in ids))

  return jax.make_array_from_callback((len(ids[0]), 3), sharding.sharded(mesh), part)


def make_load_pixels(
  config: configs.Config,
  mesh: Mesh,
  store: batches.PixelStore,
  size: np.ndarray,
  supervision: structs.Supervision | None = None,
) -> Callable:
  """Returns `load_pixels(step)`: what a step takes of a store on the device or on the host."""
  if isinstance(store.first, jax.Array):
    return lambda _: store
  draw = make_draw(config, mesh, supervision)
  return lambda step: host_pixels(draw, step, store, size, mesh)
