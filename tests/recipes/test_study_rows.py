"""The files of a study's rows and predictions: whole or not there, added once, merged, refused in one line."""

import json

import numpy as np
import pytest

from studies.rows import COLUMNS, StudyRows, key_of
from timm_igkd.errors import InputError, MissingFileError, UserError

ROW = dict.fromkeys(COLUMNS, "") | {"config_hash": "abc", "seed": 0, "device": "cpu"}


def test_a_damaged_csv_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("cell,seed\nKD,0\n")
    with pytest.raises(InputError, match="lacks column 'study'"):
        StudyRows(tmp_path).read()


def test_rows_of_a_newer_version_are_refused_before_a_run_is_lost(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(",".join([*COLUMNS, "new_metric"]) + "\n")
    with pytest.raises(InputError, match="has a column 'new_metric' that this version does not know"):
        StudyRows(tmp_path).check(ROW)


@pytest.mark.parametrize("change", [lambda line: line[:-9], lambda line: line + ",1", lambda line: "x" + line])
def test_a_line_that_is_not_whole_is_named(tmp_path, change):
    rows = StudyRows(tmp_path)
    rows.add({**ROW, "study": "s"}, np.arange(4), np.arange(4))
    header, line = rows.path.read_text().splitlines()
    seed = line.replace("abc,0,", "abc,no number,")
    rows.path.write_text(f"{header}\n{line}\n{change(line) if change('') != 'x' else seed}\n")
    with pytest.raises(InputError, match=r"run 2 of .*results\.csv is not whole"):
        rows.read()


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


def row_of_maps(seed, maps_hash, means, **cell):
    row = ROW | {"seed": seed, "maps_hash": maps_hash, "settings": json.dumps({"cell": {"overlay_prob": 0.1} | cell})}
    return row | {"maps_means": " ".join(f"{mean:.3f}" for mean in means)}


def added(folder, *rows):
    study = StudyRows(folder)
    for row in rows:
        assert study.add(row, np.zeros(8), np.arange(8) % 10)
    return study


MEANS = [20.0] * 32


def test_maps_that_another_processor_rounded_are_the_same(tmp_path):
    here = added(tmp_path / "here", row_of_maps(0, "a", MEANS))
    there = added(tmp_path / "there", row_of_maps(1, "b", [20.28, *MEANS[1:]]), row_of_maps(2, "c", MEANS))
    assert here.merge(there.folder) == 2
    assert added(tmp_path / "empty").merge(here.folder) == 3
    assert {row["maps_hash"] for row in here.read()} == {"a", "b", "c"}


@pytest.mark.parametrize("means", [[20.36, *MEANS[1:]], [20.011] * 32, MEANS[1:], []])
def test_other_maps_are_refused_however_they_come(means, tmp_path):
    """0.36 levels in one of 32 maps are 0.011 on average; means of fewer maps, or of none, tell nothing."""
    here = added(tmp_path / "here", row_of_maps(0, "a", MEANS))
    other = row_of_maps(1, "b", means)
    for refused in (
        lambda: here.check(other),
        lambda: added(here.folder, other),
        lambda: here.merge(added(tmp_path / "there", other).folder),
    ):
        with pytest.raises(InputError, match=r"other maps \(maps_hash a, this run's is b\); give another output_dir$"):
            refused()
    assert len(here.read()) == 1


def test_maps_of_rows_without_means_are_the_same_where_the_study_decides_it(tmp_path):
    here = StudyRows(tmp_path / "here", same_maps=("a", "b"))
    added(here.folder, row_of_maps(0, "a", []))
    here.check(row_of_maps(1, "b", MEANS))
    assert here.add(row_of_maps(1, "b", MEANS), np.zeros(8), np.arange(8) % 10)
    assert here.merge(added(tmp_path / "there", row_of_maps(2, "b", MEANS)).folder) == 1
    here.check(row_of_maps(3, "c", [20.001] * 32))  # a third processor's: but for rounding those of b, so also of a
    with pytest.raises(InputError, match=r"other maps \(maps_hash [ab], this run's is d\)"):
        here.check(row_of_maps(4, "d", [21.0] * 32))
    with pytest.raises(InputError, match=r"other maps \(maps_hash [ab], this run's is d\)"):
        here.check(row_of_maps(4, "d", []))


def test_a_decision_does_not_outweigh_means_that_differ(tmp_path):
    here = StudyRows(tmp_path, same_maps=("a", "b"))
    added(here.folder, row_of_maps(0, "a", MEANS))
    with pytest.raises(InputError, match=r"other maps \(maps_hash a, this run's is b\)"):
        here.check(row_of_maps(1, "b", [99.0] * 32))


def test_two_rows_of_other_maps_are_refused_in_one_merge(tmp_path):
    there = added(tmp_path / "there", row_of_maps(0, "a", MEANS))
    text = there.path.read_text().replace("abc,0", "abc,1").replace(",a,", ",b,").replace("20.000", "21.000")
    there.path.write_text(there.path.read_text() + text.splitlines()[1] + "\n")
    with np.load(there.predictions_path) as arrays:
        np.savez(there.predictions_path, **arrays, **{"abc-1": arrays["abc-0"]})
    with pytest.raises(InputError, match="holds runs with other maps"):
        StudyRows(tmp_path / "here").merge(there.folder)
    assert StudyRows(tmp_path / "here").read() == []


def test_maps_of_one_store_are_compared_and_those_of_two_are_not(tmp_path):
    rows = added(
        tmp_path,
        row_of_maps(0, "a", MEANS),
        row_of_maps(1, "b", [90.0] * 32, map_method="saliency"),
        row_of_maps(2, "c", [120.0] * 32, overlay_source="random_teacher"),
    )
    for cell in ({}, {"map_method": "saliency"}, {"overlay_source": "random_teacher"}):
        with pytest.raises(InputError, match="other maps"):
            rows.check(row_of_maps(3, "d", [50.0] * 32, **cell))


def test_other_transfer_images_are_refused_and_rows_from_before_their_hash_are_not(tmp_path):
    rows = added(tmp_path, ROW, ROW | {"seed": 1, "transfer_hash": "a"})
    with pytest.raises(InputError, match="other transfer images"):
        rows.check(ROW | {"seed": 2, "transfer_hash": "b"})
    rows.check(ROW | {"seed": 2, "transfer_hash": "a"})


@pytest.mark.parametrize("means", ["20 x", "nan", "1 2 3"])
def test_means_that_are_no_numbers_are_other_maps(means, tmp_path):
    rows = added(tmp_path, row_of_maps(0, "a", [1.0, 2.0]))
    with pytest.raises(InputError, match="other maps"):
        rows.check(row_of_maps(1, "b", []) | {"maps_means": means})
