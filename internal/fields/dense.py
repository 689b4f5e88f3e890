"""The trunk of a field: dense layers with ReLU, and its linear heads, as one function.

By hand because most of a training step is here. Autodiff of the same layers keeps what is before
each ReLU beside what is after it, and passes over both again; this keeps the layers' results
alone, and sums weight gradients in float32. On Hopper GPUs `fused` has what surrounds the products
done inside of them (internal/hopper.py); the rest of this file is its twin in plain XLA.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import math
from . import hopper

Array = jax.Array


class Layer(NamedTuple):
  """relu(x @ of_x + encoded @ of_encoded + bias); a layer may do without one of the inputs."""

  of_x: Array | None  # [width before, width]
  of_encoded: Array | None  # [f, width]
  bias: Array  # [width]


class Heads(NamedTuple):
  """Linear functions of the last layer's result: density, and the bottleneck before colour."""

  density: Array  # [width]
  bottleneck: Array | None  # [width, b]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def trunk(layers: tuple[Layer, ...], heads: Heads | None, encoded: Array, fused: bool = False):
  """Dense layers with ReLU on [m, f] features, and linear heads (no biases) on their result.

  Computed in `encoded`'s type; the parameters, and so their gradients, are float32.

  Args:
    layers: the layers, first to last.
    heads: what is wanted of the last one's result, or None for the result itself.
    encoded: [m, f].
    fused: use the kernels for Hopper GPUs where they fit.

  Returns:
    Without heads: [m, width]. With heads: density [m] float32 and bottleneck [m, b] (or None).
  """
  return outputs(heads, _activations(layers, encoded, fused)[-1])


def outputs(heads: Heads | None, x: Array):
  """What `trunk` returns, from the last layer's result x [m, width]."""
  if heads is None:
    return x
  density = math.narrow_dot(x, heads.density[:, None])[:, 0]
  return density, None if heads.bottleneck is None else x @ heads.bottleneck.astype(x.dtype)


def _inputs(layer: Layer, x: Array | None, encoded: Array) -> list[tuple[Array, Array]]:
  """Pairs of an input and its weights in the type to compute in."""
  pairs = [(x, layer.of_x), (encoded, layer.of_encoded)]
  return [(a, w.astype(encoded.dtype)) for a, w in pairs if w is not None]


def _activations(layers: tuple[Layer, ...], encoded: Array, fused: bool) -> list[Array]:
  """Each layer's result."""
  results = []
  for layer in layers:
    pairs = _inputs(layer, results[-1] if results else None, encoded)
    if fused and len(pairs) == 2 and all(hopper.fits(len(a), *w.shape) for a, w in pairs):
      x = hopper.product(*zip(*pairs), bias=layer.bias, relu=True)
    else:
      x = sum(a @ w for a, w in pairs) + layer.bias.astype(encoded.dtype)[None]
      x = jnp.maximum(x, 0)
    results.append(x)
  return results


def _forward(layers, heads, encoded, fused):
  results = _activations(layers, encoded, fused)
  return outputs(heads, results[-1]), (layers, heads, encoded, results)


def _weight_gradient(x: Array, g: Array, fused: bool) -> tuple[Array, Array]:
  """x^T g [k, n] and the sum of g's rows [n], float32."""
  if fused and hopper.fits(len(x), x.shape[1], g.shape[1]):
    return hopper.weight_gradient(x, g)
  dw = jax.lax.dot_general(
    x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )  # fmt: skip
  return dw, jnp.sum(g.astype(jnp.float32), 0)


def _input_gradient(g: Array, w: Array, x: Array, fused: bool, outer=None) -> Array:
  """(g w^T + outer) where x, a ReLU's result, is positive: the gradient before that ReLU."""
  if fused and hopper.fits(len(g), w.shape[1], w.shape[0]):
    return hopper.product([g], [w.T], outer=outer, mask=x)
  dx = g @ w.T
  if outer is not None:
    dx = dx.astype(jnp.float32) + outer[0][:, None] * outer[1][None]
  return jnp.where(x > 0, dx, 0).astype(x.dtype)


def _heads_gradient(heads: Heads | None, x: Array, d_out, fused: bool) -> tuple[Array, Heads]:
  """The gradient before the last ReLU, whose result is x, and those of the heads."""
  if heads is None:
    return jnp.where(x > 0, d_out, 0), None
  d_density, d_bottleneck = d_out
  to_density = jnp.sum(x.astype(jnp.float32) * d_density[:, None], 0)
  if heads.bottleneck is None:
    g = jnp.where(x > 0, d_density[:, None] * heads.density[None], 0).astype(x.dtype)
    return g, Heads(to_density, None)
  to_bottleneck, _ = _weight_gradient(x, d_bottleneck, fused)
  w = heads.bottleneck.astype(x.dtype)
  g = _input_gradient(d_bottleneck, w, x, fused, (d_density, heads.density))
  return g, Heads(to_density, to_bottleneck)


def _backward(fused, residuals, d_out):
  layers, heads, encoded, results = residuals
  g, d_heads = _heads_gradient(heads, results[-1], d_out, fused)
  d_layers, d_encoded = [], jnp.zeros((), encoded.dtype)
  for i in reversed(range(len(layers))):
    x = results[i - 1] if i else None
    grads = [_weight_gradient(a, g, fused) for a, _ in _inputs(layers[i], x, encoded)]
    dws = [dw for dw, _ in grads]
    of_x = None if layers[i].of_x is None else dws.pop(0)
    of_encoded = None if layers[i].of_encoded is None else dws.pop(0)
    d_layers.append(Layer(of_x, of_encoded, grads[0][1]))
    if of_encoded is not None:  # Removed by the compiler unless somebody asks for it.
      d_encoded += g @ layers[i].of_encoded.astype(g.dtype).T
    if of_x is not None:
      g = _input_gradient(g, layers[i].of_x.astype(g.dtype), x, fused)
  return tuple(reversed(d_layers)), d_heads, d_encoded


trunk.defvjp(_forward, _backward)
