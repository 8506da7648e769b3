"""The README's figures are those of the results, to the letter."""

import readme


def test_the_readme_shows_the_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert f"{readme.BEGIN}\n{readme.table()}{readme.END}" in text
