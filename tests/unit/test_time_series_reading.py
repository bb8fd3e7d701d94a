"""Readers of UCR and UEA files: every format and form, every refusal in one line."""

import gzip
import importlib.util
import re
import sys

import numpy as np
import pytest

from datamodules import TimeSeriesDataModule
from datamodules.sources.series import class_name, find_set, read_series
from datamodules.synthetic_series import synthetic_series

needs_sktime = pytest.mark.skipif(importlib.util.find_spec("sktime") is None, reason="needs [timeseries]")

TS = "@problemName Walk\n@timeStamps false\n@univariate true\n@equalLength true\n@classLabel true a b\n@data\n"
VARYING = TS.replace("@equalLength true", "@equalLength false")
CHANNELS = TS.replace("@univariate true", "@univariate false\n@dimensions 2")
ARFF = "@relation Walk\n@attribute t0 numeric\n@attribute t1 numeric\n@attribute target {a,b}\n@data\n"
BAGS = (
    "@relation Walk\n@attribute Walk relational\n@attribute t0 numeric\n@attribute t1 numeric\n@end Walk\n"
    "@attribute target {a,b}\n@data\n"
)


def written(folder, content, ending=".ts", part="TRAIN"):
    path = folder / f"Walk_{part}{ending}"
    path.write_text(content)
    return path


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def equal_sets(read, split):
    assert np.array_equal(read.values, split.series)
    assert np.array_equal(read.lengths, split.lengths)
    assert read.labels == tuple(str(label + 1) for label in split.labels)


# Round trips of a generator that writes exact values


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("ending", [".ts", ".tsv", ".txt", ".arff"])
def test_every_format_gives_back_what_was_written(tmp_path, ending, packed):
    drawn = synthetic_series(7, 5, n_steps=17, n_classes=3, seed=3)
    train, test = find_set(str(drawn.write(tmp_path, "Walk", ending + packed)), None)
    assert (train.name, test.name) == (f"Walk_TRAIN{ending}{packed}", f"Walk_TEST{ending}{packed}")
    equal_sets(read_series(train), drawn.train)
    equal_sets(read_series(test), drawn.test)


@pytest.mark.parametrize(("ending", "varies"), [(".ts", False), (".ts", True), (".arff.gz", False)])
def test_several_channels_and_lengths(tmp_path, ending, varies):
    drawn = synthetic_series(6, 4, n_steps=20, n_channels=3, rule="mean", variable_length=varies, seed=1)
    train, _ = find_set(str(drawn.write(tmp_path, "Walk", ending)), None)
    read = read_series(train)
    equal_sets(read, drawn.train)
    assert read.may_vary is varies
    assert read.values.shape == (6, 20, 3)
    assert read.declared == ("1", "2")


# Forms the archive has


@pytest.mark.parametrize("separator", ["\t", ",", " ", "   ", " , "])
def test_separators_of_text_files(tmp_path, separator):
    rows = [["1.0000000e+00", "-1.5", "2e-3"], ["-1", "0", "3"]]
    path = written(tmp_path, "".join(separator.join(row) + separator.strip(" ,") + "\r\n" for row in rows), ".txt")
    read = read_series(path)
    assert read.values[..., 0].tolist() == [[-1.5, 0.002], [0, 3]]
    assert read.labels == ("1", "-1")


def test_series_of_the_archive_that_end_in_nan_are_shorter(tmp_path):
    """Unequal lengths in ``.tsv``: rows of one width, filled up with NaN."""
    read = read_series(written(tmp_path, "1\t2\t3\tNaN\n2\t4\t5\t6\n1\t7\tnan\tNaN\r\n", ".tsv"))
    assert (read.lengths.tolist(), read.may_vary) == ([2, 3, 1], True)
    assert read.values[..., 0].tolist() == [[2, 3, 0], [4, 5, 6], [7, 0, 0]]
    assert not read_series(written(tmp_path, "1\t2\t3\n2\t4\t5\n", ".tsv")).may_vary


def test_leading_blanks_empty_lines_and_a_byte_order_mark(tmp_path):
    path = written(tmp_path, "\ufeff  1  2.5 3\n\n  2  4 5\n\n", ".txt")
    assert read_series(path).values[..., 0].tolist() == [[2.5, 3], [4, 5]]


def test_header_of_ts_in_any_case_with_comments(tmp_path):
    header = TS.replace("@classLabel true", "@CLASSLABEL\tTrue").replace("@data", "@Data")
    path = written(tmp_path, f"# note: {header.splitlines()[0]}\n{header}# note\n1,2:a\n3, 4 : b\n")
    read = read_series(path)
    assert (read.values[..., 0].tolist(), read.labels) == ([[1, 2], [3, 4]], ("a", "b"))


def test_channels_of_ts_are_columns(tmp_path):
    read = read_series(written(tmp_path, CHANNELS.replace("true\n@class", "false\n@class") + "1,2,3:4,5,6:a\n7:8:b\n"))
    assert read.values.tolist() == [[[1, 4], [2, 5], [3, 6]], [[7, 8], [0, 0], [0, 0]]]
    assert read.lengths.tolist() == [3, 1]


def test_quotes_and_comments_of_arff(tmp_path):
    header = ARFF.replace("{a,b}", "{ 'a', \"b\" }").upper().replace("'A', \"B\"", "'a', \"b\"")
    read = read_series(written(tmp_path, f"% note\n{header}1,2,'a'\n% note\n3,4,b\n", ".arff"))
    assert (read.labels, read.declared) == (("a", "b"), ("a", "b"))
    read = read_series(written(tmp_path, BAGS + "\"1,2\\n3,4\",a\n'5,6\\n7,8' , b\n", ".arff"))
    assert read.values.tolist() == [[[1, 3], [2, 4]], [[5, 7], [6, 8]]]


def test_classes_of_arff_may_hold_commas_and_end_in_a_comment(tmp_path):
    header = ARFF.replace("{a,b}", "{'left hand','right, hand'} % sides")
    read = read_series(written(tmp_path, f"{header}1,2,'right, hand'\n3,4,'left hand'\n", ".arff"))
    assert (read.labels, read.declared) == (("right, hand", "left hand"), ("left hand", "right, hand"))
    assert read.values[..., 0].tolist() == [[1, 2], [3, 4]]


def test_class_names():
    texts = ("1", " 1.0 ", "1e0", "-1", "1.5", "'a b'", "007x")
    assert tuple(map(class_name, texts)) == ("1", "1", "1", "-1", "1.5", "a b", "007x")


# Which file is meant


def test_preferred_format_and_plain_before_packed(tmp_path):
    drawn = synthetic_series(4, 4, n_steps=10)
    for ending in (".arff", ".txt", ".tsv.gz", ".tsv"):
        drawn.write(tmp_path, "Walk", ending)
    assert find_set(str(tmp_path), None)[0].name == "Walk_TRAIN.tsv"
    (tmp_path / "Walk_TRAIN.ts").write_text("half a pair")
    assert find_set(str(tmp_path), None)[0].name == "Walk_TRAIN.tsv"


def test_name_chooses_within_a_folder_or_below_it(tmp_path):
    drawn = synthetic_series(4, 4, n_steps=10)
    for place, name in ((tmp_path, "Walk"), (tmp_path, "Run"), (tmp_path / "Swim", "Swim")):
        drawn.write(place, name, ".tsv")
    drawn.write(tmp_path / "Swim", "SwimDimension1", ".tsv")
    assert find_set(str(tmp_path), "Run")[1].name == "Run_TEST.tsv"
    assert find_set(str(tmp_path), "Swim")[0] == tmp_path / "Swim" / "Swim_TRAIN.tsv"
    assert find_set(str(tmp_path / "Swim"), None)[0].name == "Swim_TRAIN.tsv"
    with pytest.raises(ValueError, match="holds the sets Run, Walk: say which one by name") as error:
        find_set(str(tmp_path), None)
    one_line(error)


def test_refusals_of_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: no folder 'nowhere'"):
        find_set("nowhere", None)
    with pytest.raises(ValueError, match=r"holds no files Walk_TRAIN and Walk_TEST in one of \.ts"):
        find_set(str(tmp_path), "Walk")
    written(tmp_path, "1\t2\n", ".tsv")
    with pytest.raises(ValueError, match=r"holds Walk_TRAIN\.tsv, but no set with both _TRAIN and _TEST"):
        find_set(str(tmp_path), None)
    with pytest.raises(ValueError, match="folder or name must be given"):
        find_set(None, None)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_series(tmp_path / "Run_TRAIN.ts")


# Sets inside sktime


@needs_sktime
def test_bundled_sets_are_read_without_importing_sktime(monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    imported = set(sys.modules)
    train, test = (read_series(path) for path in find_set(None, "JapaneseVowels"))
    assert not {name for name in set(sys.modules) - imported if name.startswith("sktime")}
    assert train.values.shape == (270, 26, 12)
    assert test.values.shape == (370, 29, 12)
    assert (train.lengths.min(), test.lengths.min()) == (7, 7)
    assert set(train.labels) == set("123456789")
    # First values of the first two channels and the class of the first row, copied from the file.
    assert train.values[0, 0, :2].tolist() == [1.860936, -0.207383]
    assert (train.lengths[0], train.labels[0]) == (20, "1")


@needs_sktime
def test_bundled_names_that_do_not_exist(monkeypatch):
    with pytest.raises(ValueError, match=r"did you mean 'GunPoint'\?"):
        find_set(None, "Gunpoint")
    with pytest.raises(ValueError, match=r"ArrowHead, BasicMotions.*downloaded from https://www\.timeseries") as error:
        find_set(None, "Wafer")
    one_line(error)
    with pytest.raises(ValueError, match="no '@classLabel true' in the header"):
        read_series(find_set(None, "Tecator")[0])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'seqlit[timeseries]'")):
        find_set(None, "GunPoint")


# Bad files


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        (".ts", "", "the file is empty"),
        (".ts", "1,2:a\n", "no line @data"),
        (".ts", TS, "the file holds no series"),
        (".ts", TS.replace("@timeStamps false", "@timeStamps true") + "(0,1):a", "'@timeStamps true'"),
        (".ts", TS.replace("true a b", "false") + "1,2\n", "no '@classLabel true'"),
        (".ts", CHANNELS.replace("ns 2", "ns two") + "1:2:a\n", "@dimensions must be a whole number, got 'two'"),
        (".ts", TS + "1,2:a\n3,4\n", "row 2: no class after ':'"),
        (".ts", TS + "1,2:a\n3,4:\n", "row 2: the class is missing, got ''"),
        (".ts", TS + "1,2:a\n3,4:c\n", "row 2: class 'c' is not in the header: a, b"),
        (".ts", TS + "1,2:a\n3,?:b\n", "row 2, column 2: the value is missing, got '?'"),
        (".ts", TS + "1,2:a\n3,NaN:b\n", "row 2, column 2: 'NaN' is not a finite number"),
        (".ts", TS + "1,2:a\n-inf,4:b\n", "row 2, column 1: '-inf' is not a finite number"),
        (".ts", TS + "1,2:a\n3,4,5:b\n", "row 2: 3 values, expected 2"),
        (".ts", TS.replace("@equalLength true\n", "") + "1,2:a\n3:b\n", "row 2: 1 values, expected 2"),
        (".ts", TS + "1,2:3,4:a\n", "row 1: 2 channels, expected 1"),
        (".ts", VARYING + "1,2:a\n:b\n", "row 2: holds no values beside the class"),
        (".ts", CHANNELS + "1,2:3,4:a\n5,6:b\n", "row 2: 1 channels, expected 2"),
        (".ts", CHANNELS + "1,2:3,4:a\n5,6:7,x:b\n", "row 2, channel 2, column 2: 'x' is not a number"),
        (".ts", CHANNELS + "1,2:3,4:a\n5,6:7:b\n", "row 2, channel 2: 1 values, expected 2"),
        (
            ".ts",
            CHANNELS.replace("Length true", "Length false") + "1,2:3:a\n",
            "row 1, channel 2: 1 values, expected 2 as in its first channel",
        ),
        (".tsv", "", "the file holds no series"),
        (".tsv", "1\t2\t3\n2\t4\tabc\n", "row 2, column 3: 'abc' is not a number"),
        (".tsv", "1\t2\t3\n2\tnan\t4\n", "row 2, column 2: 'nan' is not a finite number"),
        (".tsv", "1\t2\t3\tNaN\n2\t4\tNaN\t5\n", "row 2, column 3: 'NaN' is not a finite number"),
        (".tsv", "1\t2\t3\tNaN\n2\t4\n", "row 2: 1 values, NaN at its end included, expected 3"),
        (".tsv", "1\t2\t3\n2\tNaN\tNaN\n", "row 2: holds no values beside the class"),
        (".txt", "1\t2\t3\n2\t4\tNaN\n", "row 2, column 3: 'NaN' is not a finite number"),
        (".tsv", "1\t2\t3\n2\t1e39\t4\n", "row 2, column 2: '1e39' is not a finite number of float32"),
        (".tsv", "1\t2\t3\n2\t1_0\t4\n", "row 2, column 2: '1_0' is not a number"),
        (".tsv", "1\t2\t3\n2\t\t4\n", "row 2, column 2: the value is missing, got ''"),
        (".tsv", "1\t2\t3\n2\t4\n", "row 2: 1 values, expected 2"),
        (".tsv", "1\t2\t3\n2\n", "row 2: holds no values beside the class"),
        (".txt", "1,2,3\nNaN,4,5\n", "row 2: the class is missing, got 'NaN'"),
        (".arff", ARFF.replace("{a,b}", "numeric") + "1,2,3\n", "the last attribute must be the class"),
        (".arff", BAGS.replace("@end Walk", "@end Walk\n@attribute w relational"), "one relational attribute only"),
        (".arff", ARFF + "1,2,a\n3,b\n", "row 2: 1 values, expected 2"),
        (".arff", ARFF + "1,2,a\n3,?,b\n", "row 2, column 2: the value is missing"),
        (".arff", ARFF + "1,2,a\n3,4,c\n", "row 2: class 'c' is not in the header"),
        (".arff", BAGS + "1,2,a\n", "row 1: is not a quoted series, then a comma and the class"),
        (".arff", BAGS + "'1,2\\n3,4',a\n'1,2',b\n", "row 2: 1 channels, expected 2"),
        (".csv", "1,2,3\n", "must end in .ts, .tsv, .txt, .arff"),
    ],
)
def test_bad_files_end_in_one_line_with_place_and_reason(tmp_path, ending, content, message):
    path = written(tmp_path, content, ending)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(message)}") as error:
        read_series(path)
    one_line(error)


def test_damaged_archives(tmp_path):
    whole = gzip.compress(TS.encode() + b"1,2:a\n" * 500)
    for content in (whole[: len(whole) // 2], whole[:-1] + b"x", b"no archive", gzip.compress(b"1\t\xff\xfe\n")):
        path = tmp_path / "Walk_TRAIN.ts.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"Walk_TRAIN.ts.gz: cannot be read, truncated or damaged: ") as error:
            read_series(path)
        one_line(error)


# Splits that do not belong together


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("1\t2\t3\n2\t4\t5\n", "1\t2\t3\n3\t4\t5\n", "Walk_TEST.tsv: row 2: class '3' is missing from Walk_TRAIN.tsv"),
        ("1\t2\t3\n1\t4\t5\n", "1\t2\t3\n", "Walk_TRAIN.tsv: all series have class '1', at least two classes"),
        ("1\t2\t3\n2\t4\t5\n", "1\t2\t3\t4\n", "Walk_TEST.tsv: series of 3 values, Walk_TRAIN.tsv has 2"),
    ],
)
def test_splits_that_do_not_match(tmp_path, train, test, message):
    written(tmp_path, train, ".tsv")
    written(tmp_path, test, ".tsv", "TEST")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TimeSeriesDataModule(folder=str(tmp_path)).setup("fit")
    one_line(error)


def test_header_class_without_series_and_other_channels(tmp_path):
    written(tmp_path, TS + "1,2:a\n3,4:a\n")
    written(tmp_path, TS + "1,2:a\n", part="TEST")
    with pytest.raises(ValueError, match="class 'b' is in the header, but no series has it"):
        TimeSeriesDataModule(folder=str(tmp_path)).setup("fit")
    written(tmp_path, CHANNELS + "1,2:3,4:a\n3,4:5,6:b\n")
    with pytest.raises(ValueError, match=r"Walk_TEST.ts: 1 channels, Walk_TRAIN.ts has 2"):
        TimeSeriesDataModule(folder=str(tmp_path)).setup("fit")


# Real files


@needs_sktime
def test_two_copies_of_gunpoint_are_one(real_data):
    """The archive's ``.tsv`` and sktime's ``.ts`` come by different ways."""
    for ours, theirs in zip(
        find_set(str(real_data / "ucr" / "GunPoint"), None), find_set(None, "GunPoint"), strict=True
    ):
        one, two = read_series(ours), read_series(theirs)
        assert one.labels == two.labels
        # Both files round to at least seven decimals of values below 3.
        assert np.abs(one.values - two.values).max() < 1e-6


def test_tables_equal_those_of_numpy(real_data):
    path = find_set(str(real_data / "ucr"), "Strawberry")[0]
    table = np.loadtxt(path, delimiter="\t")
    read = read_series(path)
    assert np.array_equal(read.values[..., 0], table[:, 1:])
    assert list(map(float, read.labels)) == table[:, 0].tolist()
