"""Whatever one of a model folder's files has wrong, it is refused in one line, or does no harm."""

import pytest
from models.folder_fuzz import campaign, make_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("folders"))


@pytest.mark.parametrize("suffix, count", [(".json", 60), (".safetensors", 30)])
def test_some_mutations(folders, suffix, count, tmp_path):
    counts, faults = campaign(folders, tmp_path, count, seed=0, suffix=suffix)
    assert not faults, faults
    assert counts["refused"] > counts["taken"] > 0 and counts.total() == count


@pytest.mark.slow
@pytest.mark.parametrize("suffix, count", [(".json", 400), (".safetensors", 120)])
def test_many_mutations(folders, suffix, count, tmp_path):
    counts, faults = campaign(folders, tmp_path, count, seed=1, suffix=suffix)
    print(suffix, dict(counts), "faults", len(faults))
    assert not faults, faults
    assert counts.total() == count
