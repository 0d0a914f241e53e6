"""Which GPU a name means."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest

from tilebook import device as devices
from tilebook.errors import UsageError


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("H200", "NVIDIA H200"),
        ("nvidia h200", "NVIDIA H200"),
        ("a100", "NVIDIA A100"),
        ("L4", "NVIDIA L4"),
        ("rtx 4090", "NVIDIA GeForce RTX 4090"),
        ("AMD MI300X", "AMD Instinct MI300X"),
        ("MI300X", "AMD Instinct MI300X"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
    ],
)
def test_a_model_is_named_by_whole_words(name, model):
    assert devices.find(name).name == model


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("H20", "NVIDIA H200"), ("A10", "NVIDIA A100"), ("L40S", "NVIDIA L4"), ("B300", "NVIDIA B200")],
)
def test_a_model_that_is_not_known_is_no_other_but_the_nearest_are_named(name, nearest):
    with pytest.raises(UsageError, match="not in the catalogue") as refused:
        devices.find(name)
    assert nearest in str(refused.value).split("nearest first: ")[1].split(", ")[:2]


@pytest.mark.parametrize("name", ["", " ", "GeForce 256", "GH200", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_other_names_are_refused(name):
    with pytest.raises(UsageError, match="not in the catalogue"):
        devices.find(name)


def test_a_name_that_fits_several_is_ambiguous():
    with pytest.raises(UsageError, match="ambiguous: NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 5090"):
        devices.find("RTX")


@pytest.mark.parametrize(
    ("here", "model"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA H100 PCIe", "NVIDIA H100"),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_gpu_here_belongs_to_a_model_or_to_none(here, model):
    gpu = dataclasses.replace(devices.find("H200"), name=here)
    found = [each.name for each in devices.CATALOGUE.values() if devices.is_here(each, gpu)]
    assert found == ([model] if model else [])
    assert devices._similar(here) == (devices.CATALOGUE[model] if model else None)


def test_who_poses_as_a_gpu_has_it_for_a_while_and_in_its_own_thread_alone(monkeypatch):
    here, absent = devices.find("H100"), devices.find("B200")
    monkeypatch.setattr(devices, "_present", lambda index: here)
    with devices.posing_as(absent):
        assert devices.current() == devices.current(3) == absent
        with ThreadPoolExecutor(1) as other:
            assert other.submit(devices.current).result() == here
    assert devices.current() == here
