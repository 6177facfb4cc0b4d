"""Files are whole or not there."""

from avit_lib.training.files import read_json, write_atomically


def test_atomic_writing_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_atomically(path, b'{"a": 1}')
    write_atomically(path, b'{"a": 2}')
    assert read_json(path) == {"a": 2}
    assert [found.name for found in path.parent.iterdir()] == ["file.json"]
