"""Datasets with published results, from benchmarks.json."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence

from .. import configs, datasets
from ..datasets import pyramid
from ..errors import UserError
from ..system import files

_DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'benchmarks.json')


class BenchmarkError(UserError):
  """An unknown dataset, or a folder that does not match it."""


@dataclasses.dataclass(frozen=True)
class SceneFacts:
  """The facts that a scene's folder must match."""

  images: int  # Number of images, training and test.
  test: int  # Number of test images.
  factor: int  # Config.factor of the published numbers.
  size: tuple[int, int]  # Full width and height.

  @property
  def used_size(self) -> tuple[float, float]:
    """Width and height of the published evaluation, before rounding."""
    width, height = (side / max(1, self.factor) for side in self.size)
    return width, height


@dataclasses.dataclass(frozen=True)
class Published:
  """The published numbers of a method, as printed."""

  method: str
  source: str
  values: dict[str, dict[str, float]]  # By metric and scene.
  mean: dict[str, float]  # By metric, over all scenes.


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A dataset with published numbers."""

  name: str
  title: str
  source: str
  loader: str  # Config.dataset_loader
  config: str  # The .gin file, relative to the repository.
  hold: int | None  # Every hold-th image is a test image; None for the dataset's own split.
  groups: dict[str, list[str]]  # Groups of scenes, each with a mean of its own.
  scenes: dict[str, SceneFacts]
  published: tuple[Published, ...]


def _published(row: dict, scenes: Sequence[str]) -> Published:
  metrics = [name for name in row if name not in ('method', 'source', 'mean')]
  values = {name: dict(zip(scenes, row[name], strict=True)) for name in metrics}
  return Published(row['method'], row['source'], values, row['mean'])


@functools.cache
def load_all() -> dict[str, Benchmark]:
  """Loads all datasets of benchmarks.json, by name."""
  return {name: _benchmark(name, entry) for name, entry in files.read_json(_DATA).items()}


def _benchmark(name: str, entry: dict) -> Benchmark:
  scenes = {
    scene: SceneFacts(**{**facts, 'size': tuple(facts['size'])})
    for scene, facts in entry['scenes'].items()
  }
  published = tuple(_published(row, list(scenes)) for row in entry['published'])
  return Benchmark(**{**entry, 'name': name, 'scenes': scenes, 'published': published})


def load(name: str) -> Benchmark:
  """Returns the dataset `name`.

  Raises:
    BenchmarkError: the name is unknown.
  """
  if name not in load_all():
    raise BenchmarkError(f'Unknown dataset {name!r}; choose one of {", ".join(load_all())}.')
  return load_all()[name]


def scene_bindings(benchmark: Benchmark, root: str, scene: str) -> list[str]:
  """Returns the gin bindings that set a scene's folder and published downsampling factor."""
  return [
    f'Config.data_dir = {os.path.join(root, scene)!r}',
    f'Config.factor = {benchmark.scenes[scene].factor}',
  ]


def check_scene(benchmark: Benchmark, scene: str, config: configs.Config) -> None:
  """Checks a scene's folder against the published facts, with the loader used in training.

  Raises:
    BenchmarkError: the number or size of images differs, or downsampled images are missing.
    DataError: the folder cannot be loaded.
  """
  facts = benchmark.scenes[scene]
  report = datasets.load_dataset(config, read_only=True).report
  missing = len(report['images_missing'])
  counts = {
    'registered images': (report['images_registered'] - missing, facts.images),
    'test images': (report['test_images'], facts.test),
  }
  for what, (found, wanted) in counts.items():
    if found != wanted:
      raise BenchmarkError(
        f'{config.data_dir}: {found} {what}, the published {scene} has {wanted}; download it again.'
      )
  differ = 'Images that are downsampled here differ from those of the published evaluation.'
  if report['folder_to_be_made']:
    raise BenchmarkError(
      f'{config.data_dir}: {report["folder_to_be_made"]}/ is missing; download it. {differ}'
    )
  if pyramid.BY_AREA_FILTER in report['reduction']:
    folders = ', '.join(f'{name}/' for name in report['image_folders'])
    raise BenchmarkError(
      f'{config.data_dir}: {folders} was made here; remove it and download it. {differ}'
    )
  for size in report['image_sizes']:
    sides = [int(side) for side in size.split('x')]
    if any(abs(side - wanted) > 1 for side, wanted in zip(sides, facts.used_size)):
      wanted = 'x'.join(f'{side:.0f}' for side in facts.used_size)
      raise BenchmarkError(
        f'{config.data_dir}: images of {size} at Config.factor = {config.factor}, the published '
        f'{scene} has {wanted}.'
      )
