"""What is published lies in the dataset's folder."""

import pytest
from datasets import Dataset, Image

from trl_spatial.data import prepare_splits


@pytest.mark.parametrize("kind", ["string", "Image"])
def test_only_files_of_the_folder_are_published(tmp_path, monkeypatch, good, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    rows = good["test"].select(range(2))
    rows[0]["chosen"].save(tmp_path / "folder/a.png")
    rows[0]["rejected"].save(tmp_path / "folder/b.png")
    rows[0]["chosen"].save(tmp_path / "secret.png")
    (tmp_path / "folder/link.png").symlink_to(tmp_path / "secret.png")
    inside = "b.png" if kind == "string" else str(tmp_path / "folder/b.png")
    names = [
        inside,
        str(tmp_path / "secret.png"),
        "../secret.png",
        "link.png",
        "/etc/hostname",
        "https://x.invalid/a.png",
    ]
    for name in names:
        table = {"prompt": ["a"], "chosen": [str(tmp_path / "folder/a.png")], "rejected": [name]}
        pairs = Dataset.from_dict(table)
        if kind == "Image":
            if name == "link.png":
                name = str(tmp_path / "folder/link.png")
                pairs = Dataset.from_dict(table | {"rejected": [name]})
            pairs = pairs.cast_column("chosen", Image(decode=False)).cast_column("rejected", Image(decode=False))
        if name == inside:
            assert prepare_splits({"train": pairs}, "folder")["train"][0]["rejected"].size == (32, 32)
        else:
            with pytest.raises(ValueError, match="is not in the dataset's folder"):
                prepare_splits({"train": pairs}, "folder")
