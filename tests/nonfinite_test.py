"""Non-finite losses and gradients: skipped updates, log lines, and replayed steps."""

import captures
import jax
import jax.numpy as jnp
import numpy as np
import program_runner
import pytest
import tiny
import train_step_test

from internal import configs, losses, structs
from internal.commands import train
from internal.devices import sharding
from internal.training import checkpoints, nonfinite, run_folder, runlog, train_step

RUN = train_step_test._run
MODEL = [line for line in program_runner.SMALLEST if not line.startswith('Config.')]


def poison(monkeypatch, part, hit=lambda batch: batch.rays.cam_idx == 2, value=jnp.inf):
  """Makes the loss of some rays non-finite, and its gradient in `part` ('loss': none)."""
  total = losses.total

  def poisoned(config, params, renderings, history, batch):
    loss, terms = total(config, params, renderings, history, batch)
    seen = history[0].weights.sum(-1) if part == 'prop_mlp' else renderings[-1].rgb.sum(-1)
    if part == 'loss':
      seen = jax.lax.stop_gradient(seen)
    extra = jnp.mean(jnp.where(hit(batch), value, 0.0) * seen)
    return loss + extra, {**terms, 'poison': extra}

  monkeypatch.setattr(losses, 'total', poisoned)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


class TestUpdates:
  def test_parts_with_non_finite_gradients_are_skipped_and_others_updated(self, monkeypatch):
    settings = tiny.settings(
      *MODEL, 'Model.num_glo_features = 4', 'Config.micro_batches = 2', 'Config.batch_size = 16'
    )
    before = train_step.create_state(settings)
    clean, _ = RUN(settings, tiny.mesh(2), 1)
    poison(monkeypatch, 'nerf_mlp', value=np.nan)
    after, (stats,) = RUN(settings, tiny.mesh(2), 1)
    assert set(clean.params) == {'nerf_mlp', 'prop_mlp', 'glo'}
    affected = {'nerf_mlp', 'glo'}  # The appearance vectors work through the colours.
    assert after.step == 1
    assert not np.isfinite(stats['loss'])
    for name in clean.params:
      same = before if name in affected else clean
      assert_equal(after.params[name], same.params[name])
      assert_equal(after.opt_state[name], same.opt_state[name])
      assert stats[f'skipped_{name}'] == after.skipped[name] == (name in affected)

  @pytest.mark.parametrize(
    ('bad', 'loss', 'kept'),
    [
      ({}, 1.0, ''),
      ({'a': np.inf}, 1.0, 'a'),
      ({'b': np.nan}, np.nan, 'b'),
      ({'a': -np.inf, 'b': np.nan}, np.nan, 'ab'),
      ({}, np.nan, 'ab'),  # Unknown which part is affected.
    ],
  )
  def test_a_part_with_one_bad_entry_is_kept(self, bad, loss, kept):
    optimizer = train_step.make_optimizer(configs.Config())
    params = {name: {'w': jnp.arange(1.0, 4), 'v': jnp.ones(2)} for name in 'ab'}
    state = structs.TrainState(
      jnp.array(6),
      params,
      {name: optimizer.init(part) for name, part in params.items()},
      {'a': jnp.array(2), 'b': jnp.array(0)},
    )
    grads = {name: {'w': jnp.ones(3), 'v': jnp.ones(2)} for name in 'ab'}
    for name, value in bad.items():
      grads[name]['w'] = grads[name]['w'].at[1].set(value)
    after = train_step.update_finite(optimizer, 0.1, state, grads, jnp.array(loss))
    assert after.step == 7
    for name in 'ab':
      count = train_step_test._adam(after.opt_state[name]).count
      if name in kept:
        assert_equal(after.params[name], params[name])
        assert_equal(after.opt_state[name], state.opt_state[name])
        assert (count, after.skipped[name]) == (0, state.skipped[name] + 1)
      else:
        assert (after.params[name]['w'] < params[name]['w']).all()
        assert (count, after.skipped[name]) == (1, 0)


def rows(*counts, **values):
  return [
    {'loss': np.float32(np.nan), 'skipped_a': np.int32(n), 'grad_norm_a': np.float32(np.inf)}
    for n in counts
  ]


def test_lines_report_the_first_few_steps():
  assert nonfinite.lines(7, rows(0, 0)) == []
  assert nonfinite.lines(7, rows(0, 1, 0)) == [
    'step 6: skipped the update of a, non-finite: loss nan, gradient norm of a inf; '
    '--replay_step 6 shows the rays'
  ]
  report = nonfinite.lines(100, rows(*range(1, 101)))
  assert len(report) == 6
  assert report[-1] == 'and 95 more steps up to step 100'


def test_check_ends_the_run_at_the_limit(tmp_path):
  nonfinite.check(str(tmp_path), 5, 9, rows(1, 2, 3, 4, 0, 1))
  nonfinite.check(str(tmp_path), 0, 9, rows(8, 9))
  with pytest.raises(
    nonfinite.NonFiniteError,
    match=r'a was not updated in 5 steps, 5 to 9: .*good checkpoint: none.*step 5 ',
  ):
    nonfinite.check(str(tmp_path), 5, 10, rows(4, 5, 6))


MESH = tiny.mesh(1)
SMALL = (
  'Config.max_steps = 8',
  'Config.print_every = 4',
  'Config.checkpoint_every = 2',
  'Config.checkpoint_keep = 0',
  'Config.train_render_every = 0',
  'Config.batch_size = 40',
  'Config.factor = 0',
  *MODEL,
)


class TestPrograms:
  @pytest.fixture
  def program(self, tmp_path, monkeypatch):
    """Runs train.py on one device in a temporary folder."""
    monkeypatch.setattr(sharding, 'make_mesh', lambda *_: MESH)
    captures.write_colmap(tmp_path / 'capture')

    def run(*bindings, flags=()):
      here = f"Config.data_dir = '{tmp_path}/capture'", f"Config.checkpoint_dir = '{tmp_path}/run'"
      args = ('--gin_configs=configs/360.gin', '--gin_bindings', *SMALL, *here, *bindings)
      train.main([*args, *flags])

    return run

  def test_a_step_is_logged_counted_and_replayed_with_its_ray(
    self, program, tmp_path, monkeypatch, capsys
  ):
    settings = tiny.settings('Config.batch_size = 40')
    size = np.array([captures.SIZE] * 7)  # Of nine images the first and the last are for testing.
    draw = train_step.make_draw(settings.config, tiny.mesh(1))
    pixels = [{tuple(p) for p in np.stack(draw(k, size), -1).tolist()} for k in range(8)]
    cam, x, y = min(pixels[5] - set.union(*pixels[:5], *pixels[6:]))
    row = cam + 1
    color = captures.pixels(row)[y, x] / 255  # Pictures of noise tell each pixel by it.

    def hit(batch):
      return (batch.rays.cam_idx == cam) & (jnp.abs(batch.rgb - color[None]) < 1e-3).all(-1)

    poison(monkeypatch, 'nerf_mlp', hit)
    program()
    said = capsys.readouterr().out
    assert said.count('skipped the update of') == 1
    assert (
      'step 6: skipped the update of nerf_mlp, non-finite: loss inf, gradient norm of nerf_mlp '
      in said
    )
    lines = runlog.read_metrics(str(tmp_path / 'run' / 'metrics.jsonl'))
    assert [(r['step'], r['skipped_nerf_mlp'], r['skipped_prop_mlp']) for r in lines] == [
      (2, 0, 0), (4, 0, 0), (6, 1, 0), (8, 0, 0)
    ]  # fmt: skip
    assert all(np.isfinite(r['loss']) for r in lines)
    program(flags=('--replay_step', '6'))
    said = capsys.readouterr().out
    assert 'step 6, from the checkpoint of step 4:' in said
    assert '  loss_poison inf\n' in said
    assert '  skipped_nerf_mlp 1\n' in said
    rays = [line for line in said.splitlines() if line.startswith('ray ')]
    assert len(rays) == 1
    assert f'camera {row} ({row:03}.png), pixel x {x}, y {y}: loss inf, loss_data 0.' in rays[0]
    program(flags=('--replay_step', '5'))
    assert 'gradient of each of the 40 rays are finite' in capsys.readouterr().out

  def test_a_replay_looks_at_the_proposals_of_all_rays(self, program, monkeypatch):
    made, real = [], train_step.make_loss_gradient
    monkeypatch.setattr(
      train_step, 'make_loss_gradient', lambda s: made.append(s.config.interlevel_every) or real(s)
    )
    every = 'Config.interlevel_every = 4'
    program(every)
    program(every, flags=('--replay_step', '2'))
    assert made == [4, 4, 1]

  def test_a_blocked_run_ends_also_when_resumed(self, program, tmp_path):
    """The learning rate is so large that the second step is non-finite."""
    bindings = ('Config.lr_init = 1e30', 'Config.lr_final = 1e30', 'Config.max_skipped_updates = 5')
    for _ in range(2):
      with pytest.raises(
        nonfinite.NonFiniteError, match=r'in 5 steps, \d to \d: .*checkpoint: .*replay_step \d '
      ):
        program(*bindings)
      assert checkpoints.newest(str(tmp_path / 'run')) == 4
    state, _ = checkpoints.restore_params(
      str(tmp_path / 'run'), run_folder.open_run(str(tmp_path / 'run'))[0]
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))

  def test_replay_of_a_step_outside_the_run(self, program):
    with pytest.raises(ValueError, match=r'--replay_step must be in \[1, 8\], got 9'):
      program(flags=('--replay_step', '9'))
