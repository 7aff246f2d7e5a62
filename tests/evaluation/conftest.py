"""Fixtures that the tests of the runtime have, too."""

from tests.runtime.conftest import no_runtime as no_runtime
