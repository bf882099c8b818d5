"""The built-in corpus is there, is large enough, and is text."""

from warploom.data.documents import read_documents
from warploom.data.stdlib import stdlib_paths


def test_the_standard_library_is_a_corpus():
    paths = stdlib_paths()
    assert paths == sorted(paths) == sorted(set(paths))
    assert {"argparse.py", "topics.py"} <= {path.name for path in paths}
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & {
        part for p in paths for part in p.parts[-3:]
    }
    assert 8e6 < sum(path.stat().st_size for path in paths) < 40e6
    assert all(text for _, text in read_documents(paths))
