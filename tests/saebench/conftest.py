"""No test of SAEBench reaches further than this machine, and sae_bench's garbage is left lying."""

import socket

import pytest


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path_factory) -> list:
    """The addresses that were asked for, in vain; those of this machine can be reached."""
    import datasets.config

    asked, connect, getaddrinfo = [], socket.socket.connect, socket.getaddrinfo

    def refuse(address):
        asked.append(address)
        raise OSError("no network in this test")

    def connect_here(self, address):
        here = self.family == socket.AF_UNIX or address[0] == "127.0.0.1"
        return connect(self, address) if here else refuse(address)

    def find_here(host, *rest, **options):
        return getaddrinfo(host, *rest, **options) if host == "127.0.0.1" else refuse(host)

    # sae_bench calls it all the time, a third of a second each
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", find_here)
    kept = tmp_path_factory.getbasetemp() / "datasets cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(kept))
    return asked


@pytest.fixture
def offline(network):
    """For evals that never look for the Hub."""
    yield
    assert not network
