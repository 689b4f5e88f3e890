"""The datasets that numbers are published on, and those numbers: benchmarks.json."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence

from .. import configs, datasets
from ..errors import UserError

_DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'benchmarks.json')


class BenchmarkError(UserError):
  """A dataset that is unknown, or a folder that is not that dataset."""


@dataclasses.dataclass(frozen=True)
class SceneFacts:
  """What is known of a scene before it is looked at."""

  images: int  # For training and testing.
  test: int  # For testing.
  factor: int  # Config.factor of the published numbers.
  size: tuple[int, int]  # Width and height in full.

  @property
  def used_size(self) -> tuple[float, float]:
    """Width and height at which numbers are published, before rounding."""
    width, height = (side / max(1, self.factor) for side in self.size)
    return width, height


@dataclasses.dataclass(frozen=True)
class Published:
  """A method's numbers, as printed."""

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
  hold: int | None  # Every so many-th image is a test image; None: the dataset's own split.
  groups: dict[str, list[str]]  # Of scenes, over which means are taken too.
  scenes: dict[str, SceneFacts]
  published: tuple[Published, ...]


def _published(row: dict, scenes: Sequence[str]) -> Published:
  metrics = [name for name in row if name not in ('method', 'source', 'mean')]
  values = {name: dict(zip(scenes, row[name], strict=True)) for name in metrics}
  return Published(row['method'], row['source'], values, row['mean'])


@functools.cache
def load_all() -> dict[str, Benchmark]:
  """Every dataset of benchmarks.json, by its name."""
  with open(_DATA, encoding='utf-8') as f:
    table = json.load(f)
  return {name: _benchmark(name, entry) for name, entry in table.items()}


def _benchmark(name: str, entry: dict) -> Benchmark:
  scenes = {
    scene: SceneFacts(**{**facts, 'size': tuple(facts['size'])})
    for scene, facts in entry['scenes'].items()
  }
  published = tuple(_published(row, list(scenes)) for row in entry['published'])
  return Benchmark(**{**entry, 'name': name, 'scenes': scenes, 'published': published})


def load(name: str) -> Benchmark:
  """The dataset of that name.

  Raises:
    BenchmarkError: there is none; the known ones are listed.
  """
  if name not in load_all():
    raise BenchmarkError(f'Unknown dataset {name!r}: there are {", ".join(load_all())}.')
  return load_all()[name]


def scene_bindings(benchmark: Benchmark, root: str, scene: str) -> list[str]:
  """Bindings that make a config one of the scene, as the published numbers have it."""
  return [
    f'Config.data_dir = {os.path.join(root, scene)!r}',
    f'Config.factor = {benchmark.scenes[scene].factor}',
  ]


def check_scene(benchmark: Benchmark, scene: str, config: configs.Config) -> None:
  """Holds a scene's folder to what is known of it, by the loader that training uses.

  Raises:
    BenchmarkError: another number or size of images, or pictures that are still to be made.
    DataError and its like: the folder cannot be loaded at all.
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
        f'{config.data_dir}: {found} {what}, the published {scene} has {wanted}.'
      )
  if report['folder_to_be_made']:
    raise BenchmarkError(
      f'{config.data_dir}: {report["folder_to_be_made"]}/ is missing; pictures made here from the '
      'full ones are not those that the published numbers are of.'
    )
  for size in report['image_sizes']:
    sides = [int(side) for side in size.split('x')]
    if any(abs(side - wanted) > 1 for side, wanted in zip(sides, facts.used_size)):
      wanted = 'x'.join(f'{side:.0f}' for side in facts.used_size)
      raise BenchmarkError(
        f'{config.data_dir}: images of {size} at Config.factor = {config.factor}, the published '
        f'{scene} has {wanted}.'
      )
