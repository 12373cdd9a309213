import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Answers of servers and benchmarks' data are kept apart from the user's, and from those of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
