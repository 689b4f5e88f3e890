"""Many training steps in one dispatch: the same bits, where they end, how far they go ahead."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import threading
import types

import captures
import jax
import numpy as np
import pytest
import tiny

from internal import configs, datasets, structs
from internal.datasets import images
from internal.devices import memory, sharding, starting
from internal.errors import UserError
from internal.evaluation import train_renders
from internal.training import (
  batches,
  checkpoints,
  dispatch,
  loop,
  pixel_store,
  run_folder,
  train_step,
)

GRID = (
  *(f"{part}.encoding = 'grid'" for part in ('PropMLP', 'NerfMLP')),
  *(f'{part}.grid_levels = 2' for part in ('PropMLP', 'NerfMLP')),
  *(f'{part}.grid_log2_size = 8' for part in ('PropMLP', 'NerfMLP')),
  'Model.deterministic_grid = True',
)


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@functools.cache
def run(bindings, devices, groups, **how):
  """Takes each group of steps from the beginning; returns the states and the stats of each step."""
  settings, mesh, (cams, images) = tiny.settings(*bindings), tiny.mesh(devices), tiny.capture()
  step_fn = train_step.make_train_step(settings, mesh, **how)
  args = sharding.replicate((cams, batches.make_store(images)), mesh)
  results = []
  for sizes in groups:
    state, rows = sharding.place(train_step.create_state(settings), mesh), []
    for count in sizes:
      before = jax.tree.leaves(state)
      state, stats = step_fn(state, *args, count)
      assert all(leaf.is_deleted() for leaf in before)  # Its buffers are donated.
      rows.extend(np.asarray(stats.numbers)[:count])
    results.append((jax.device_get(state), rows))
  assert len(step_fn._programs) == 1
  return results


GROUPS = ((1, 1, 1, 1, 1), (2, 3), (4, 1))
FIXED = ('most', 4), ('fixed', True)


class TestBits:
  @pytest.mark.parametrize(
    ('bindings', 'devices', 'how'),
    [((), 1, ()), ((), 1, FIXED), ((*GRID, 'Config.micro_batches = 2'), 8, ())],
  )
  def test_steps_do_not_depend_on_how_they_are_grouped(self, bindings, devices, how, monkeypatch):
    monkeypatch.setattr(sharding, '_LARGE', 1024)  # Tables are split over the devices.
    one, *others = run(bindings, devices, GROUPS, **dict(how))
    assert one[0].step == 5
    for other in others:
      assert bits(other) == bits(one)

  def test_a_fixed_number_of_steps_computes_what_a_loop_does(self):
    """Up to rounding: it is another program."""
    (a, rows_a), (b, rows_b) = (run((), 1, GROUPS, **dict(how))[1] for how in ((), FIXED))
    assert a.step == b.step
    np.testing.assert_allclose(rows_a, rows_b, rtol=1e-4, atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), a.params, b.params)


def test_dispatches_stop_at_all_multiples():
  intervals = 7, 10, 0, 4
  for step in range(60):
    wanted = next(
      k for k in range(step + 1, 99) if k == 53 or any(n and k % n == 0 for n in intervals)
    )
    assert dispatch.next_stop(step, 53, intervals) == wanted if step < 53 else True


class TestShape:
  GPU = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform='gpu')]))

  def shape(self, *bindings, intervals=(100, 12500, 0), watched=False):
    settings = configs.load_config(['configs/360_fast.gin'], bindings)
    return dispatch.shape(settings, self.GPU, intervals, watched)

  def test_a_gpu_takes_a_number_that_divides_all_intervals(self):
    assert self.shape() == (20, True)
    assert self.shape(watched=True) == (5, True)
    assert self.shape(intervals=(30, 45)) == (15, True)
    assert self.shape(intervals=(100, 1)) == (1, True)
    assert self.shape(intervals=(0, 0)) == (20, True)
    assert self.shape('Config.steps_per_dispatch = 60') == (50, True)

  def test_long_steps_are_dispatched_one_by_one(self):
    assert self.shape("NerfMLP.encoding = 'ipe'") == (1, True)

  def test_other_devices_take_any_number(self):
    settings = configs.load_config(['configs/360_fast.gin'])
    assert dispatch.shape(settings, tiny.mesh(1), (7,)) == (100, False)


class FakeSteps:
  """Steps whose numbers are the step itself; records the dispatches and which are done."""

  def __init__(self, most=100, fixed=False):
    self.most, self.fixed, self.counts, self.waiting, self.most_waiting = most, fixed, [], set(), 0

  def __call__(self, state, cams, pixels, count):
    steps = self

    class Numbers:
      def copy_to_host_async(self):
        pass

      def __array__(self, *_, **__):
        steps.waiting.discard(self)
        return np.arange(state + 1, state + 1 + steps.most)[:, None].astype(np.float32)

    numbers = Numbers()
    self.counts.append(count)
    self.waiting.add(numbers)
    self.most_waiting = max(self.most_waiting, len(self.waiting))
    return state + count, structs.Stats(numbers, ('loss',))


class TestDispatcher:
  def go(self, steps, on_device=True, seconds=None, until=47, **how):
    loads = []
    pump = dispatch.Dispatcher(steps, None, loads.append, on_device, [{'loss': -1.0}], **how)
    if seconds:
      pump.set_pace(seconds)
    state = step = 0
    while step < until:
      state, step = pump.take(state, step, until)
    assert [row['loss'] for row in pump.rows()] == [-1.0, *range(1, until + 1)]
    pump.clear()
    assert pump.rows() == []
    assert loads == np.cumsum([0, *steps.counts])[:-1].tolist()
    return steps.counts

  def test_a_dispatch_takes_a_tenth_of_a_second(self):
    steps = FakeSteps()
    assert self.go(steps, seconds=0.005) == [20, 20, 7]
    assert steps.most_waiting == 2
    assert self.go(FakeSteps(), seconds=0.005, watched=True) == [5] * 9 + [2]
    assert self.go(FakeSteps(), seconds=1.0) == [1] * 47
    assert self.go(FakeSteps(), seconds=1e-9, until=147) == [100, 47]

  def test_it_starts_with_single_steps(self):
    assert self.go(FakeSteps(), until=4) == [1] * 4

  def test_a_fixed_number_is_kept(self):
    assert self.go(FakeSteps(10, fixed=True), seconds=1.0) == [10] * 4 + [7]

  def test_pixels_on_the_host_come_step_by_step(self):
    assert self.go(FakeSteps(), on_device=False, seconds=0.005, until=9) == [1] * 9


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Runs with one and with many steps a dispatch, with the steps of their callbacks."""
  folder = tmp_path_factory.mktemp('dispatch')
  captures.write_colmap(folder / 'data', n=9, size=(16, 16))
  runs = {}
  for name, seconds in (('one', 0.0), ('many', 1e3)):
    bindings = (
      f"Config.data_dir = '{folder}/data'", f"Config.checkpoint_dir = '{folder}/{name}'",
      'Config.factor = 0', 'Config.max_steps = 40', 'Config.early_exit_steps = 38',
      'Config.print_every = 15', 'Config.checkpoint_every = 12', 'Config.checkpoint_keep = 0',
    )  # fmt: skip
    settings, called, sizes = tiny.settings(*bindings), [], []

    def on_step(step, params, called=called):
      called.append(step)
      return 0.0

    def take(*args, sizes=sizes, real=train_step.TrainStep.__call__):
      sizes.append(args[4])
      return real(*args)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(train_step.TrainStep, '__call__', take)
      patch.setattr(dispatch, '_SECONDS', seconds)  # However fast this machine is.
      scene = datasets.load_dataset(settings.config)
      loop.train(settings, scene, tiny.mesh(1), on_step=on_step, on_step_every=10)
    runs[name] = folder / name, settings, called, sizes
  return runs


def test_a_resumed_run_keeps_the_checkpoints_of_a_start_that_kept_more(trained, tmp_path, capsys):
  folder, settings, _, _ = trained['many']
  shutil.copytree(folder, tmp_path / 'run')
  before = checkpoints.all_steps(str(tmp_path / 'run'))
  assert before == [12, 24, 36, 38]
  changes = {'checkpoint_dir': str(tmp_path / 'run'), 'checkpoint_keep': 1, 'checkpoint_every': 1}
  settings = settings.change('config', early_exit_steps=40, **changes)
  loop.train(settings, datasets.load_dataset(settings.config), tiny.mesh(1))
  assert checkpoints.all_steps(str(tmp_path / 'run')) == [*before, 40]
  assert 'The 4 checkpoints that are there stay' in capsys.readouterr().out


class TestStart:
  """The step compiles while pictures are read and the state is created."""

  @pytest.fixture
  def run(self, tmp_path):
    captures.write_colmap(tmp_path / 'data', n=9, size=(16, 16))
    bindings = (
      f"Config.data_dir = '{tmp_path}/data'", f"Config.checkpoint_dir = '{tmp_path}/run'",
      'Config.factor = 0', 'Config.max_steps = 4', 'Config.print_every = 2',
      'Config.train_render_every = 2',
    )  # fmt: skip
    settings = tiny.settings(*bindings)
    return settings, datasets.load_dataset(settings.config)

  @pytest.mark.parametrize('on', ['device', 'host'])
  def test_what_it_compiles_is_what_the_loop_runs(self, run, on, monkeypatch):
    settings, scene = run
    config = dataclasses.replace(settings.config, pixels_on=on)
    programs = []

    def take(step_fn, *args, real=train_step.TrainStep.__call__):
      programs.append(dict(step_fn._programs))
      return real(step_fn, *args)

    monkeypatch.setattr(train_step.TrainStep, '__call__', take)
    loop.train(dataclasses.replace(settings, config=config), scene, tiny.mesh(1))
    assert len(programs) >= 2
    assert all(p.keys() == programs[0].keys() and len(p) == 1 for p in programs)

  def test_memory_is_what_remains_beside_all_arguments(self, run, monkeypatch):
    settings, scene = run
    monkeypatch.setattr(memory, 'free_memory', lambda _: 10**9)
    made, real = [], train_step.make_train_step
    monkeypatch.setattr(
      train_step, 'make_train_step', lambda *a, **k: made.append(real(*a, **k)) or made[0]
    )
    loop.train(settings, scene, tiny.mesh(1))
    state = train_step.create_state(settings)
    cams = pixel_store.training_cameras(settings, scene)
    known = sum(np.asarray(x).nbytes for x in jax.tree.leaves((state, cams)))
    pixels = 3 * 16 * 16 * len(scene.train) + 4 * len(scene.train)
    assert made[0].free == 10**9 - known - pixels

  def test_a_state_that_does_not_fit_is_not_the_steps_fault(self, run, monkeypatch):
    def fail(*_):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: the state')

    begun, real = [], memory._compile
    monkeypatch.setattr(run_folder, 'start_run', fail)
    monkeypatch.setattr(memory, '_compile', lambda *a: begun.append(1) or real(*a))
    with pytest.raises(jax.errors.JaxRuntimeError, match='the state'):
      loop.train(*run, tiny.mesh(1))
    assert len(begun) == 1

  def test_where_the_pixels_go_is_decided_once(self, run, monkeypatch, capsys):
    settings, scene = run
    size = pixel_store.num_bytes(scene)
    free = iter([3 * size, 3 * size])  # Too little for the device, enough for the host; later, 1.
    monkeypatch.setattr(pixel_store, 'available_memory', lambda: next(free, 1))
    loop.train(settings, scene, tiny.mesh(1))
    assert 'pixels on the host' in capsys.readouterr().out
    assert not os.path.exists(os.path.join(settings.config.data_dir, pixel_store._FOLDER))

  @pytest.mark.parametrize('fails', [False, True])
  def test_test_renders_are_compiled_beside_it_on_accelerators(self, run, fails, monkeypatch):
    settings, scene = run
    monkeypatch.setattr(starting, 'has_accelerator', lambda: True)
    renders = train_renders.TestRenders(settings, scene, tiny.mesh(1))
    threads, compiled = [], []

    def warm_up(params, real=renders.warm_up):
      threads.append(threading.current_thread().name)
      if fails:
        raise RuntimeError('no memory')  # It is tried again when it is needed.
      real(params)

    def compiling(*args, real=memory._compile):
      compiled.append(threading.current_thread().name)
      return real(*args)

    monkeypatch.setattr(renders, 'warm_up', warm_up)
    monkeypatch.setattr(memory, '_compile', compiling)
    loop.train(settings, scene, tiny.mesh(1), render_test=renders)
    assert threads == [name for name in threads if name != 'MainThread']
    assert len(threads) == 1
    # The step, and the chunk of a test image: there, or when it is first rendered.
    assert sorted(compiled) == sorted(['MainThread', 'MainThread' if fails else threads[0]])
    pictures = os.listdir(os.path.join(settings.config.checkpoint_dir, 'train_renders'))
    assert sorted(name[-11:] for name in pictures) == ['0000002.png'] * 2 + ['0000004.png'] * 2

  def test_an_unreadable_picture_ends_the_run(self, run):
    settings, scene = run
    path = os.path.join(settings.config.data_dir, scene.files[scene.train[1]])
    with open(path, 'r+b') as f:
      f.truncate(200)
    with pytest.raises(images.DataError, match=re.escape(path)):
      loop.train(settings, scene, tiny.mesh(1))

  @pytest.mark.parametrize('binding', ['Config.micro_batches = 5', 'Config.batch_size = 63'])
  def test_bad_settings_leave_a_finished_run_unchanged(self, run, binding):
    settings, scene = run
    loop.train(settings, scene, tiny.mesh(1))
    folder = settings.config.checkpoint_dir
    paths = [pathlib.Path(folder, name) for name in ('config.gin', 'scene.json', 'metrics.jsonl')]
    before = [path.read_bytes() for path in paths]
    name, value = binding.removeprefix('Config.').split(' = ')
    config = dataclasses.replace(settings.config, max_steps=8, **{name: int(value)})
    with pytest.raises(UserError, match=name):
      loop.train(dataclasses.replace(settings, config=config), scene, tiny.mesh(2))
    assert before == [path.read_bytes() for path in paths]

  def test_a_failure_stops_the_reading(self, run, monkeypatch):
    settings, scene = run
    stopped = []

    def read(config, scene, progress, stop, where):
      stopped.append(stop.wait(20))

    def fit(*_, **__):
      raise RuntimeError('no compiler')

    monkeypatch.setattr(pixel_store, 'read', read)
    monkeypatch.setattr(train_step.TrainStep, 'fit', fit)
    with pytest.raises(RuntimeError, match='no compiler'):
      loop.train(settings, scene, tiny.mesh(1))
    assert stopped == [True]


class TestLoop:
  def test_dispatches_end_where_something_is_due(self, trained):
    assert trained['one'][3] == [1] * 38
    # Log lines at 15 and 30, checkpoints at 12, 24 and 36, callbacks at 10, 20 and 30.
    # The first step compiles, and the second is timed.
    assert np.cumsum(trained['many'][3]).tolist() == [1, 2, 10, 12, 15, 20, 24, 30, 36, 38]

  def test_the_callback_is_called_when_it_is_due(self, trained):
    assert trained['one'][2] == trained['many'][2] == [10, 20, 30, 38]

  def test_logs_and_checkpoints_are_the_same_to_the_bit(self, trained):
    times = 'time', 'train_seconds', 'rays_per_sec', 'peak_bytes'
    logs, states = [], []
    for folder, settings, *_ in trained.values():
      lines = (folder / 'metrics.jsonl').read_text().splitlines()
      logs.append([{k: v for k, v in json.loads(t).items() if k not in times} for t in lines])
      at = [checkpoints.restore(str(folder), settings, tiny.mesh(1), k) for k in (12, 24, 36, 38)]
      windows = [checkpoints.notes(str(folder), k)['window'] for k in (12, 24, 36, 38)]
      states.append((bits(at), windows))
    assert [row['step'] for row in logs[0]] == [12, 15, 24, 30, 36, 38]
    assert logs[0] == logs[1]
    assert states[0] == states[1]
