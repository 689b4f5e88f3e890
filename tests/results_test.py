import copy
import json
from pathlib import Path

import outcomes
import pytest

from internal.evaluation import results


def test_what_evaluation_writes_fits(tmp_path):
  path = tmp_path / 'results.json'
  content = outcomes.outcome('bonsai', psnr=float('inf'), lpips=0.2)
  results.write_json(str(path), content)
  got = results.read(str(path))
  assert got['mean']['psnr'] is None
  assert got['mean']['lpips_vgg'] == pytest.approx(0.25)


def test_the_schema_is_of_the_version_that_is_written():
  schema = results.schema()
  assert schema['properties']['schema_version']['const'] == results.SCHEMA_VERSION


def test_every_field_is_described():
  def fields(rule, where):
    for name, inner in rule.get('properties', {}).items():
      yield f'{where}.{name}', inner
      yield from fields(inner, f'{where}.{name}')
    if 'items' in rule:
      yield from fields(rule['items'], f'{where}[]')

  found = dict(fields(results.schema(), ''))
  assert len(found) > 40
  for name, rule in found.items():
    assert 'description' in rule, name
    assert {'type', 'const'} & set(rule), name
    if rule.get('type') == 'object' and 'properties' in rule:
      assert set(rule['required']) == set(rule['properties'])
  text = (Path(__file__).parents[1] / 'docs' / 'results.md').read_text()
  for name in results.schema()['properties']:
    assert f'`{name}`' in text, name


def change(content, where, value=None, drop=False):
  content = copy.deepcopy(content)
  *inner, last = where
  at = content
  for name in inner:
    at = at[name]
  if drop:
    del at[last]
  else:
    at[last] = value
  return content


@pytest.mark.parametrize(
  ('where', 'value', 'words'),
  [
    (['num_images'], 3.5, 'num_images must be integer, got 3.5'),
    (['factor'], True, 'factor must be integer, got True'),
    (['protocol', 'quantized'], 1, 'protocol.quantized must be boolean'),
    (['mean', 'psnr'], '25', 'mean.psnr must be number or null'),
    (['per_image', 1, 'width'], None, r'per_image\[1\].width must be integer'),
    (['image_sizes', '40x30'], 'three', 'image_sizes.40x30 must be integer'),
    (['colour'], 1, 'colour is unknown'),
    (['per_image', 2, 'depth'], 1, r'per_image\[2\].depth is unknown'),
  ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path, where, value, words):
  path = outcomes.write(tmp_path / 'r.json', change(outcomes.outcome('a'), where, value))
  with pytest.raises(results.ResultsError, match=f'{path}: {words}'):
    results.read(path)


@pytest.mark.parametrize('where', [['step'], ['device', 'kind'], ['per_image', 0, 'lpips_vgg']])
def test_a_missing_field_is_named(tmp_path, where):
  path = outcomes.write(tmp_path / 'r.json', change(outcomes.outcome('a'), where, drop=True))
  with pytest.raises(results.ResultsError, match=f'{where[-1]} is missing'):
    results.read(path)


@pytest.mark.parametrize('text', ['', '{"a": ', '[1, 2]', '\x00', '{"schema_version": 1}', 'null'])
def test_other_files_are_refused(tmp_path, text):
  path = tmp_path / 'r.json'
  path.write_text(text)
  with pytest.raises(results.ResultsError, match=r'r\.json') as caught:
    results.read(str(path))
  assert 'run eval.py again' in str(caught.value).lower()


def test_another_schema_version_has_its_own_error(tmp_path):
  content = change(outcomes.outcome('a'), ['schema_version'], 1)
  path = outcomes.write(tmp_path / 'r.json', content)
  with pytest.raises(results.ResultsError, match='has schema_version 1, this program reads 2'):
    results.read(path)


def test_no_file(tmp_path):
  with pytest.raises(results.ResultsError, match='No such file'):
    results.read(str(tmp_path / 'r.json'))


def test_is_a_json_schema_that_json_tools_know():
  schema = results.schema()
  assert schema['$schema'].startswith('https://json-schema.org/')
  known = {'$schema', 'title', 'description', 'type', 'properties', 'required', 'items', 'const',
           'additionalProperties'}  # fmt: skip

  def keywords(rule):
    assert set(rule) <= known, json.dumps(rule)[:100]  # Those that `check` heeds, or comments.
    inner = [
      *rule.get('properties', {}).values(),
      rule.get('items'),
      rule.get('additionalProperties'),
    ]
    for part in inner:
      if isinstance(part, dict):
        keywords(part)

  keywords(schema)
