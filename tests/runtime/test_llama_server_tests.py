"""llama.cpp's own tests of its server, without those that wait for clocks; `tools/server_tests.py` runs all."""

import re
import shutil
import socket
from pathlib import Path

import pytest

from tests.availability import require_server
from tools import server_tests

UNITS = (
    "basic", "chat_completion", "completion", "compat_anthropic", "compat_gcp", "compat_oai_responses", "ctx_shift",
    "ignore_eos", "kv_keep_only_active", "metrics", "security", "slot_save", "template", "tokenize", "tool_call",
)  # fmt: skip
PASSED, DROPPED = 170, 261


@pytest.mark.slow
def test_own_tests_pass(chat_file: Path, pristine_tree: Path, tmp_path: Path) -> None:
    require_server()
    # They leave files in their folder, and read chat templates in that of the models.
    shutil.copytree(pristine_tree / server_tests.TESTS, tmp_path / server_tests.TESTS)
    models = Path("vendor/llama.cpp/models")
    (tmp_path / models).symlink_to(pristine_tree / models)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = server_tests.run(tmp_path, chat_file, [f"unit/test_{name}.py" for name in UNITS], port)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-6000:]
    dropped = sum(map(int, re.findall(r"^dropped (\d+): ", done.stdout, re.MULTILINE)))
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert (int(passed[1]), dropped) == (PASSED, DROPPED)
