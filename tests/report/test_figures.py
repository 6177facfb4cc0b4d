"""Every chart keeps its labels on the page, and shows what it says."""

import pandas as pd
from conftest import assert_on_the_page
from IPython.core.formatters import DisplayFormatter

from avit_lib.peers import PEERS
from avit_lib.report import figures


def test_differences_stand_with_their_intervals_and_models_of_a_kind_on_a_curve():
    names = ["DeiT", "ToMe, r = 4", "ToMe, r = 2", "A-ViT", "A-ViT, depth 4"]
    names += ["Adaptive merging, 44%", "Adaptive merging, 55%"]
    table = pd.DataFrame({"model": names, "flops_saved": [0, 0.5, 0.3, 0.2, 0.6, 0.441, 0.553]})
    table["difference_macro"] = -0.1 * table["flops_saved"]
    table["low_macro"] = table["difference_macro"] - 0.01
    table["high_macro"] = table["difference_macro"] + 0.02
    figure = figures.difference_against(table, "flops_saved", "FLOPs saved")
    assert_on_the_page(figure)
    (axis,) = figure.axes
    lines = {line.get_label(): line.get_xydata().round(9).tolist() for line in axis.lines}
    assert lines["ToMe: r = 2, 4"] == [[0.3, -3.0], [0.5, -5.0]]
    assert {"DeiT", "A-ViT: as trained, depth 4", "Adaptive merging: 44%, 55%"} < lines.keys()
    bars = [segment.tolist() for part in axis.collections for segment in part.get_segments()]
    assert [[0, -1.0], [0, 2.0]] in bars


def test_a_notebook_shows_a_figure_as_png_without_pyplot():
    shown, _ = DisplayFormatter().format(figures.subplots()[0], include={"image/png"})
    assert shown["image/png"].startswith(b"\x89PNG")


def test_each_peer_has_a_colour_of_its_own():
    assert len({figures.model_colour(name) for name in PEERS}) == len(PEERS)


def test_a_model_of_one_s_own_has_no_colour_of_another():
    known = {figures.model_colour(label) for label in ("DeiT", "A-ViT from the published start")}
    for label in ("A-ViT halting early", "Mine"):
        colour = figures.model_colour(label)
        assert colour == figures.model_colour(f"{label}, depth 6") and colour not in known
