"""bench.runs.damage and bench.runs.kills, a few of each: what is damaged is refused, what is killed loses no bit."""

from bench.runs import damage, kills


def test_a_damaged_file_is_refused_or_makes_no_difference(tmp_path):
    results = dict(damage.test(10, 0, tmp_path))
    assert set(results.values()) <= {'refused', 'no difference'}, results
    assert 'refused' in results.values()


def test_a_run_killed_while_it_saves_ends_as_one_left_alone(tmp_path):
    assert kills.test('saves often', 1, 6, tmp_path) == []
