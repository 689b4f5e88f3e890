"""Bindings as people type them: text without quotes, and errors that say what to type."""

import os
import shlex

import pytest

from internal import configs


def load(*bindings):
  return configs.load_config((), bindings)


@pytest.mark.parametrize(
  'value',
  ['my_scene', 'data/360/garden', '/abs/path', 'with space', '~other', 'a-b.c', 'ü', '3d_scan'],
)
@pytest.mark.parametrize('form', ['Config.data_dir={}', 'Config.data_dir = {}'])
def test_text_may_lack_its_quotes(form, value):
  assert load(form.format(value)).config.data_dir == value


def test_a_home_folder_without_quotes_is_found():
  assert load('Config.checkpoint_dir=~/x').config.checkpoint_dir == os.path.expanduser('~/x')


def test_names_of_choices_may_lack_their_quotes():
  settings = load('NerfMLP.encoding=grid', 'Model.raydist_fn=log', 'Config.batching=single_image')
  assert settings.nerf_mlp.encoding == 'grid'
  assert settings.model.raydist_fn == 'log'
  assert settings.config.batching == 'single_image'


@pytest.mark.parametrize(
  ('binding', 'value'),
  [
    ("Config.data_dir='a'", 'a'),
    ('Config.data_dir = "it\'s"', "it's"),
    ("Config.data_dir = 'a' # A comment.", 'a'),
    ('Config.data_dir = None', None),
    ("Config.data_dir = ('a'\n 'b')", 'ab'),
  ],
)
def test_what_gin_can_read_stays(binding, value):
  assert load(binding).config.data_dir == value


def test_a_macro_stays_a_macro():
  assert load("WHERE = 'x'", 'Config.data_dir = %WHERE').config.data_dir == 'x'


def test_a_macro_of_an_overridden_setting_is_used(tmp_path):
  path = tmp_path / 'a.gin'
  path.write_text('RATE = 0.5\nHALF = %RATE\nConfig.lr_init = %HALF\n')
  assert configs.load_config([str(path)]).config.lr_init == 0.5
  assert configs.load_config([str(path)], ['Config.lr_init = 0.1']).config.lr_init == 0.1


def test_a_macro_that_nothing_refers_to_is_refused_in_files(tmp_path):
  path = tmp_path / 'a.gin'
  path.write_text('Config.lr_init = 0.5\nmax_steps = 10\n')
  with pytest.raises(
    configs.ConfigError, match=r'a\.gin: max_steps = 10: sets .*Config\.max_steps'
  ):
    configs.load_config([str(path)])


def test_words_that_a_shell_has_split_are_joined():
  words = ['Config.data_dir', '=', 'x', 'Config.factor', '=', '4', 'Config.near', '=', '1']
  config = load(*words).config
  assert (config.data_dir, config.factor, config.near) == ('x', 4, 1)


@pytest.mark.parametrize(
  ('binding', 'words'),
  [
    (
      'Config.batch_size=4k',
      'Config.batch_size=4k: 4k is not a whole number, at least 1, '
      'such as Config.batch_size=16384.',
    ),
    (
      'Model.use_viewdirs=true',
      'Model.use_viewdirs=true: true is not True or False, such as Model.use_viewdirs=True.',
    ),
    (
      'Config.far=',
      'Config.far=: it has no value. Type a number, at least 0, such as Config.far=6.0.',
    ),
    ('Config.data_dri=my_scene', "No setting 'Config.data_dri'. Nearest known: Config.data_dir"),
    ('config.data_dir=my_scene', 'Nearest known: Config.data_dir'),
    ('Confg.batch_size=4k', 'Nearest known: Config.batch_size'),
    ('batch_size=4', 'batch_size = 4: sets nothing without its owner. Write Config.batch_size.'),
    ('net_width = 4', 'Write NerfMLP.net_width or PropMLP.net_width.'),
    ('steps = 10', 'steps = 10: sets nothing; steps is not a setting'),
    ('steps = 10', 'Nearest known: Config.max_steps'),
    ('lr=0.1', 'Nearest known: Config.lr_init'),
    ('batchsize = 64', 'Nearest known: Config.batch_size'),
    ('x = 3', 'x = 3: sets nothing; x is not a setting, and no setting refers to %x.'),
    ('Config.lr_init = %rate', 'Config.lr_init = %rate: there is no rate. Give it a value too'),
    ("Config.loss_mults = {'a': (%b,)}", "Config.loss_mults = {'a': (%b,)}: there is no b"),
    ('rate = %other', 'rate = %other: there is no other'),
    ('Config.factor == 2', "--gin_bindings 'Config.factor == 2': a setting has a name, = and"),
    ('Config.factor = [1', 'Config.factor = [1: cannot be read'),
    ('Config.data_dir', "--gin_bindings 'Config.data_dir': a setting has a name, = and a value"),
    ('runs/x', 'Give all other arguments before --gin_bindings'),
    ('Config.data_dir=2024', "Write '2024', with quotes, if it is text."),
    ('Config.batching=some', "must be one of 'all_images', 'single_image', got 'some'"),
    ('Config.unheard_of_thing=3', '--list_knobs'),
  ],
)
def test_what_cannot_be_read_is_explained(binding, words):
  with pytest.raises(configs.ConfigError) as e:
    load(binding)
  assert words in str(e.value)


@pytest.mark.parametrize('typed', ["it's", "'unbalanced", '"unbalanced', 'a#b'])
def test_the_advice_on_quotes_works_as_typed(typed):
  with pytest.raises(configs.ConfigError) as e:
    load(f'Config.data_dir={typed}')
  advice = str(e.value).split('other quotes: ')[1].removesuffix('.')
  (binding,) = shlex.split(advice)
  assert load(binding).config.data_dir == typed.strip('\'"')
