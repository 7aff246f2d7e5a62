"""Find out whether the installed runtime can run a file, by letting llama.cpp load it without reading weights.

It runs in a process of its own, because some malformed files make llama.cpp abort.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from d2q_edge import runtime
from d2q_edge.errors import D2QError
from d2q_edge.runtime.llama_model import Log

TIMEOUT = 120
"""Seconds; it usually takes one."""


def why_not(path: Path) -> str | None:
    """Return one sentence about why the installed runtime (or a missing one) can't run a GGUF file; None if it can."""
    command = [sys.executable, "-m", "d2q_edge.runtime.trial_load", str(path)]
    # The child must find this package, and must not start a debugger when llama.cpp aborts.
    search = filter(None, (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "GGML_NO_BACKTRACE": "1"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
        answer: str | None = json.loads(result.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"llama.cpp has not read its header after {TIMEOUT} seconds"
    except (ValueError, IndexError):
        lines = result.stderr.strip().splitlines()
        said = next((line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line), "")
        return "llama.cpp crashes when it loads the file" + (f": {said.strip()}" if said else "")
    return answer


def attempt(path: Path) -> str | None:
    """Do what why_not does, in this process."""
    try:
        api = runtime.require()
    except D2QError as error:
        return str(error)
    log = Log(api)
    api.llama_backend_init()
    parameters = api.llama_model_default_params()
    parameters.no_alloc = True
    parameters.load_mode = api.LLAMA_LOAD_MODE_NONE
    model = api.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        return log.cause
    api.llama_model_free(model)
    return None


if __name__ == "__main__":
    print(json.dumps(attempt(Path(sys.argv[1]))))
