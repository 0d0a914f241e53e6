"""Programs that call tilebook, each beside plain PyTorch on the same inputs: run on the CPU and on a GPU alike.

A test here takes a `device`, which the modules that import it supply: tests/test_programs_cpu.py "cpu", those in
tests/gpu "cuda".
"""

import pkgutil

import pytest

pytest.register_assert_rewrite(*(f"programs.{module.name}" for module in pkgutil.iter_modules(__path__)))
