"""The trunk of a field: dense ReLU layers and linear heads, with a hand-written gradient.

Most of a training step's time is spent here. Autodiff of the same layers would store the values
both before and after each ReLU and read both again in the backward pass; this gradient stores only
the values after it, and accumulates weight gradients in float32. With `fused`, Hopper GPUs run the
kernels of hopper.py, which merge biases, ReLUs and masks into the matrix products; otherwise the
same computation is plain XLA. TPUs compute it in blocks of rows (`_blocked`).

Shapes: m rows (all intervals of all rays), f features of the encoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import math
from . import hopper

Array = jax.Array

# TPUs compute blocks of at most this many rows, and of this many values per layer: 2,048 rows of
# 1024. Values of larger blocks and the weights' gradients do not fit together in vector memory.
_ROWS, _VALUES = 4096, 2**21
_LEAST = 256  # Rows: smaller blocks would not keep the matrix units busy.


class Layer(NamedTuple):
  """Parameters of x @ of_x + encoded @ of_encoded + bias; an input that is not used has None."""

  of_x: Array | None  # [width before, width]
  of_encoded: Array | None  # [f, width]
  bias: Array  # [width]


class HeadLayers(NamedTuple):
  """The linear layers after the last hidden layer."""

  density: Layer  # Of width 1.
  bottleneck: Layer | None

  def kernels(self) -> Heads:
    """Returns the kernels that multiply the last hidden layer."""
    bottleneck = None if self.bottleneck is None else self.bottleneck.of_x
    return Heads(self.density.of_x[:, 0], bottleneck)


class Heads(NamedTuple):
  """Kernels of the heads, without biases and skip connections."""

  density: Array  # [width]
  bottleneck: Array | None  # [width, b]


def trunk_with_heads(
  layers: tuple[Layer, ...], heads: HeadLayers, encoded: Array, fused: bool = False
) -> tuple[Array, Array | None]:
  """Evaluates the hidden layers and the heads on [m, f] features.

  Returns:
    Density [m] in float32, and bottleneck [m, b] in `encoded`'s dtype (or None).
  """
  return _finish(heads, trunk(layers, heads.kernels(), encoded, fused), encoded)


def apply_heads(heads: HeadLayers, x: Array, encoded: Array) -> tuple[Array, Array | None]:
  """Evaluates the heads on the last hidden layer x [m, width]; returns as `trunk_with_heads`."""
  return _finish(heads, _products(heads.kernels(), x), encoded)


def _finish(heads: HeadLayers, products, encoded: Array) -> tuple[Array, Array | None]:
  """Adds biases and skip connections to the heads' products with the last hidden layer."""
  density, bottleneck = products  # [m], [m, b]
  density += heads.density.bias
  if heads.density.of_encoded is not None:
    density += math.narrow_dot(encoded, heads.density.of_encoded)[:, 0]
  if heads.bottleneck is not None:
    bottleneck += heads.bottleneck.bias.astype(encoded.dtype)[None]
    if heads.bottleneck.of_encoded is not None:
      bottleneck += encoded @ heads.bottleneck.of_encoded.astype(encoded.dtype)
  return density, bottleneck


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def trunk(layers: tuple[Layer, ...], heads: Heads | None, encoded: Array, fused: bool = False):
  """Evaluates ReLU layers on [m, f] features, and the heads' kernels on the result.

  Computes in `encoded`'s dtype; parameters and their gradients are float32.

  Args:
    layers: the hidden layers, first to last.
    heads: kernels to apply to the last layer, or None to return the layer itself.
    encoded: [m, f].
    fused: use the Hopper kernels for layers whose shape they support.

  Returns:
    Without heads: [m, width]. With heads: density [m] in float32, and bottleneck [m, b] or None.
  """

  def whole(layers, heads, encoded):
    return _products(heads, _activations(layers, encoded, fused)[-1])

  return _by_platform(_blocked(whole), whole, fused)(layers, heads, encoded)


def _blocked(whole: Callable) -> Callable:
  """Returns `whole(layers, heads, encoded)`, evaluated for one block of rows after the other.

  A block's values stay in the TPU's vector memory from layer to layer, and so do the weights'
  gradients. Main memory holds only what the backward pass needs: each layer's values.
  """

  def blocked(layers, heads, encoded):
    rows = _block_rows(layers, encoded)
    return _scan(rows, lambda _, e: (None, whole(layers, heads, e)), None, encoded)[1]

  return blocked


def _by_platform(blocked: Callable, whole: Callable, fused: bool) -> Callable:
  """Returns a function that runs `blocked` on TPUs, otherwise `whole`."""
  return whole if fused else math.by_platform(blocked, whole)


def _block_rows(layers: tuple[Layer, ...], encoded: Array) -> int:
  """Returns the number of rows to compute at a time, which divides m."""
  power = len(encoded) & -len(encoded)  # The largest power of two that divides m.
  rows = min(_ROWS, _VALUES // layers[0].bias.size, power)
  return rows if rows >= _LEAST else len(encoded)


def _scan(rows: int, step: Callable, total, encoded: Array, *others):
  """Scans blocks of the rows of arrays [m, ...]: `step(total, *blocks)` -> (total, results).

  Returns:
    The last total, and the results [m, ...].
  """
  columns = encoded.T  # [f, m]: the layout of features on TPUs.

  def block(total, part):
    i, *parts = part
    return step(total, jax.lax.dynamic_slice_in_dim(columns, i * rows, rows, 1).T, *parts)

  split = lambda x: x.reshape(-1, rows, *x.shape[1:])  # noqa: E731
  parts = jnp.arange(len(encoded) // rows), *jax.tree.map(split, others)
  total, results = jax.lax.scan(block, total, parts)
  return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _products(heads: Heads | None, x: Array):
  """Returns what `trunk` does, from the last hidden layer x [m, width]."""
  if heads is None:
    return x
  density = math.narrow_dot(x, heads.density[:, None])[:, 0]  # [m], float32
  return density, None if heads.bottleneck is None else x @ heads.bottleneck.astype(x.dtype)


def _inputs(layer: Layer, x: Array | None, encoded: Array) -> list[tuple[Array, Array]]:
  """Returns the layer's inputs, each with its kernel in the dtype to compute in."""
  pairs = [(x, layer.of_x), (encoded, layer.of_encoded)]
  return [(a, w.astype(encoded.dtype)) for a, w in pairs if w is not None]


def _activations(layers: tuple[Layer, ...], encoded: Array, fused: bool) -> list[Array]:
  """Returns each layer's output [m, width], after its ReLU."""
  results = []
  for layer in layers:
    pairs = _inputs(layer, results[-1] if results else None, encoded)
    # With one input, cuBLASLt is faster: it also adds the bias and applies the ReLU.
    if fused and len(pairs) == 2 and all(hopper.fits(len(a), *w.shape) for a, w in pairs):
      x = hopper.product(*zip(*pairs), bias=layer.bias, relu=True)
    else:
      x = sum(a @ w for a, w in pairs) + layer.bias.astype(encoded.dtype)[None]
      x = jnp.maximum(x, 0)
    results.append(x)
  return results


def _forward(layers, heads, encoded, fused):
  def whole(layers, heads, encoded):
    results = _activations(layers, encoded, fused)
    return _products(heads, results[-1]), results

  products, results = _by_platform(_blocked(whole), whole, fused)(layers, heads, encoded)
  return products, (layers, heads, encoded, results)


def _weight_gradient(x: Array, g: Array, fused: bool) -> tuple[Array, Array]:
  """Returns the kernel's gradient x^T g [k, n] and the bias's, sum(g, 0) [n], in float32."""
  if fused and hopper.fits(len(x), x.shape[1], g.shape[1]):
    return hopper.weight_gradient(x, g)
  dw = jax.lax.dot_general(
    x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )  # fmt: skip
  return dw, jnp.sum(g.astype(jnp.float32), 0)


def _input_gradient(g: Array, w: Array, x: Array, fused: bool, outer=None) -> Array:
  """Returns (g w^T + outer) where x > 0, else 0: the gradient before the ReLU that gave x.

  Args:
    g: [m, n] gradient of the next layer, before its ReLU.
    w: [k, n] kernel of the next layer.
    x: [m, k] output of the ReLU.
    fused: use the Hopper kernel if it supports the shape.
    outer: ([m], [k]) whose outer product is added, or None.
  """
  if fused and hopper.fits(len(g), w.shape[1], w.shape[0]):
    return hopper.product([g], [w.T], outer=outer, mask=x)
  dx = g @ w.T  # [m, k]
  if outer is not None:
    dx = dx.astype(jnp.float32) + outer[0][:, None] * outer[1][None]
  return jnp.where(x > 0, dx, 0).astype(x.dtype)


def _layer_gradient(x: Array, g: Array, w: Array, fused: bool, outer=None):
  """Computes the gradients of a layer y = x @ w + bias of which x is the output of a ReLU.

  Args:
    x: [m, k] output of the ReLU.
    g: [m, n] gradient of y.
    w: [k, n] kernel, in g's dtype.
    fused: use the Hopper kernels if they support the shape.
    outer: ([m], [k]) whose outer product is added to the gradient of x, or None.

  Returns:
    The gradient before the ReLU [m, k]; the kernel's [k, n]; the bias's, sum(g, 0) [n]; and the
    sum of the first over rows [k]. The last three are float32. The joined kernel gives no bias's,
    and the others give no sum of the first: None.
  """
  if fused and hopper.fits_layer(len(x), *w.shape):
    before, dw, total = hopper.layer_gradient(x, g, w, outer=outer)
    return before, dw, None, total
  return _input_gradient(g, w, x, fused, outer), *_weight_gradient(x, g, fused), None


def _heads_gradient(heads: Heads | None, x: Array, d_out, fused: bool):
  """Returns the gradient before the last ReLU, whose output is x [m, width], and the heads'.

  Returns:
    [m, width]; its sum over rows [width] in float32, or None if that would cost another pass; and
    the heads' gradients.
  """
  if heads is None:
    return jnp.where(x > 0, d_out, 0), None, None
  d_density, d_bottleneck = d_out  # [m], [m, b]
  to_density = jnp.sum(x.astype(jnp.float32) * d_density[:, None], 0)  # [width]
  if heads.bottleneck is None:
    by_row = jnp.where(x > 0, d_density[:, None], 0)  # The density head has one column.
    g = (by_row * heads.density[None]).astype(x.dtype)
    return g, jnp.sum(by_row, 0) * heads.density, Heads(to_density, None)
  w = heads.bottleneck.astype(x.dtype)
  outer = d_density, heads.density
  g, to_bottleneck, _, total = _layer_gradient(x, d_bottleneck, w, fused, outer)
  return g, total, Heads(to_density, to_bottleneck)


def _backward(fused, residuals, d_out):
  def whole(layers, heads, *rows):
    return _gradients(layers, heads, *rows, fused)

  def blocked(layers, heads, *rows):
    def step(total, *part):
      *grads, d_encoded = whole(layers, heads, *part)
      return jax.tree.map(jnp.add, total, tuple(grads)), d_encoded

    zeros = jax.tree.map(jnp.zeros_like, (layers, heads))
    total, d_encoded = _scan(_block_rows(layers, rows[0]), step, zeros, *rows)
    return *total, d_encoded

  return _by_platform(blocked, whole, fused)(*residuals, d_out)


def _gradients(layers, heads, encoded, results, d_out, fused: bool):
  """Returns the gradients of the layers, the heads and the features."""
  g, total, d_heads = _heads_gradient(heads, results[-1], d_out, fused)  # Before the ReLU.
  d_layers, d_encoded = [], jnp.zeros((), encoded.dtype)
  for i in reversed(range(len(layers))):
    of_x, of_encoded, after, sums = None, None, g, [total]  # sums: of `after` over rows, if known.
    if layers[i].of_encoded is not None:  # XLA removes the product if nothing uses its result.
      d_encoded += after @ layers[i].of_encoded.astype(after.dtype).T
      of_encoded, known = _weight_gradient(encoded, after, fused)
      sums.append(known)
    if layers[i].of_x is not None:
      w = layers[i].of_x.astype(after.dtype)
      g, of_x, known, total = _layer_gradient(results[i - 1], after, w, fused)
      sums.append(known)
    sums = [s for s in sums if s is not None] or [jnp.sum(after.astype(jnp.float32), 0)]
    d_layers.append(Layer(of_x, of_encoded, sums[0]))
  return tuple(reversed(d_layers)), d_heads, d_encoded


trunk.defvjp(_forward, _backward)
