import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ensemerge.errors import InvalidData
from ensemerge.merge.staging import JOURNAL, staged

HOLD = """
import sys, time
from pathlib import Path
from ensemerge.merge.staging import staged
with staged(Path(sys.argv[1]), "one") as staging:
    (staging.folder / "part.safetensors").write_text("half")
    staging.add("first")
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def another_process(out: Path) -> Iterator[None]:
    """One that has written a tensor and is at the next; killed at the end."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


def test_the_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "merged"
    with staged(out, "one") as staging:
        (staging.folder / "model").write_text("whole")
        assert not out.exists()
    assert [entry.name for entry in out.iterdir()] == ["model"]
    assert [entry.name for entry in out.parent.iterdir()] == ["merged"]


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), staged(tmp_path / "merged", "one") as staging:
        (staging.folder / "model").write_text("half")
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_in_the_tree_of_errors(tmp_path: Path) -> None:
    told = pytest.raises(InvalidData, match="No space left on device; nothing was left behind")
    with told, staged(tmp_path / "merged", "one"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_wrote_is_gone_on_from(tmp_path: Path) -> None:
    with another_process(tmp_path / "merged"):
        pass
    assert not (tmp_path / "merged").exists()
    with staged(tmp_path / "merged", "one") as staging:
        assert (staging.resumed, staging.holds("first"), staging.holds("second")) == (1, True, False)
        assert (staging.folder / "part.safetensors").read_text() == "half"


def test_another_merge_begins_anew(tmp_path: Path) -> None:
    with another_process(tmp_path / "merged"):
        pass
    with staged(tmp_path / "merged", "two") as staging:
        assert staging.resumed == 0
        assert [entry.name for entry in staging.folder.iterdir()] == [JOURNAL]


def test_an_interruption_keeps_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "merged", "one") as staging:
        staging.add("first")
        raise KeyboardInterrupt
    with staged(tmp_path / "merged", "one") as staging:
        assert staging.holds("first")


def test_a_journal_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "merged", "one") as staging:
        staging.add("first")
        raise KeyboardInterrupt
    journal = tmp_path / ".merged.merging" / JOURNAL
    journal.write_text(journal.read_text() + json.dumps("second")[:-2])
    with staged(tmp_path / "merged", "one") as staging:
        assert (staging.holds("first"), staging.holds("second")) == (True, False)


def test_two_processes_cannot_be_at_it(tmp_path: Path) -> None:
    refused = pytest.raises(InvalidData, match="another process is merging into")
    with another_process(tmp_path / "merged"), refused, staged(tmp_path / "merged", "one"):
        pass
    assert (tmp_path / ".merged.merging" / "part.safetensors").exists()


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(InvalidData, match="merged exists"), staged(tmp_path / "merged", "one"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]
