"""eval.py and render.py, with a fake renderer."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

from internal import cameras, configs
from internal.commands import eval as eval_program
from internal.commands import render as render_program
from internal.datasets import scenes
from internal.evaluation import lpips
from internal.evaluation import results as results_lib
from internal.rendering import renderer, trained, videos
from internal.training import checkpoints, run_folder, run_seal
from internal.vis import video


def fake_render(params, cams, i, step_fraction=1.0, progress=None):
  """A picture that tells which frame it is, with depths from `params` on."""
  width, height = np.asarray(cams.size)[i]
  shade = np.full((height, width), 0.1 + 0.05 * i, np.float32)
  distance = float(params['w'][0]) + np.linspace(0, 4, width)[None].repeat(height, 0)
  return {
    'rgb': np.stack([shade, 1 - shade, shade], -1),
    'acc': np.ones((height, width), np.float32),
    'distance_median': distance.astype(np.float32),
    'normals': np.tile(np.float32([0, 0.6, -0.8]), (height, width, 1)),
  }


@pytest.fixture
def scene(tmp_path):
  """Five images on disk, the first and the last for testing, one of them in a folder."""
  names = ('a.png', 'b.png', 'c.png', 'd.png', 'sub/e.png')
  (tmp_path / 'data' / 'sub').mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in names:
    picture = Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8))
    picture.save(tmp_path / 'data' / name)
  angle = 2 * np.pi * np.arange(5) / 5
  poses = np.zeros((5, 3, 4))
  back = np.stack([np.cos(angle), np.sin(angle), 0 * angle], -1)
  up = np.tile([0.0, 0, 1], (5, 1))
  poses[...] = np.stack([np.cross(up, back), up, back, back], -1)
  cams = cameras.make_cameras(
    cameras.pixtocam_from_intrinsics(20.0, 20.0, 10.0, 8.0), poses, size=[20, 16]
  )
  return scenes.Scene(
    loader='llff', files=names, names=names, cameras=cams, train=(1, 2, 3), test=(0, 4),
    world_transform=np.eye(4), background='none', bounds=None, report={},
  )  # fmt: skip


class TestStepsToEvaluate:
  def steps(self, monkeypatch, latest, **config):
    """Returns the evaluated steps and the number of waits; `latest` has one entry per poll."""
    polls, naps, at = iter(latest), [], []
    monkeypatch.setattr(checkpoints, 'latest_step', lambda run: at.append(next(polls)) or at[-1])
    monkeypatch.setattr(checkpoints, 'newest', lambda run: at[-1])
    fake_time = SimpleNamespace(sleep=naps.append, time=lambda: 0.0)
    monkeypatch.setattr(eval_program, 'time', fake_time)
    return list(eval_program.steps_to_evaluate('runs/a', configs.Config(**config))), len(naps)

  def test_once_means_the_newest(self, monkeypatch):
    assert self.steps(monkeypatch, [400]) == ([400], 0)

  def test_no_checkpoint_is_an_error(self, monkeypatch):
    with pytest.raises(eval_program.EvalError, match=r'No complete checkpoint in runs/a'):
      self.steps(monkeypatch, [None])

  def test_damaged_checkpoints_are_not_called_missing(self, monkeypatch):
    monkeypatch.setattr(checkpoints, 'latest_step', lambda run: 9)
    monkeypatch.setattr(checkpoints, 'newest', lambda run: None)
    with pytest.raises(eval_program.EvalError, match=r'No intact checkpoint in runs/a/checkpoints'):
      list(eval_program.steps_to_evaluate('runs/a', configs.Config()))

  def test_waiting_mode_evaluates_new_checkpoints_until_the_last(self, monkeypatch):
    latest = [None, None, 100, 100, 300, 1000]
    got = self.steps(monkeypatch, latest, eval_only_once=False, max_steps=1000)
    assert got == ([100, 300, 1000], 5)

  def test_waiting_mode_ends_at_early_exit_steps(self, monkeypatch):
    got = self.steps(monkeypatch, [50], eval_only_once=False, max_steps=1000, early_exit_steps=50)
    assert got == ([50], 0)


class TestSelectImages:
  def select(self, scene, tmp_path, **config):
    return eval_program.select_images(
      configs.Config(**{'data_dir': str(tmp_path / 'data'), **config}), scene
    )

  def test_all_or_some(self, scene, tmp_path):
    assert self.select(scene, tmp_path) == [0, 4]
    assert self.select(scene, tmp_path, eval_render_interval=2) == [0]
    assert self.select(scene, tmp_path, eval_dataset_limit=1) == [0]

  def test_none_is_an_error(self, scene, tmp_path):
    with pytest.raises(eval_program.EvalError, match='no test images'):
      self.select(scene, tmp_path, eval_dataset_limit=0)

  def test_missing_photographs_are_an_error(self, scene, tmp_path):
    with pytest.raises(eval_program.EvalError, match=r'/elsewhere.*Config\.data_dir'):
      self.select(scene, tmp_path, data_dir='/elsewhere')


class TestEvaluate:
  def evaluate(self, scene, tmp_path, **config):
    config = configs.Config(**{'data_dir': str(tmp_path / 'data'), **config})
    settings = dataclasses.replace(tiny.settings(), config=config)
    params = {'w': np.ones(5, np.float32)}
    run = trained.TrainedRun(str(tmp_path), settings, scene, tiny.mesh(1), params, 70)
    eval_program.evaluate(run, [0, 4], fake_render)
    folder = tmp_path / 'eval'
    return folder, json.loads((folder / 'results.json').read_text())

  def test_writes_metrics_and_pictures(self, scene, tmp_path, capsys):
    folder, results = self.evaluate(scene, tmp_path)
    assert [row['name'] for row in results['per_image']] == ['a.png', 'sub/e.png']
    assert results['step'] == 70
    assert results['num_params'] == 5
    names = {p.name for p in folder.iterdir()}
    for kind in ('prediction', 'truth', 'error', 'depth', 'normals', 'sheet'):
      assert {f'000_a_{kind}.png', f'001_sub_e_{kind}.png'} <= names
    assert 'contact_sheet.png' in names
    truth = np.asarray(Image.open(folder / '001_sub_e_truth.png'))
    np.testing.assert_array_equal(truth, np.asarray(Image.open(tmp_path / 'data/sub/e.png')))
    shown = np.asarray(Image.open(folder / '001_sub_e_prediction.png')) / 255.0
    wanted = -10 * np.log10(np.mean((shown - truth / 255.0) ** 2))
    assert results['per_image'][1]['psnr'] == pytest.approx(wanted, abs=1e-3)
    out = capsys.readouterr().out
    assert '2/2 sub/e.png  psnr' in out
    assert f'psnr {results["mean"]["psnr"]:.2f}' in out
    assert results_lib.read(str(folder / 'results.json')) == results  # It fits the schema.

  def test_lpips_is_measured_or_its_absence_explained(self, scene, tmp_path, monkeypatch, capsys):
    def absent():
      raise lpips.LpipsUnavailableError('not here: install it')

    monkeypatch.setattr(lpips, 'load', absent)
    _, results = self.evaluate(scene, tmp_path, eval_save_output=False)
    assert results['lpips']['absent'] == 'not here: install it'
    assert results['mean']['lpips_vgg'] is results['per_image'][1]['lpips_paper'] is None
    assert 'LPIPS is null: not here: install it' in capsys.readouterr().out
    numbers = {'lpips_paper': 0.125, 'lpips_vgg': 0.25}
    monkeypatch.setattr(lpips, 'load', lambda: lambda a, b, mask: numbers)
    _, results = self.evaluate(scene, tmp_path, eval_save_output=False)
    assert results['lpips']['absent'] is None
    assert {k: results['mean'][k] for k in numbers} == numbers

  def test_training_time_and_memory_are_those_up_to_the_step(self, scene, tmp_path):
    _, results = self.evaluate(scene, tmp_path, eval_save_output=False)
    assert results['train_seconds'] is results['train_peak_bytes'] is None
    peaks = {50: 900, 70: 800, 90: 2000}  # A resumed run may need less.
    rows = (
      {'step': s, 'train_seconds': 2.0 * s, 'peak_bytes': float(peaks[s])} for s in (50, 70, 90)
    )
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    _, results = self.evaluate(scene, tmp_path, eval_save_output=False)
    assert (results['train_seconds'], results['train_peak_bytes']) == (140, 900)

  def test_what_was_doubtful_in_training_stays_in_the_results(self, scene, tmp_path, monkeypatch):
    monkeypatch.setattr(run_seal, 'warnings', lambda folder: [f'of {folder}'])
    folder, results = self.evaluate(scene, tmp_path, eval_save_output=False)
    assert results['capture_warnings'] == [*scene.report.get('warnings', ()), f'of {tmp_path}']
    assert f'Warning: of {tmp_path}' in (folder / 'report.html').read_text()

  def test_pictures_can_be_left_out(self, scene, tmp_path):
    folder, _ = self.evaluate(scene, tmp_path, eval_save_output=False)
    assert sorted(os.listdir(folder)) == ['report.html', 'results.json']

  def test_waiting_keeps_the_results_of_each_step(self, scene, tmp_path):
    folder, results = self.evaluate(scene, tmp_path, eval_only_once=False, eval_save_output=False)
    assert json.loads((folder / 'results_000070.json').read_text()) == results

  def test_of_earlier_steps_only_numbers_are_written(self, scene, tmp_path, monkeypatch, capsys):
    settings = dataclasses.replace(
      tiny.settings(), config=configs.Config(data_dir=str(tmp_path / 'data'))
    )
    monkeypatch.setattr(run_folder, 'open_run', lambda folder, bindings: (settings, scene))
    monkeypatch.setattr(checkpoints, 'all_steps', lambda run: [20, 50, 70])
    monkeypatch.setattr(
      checkpoints, 'restore_params', lambda run, settings, step, mesh: ({'w': np.ones(5)}, step)
    )
    made = []
    monkeypatch.setattr(
      renderer, 'make_image_renderer', lambda *_, **__: made.append(1) or fake_render
    )
    eval_program.main([str(tmp_path), '--steps', '50', '20'])
    folder = tmp_path / 'eval'
    assert sorted(os.listdir(folder)) == ['results_000020.json', 'results_000050.json']
    found, notes = results_lib.read_steps(str(tmp_path))
    assert [r['step'] for r in found] == [20, 50]
    assert not notes
    assert len(made) == 1
    assert 'at step 50' in capsys.readouterr().out
    with pytest.raises(eval_program.EvalError, match=r'--steps 30: .*no such.*\[20, 50, 70\]'):
      eval_program.main([str(tmp_path), '--steps', '20', '30'])
    for flags in (['--steps', '20', '--multiscale'], ['--multiscale', '--report_only']):
      with pytest.raises(SystemExit):
        eval_program.main([str(tmp_path), *flags])


@pytest.fixture
def render(scene, tmp_path, monkeypatch):
  """Runs render.py's main; returns the numbers of the full-size frames that it rendered."""
  run = tmp_path / 'run'

  def main(step=7, weights=2.0, stop_after=None, **config):
    config = configs.Config(**{'render_path_frames': 6, **config})
    rendered = []

    def render_image(params, cams, i, fraction):
      if len(cams.size) == 6 and np.asarray(cams.size)[i, 0] >= 20:
        if len(rendered) == stop_after:
          raise KeyboardInterrupt
        rendered.append(i)
      return fake_render(params, cams, i)

    params = {'w': np.full(3, weights, np.float32)}
    settings = dataclasses.replace(configs.load_config(), config=config)
    monkeypatch.setattr(run_folder, 'open_run', lambda folder, bindings: (settings, scene))
    monkeypatch.setattr(checkpoints, 'restore_params', lambda *_, **__: (params, step))
    monkeypatch.setattr(
      renderer, 'make_image_renderer', lambda *_, **told: asked.append(told) or render_image
    )
    monkeypatch.setattr(videos, '_SURVEY_SIDE', 10)
    render_program.main(['--checkpoint_dir', str(run)])
    assert asked[-1] == {'with_normals': config.vis_normals}
    return rendered

  asked, main.folder = [], run / 'render'
  return main


def frames(folder, kind='depth'):
  return {p.name: np.asarray(Image.open(p)) for p in sorted((folder / kind).iterdir())}


class TestRender:
  def test_frames_and_videos(self, render):
    assert render() == list(range(6))
    for kind in ('color', 'depth'):
      assert list(frames(render.folder, kind)) == [f'{k:05d}.png' for k in range(6)]
      assert (render.folder / f'{kind}.mp4').stat().st_size > 300
    color = frames(render.folder, 'color')['00003.png']
    np.testing.assert_array_equal(color[0, 0], [64, 191, 64])

  def test_normals_where_asked_for(self, render):
    render()
    assert not (render.folder / 'normals').exists()
    render(vis_normals=True)
    for picture in frames(render.folder, 'normals').values():
      assert (picture == [128, 204, 26]).all()
    assert (render.folder / 'normals.mp4').exists()

  def test_goes_on_after_an_interruption_on_the_same_depth_scale(self, render, tmp_path):
    with pytest.raises(KeyboardInterrupt):
      render(stop_after=2)
    assert len(frames(render.folder)) == 2
    scale = json.loads((render.folder / 'render.json').read_text())['depth_range']
    assert 1.9 < scale[0] < 2.5
    assert 5.5 < scale[1] < 6.1
    assert render() == [2, 3, 4, 5]
    resumed = frames(render.folder)
    shutil.rmtree(render.folder)
    render()
    for name, picture in frames(render.folder).items():
      np.testing.assert_array_equal(picture, resumed[name])

  def test_a_path_far_from_the_cameras_is_warned_of(self, render, tmp_path, capsys):
    render()
    assert json.loads((render.folder / 'render.json').read_text())['warnings'] == []
    shutil.rmtree(render.folder)
    far = np.tile(np.eye(3, 4), (6, 1, 1))
    far[:, :, 3] = 1000
    np.save(tmp_path / 'far.npy', far)
    render(render_path_file=str(tmp_path / 'far.npy'))
    (warning,) = json.loads((render.folder / 'render.json').read_text())['warnings']
    assert warning.startswith(f'{tmp_path}/far.npy: this camera path stays ')
    assert f'Warning: {warning}' in capsys.readouterr().err

  def test_nothing_is_rendered_twice(self, render):
    render()
    (render.folder / 'depth' / '00004.png').unlink()
    assert render() == [4]
    assert render() == []

  @pytest.mark.parametrize(
    ('change', 'word'),
    [
      ({'step': 8}, r'step 7 \(now 8\)'),
      ({'weights': 3.0}, 'weights'),
      ({'render_path_frames': 5}, r'frames 6 \(now 5\)'),
      ({'render_resolution': (40, 32)}, 'size'),
      ({'z_variation': 1.0, 'z_phase': 0.3}, 'path'),
      ({'render_camtype': 'fisheye'}, 'lens'),
    ],
  )
  def test_frames_of_something_else_are_not_mixed_in(self, render, scene, change, word):
    scene.cameras.camtoworld[1:4, 2, 3] = [0.0, 0.3, -0.3]  # Heights for z_variation.
    with pytest.raises(KeyboardInterrupt):
      render(stop_after=1)
    with pytest.raises(videos.RenderError, match=f'{word}.*render_dir'):
      render(render_dir=str(render.folder), **change)
    assert len(frames(render.folder)) == 1

  @pytest.mark.parametrize(
    ('change', 'name'),
    [
      ({'step': 8}, 'render_step8'),
      ({'weights': 3.0}, 'render_step7'),
      ({'render_path_type': 'orbit'}, 'render_orbit'),
      ({'render_resolution': (40, 32)}, 'render_ellipse'),
      ({'render_path_type': 'orbit', 'step': 8}, 'render_orbit'),
      ({'render_path_file': 'a walk.npy'}, 'render_a_walk'),
    ],
  )
  def test_another_video_gets_a_folder_of_its_own_name(
    self, render, monkeypatch, tmp_path, change, name
  ):
    monkeypatch.chdir(tmp_path)
    np.save('a walk.npy', np.tile(np.eye(3, 4), (6, 1, 1)))
    render()
    before = frames(render.folder)
    with pytest.raises(KeyboardInterrupt):
      render(stop_after=2, **change)
    own = render.folder.parent / name
    assert len(frames(own)) == 2
    assert render(**change) == [2, 3, 4, 5]  # The same command resumes it.
    assert render() == []  # So does the first one.
    for frame, picture in frames(render.folder).items():
      np.testing.assert_array_equal(picture, before[frame])
    assert sorted(p.name for p in render.folder.parent.iterdir()) == ['render', name]

  def test_a_third_video_of_one_name_gets_a_number(self, render):
    for size in ((40, 32), (50, 40), (60, 48)):
      render(render_resolution=size)
    names = sorted(p.name for p in render.folder.parent.iterdir())
    assert names == ['render', 'render_ellipse', 'render_ellipse_2']
    assert render(render_resolution=(50, 40)) == []

  def test_another_folder_may_hold_them(self, render, tmp_path):
    render(stop_after=None)
    assert render(step=8, render_dir=str(tmp_path / 'other')) == list(range(6))
    assert len(frames(tmp_path / 'other')) == 6

  @pytest.mark.parametrize('text', [None, 'half of', '{"step": 7}'])
  def test_frames_of_unknown_origin_are_left_alone(self, render, text):
    render()
    path = render.folder / 'render.json'
    path.unlink()
    if text:
      path.write_text(text)
    with pytest.raises(videos.RenderError, match='Remove the folder'):
      render()

  def test_without_an_encoder_the_frames_stay(self, render, monkeypatch):
    def missing():
      raise video.VideoError('no encoder')

    with monkeypatch.context() as patch:
      patch.setattr(video, 'find_ffmpeg', missing)
      with pytest.raises(video.VideoError):
        render()
    assert render() == []
    assert (render.folder / 'color.mp4').exists()
