"""Tests of which ways of mapping are tried, and which result is kept."""

import dataclasses

import pytest

from internal.sfm import evidence, mapping, photos, reconstruction


@dataclasses.dataclass
class Model:
  posed: int

  def num_reg_images(self):
    return self.posed


def outcome(name, posed, contradicted, in_order=0):
  pairs = tuple((f'{k}.jpg', f'{k + 1}.jpg') for k in range(contradicted))
  return mapping.Attempt(name, [Model(posed)], evidence.Evidence(100, pairs, in_order, 0.01))


class Attempts(mapping._Mapping):
  """Attempts whose outcomes are given: posed photographs, contradicted pairs, those in order."""

  def __init__(self, outcomes, count=20):
    self.names, self.attempts, self._outcomes = [f'{k}.jpg' for k in range(count)], [], outcomes

  def attempt(self, name, make=None):
    if self._outcomes[name] is None:
      raise photos.PosesError(f'{name} failed.')
    self.attempts.append(outcome(name, *self._outcomes[name]))

  run = attempt

  def without_look_alikes(self):
    self.attempt('repair')

  def along_the_order(self):
    self.attempt('order')

  def with_more_pairs(self):
    self.attempt('more')


@pytest.mark.parametrize(
  ('outcomes', 'tried', 'best'),
  [
    ({'global': (20, 0)}, ['global'], 'global'),
    ({'global': (20, 3), 'incremental': (19, 0)}, ['global', 'incremental'], 'incremental'),
    # Photographs without a pose, but nothing contradicted: other matches would not help.
    ({'global': (15, 0), 'incremental': (14, 0)}, ['global', 'incremental'], 'global'),
    (
      {'global': (20, 5), 'incremental': (20, 4), 'repair': (20, 0)},
      ['global', 'incremental', 'repair'],
      'repair',
    ),
    (
      {'global': (20, 5), 'incremental': (20, 4), 'repair': (20, 9), 'order': (20, 0)},
      ['global', 'incremental', 'repair', 'order'],
      'order',
    ),
    (
      {
        'global': (20, 5),
        'incremental': (20, 4),
        'repair': (20, 9),
        'order': (20, 3),
        'more': (20, 2),
      },
      ['global', 'incremental', 'repair', 'order', 'more'],
      'more',
    ),
    # Neighbours that contradict the poses weigh more than look-alikes, and than photographs lost.
    (
      {
        'global': (20, 2, 1),
        'incremental': (17, 30),
        'repair': (15, 0),
        'order': (20, 3, 2),
        'more': (16, 40),
      },
      ['global', 'incremental', 'repair', 'order', 'more'],
      'incremental',
    ),
    ({'global': None, 'incremental': (20, 0)}, ['incremental'], 'incremental'),
  ],
)
def test_other_ways_are_tried_until_nothing_is_contradicted(outcomes, tried, best):
  attempts = Attempts(outcomes)
  mapping._map_until_settled(attempts)
  assert [attempt.name for attempt in attempts.attempts] == tried
  assert attempts.best().name == best


def test_large_captures_are_mapped_hierarchically_in_the_second_attempt():
  attempts = Attempts({'global': (1500, 0), 'hierarchical': (2000, 0)}, 2000)
  mapping._map_until_settled(attempts)
  assert attempts.best().name == 'hierarchical'


def test_two_failures_are_an_error():
  with pytest.raises(photos.PosesError, match='could not map'):
    mapping._map_until_settled(Attempts({'global': None, 'incremental': None}))


def test_all_pairs_of_the_photographs_in_question_are_matched(monkeypatch):
  attempts = Attempts({'global': (5, 1), 'global with more pairs': (5, 0)}, 5)
  attempts.scene_dir = 'scene'
  attempts.matches = type('Matches', (), {'pairs': [1, 2]})
  attempts.attempt('global')
  wanted = []
  monkeypatch.setattr(reconstruction, 'match_pairs', lambda *args: wanted.append(args))
  more = type('Matches', (), {'pairs': [1, 2, 3]})
  monkeypatch.setattr(evidence, 'Matches', lambda *_: more)
  mapping._Mapping.with_more_pairs(attempts)
  pairs = {(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)}
  assert wanted == [('scene', attempts.names, pairs)]
  assert attempts.best().name == 'global with more pairs'


NEAR, MIDDLE, FAR, FALSE = (evidence.Pair(*names, None) for names in ('ab', 'ac', 'ad', 'ae'))
WITHIN_2, WITHIN_5 = 'global within 2 in order', 'global within 5 in order'
AGREES = ' and what agrees'


@pytest.mark.parametrize(
  ('posed', 'ordered', 'tried', 'best'),
  [
    (40, True, {WITHIN_2: [MIDDLE, FAR, FALSE], WITHIN_2 + AGREES: [FALSE]}, WITHIN_2 + AGREES),
    # Neighbours do not join all photographs.
    (
      25,
      True,
      {WITHIN_2: [MIDDLE, FAR, FALSE], WITHIN_5: [FALSE], WITHIN_5 + AGREES: [FALSE]},
      WITHIN_5 + AGREES,
    ),
    (40, False, {}, 'global'),
  ],
)
def test_the_repair_along_the_order_drops_far_pairs_then_those_that_disagree(
  posed, ordered, tried, best
):
  class Matches:
    pairs, neighbours, is_ordered = (NEAR, MIDDLE, FAR, FALSE), 2, ordered
    apart = staticmethod(lambda pair: {NEAR: 2, MIDDLE: 4, FAR: 5, FALSE: 20}[pair])

    def contradicting(self, model, tolerance):
      assert (model.posed, tolerance) == (40, mapping._DRIFT)
      return [FALSE]

  outcomes = {'global': (40, 9, 3), WITHIN_2: (posed, 8), WITHIN_2 + AGREES: (40, 7)}
  outcomes |= {WITHIN_5: (40, 8), WITHIN_5 + AGREES: (40, 7)}
  attempts, dropped = Attempts(outcomes, 40), {}
  attempts.matches = Matches()
  attempts.run('global')

  def without(name, pairs):
    dropped[name] = pairs
    attempts.attempt(name)

  attempts.without = without
  mapping._Mapping.along_the_order(attempts)
  assert dropped == tried
  assert attempts.best().name == best


def test_a_repair_that_fails_does_not_undo_the_others(capsys):
  attempts = Attempts({'global': (20, 5), 'incremental': (20, 4), 'repair': None, 'order': (20, 0)})
  mapping._map_until_settled(attempts)
  assert attempts.best().name == 'order'
  assert 'repair failed' in capsys.readouterr().out


@pytest.mark.parametrize('sign', [{'folded': 0.4}, {'beside': 1}])
def test_a_folded_result_comes_after_one_that_look_alikes_contradict(sign):
  attempts = Attempts({})
  folded, right = outcome('folded', 20, 1), outcome('right', 20, 30)
  folded = dataclasses.replace(folded, evidence=dataclasses.replace(folded.evidence, **sign))
  attempts.attempts = [folded, right]
  assert attempts.best() is right


def test_of_equal_results_the_one_from_more_pairs_is_kept():
  attempts = Attempts({})
  fewer, more = (dataclasses.replace(outcome(str(n), 20, 3), dropped=n) for n in (90, 10))
  attempts.attempts = [fewer, more]
  assert attempts.best() is more
