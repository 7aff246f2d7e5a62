"""The list of dropped tests is one of tests that exist."""

import json
from pathlib import Path

from tools import server_tests


def test_every_dropped_test_exists(pristine_tree: Path) -> None:
    tests = pristine_tree / server_tests.TESTS
    for begins in json.loads(server_tests.DROPPED.read_text("utf-8")).values():
        for begin in begins:
            file, _, name = begin.partition("::")
            assert (
                f"def {name.partition('[')[0]}" in (tests / file).read_text("utf-8")
                if name
                else (tests / file).is_file()
            )
