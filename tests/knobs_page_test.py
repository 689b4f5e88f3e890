"""The list of settings and its page are what configs.py says."""

import dataclasses
import pathlib

import pytest

from internal import configs, knobs

ROOT = pathlib.Path(__file__).parents[1]


def all_knobs():
  return {knob.name: knob for group in knobs.groups() for knob in group.knobs}


def test_the_page_is_up_to_date():
  assert (ROOT / 'docs' / 'knobs.md').read_text() == knobs.markdown(), (
    'Run: python -m internal.knobs > docs/knobs.md'
  )


@pytest.mark.parametrize('owner', [configs.Config, configs.Model, configs.NerfMLP])
def test_every_setting_is_listed_with_a_meaning(owner):
  listed = all_knobs()
  for field in dataclasses.fields(owner):
    knob = listed[f'{owner.__name__}.{field.name}']
    assert len(knob.meaning) > 15, knob
    assert knob.kind, knob
    assert '...' not in (knob.meaning[:3], knob.meaning[-3:])  # Each can be read alone.


@pytest.mark.parametrize(
  ('name', 'kind', 'default', 'meaning', 'section'),
  [
    ('Config.factor', 'a whole number, at least 0', '0',
     'Downsampling factor: use images_<factor>/ (0: images/ at full size).', 'Data'),
    ('Config.data_dir', 'text or None', 'None', 'Folder of the capture.', 'Data'),
    ('Config.randomized', 'True or False', 'True',
     'Random jitter, noise and backgrounds in training (False: none).', 'Training'),
    ('Config.charb_padding', 'a number, above 0', '0.001',
     'Charbonnier loss sqrt(r^2 + padding^2): quadratic below this.', 'Training'),
    ('Config.loss_mults', 'a dictionary from text to numbers', '{}',
     'Multiplier of each plugged-in loss by name; those without one are not computed.', 'Training'),
    ('Config.render_path_type', "'ellipse' or 'spiral' or 'orbit' or 'dolly' or None", 'None',
     "None: 'spiral' for forward-facing captures, else 'ellipse'.", 'Rendering'),
    ('Config.render_video_crf', 'a whole number, 0 to 51', '18',
     'Compression of the video: 0 (lossless) to 51 (smallest).', 'Rendering'),
    ('Model.bg_intensity_range', 'a tuple of numbers, 0 to 1', '(1.0, 1.0)',
     '(low, high): random grey in training.', ''),
  ],
)  # fmt: skip
def test_a_setting_is_described_by_its_field(name, kind, default, meaning, section):
  knob = all_knobs()[name]
  assert (knob.kind, knob.default, knob.meaning, knob.section) == (kind, default, meaning, section)


def test_settings_without_effect_say_why():
  assert all_knobs()['Config.render_path'].meaning.startswith('No effect: render.py renders')
