"""The demo: the model it trains, the files it writes, and what it refuses before it starts."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

from deqcore import DEQConfig, MissingExtraError, Solver, SolverSettings, Step, registry
from deqcore.cli import main
from deqcore_zoo import convergence, demo, digits
from deqcore_zoo.convergence import Curve, draw, residual_curve
from deqcore_zoo.digits import DigitsDEQ, Split, augment, fit, load_digits_split

PNG = b"\x89PNG\r\n\x1a\n"
CHEAP = ["--solver", "fixed_point_iter", "--gradient", "phantom"]


@pytest.fixture
def run(capsys):
    """Run the program here; returns exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def small(monkeypatch):
    """The demo on 96 training images and 40 test images."""
    data = load_digits_split()
    part = Split(data.train_images[:96], data.train_labels[:96], data.test_images[:40], data.test_labels[:40])
    monkeypatch.setattr(demo, "load_digits_split", lambda: part)
    return part


@pytest.fixture
def never_trains(monkeypatch):
    """Fail where training begins."""

    def fail(*_: object) -> None:
        pytest.fail("training began")

    monkeypatch.setattr(demo, "fit", fail)


# ---- the whole thing


def test_the_whole_demo(run, tmp_path):
    """One run as a user makes it, with the cheapest of the built-ins; one test, so that it is trained once."""
    folder = tmp_path / "made" / "here"
    code, out, err = run("demo", *CHEAP, "--out", str(folder), "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["accuracy"] >= 0.97
    _check_rows(document)
    _check_curves(document)
    assert sorted(path.name for path in folder.iterdir()) == ["convergence.png", "demo.toml"]
    assert document["files"] == {"picture": str(folder / "convergence.png"), "config": str(folder / "demo.toml")}
    header = (folder / "convergence.png").read_bytes()[:24]
    assert header.startswith(PNG)
    assert int.from_bytes(header[16:20]) >= 1000, "pixels wide"
    assert int.from_bytes(header[20:24]) >= 600, "pixels high"
    used = DEQConfig.from_file(folder / "demo.toml")
    assert used == DEQConfig.from_dict(document["config"])
    assert used == demo.configuration(None, "fixed_point_iter", "phantom")
    assert used == demo.configuration(folder / "demo.toml", None, None)


def _check_rows(document):
    rows = document["epochs"]
    assert [row["epoch"] for row in rows] == list(range(1, 15))
    assert document["accuracy"] == rows[-1]["accuracy"]
    assert rows[-1]["loss"] < 0.2 < rows[0]["loss"]
    for before, row in itertools.pairwise(rows):
        assert before["seconds"] < row["seconds"] <= document["seconds"]
    for row in rows:
        assert set(row) == {"epoch", "loss", "accuracy", "steps", "nfe", "residual", "converged", "seconds"}
        assert 1 <= row["steps"] < row["nfe"]
        assert 0 < row["residual"] < 1e-2


def _check_curves(document):
    curves = {curve["solver"]: curve["residuals"] for curve in document["convergence"]}
    assert list(curves) == ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"]
    plain, simple = curves["fixed_point_iter"], curves["simple_fixed_point_iter"]
    common = min(len(plain), len(simple)) - 1
    assert common > 20
    assert plain[:common] == pytest.approx(simple[:common], rel=1e-3, abs=1e-6), "the same iteration"
    assert min(curves["anderson"]) <= 1e-6
    assert min(curves["broyden"]) <= 1e-6
    assert len(curves["anderson"]) < len(plain)


def test_table_on_the_terminal_with_the_defaults(run, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    code, out, err = run("demo", "--epochs", "2")
    assert (code, err) == (0, "")
    header, first, second, *rest = out.splitlines()
    assert header.split() == ["epoch", "loss", "test", "accuracy", "solver", "steps", "nfe", "residual", "seconds"]
    assert [line.split()[0] for line in (first, second)] == ["1", "2"]
    assert "solver anderson, gradient implicit: test accuracy" in "\n".join(rest)
    assert rest[-1] == "wrote convergence.png and demo.toml"
    assert Path("convergence.png").is_file()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_fixes_everything(run, small, tmp_path):
    def losses(seed: str) -> list[float]:
        _, out, _ = run("demo", *CHEAP, "--epochs", "2", "--seed", seed, "--out", str(tmp_path), "--json")
        return [row["loss"] for row in json.loads(out)["epochs"]]

    assert losses("3") == losses("3")
    assert losses("3") != losses("4")


class HalfSettings(SolverSettings):
    fraction: float = 0.25


class Half(Solver[HalfSettings]):
    """Damped iteration."""

    def step(self, problem, z, fz, state):
        return Step(torch.lerp(z, fz, self.settings.fraction), state)


def test_any_installed_solver_and_its_line(run, small, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('on_failure = "ignore"\n[solver]\nname = "half"\nfraction = 0.9\nmax_iter = 20\n')
    with registry.scope():
        registry.register("solver", "half", Half)
        code, out, _ = run("demo", "--config", str(file), "--epochs", "1", "--out", str(tmp_path), "--json")
        assert code == 0
        document = json.loads(out)
        assert document["config"]["solver"]["fraction"] == 0.9
        curves = {curve["solver"]: curve["residuals"] for curve in document["convergence"]}
        assert list(curves)[-1] == "half"
        assert len(curves) == 5
        _, out, _ = run("demo", "--solver", "half", "--epochs", "1", "--out", str(tmp_path), "--json")
        slower = {curve["solver"]: curve["residuals"] for curve in json.loads(out)["convergence"]}["half"]
        assert slower[3] > curves["half"][3], "the line is of the solver with the settings it was given"


def test_a_builtin_that_is_switched_off_is_said_to_be_missing(run, small, tmp_path, monkeypatch):
    monkeypatch.setenv("DEQCORE_DISABLE_PLUGINS", "solver:broyden")
    code, out, err = run("demo", *CHEAP, "--epochs", "1", "--out", str(tmp_path), "--json")
    assert code == 0
    assert [c["solver"] for c in json.loads(out)["convergence"]] == [
        "fixed_point_iter",
        "simple_fixed_point_iter",
        "anderson",
    ]
    assert "broyden is not in the picture" in err
    assert "DEQCORE_DISABLE_PLUGINS" in err


def test_a_loss_of_nan_is_null_in_json(run, small, tmp_path, monkeypatch):
    row = digits.Epoch(1, float("nan"), 0.1, 1.0, 2, float("inf"), 0.0, 1.0)
    monkeypatch.setattr(demo, "fit", lambda *_: iter([None, row]))
    monkeypatch.setattr(demo, "convergence", lambda *_: [Curve("anderson", [1.0, float("nan")])])
    code, out, _ = run("demo", "--out", str(tmp_path), "--json")
    document = json.loads(out)
    assert code == 0
    assert document["epochs"][0]["loss"] is document["epochs"][0]["residual"] is None
    assert document["convergence"][0]["residuals"] == [1.0, None]


# ---- what it uses


def test_defaults_rank_below_environment_and_names(monkeypatch):
    own = demo.configuration(None, None, None)
    assert (own.solver.name, own.solver.rtol, own.solver.max_iter) == ("anderson", 1e-2, 30)
    assert own.gradient.name == "implicit"
    monkeypatch.setenv("DEQCORE_SOLVER__RTOL", "1e-3")
    monkeypatch.setenv("DEQCORE_GRADIENT__NAME", "phantom")
    assert demo.configuration(None, None, None).solver.rtol == 1e-3
    assert demo.configuration(None, None, None).gradient.name == "phantom"
    named = demo.configuration(None, "broyden", "implicit")
    assert (named.solver.name, named.solver.rtol, named.gradient.name) == ("broyden", 1e-3, "implicit")


def test_a_file_is_instead_of_the_defaults(tmp_path):
    file = tmp_path / "deq.json"
    file.write_text('{"solver": {"name": "broyden", "memory": 7}}')
    config = demo.configuration(file, None, None)
    assert (config.solver.name, config.solver.rtol, config.gradient.name) == ("broyden", None, "phantom")
    assert config.solver.model_dump()["memory"] == 7
    assert demo.configuration(file, "anderson", None).solver.name == "anderson"


# ---- what it refuses, before it trains


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--solver", "andersen"], "Did you mean 'anderson'?"),
        (["--gradient", "anderson"], "is a solver"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--config", "deq.ini"], ".toml"),
        (["--out", "taken"], "taken"),
    ],
)
def test_wrong_options(run, never_trains, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    code, out, err = run("demo", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--epochs", "x"], ["--seed", "-1"]])
def test_numbers_out_of_range(run, never_trains, arguments):
    code, out, err = run("demo", *arguments)
    assert (code, out) == (2, "")
    assert arguments[0] in err


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn.datasets", "scikit-learn"), ("matplotlib.figure", "matplotlib")]
)
def test_missing_extras(run, never_trains, tmp_path, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    code, out, err = run("demo", "--out", str(tmp_path))
    assert (code, out) == (2, "")
    assert repr(package) in err
    assert "pip install 'deqcore[demo]'" in err
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError) as caught:
        load_digits_split()
    assert isinstance(caught.value, ImportError)


def test_ctrl_c(run, small, tmp_path, monkeypatch):
    real, threads = digits.fit, torch.get_num_threads()

    def interrupted(*args):
        for count, row in enumerate(real(*args)):
            yield row
            if count == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo, "fit", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        code, out, err = run("demo", *CHEAP, "--out", str(tmp_path), "--epochs", "9")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (130, "")
    assert err == "Interrupted after 1 of 9 epochs.\n"
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


# ---- curves and picture


@pytest.mark.parametrize("solver", ["fixed_point_iter", "simple_fixed_point_iter"])
def test_a_curve_is_what_can_be_worked_out(solver):
    """z <- rho z + 1 from 0: z_k = (1 - rho^k) / (1 - rho), f(z_k) - z_k = rho^k."""
    rho = torch.tensor([[0.5], [0.25]], dtype=torch.float64)
    calls = []

    def f(z, scale):
        calls.append(1)
        return scale * z + 1

    curve = residual_curve(f, torch.zeros(2, 1, dtype=torch.float64), (rho,), solver, rtol=1e-6, max_iter=30)
    exact = [0.5**k * 0.5 / (1 - 0.5 ** (k + 1)) for k in range(31)]
    assert curve.solver == solver
    assert len(curve.residuals) == len(calls)
    shared = min(len(curve.residuals), 18)
    assert curve.residuals[:shared] == pytest.approx(exact[:shared], rel=1e-9)
    if solver == "fixed_point_iter":
        assert len(calls) == next(k for k, value in enumerate(exact, 1) if value <= 1e-6)
    else:
        assert len(calls) == 31


def test_a_curve_replaces_the_solvers_own_tolerance():
    fast = residual_curve(lambda z: 0.5 * z + 1, torch.zeros(1, 1), (), {"name": "fixed_point_iter", "tol": 0.5})
    assert fast.residuals[-1] <= 1e-6


def test_draw_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "c.png"
    draw(
        [Curve("anderson", [1.0, 1e-3, 1e-7, 1e-8]), Curve("else", [1.0]), Curve("nan", [1.0, float("nan")])], path, "t"
    )
    before = path.read_bytes()
    assert before.startswith(PNG)

    def full_disk(figure, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space"):
        draw([Curve("anderson", [1.0, 0.1])], path, "t")
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["c.png"]


def test_lines_end_at_the_floor_and_can_be_told_apart(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, target, **_: kept.append(figure))
    names = ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden", "mine", "yours"]
    draw([Curve(name, [1.0, 1e-3, 9e-7, 1e-9]) for name in names], tmp_path / "c.png", "title")
    (axes,) = kept[0].axes
    lines = axes.get_lines()[: len(names)]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3]] * len(names)
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == len(names)
    assert axes.get_yscale() == "log"
    assert "evaluations" in axes.get_xlabel()
    assert "residual" in axes.get_ylabel()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == [f"{name} (3)" for name in names]


def test_a_line_that_does_not_arrive_says_so():
    assert convergence._reached(Curve("x", [1.0, 0.5]), [1.0, 0.5], 1e-6) == "not in 2"


# ---- model and data


def test_split_is_all_digits_once_in_proportion():
    from sklearn.datasets import load_digits

    data, again = load_digits_split(), load_digits_split()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.float32
    assert data.test_labels.dtype == torch.int64
    assert torch.equal(data.test_images, again.test_images)
    assert torch.equal(data.train_labels, again.train_labels)
    counts = torch.bincount(torch.cat([data.train_labels, data.test_labels])).double() * 360 / 1797
    assert (torch.bincount(data.test_labels) - counts).abs().max() < 1
    pixels, labels = load_digits(return_X_y=True)
    rows = torch.cat([data.train_images, data.test_images]).reshape(1797, 64) * 16
    mine = sorted(
        [*row.tolist(), label]
        for row, label in zip(rows, torch.cat([data.train_labels, data.test_labels]).tolist(), strict=True)
    )
    assert mine == sorted([*row, label] for row, label in zip(pixels.tolist(), labels.tolist(), strict=True))


def test_augmentation_moves_digits_a_little():
    images = load_digits_split().train_images[:64]
    before = images.clone()
    moved = augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    assert torch.equal(moved, augment(images, torch.Generator().manual_seed(0)))
    assert moved.shape == images.shape
    assert 0 <= moved.min()
    assert moved.max() <= 1
    grid = torch.arange(8.0)

    def centre(batch):
        mass = batch.sum((1, 2, 3))
        return torch.stack([(batch.sum(2)[:, 0] * grid).sum(1) / mass, (batch.sum(3)[:, 0] * grid).sum(1) / mass], 1)

    shift = (centre(moved) - centre(images)).abs()
    assert 0.2 < shift.mean()
    assert shift.max() < 1.5


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_model_solves_and_every_weight_learns(gradient):
    torch.manual_seed(0)
    model = DigitsDEQ(
        solver={"name": "anderson", "rtol": 1e-4, "max_iter": 60}, gradient=gradient, channels=8, groups=2
    )
    images = load_digits_split().train_images[:6]
    logits, info = model(images)
    assert logits.shape == (6, 10)
    assert bool(info.converged.all())
    logits.logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    u = model.inject(images)
    z = info["z"].view(6, 8, 8, 8)
    residual = (model.cell(z, u) - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
    assert residual.max() < 2e-4


def test_models_norm_is_the_configurations():
    assert parametrize.is_parametrized(DigitsDEQ(channels=8, groups=2).cell.conv)
    spectral = DigitsDEQ(norm="spectral_norm", channels=8, groups=2).cell.conv
    weight = DigitsDEQ(norm="weight_norm", channels=8, groups=2).cell.conv
    kinds = [type(conv.parametrizations.weight[0]).__name__ for conv in (spectral, weight)]
    assert kinds[0] != kinds[1]


def test_model_travels(tmp_path):
    torch.manual_seed(0)
    model = DigitsDEQ(solver="anderson", channels=8, groups=2, on_failure="ignore").eval()
    images = load_digits_split().test_images[:4]
    with torch.no_grad():
        expected, _ = model(images)
        other = DigitsDEQ(model.deq.config, channels=8, groups=2).eval()
        other.load_state_dict(model.state_dict())
        for travelled in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(travelled(images)[0], expected)


def test_regularizers_are_part_of_the_loss(small):
    def weights(*regularizers):
        torch.manual_seed(0)
        model = DigitsDEQ(solver="anderson", regularizers=[*regularizers], on_failure="ignore", channels=8, groups=2)
        rows = [row for row in fit(model, small, 1, torch.Generator().manual_seed(0), batch=32) if row]
        return rows[0].loss, model.cell.norm.weight

    (plain_loss, plain), (loss, regularized) = weights(), weights({"name": "jacobian", "weight": 10.0})
    assert not torch.equal(plain, regularized)
    assert loss == pytest.approx(plain_loss, rel=0.2), "the table's loss is the cross entropy alone"


def test_fit_yields_once_a_step(small):
    model = DigitsDEQ(solver="anderson", on_failure="ignore", channels=8, groups=2)
    yielded = list(fit(model, small, 2, torch.Generator().manual_seed(0), batch=40))
    assert [row and row.epoch for row in yielded] == [None, 1, None, 2], "16 of 96 images wait"
