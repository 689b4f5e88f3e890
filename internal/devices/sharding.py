"""Sharding of arrays over a 1-D mesh of all devices.

One program runs on all devices of all hosts. Rays are sharded, and each device runs the model on
its own rays. Small parameters and their optimizer state are replicated. Large ones are sharded by
rows: each device keeps and updates its rows, and a step gathers the others (arXiv:1910.02054,
section 5).
"""

from collections.abc import Callable

import jax
import jax.flatten_util
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..errors import UserError

AXIS = 'rays'
WHOLE = PartitionSpec()  # Each device has the whole array.
SPLIT = PartitionSpec(AXIS)  # Each device has its own rows.

_LARGE = 2**23  # Bytes from which an array, such as a hash grid's table, is sharded.


def make_mesh(devices=None) -> Mesh:
  """Creates a 1-D mesh over `devices`, by default all devices of all hosts."""
  return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def check_divisible(name: str, count: int, mesh: Mesh, block: int = 1) -> None:
  """Raises UserError unless `count` is so many blocks of rays that the devices divide them."""
  unit = block * mesh.size
  if count % unit:
    nearest = max(unit, round(count / unit) * unit)
    times = f' times the {block} pixels of a patch' if block > 1 else ''
    raise UserError(
      f'{name} must be divisible by the number of devices ({mesh.size}){times}, got {count}; '
      f'use {nearest}.'
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that replicates an array on every device."""
  return NamedSharding(mesh, WHOLE)


def sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the leading axis over the devices."""
  return NamedSharding(mesh, SPLIT)


def replicate(tree, mesh: Mesh):
  """Replicates host values (or key arrays) on every device of every process."""
  return _put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def _put(tree, shardings):
  """Puts host values, the same on all processes, on devices by a tree of shardings."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  put = lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda idx: np.asarray(x)[idx])  # noqa: E731
  return jax.tree.map(put, tree, shardings)


def _is_large(x) -> bool:
  return x.size * x.dtype.itemsize >= _LARGE


def _spec(x, devices: int) -> PartitionSpec:
  """Returns SPLIT for a large array whose rows the devices divide, else WHOLE."""
  return SPLIT if devices > 1 and _is_large(x) and x.shape[0] % devices == 0 else WHOLE


def specs(tree, mesh: Mesh):
  """Returns the PartitionSpecs of a training state or gradients."""
  return jax.tree.map(lambda x: _spec(x, mesh.size), tree)


def placement(tree, mesh: Mesh):
  """Returns the shardings of a training state: `specs` on the mesh."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))


def placed_shapes(tree, mesh: Mesh):
  """Returns the shapes of a training state as `place` shards it."""
  return _shapes(tree, placement(tree, mesh))


def replicated_shapes(tree, mesh: Mesh):
  """Returns the shapes of what `replicate` returns."""
  return _shapes(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def _shapes(tree, shardings):
  def shape(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding)

  return jax.tree.map(shape, tree, shardings)


def place(tree, mesh: Mesh):
  """Shards a training state, the same on every host, as it is kept between steps."""
  return _put(tree, placement(tree, mesh))


def whole(tree, mesh: Mesh):
  """Gathers sharded arrays so that every device has all of them, inside or outside of jit.

  Outside of jit, all processes must call it together.
  """
  target = replicated(mesh)

  def gather(x):
    if getattr(x, 'sharding', None) == target:
      return x  # A constraint outside of jit would copy it.
    return jax.lax.with_sharding_constraint(x, target)

  return jax.tree.map(gather, tree)


def shard_rays(tree, mesh: Mesh):
  """Constrains arrays inside jit to be sharded over the devices by their first axis."""
  return jax.lax.with_sharding_constraint(tree, sharded(mesh))


def per_device(fn: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
  """Maps `fn` over the devices with shard_map; specs are WHOLE or SPLIT for each argument.

  Inside, arrays have per-device shapes and only explicit collectives communicate. A gradient is
  that of the device's own loss, and kernels that XLA cannot partition work.
  """
  # With check_vma, JAX would sum gradients of replicated parameters over devices leaf by leaf, and
  # kernels would have to declare how their results vary.
  return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mean_over_devices(tree):
  """Averages float32 arrays over all devices, inside `per_device`; results follow `specs`.

  Small arrays are concatenated into one all-reduce. Large ones would be costly to copy: each has a
  reduce-scatter of its own, which XLA overlaps with the computation of the others.
  """
  devices = jax.lax.axis_size(AXIS)
  leaves, structure = jax.tree.flatten(tree)
  joined, split = jax.flatten_util.ravel_pytree([x for x in leaves if not _is_large(x)])
  small = iter(split(jax.lax.pmean(joined, AXIS)))

  def mean(x):
    if not _is_large(x):
      return next(small)
    if _spec(x, devices) == WHOLE:
      return jax.lax.pmean(x, AXIS)
    return jax.lax.psum_scatter(x, AXIS, tiled=True) / devices

  return structure.unflatten(map(mean, leaves))


def to_host(array: jax.Array) -> np.ndarray:
  """Returns an array as numpy; for a sharded array, all processes must call it together."""
  if not array.is_fully_replicated:
    array = whole(array, array.sharding.mesh)
  return np.asarray(array.addressable_data(0))
