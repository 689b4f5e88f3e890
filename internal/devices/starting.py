"""What to start with on this machine: the config, the size of the pictures, the command."""

from __future__ import annotations

import os

import jax

from ..system import installation

LARGEST = 1600  # Pixels of the longer side that 360_fast.gin is recommended for.
_LARGEST_ON_CPU = 400  # cpu.gin's: an image is rendered in seconds.


def recommend_factor(size: tuple[int, int], largest: int = LARGEST) -> int:
  """Returns the least factor of 0 (full size), 2, 4, 8 with at most `largest` pixels a side, or 8.

  Args:
    size: of the photographs, in pixels.
    largest: limit of the longer side.
  """
  return next((f for f in (0, 2, 4) if max(size) / max(f, 1) <= largest), 8)


def has_accelerator() -> bool:
  """Returns whether JAX computes on a GPU or TPU."""
  return jax.default_backend() != 'cpu'


def train_command(scene: str, size: tuple[int, int], accelerator: bool) -> str:
  """Returns the command line that trains a capture in minutes, on a GPU or TPU or on a CPU.

  Args:
    scene: the capture's folder. The run gets its name, in runs/.
    size: of the full-size photographs, in pixels.
    accelerator: whether it is for a machine with a GPU or TPU.
  """
  config = 'fast' if accelerator else 'cpu'
  factor = recommend_factor(size, LARGEST if accelerator else _LARGEST_ON_CPU)
  run = os.path.join('runs', os.path.basename(os.path.realpath(scene)))
  return installation.train_text(scene, run, config, factor)


def advice(scene: str, size: tuple[int, int]) -> str:
  """Returns lines with the command for this machine; without a GPU or TPU, also that for one."""
  fast = train_command(scene, size, True)
  if has_accelerator():
    return f'  {fast}'
  here = train_command(scene, size, False)
  between = '(ten minutes with evaluation and video, small and soft. A large GPU: two, sharp:)'
  return f'  {here}\n  {between}\n  {fast}'
