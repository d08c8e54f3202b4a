"""Fixtures: single files of every family with few channels and random weights, and folders saved from them."""

from __future__ import annotations

import functools
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from demo.ldm_export import thin, write

from sd_hyena.families import FAMILIES, Family


@dataclass
class Thin:
    """A family with few channels, a single file of it, and the components' state dicts that it was made from."""

    family: Family
    path: Path
    states: dict


@pytest.fixture(scope="session")
def _thin(tmp_path_factory):
    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        family = thin(name, folder)
        torch.manual_seed(0)
        return Thin(family, folder / "model.safetensors", write(family, folder / "model.safetensors"))

    return make


@pytest.fixture
def thin_model(_thin, monkeypatch):
    """``thin_model(name)``: the :class:`Thin` of a family, which stands in for it during the test."""

    def make(name):
        made = _thin(name)
        monkeypatch.setitem(FAMILIES, name, made.family)
        return made

    return make


@pytest.fixture(scope="session")
def _folders(_thin, tmp_path_factory):
    from sd_hyena.models import load_pipeline, locate

    @functools.cache
    def make(name):
        made, folder = _thin(name), tmp_path_factory.mktemp(name) / "model"
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setitem(FAMILIES, name, made.family)
            pipe = load_pipeline(locate(str(made.path)), dtype=torch.float16)
        pipe.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def saved_folder(_folders):
    """``saved_folder(name)``: the diffusers folder saved from a family's thin single file; not to be changed."""
    return _folders


@pytest.fixture
def no_network(monkeypatch):
    """Libraries believe that there is a network, and whoever tries it fails the test; yields the tries."""
    import huggingface_hub.constants

    attempts = []  # also those of threads, and whose failure is caught

    def tried(*args, **kwargs):
        attempts.append(args)
        raise OSError(f"the network was tried: {args}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, tried)
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, tried)
    yield attempts
    assert not attempts
