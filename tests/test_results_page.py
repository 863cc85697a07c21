"""RESULTS.md says what the benchmarks wrote."""

import re
import sys

from conftest import ROOT


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import results_page


def test_page_is_up_to_date():
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == results_page.page()


def test_scripts_and_pictures_exist():
    page = results_page.page()
    paths = re.findall(r"\]\((.+?)\)|`python (.+?)`", page)
    assert len(paths) >= 10
    for path in (path for pair in paths for path in pair if path):
        assert (ROOT / path).is_file(), path
