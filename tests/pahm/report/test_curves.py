"""Curves of a run from TensorBoard's event files."""

from torch.utils.tensorboard import SummaryWriter

from pahm.report.curves import charts, read_curves


def test_steps_that_a_resumed_run_took_again_count_once(tmp_path):
    for start, stop, value in ((0, 6, 1.0), (4, 8, 2.0)):
        writer = SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=f".{start}")
        for step in range(start, stop):
            writer.add_scalar("train/mesh_1", value, step)
        writer.close()
        # TensorBoard's files are named by the second they were begun in.
        for path in (tmp_path / "tensorboard").glob(f"*.{start}"):
            path.rename(path.with_name(f"events.out.tfevents.{start}.run"))
    curve = read_curves(tmp_path)["train/mesh_1"]
    assert curve.steps.tolist() == list(range(8)) and curve.values.tolist() == [1.0] * 4 + [2.0] * 4


def test_a_chart_leaves_out_what_it_cannot_draw_and_keeps_the_ends(tmp_path):
    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    for step in range(3000):
        writer.add_scalar(
            "train/mesh_1", float("nan") if step == 5 else 0.0 if step == 7 else 1 / (step + 1), step
        )
    writer.close()
    (chart,) = charts(read_curves(tmp_path))
    (trace,) = chart["traces"]
    assert 900 < len(trace["x"]) <= 1000 and (trace["x"][0], trace["x"][-1]) == (0, 2999)
    assert 5 not in trace["x"] and 7 not in trace["x"] and min(trace["y"]) > 0


def test_a_folder_without_event_files_has_no_curves(tmp_path):
    assert read_curves(tmp_path) == {} and charts({}) == []
