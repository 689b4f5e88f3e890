"""Sharding of arrays over a 1-D mesh of all devices.

One global program runs over all devices of all hosts: rays are sharded over a 1-D mesh, and each
device runs the model on its own rays. Parameters and the optimizer's state are replicated, but for
large arrays, of which each device keeps and updates some rows and gathers the others for a step
(arXiv:1910.02054, section 5).
"""

from collections.abc import Callable

import jax
import jax.flatten_util
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..errors import UserError

AXIS = 'rays'
WHOLE, SPLIT = PartitionSpec(), PartitionSpec(AXIS)  # What each device has of an array.

_LARGE = 2**23  # Bytes of an array that goes by itself, as tables of hash grids do.


def make_mesh(devices=None) -> Mesh:
  """A 1-D mesh over all devices of all hosts (or over those given)."""
  return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def check_divisible(name: str, count: int, mesh: Mesh) -> None:
  """Raises ValueError unless the mesh's devices divide `count` rays."""
  if count % mesh.size:
    nearest = max(mesh.size, round(count / mesh.size) * mesh.size)
    raise UserError(
      f'{name} must be a multiple of the device count, got {count} on {mesh.size}; '
      f'nearest: {nearest}.'
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole."""
  return NamedSharding(mesh, WHOLE)


def sharded(mesh: Mesh) -> NamedSharding:
  """The leading axis is split over the devices."""
  return NamedSharding(mesh, SPLIT)


def replicate(tree, mesh: Mesh):
  """Puts the same host values (or key arrays) on every device of every process."""
  return _put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def _put(tree, where):
  """Host values, which all processes have, where a tree of shardings says."""
  if jax.process_count() == 1:
    return jax.device_put(tree, where)
  put = lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda idx: np.asarray(x)[idx])  # noqa: E731
  return jax.tree.map(put, tree, where)


def _is_large(x) -> bool:
  return x.size * x.dtype.itemsize >= _LARGE


def _spec(x, devices: int) -> PartitionSpec:
  """What each of so many devices keeps of an array: some rows of a large one, if they divide it."""
  return SPLIT if devices > 1 and _is_large(x) and x.shape[0] % devices == 0 else WHOLE


def specs(tree, mesh: Mesh):
  """For each array of a training state, or of gradients, what a device has of it."""
  return jax.tree.map(lambda x: _spec(x, mesh.size), tree)


def placement(tree, mesh: Mesh):
  """`specs` as shardings."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))


def place(tree, mesh: Mesh):
  """Puts a training state, the same on every host, where it lives between steps."""
  return _put(tree, placement(tree, mesh))


def whole(tree, mesh: Mesh):
  """All of each array on every device, of those that were placed; inside of jit and outside.

  Outside, where arrays have to be gathered, all processes call it together.
  """
  where = replicated(mesh)

  def one(x):
    if getattr(x, 'sharding', None) == where:
      return x  # A constraint outside of jit would copy it.
    return jax.lax.with_sharding_constraint(x, where)

  return jax.tree.map(one, tree)


def shard_rays(tree, mesh: Mesh):
  """Marks arrays inside a jit-compiled function as split over the devices by their first axis."""
  return jax.lax.with_sharding_constraint(tree, sharded(mesh))


def per_device(fn: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
  """`fn`, run by each device by itself on the parts (WHOLE or SPLIT) of the arguments that it has.

  Inside, arrays have the device's own sizes and only named collectives communicate: a gradient
  taken there is of the device's own loss, and a kernel that XLA cannot partition need not be.
  """
  # Checked, the gradient of whole parameters would be summed over devices behind our back, leaf
  # by leaf, and kernels would have to declare how their results vary.
  return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def mean_over_devices(tree):
  """Inside `per_device`: of the mean of each float32 array over all devices, what a device keeps.

  One all-reduce has the small arrays joined. Large ones, which joining would copy there and back,
  go by themselves, each device's rows to it alone: XLA starts each as soon as it is there, while
  others are still computed.
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
  """An array's value, as numpy; of one whose rows are split, all processes ask together."""
  if not array.is_fully_replicated:
    array = whole(array, array.sharding.mesh)
  return np.asarray(array.addressable_data(0))
