from matplotlib.figure import Figure

from l2l_ref import drawing


def test_no_formulas_on_logarithmic_axes(tmp_path):
    with drawing.own_style():
        figure = Figure()
        for panel, scale in zip(figure.subplots(1, 2), ("log", "symlog"), strict=True):
            panel.plot([1, 4, 1000], [200, 300, 450])
            panel.set(xscale=scale, yscale=scale)
        drawing.save_png(figure, tmp_path / "x.png", 50)
        axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
        labels = [label.get_text() for axis in axes for label in axis.get_ticklabels(which="both")]
    assert "10" in labels and "300" in labels and "$" not in "".join(labels)
