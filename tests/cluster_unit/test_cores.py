import os

import pytest

from actors.process import num_cores


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("400000 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("6400000 100000", 16), ("max 100000", 16), ("", 16), ("4 0", 16)],
)
def test_a_containers_limit_bounds_the_cores(tmp_path, sixteen_cores, cpu_max, cores):
    (tmp_path / "cpu.max").write_text(f"{cpu_max}\n")
    assert num_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("800000", 8), ("-1", 16)])
def test_so_does_one_of_cgroup_v1(tmp_path, sixteen_cores, quota, cores):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert num_cores(tmp_path) == cores


def test_without_cgroup_files_there_is_no_limit(tmp_path, sixteen_cores):
    assert num_cores(tmp_path) == 16
