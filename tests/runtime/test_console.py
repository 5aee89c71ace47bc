from edgeclip.runtime.console import columns


def test_words_are_aligned_to_the_left_and_numbers_to_the_right() -> None:
    rows = (("name", "ms", "note"), ("a longer one", "1", "x"), ("b", "12.5", ""))
    assert columns(rows) == "name            ms  note\na longer one     1     x\nb             12.5"
    assert columns(rows, left=3).splitlines()[1] == "a longer one  1     x"
