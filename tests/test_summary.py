from masklr.summary import series, summary

HEADER = "step,val/loss,val/loss_of_patch_means,probe/encoder.norm/accuracy,probe/pixels/accuracy,probe/mean/accuracy,"
HEADER += "representation/norm/effective_rank,representation/norm/effective_rank_null,weight/mean/effective_rank,"
HEADER += "cost/probe/share,cost/weight_spectrum/share,train/loss,cost/probe/seconds,cost/weight_spectrum/seconds\n"


def write(folder, *rows, header=HEADER):
    (folder / "metrics.csv").write_text(header + "".join(f"{row}\n" for row in rows))


def line(text, label):
    found = [row for row in text.splitlines() if row.startswith(label)]
    assert len(found) == 1, f"{label} is in {len(found)} lines"
    return found[0]


def test_series_are_sorted_by_step_and_leave_gaps_out(tmp_path):
    write(tmp_path, "20,0.5,", "0,1.5,3.0", "10,,2.0", header="step,a,b\n")
    assert series(tmp_path) == {"a": [(0, 1.5), (20, 0.5)], "b": [(0, 3.0), (10, 2.0)]}


def test_a_folder_without_metrics_has_no_series_and_a_summary_of_its_place(tmp_path):
    assert series(tmp_path) == {}
    assert summary(tmp_path).splitlines()[-1] == f"run: {tmp_path}"


def test_summary_shows_first_and_last_values_with_what_they_compare_to(tmp_path):
    write(
        tmp_path,
        "0,2.25,0.75,81.94,93.06,81.94,26.04,58.2,70.0,0.5,0.2,,1.0,0.5",
        "500,1.5,0.75,90.0,,90.0,40.0,58.2,60.0,0.2,0.1,1.1,1.0,0.5",
        "1000,0.125,0.75,98.61,,98.61,59.96,58.2,55.5,0.04,0.02,0.1,2.0,1.0",
    )
    picture = tmp_path / "pictures" / "reconstructions" / "step=00001000.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    picture.with_name("step=00000500.png").touch()
    text = summary(tmp_path)
    assert "step 0 and step 1,000" in text.splitlines()[1]
    assert line(text, "validation loss").split(maxsplit=4)[2:] == [
        "2.250",
        "0.125",
        "predicting each patch's mean: 0.750",
    ]
    probe = line(text, "ridge probe on encoder.norm, accuracy %")
    assert probe.split()[-5:] == ["81.9", "98.6", "raw", "pixels:", "93.1"]
    rank = line(text, "effective rank of norm")
    assert rank.split()[4:6] == ["26.0", "60.0"]
    assert rank.endswith("58.2")
    assert line(text, "effective rank of weights, mean").split()[-2:] == ["70.0", "55.5"]
    assert line(text, "measuring, share of the run").split()[-1] == "6.0%"
    assert line(text, "picture:") == f"picture: {picture}"
    assert line(text, "run:") == f"run: {tmp_path}"
    assert "probe on pixels" not in text
    assert "probe on mean" not in text


def test_summary_has_only_lines_that_the_run_has_values_for(tmp_path):
    write(tmp_path, "5,0.4", "10,0.3", header="step,val/loss\n")
    text = summary(tmp_path)
    assert line(text, "validation loss").split()[2:] == ["0.400", "0.300"]
    assert not any(word in text for word in ("probe", "rank", "measuring", "picture:", "patch's mean"))


def test_a_value_measured_once_after_the_start_is_an_end_not_a_start(tmp_path):
    write(tmp_path, "10,0.3", header="step,val/loss\n")
    assert line(summary(tmp_path), "validation loss").split()[2:] == ["0.300"]


def test_value_older_than_the_run_says_when_it_was_measured(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/loss,train/loss\n0,2.0,\n4,1.0,\n7,,0.5\n")
    text = summary(tmp_path)
    assert "measured at step 4" in line(text, "validation loss")


def test_test_accuracy_is_that_of_the_end(tmp_path):
    write(tmp_path, "200,0.654", header="step,test/accuracy\n")
    assert line(summary(tmp_path), "test accuracy, %").split() == ["test", "accuracy,", "%", "65.4"]


def test_picture_is_the_latest_and_of_several_the_reconstructions(tmp_path):
    for name in (
        "weight_spectrum/step=00000010.png",
        "reconstructions/step=00000010.png",
        "weight_spectrum/step=00000002.png",
    ):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert f"picture: {tmp_path / 'pictures' / 'reconstructions' / 'step=00000010.png'}" in summary(tmp_path)
    path = tmp_path / "pictures" / "weight_spectrum" / "step=00000011.png"
    path.touch()
    assert f"picture: {path}" in summary(tmp_path)


def test_accuracy_is_shown_in_percent_and_the_objective_as_it_is(tmp_path):
    write(tmp_path, "0,0.1,19.5", "200,0.9871,19.25", header="step,val/accuracy,val/objective\n")
    text = summary(tmp_path)
    assert line(text, "validation accuracy, %").split()[-2:] == ["10.0", "98.7"]
    assert line(text, "objective, with the masks' penalty").split()[-2:] == ["19.5000", "19.2500"]
