"""The check that every function of the pure layer must stand at its awkward points."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_finite(fn, *args):
  """Fails unless fn's values, and the gradient of their sum in every argument, are finite."""
  args = tuple(jnp.asarray(a, jnp.float32) for a in args)

  def total(*a):
    out = fn(*a)
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out)), out

  slopes = jax.value_and_grad(total, argnums=tuple(range(len(args))), has_aux=True)
  (_, values), grads = jax.jit(slopes)(*args)
  for what, tree in (('value', values), ('gradient', grads)):
    for leaf in jax.tree.leaves(tree):
      assert np.all(np.isfinite(leaf)), f'{what}: {leaf}'
