"""The files of a study's rows and predictions: whole or not there, added once, merged, refused in one line."""

import numpy as np
import pytest

from studies.rows import COLUMNS, StudyRows, key_of
from timm_igkd.errors import InputError, MissingFileError, UserError

ROW = dict.fromkeys(COLUMNS, "") | {"config_hash": "abc", "seed": 0, "device": "cpu"}


def test_a_damaged_csv_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("cell,seed\nKD,0\n")
    with pytest.raises(InputError, match="lacks column 'study'"):
        StudyRows(tmp_path).read()


def test_missing_rows_and_predictions_are_named(tmp_path):
    with pytest.raises(MissingFileError, match="no results to merge"):
        StudyRows(tmp_path / "here").merge(tmp_path / "there")
    with pytest.raises(MissingFileError, match=r"predictions\.npz' does not exist; .* restore it"):
        StudyRows(tmp_path).predictions(("abc", 0))


def test_a_damaged_file_of_predictions_is_refused_in_one_line_or_read_unchanged(tmp_path):
    rows = StudyRows(tmp_path)
    assert rows.add(ROW, np.arange(64) % 5, np.arange(64) % 10)
    whole, key = rows.predictions_path.read_bytes(), key_of(ROW)
    flipped = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(len(whole))]
    said = []
    for damaged in [b"", b"no archive", b"\x93NUMPY", whole[: len(whole) // 2], *flipped]:
        rows.predictions_path.write_bytes(damaged)
        try:
            assert rows.predictions(key).tolist() == (np.arange(64) % 5).tolist()
        except UserError as error:
            said.append(str(error))
    assert len(said) > len(whole) // 4
    assert all("restore" in message and "\n" not in message for message in said)


def test_a_run_is_not_added_to_predictions_that_cannot_be_read(tmp_path):
    rows = StudyRows(tmp_path)
    assert rows.add(ROW, np.arange(8) % 5, np.arange(8) % 10)
    rows.predictions_path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be read"):
        rows.add(ROW | {"seed": 1}, np.arange(8) % 5, np.arange(8) % 10)
    assert len(rows.read()) == 1
    assert rows.predictions_path.read_bytes() == b"no archive"


def test_all_predictions_of_a_study_are_one_file_without_temporaries(tmp_path):
    rows = StudyRows(tmp_path)
    for seed in range(3):
        assert rows.add(ROW | {"seed": seed}, np.full(8, seed), np.arange(8) % 10)
    assert not rows.add(ROW | {"seed": 2}, np.full(8, 7), np.arange(8) % 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "predictions.npz", "results.csv"]
    assert [rows.predictions(("abc", seed))[0] for seed in range(3)] == [0, 1, 2]
    assert rows.labels().dtype == rows.predictions(("abc", 0)).dtype == np.uint8


def test_predictions_of_a_run_that_was_killed_before_its_row_are_replaced(tmp_path):
    rows = StudyRows(tmp_path)
    assert rows.add(ROW, np.zeros(8), np.arange(8) % 10)
    rows.path.unlink()
    assert rows.add(ROW, np.ones(8), np.arange(8) % 10)
    assert rows.predictions(key_of(ROW)).tolist() == [1] * 8


def test_classes_beyond_255_are_kept(tmp_path):
    rows = StudyRows(tmp_path)
    assert rows.add(ROW, np.array([0, 999]), np.array([0, 1]))
    assert rows.predictions(key_of(ROW)).tolist() == [0, 999]


def test_merged_runs_bring_their_predictions_and_diverged_ones_their_row_alone(tmp_path):
    here, there = StudyRows(tmp_path / "here"), StudyRows(tmp_path / "there")
    labels = np.arange(8) % 10
    assert here.add(ROW, np.zeros(8), labels)
    assert there.add(ROW | {"seed": 1}, np.ones(8), labels)
    assert there.add(ROW | {"seed": 2, "diverged_epoch": 3}, None, labels)
    assert here.merge(there.folder) == 2
    assert here.merge(there.folder) == 0
    assert here.run_keys() == {("abc", 0), ("abc", 1), ("abc", 2)}
    assert here.predictions(("abc", 1)).tolist() == [1] * 8
    with pytest.raises(MissingFileError, match="lacks the entry 'abc-2'"):
        here.predictions(("abc", 2))


def test_a_merge_whose_predictions_are_missing_takes_nothing(tmp_path):
    here, there = StudyRows(tmp_path / "here"), StudyRows(tmp_path / "there")
    assert there.add(ROW, np.zeros(8), np.arange(8) % 10)
    there.predictions_path.unlink()
    with pytest.raises(MissingFileError, match="does not exist"):
        here.merge(there.folder)
    assert here.read() == []


def sample(levels):
    maps = np.arange(32 * 16, dtype=np.uint8).reshape(32, 4, 4) % 200
    return {"maps": maps + np.uint8(levels), "logits": np.zeros((32, 2), dtype=np.float32)}


def folder_with_maps(path, seed, maps_hash, given):
    rows, row = StudyRows(path), ROW | {"seed": seed, "maps_hash": maps_hash}
    rows.check(row, given)
    assert rows.add(row, np.zeros(8), np.arange(8) % 10)
    return rows


def test_maps_of_another_machine_that_differ_by_rounding_are_the_same(tmp_path):
    rounded = sample(0)
    rounded["maps"][0, 0, 0] += 4
    rounded["logits"][0, 0] = 1e-5
    here = folder_with_maps(tmp_path / "here", 0, "a", sample(0))
    there = folder_with_maps(tmp_path / "there", 1, "b", rounded)
    assert here.merge(there.folder) == 1
    here.check(ROW | {"seed": 2, "maps_hash": "b"})  # its sample came along
    with pytest.raises(InputError, match=r"other maps \(maps_hash a, this run's is c\); give another output_dir$"):
        here.check(ROW | {"seed": 2, "maps_hash": "c"}, sample(1))
    assert len(here.read()) == 2


@pytest.mark.parametrize("change", [{"maps": np.zeros((32, 8, 8))}, {"logits": np.ones((32, 2))}, {"logits": None}])
def test_maps_of_another_size_or_other_logits_are_other_maps(change, tmp_path):
    here = folder_with_maps(tmp_path / "here", 0, "a", sample(0))
    other = {name: array for name, array in (sample(0) | change).items() if array is not None}
    there = folder_with_maps(tmp_path / "there", 1, "b", other)
    with pytest.raises(InputError, match="holds runs with other maps"):
        here.merge(there.folder)
    with pytest.raises(InputError, match="holds runs with other maps"):
        here.check(ROW | {"seed": 1, "maps_hash": "b"}, other)
    assert len(here.read()) == 1


@pytest.mark.parametrize("known", [True, False])
def test_rounding_is_not_told_from_other_maps_without_a_sample(known, tmp_path):
    here = folder_with_maps(tmp_path / "here", 0, "a", sample(0) if known else None)
    there = folder_with_maps(tmp_path / "there", 1, "b", None if known else sample(0))
    with pytest.raises(InputError, match=r"copy those maps here; without a sample of both in maps\.npz"):
        here.merge(there.folder)


def test_a_damaged_file_of_samples_is_refused_in_one_line(tmp_path):
    rows = folder_with_maps(tmp_path, 0, "a", sample(0))
    (tmp_path / "maps.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"maps\.npz' cannot be read .*; restore it"):
        rows.check(ROW | {"seed": 1, "maps_hash": "b"}, sample(0))
