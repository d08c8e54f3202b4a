"""docs/compatibility.md says what the tests say."""

from compatibility import PAGE, page


def test_the_page_is_written_from_the_tests():
    assert PAGE.read_text() == page(), "run: python tests/compatibility.py"
