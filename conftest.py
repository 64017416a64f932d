"""Notebooks under nbval: what builds on a cell that failed is skipped, not failed or waited for."""

from __future__ import annotations

import pytest

# It installs packages: tests/test_colab.py runs it in an environment of its own.
collect_ignore_glob = ["notebooks/colab_*.ipynb"]
_failed: list[str] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.suffix == ".ipynb" and _failed:
        pytest.skip(f"{_failed[0]} failed before")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and ".ipynb" in report.nodeid:
        _failed.append(report.nodeid)
