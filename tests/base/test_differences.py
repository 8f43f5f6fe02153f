"""What differs between two settings: keys by their dotted paths, a missing one as what the caller names for it."""

from gvendi_fast.base.differences import differences, flat


def test_nested_settings_become_dotted_paths_and_an_empty_dict_stays_a_value():
    assert flat({"a": {"b": 1, "c": {"d": [1]}}, "e": {}, 7: None}) == {
        "a.b": 1,
        "a.c.d": [1],
        "e": {},
        "7": None,
    }


def test_differences_name_each_key_once_old_ones_first():
    old, new = {"z": 1, "same": [1], "gone": 2}, {"new": 3, "same": [1], "z": 4}
    assert differences(old, new) == [("z", 1, 4), ("gone", 2, None), ("new", None, 3)]
    assert differences(old, dict(reversed(old.items()))) == []


def test_a_missing_key_is_null_unless_the_caller_tells_them_apart():
    absent = object()
    assert differences({"a": None}, {}) == []
    assert differences({"a": None}, {}, absent) == [("a", None, absent)]
