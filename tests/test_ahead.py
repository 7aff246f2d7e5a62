"""When transformers' models are imported, and that nobody waits for them who doesn't need them."""

import ctypes
import gc
import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d2q_edge import ahead
from tests.checkpoints import EXAMPLE
from tests.command_line import Call

HEAVY = "transformers.modeling_utils"
FACTS = """
import json, sys, threading
from d2q_edge import ahead, conversion
seen = {}
split = conversion.split_windows

def tokenize(*arguments):
    seen["begun"] = any(thread._target is ahead._import for thread in threading.enumerate()) or HEAVY in sys.modules
    return split(*arguments)

conversion.split_windows = tokenize
from d2q_edge.cli import main
try:
    main()
except SystemExit as end:
    seen |= {"code": end.code or 0, "imported": HEAVY in sys.modules}
print(json.dumps(seen))
"""


def convert(tmp_path: Path, *arguments: str, program: str = FACTS) -> tuple[dict[str, object], str]:
    """What a process of its own, in which nothing is imported yet, tells about itself; and its messages."""
    command = [sys.executable, "-c", program.replace("HEAVY", repr(HEAVY)), "convert", str(EXAMPLE)]
    command += ["-o", str(tmp_path / "out.gguf"), "--no-verify", "--calibration-tokens", "512", *arguments]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=300)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("option", ["--dry-run", "--no-calibration"])
def test_what_needs_no_models_imports_none(tmp_path: Path, option: str) -> None:
    facts, messages = convert(tmp_path, option)
    assert not facts.pop("begun", False)
    assert facts == {"code": 0, "imported": False}, messages


def test_bad_input_imports_none(tmp_path: Path) -> None:
    facts, messages = convert(tmp_path, "--calibration", "nowhere.txt")
    assert facts == {"code": 1, "imported": False}
    assert "can't read the text nowhere.txt" in messages


def test_a_text_is_tokenized_meanwhile(tmp_path: Path) -> None:
    facts, messages = convert(tmp_path)
    assert facts == {"begun": True, "code": 0, "imported": True}, messages


FAILING = """
import sys
from d2q_edge import ahead

class Nothing:
    def find_spec(self, name, path, target=None):
        if name == HEAVY:
            raise RuntimeError("no memory for models")

sys.meta_path.insert(0, Nothing())
""" + FACTS.lstrip()


def test_an_import_that_fails_is_one_sentence(tmp_path: Path) -> None:
    """It fails in the thread, without a word, and again where the models are needed."""
    facts, messages = convert(tmp_path, program=FAILING)
    assert facts == {"begun": True, "code": 1, "imported": False}
    assert "transformers can't build the model" in messages
    assert "Traceback" not in messages
    assert "Thread" not in messages


def test_a_process_may_end_meanwhile(tmp_path: Path) -> None:
    program = "from d2q_edge import ahead; import d2q_edge.tokenizer.original; ahead.begin(); raise SystemExit(3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()], ids=repr)
def test_a_thread_that_does_not_start_hinders_nobody(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Also Ctrl-C in a notebook, whose next conversion comes here again."""

    def fail(_: threading.Thread) -> None:
        raise error

    monkeypatch.setattr(ahead, "_threads", [])
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                ahead.begin()
        else:
            ahead.begin()
    ahead.begin()
    ahead.wait()


def test_two_threads_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them imports, and both wait for that."""
    failures: list[BaseException] = []
    imported: list[None] = []
    monkeypatch.setattr(ahead, "_import", lambda: imported.append(None))

    def both(together: threading.Barrier) -> None:
        together.wait()
        try:
            ahead.begin()
            ahead.wait()
        except BaseException as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(300):
            monkeypatch.setattr(ahead, "_threads", [])
            together = threading.Barrier(2)
            threads = [threading.Thread(target=both, args=(together,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures
            assert len(imported) == number + 1
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_looks_for_garbage(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), ahead.no_garbage():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


class Driver:
    """In place of NVIDIA's."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    def cuInit(self, flags: int) -> int:
        self.calls.append((flags, threading.current_thread() is threading.main_thread()))
        return 0


@pytest.mark.parametrize("missing", [False, True])
def test_the_driver_is_woken_by_a_thread(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, names = Driver(), []

    def load(name: str) -> Driver:
        names.append(name)
        if missing:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    monkeypatch.setattr(ctypes, "CDLL", load)
    before = set(threading.enumerate())
    ahead.wake_driver()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert names == ["libcuda.so.1"]
    assert driver.calls == ([] if missing else [(0, False)])
    assert not failures


@pytest.mark.parametrize(
    ("options", "woken"),
    [([], True), (["--device", "cuda"], True), (["--device", "cpu"], False), (["--type", "f16"], False)],
)
def test_who_may_use_a_gpu_wakes_it(
    options: list[str], woken: bool, d2q: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(importlib.import_module("d2q_edge.cli.convert"), "wake_driver", lambda: calls.append(None))
    d2q("convert", tmp_path / "no such model", "-o", tmp_path / "out.gguf", *options)
    assert len(calls) == woken
