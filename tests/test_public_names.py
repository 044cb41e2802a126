"""What `import tcompress` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tcompress


@pytest.mark.parametrize("name", sorted(set(tcompress.__all__) - {"__version__"}))
def test_every_public_name_resolves_and_is_documented(name):
    found = getattr(tcompress, name)
    assert found.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tcompress' has no attribute 'comprss'"):
        tcompress.comprss  # noqa: B018


def test_importing_the_package_does_not_import_torch():
    program = "import sys, tcompress; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
