"""The driver: what a run leaves, that it resumes, and every way to get the command line wrong."""

import csv
import itertools
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import conftest
import pytest
import torch

import l2l_ref
import run
from l2l_ref import attacks, data, evaluate
from l2l_ref.backend import resolve
from l2l_ref.errors import InputError
from l2l_ref.experiment import cli, machine, protocol, tuning
from l2l_ref.files import read_checkpoint, write_checkpoint

LOADING, TINY = ([*options, "--seeds", "2"] for options in (conftest.LOADING, conftest.TINY))
TABLE = {"L2L", "L2L + L1", "L2L-Transfer (clean)", "L2L-Transfer (clean) + L1", "Adam + L1",
         "L2L-Transfer (mixed)", "Transfer-NOT", "Transfer-NOT (clean)", "Adam, learned rate",
         "Adam", "SGD", "Adam + penalty + L1", "SGD + penalty + L1, cosine", "Adam (attacked)",
         "Adam (attacked) + L1", "Adam (attacked) + L1, cosine", "Adam (attacked) + penalty + L1",
         "Adam (N-FGSM) + L1"}  # fmt: skip
ADAM = torch.optim.Adam, "step"  # of φ
FILES = {"config.json", "metrics.csv", "summary.json", "meta_optimizer.pt", "curves.png",
         "meta_training.png", "parts"}  # fmt: skip


def read(folder) -> tuple[dict, list[dict]]:
    """summary.json, and the rows of metrics.csv."""
    with open(f"{folder}/metrics.csv") as file:
        return json.loads(Path(f"{folder}/summary.json").read_text()), list(csv.DictReader(file))


def config_of(folder) -> dict:
    return json.loads(Path(f"{folder}/config.json").read_text())


def phis_of(folder) -> dict:
    """The φ of a run: {name: {φ-group: settings and weights}}."""
    return torch.load(f"{folder}/meta_optimizer.pt", weights_only=True)["phis"]


def without_times(summary):
    """The parts of a summary that the clock has no hand in."""
    clocked = {"ms_per_step", "seconds"}
    rows = [{k: v for k, v in row.items() if k not in clocked} for row in summary["runs"]]
    return rows, summary["meta_training"], summary["tuned"]


def same_results(a, b) -> bool:
    """Two runs differ in their times alone, down to the weights of every φ."""
    (summary, rows), (other, others) = read(a), read(b)
    phis, theirs = phis_of(a), phis_of(b)
    for name, phi in phis.items():
        for group, meta in phi.items():
            their = theirs[name][group]["state_dict"]
            assert all(torch.equal(w, their[key]) for key, w in meta["state_dict"].items())
    assert list(phis) == list(theirs)  # `l2l_ref.load` takes the first, that under attack
    return rows == others and without_times(summary) == without_times(other)


class TestWhatARunLeaves:
    def test_two_panels_with_every_method(self, workdir, small_data, capsys):
        run.main([*TINY, "--eps", "0.1", "8/255", "--out", "r"])
        folder = workdir / "r"
        assert {path.name for path in folder.glob("[!.]*")} == FILES  # and the lock
        summary, rows = read(folder)
        assert {row["method"] for row in summary["table"]} == TABLE
        assert {row["eps"] for row in summary["table"]} == {0.1, 8 / 255}
        # one row a method, ε, seed and step (0 to 4)
        assert len(rows) == len(TABLE) * 2 * 2 * 5
        assert {row["step"] for row in rows} == set("01234")
        # Transfer-NOT's φ does not depend on ε and is trained once
        kinds = sorted(name.split("-")[0] for name in summary["meta_training"])
        assert kinds == ["ablation", "ablation", "attacked", "attacked", "clean"]
        tuned = {m for m in TABLE if m.startswith(("Adam", "SGD")) and "learned" not in m}
        tuned |= {"L2L + L1, phi0", "L2L-Transfer (clean) + L1, phi0"}
        assert set(summary["tuned"]["0.1"]["0"]) == tuned
        printed = capsys.readouterr().out
        # nobody mistakes the stand-in for the real set
        saved = torch.load(folder / "meta_optimizer.pt", weights_only=True)
        assert "data: stand-in" in printed and "data: stand-in" in summary["title"]
        assert {row["data"] for row in rows} == {saved["data"]} == {summary["data"]} == {"stand-in"}
        for method in TABLE:
            assert f"| {method} " in printed
        assert "meta-training attacked-fold0-phi0-eps0.1, episode " in printed
        config = config_of("r")
        assert config["settings"]["steps"] == 4 and config["command"].startswith("python run.py")
        environment = config["environment"]
        assert environment["backend"] == resolve("auto")
        assert environment["data"] == "stand-in" and len(environment["data_sha256"]) == 64
        assert not list(folder.rglob("*.partial"))

    @pytest.mark.usefixtures("few_candidates")
    def test_with_the_penalty_a_rate_is_all_that_is_learned(
        self, workdir, small_data, capsys, recwarn, monkeypatch
    ):
        accuracy, count = evaluate.robust_accuracy, itertools.count()

        def warning(model, images, attack, **options):
            if attack is not attacks.none:
                warnings.warn(f"no gradient {next(count)}", stacklevel=2)
            return accuracy(model, images, attack, **options)

        monkeypatch.setattr(evaluate, "robust_accuracy", warning)
        run.main(["--recipe", "penalty", *TINY, "--out", "a"])
        rows = {row["method"] for row in read("a")[0]["table"]}
        assert "Adam, learned rate" in rows and not any("L2L" in row for row in rows)
        printed = capsys.readouterr().out
        assert "loss of Adam, learned rate minus that of Adam" in printed
        assert printed.count("no gradient") == 1 and not recwarn  # one of so many is enough
        assert l2l_ref.load("a/meta_optimizer.pt")["linear"].nominal

    @pytest.mark.usefixtures("few_candidates")
    def test_cifar_has_two_phi_and_as_many_folds_as_are_asked_for(self, workdir, small_data):
        run.main(["--dataset", "cifar10", "--attack", "pgd", "--eps", "0.03", *TINY, "--out", "r",
                  "--attack-steps", "2", "--seeds", "1", "--steps", "2", "--episode-steps", "2",
                  "--eval-steps", "1", "--folds", "2"])  # fmt: skip
        _, rows = read("r")
        assert {row["fold"] for row in rows} == {"0", "1"}
        assert set(phis_of("r")["attacked-fold1-phi0-eps0.03"]) == {"convolutional", "linear"}

    @pytest.mark.parametrize("dataset", ["quadratic", "mnist"])
    def test_without_attack(self, workdir, small_data, dataset):
        run.main(["--dataset", dataset, "--attack", "none", *TINY, "--out", "r"])
        summary, rows = read("r")
        methods = {row["method"] for row in summary["table"]}
        assert {"L2L-Transfer", "Adam", "SGD"} <= methods
        assert ("L2L" in methods) == (dataset == "mnist")
        assert not any("NOT" in method or "attacked" in method for method in methods)
        assert all(row["clean_loss"] == row["attacked_loss"] for row in rows)
        assert ("pgd_accuracy" in summary["table"][0]) == (dataset == "mnist")


@pytest.mark.usefixtures("few_candidates")
class TestResumeAndLoad:
    arguments = [*TINY, "--episodes", "3", "--out", "r"]

    @pytest.mark.parametrize(
        "where, count, more",
        [
            ((tuning, "validate"), 1, ["--dataset", "quadratic"]),
            ((protocol, "run_method"), 2, ["--dataset", "quadratic"]),
            # random lengths and a curriculum, and η, which has an Adam group of its own
            (ADAM, 9, ["--attack", "pgd", "--attack-steps", "2", "--recipe", "robust",
                       "--curriculum", "0", "0.5", "--episode-steps", "2", "7", "--episodes", "6"]),
        ],
    )  # fmt: skip
    def test_resumed_equals_uninterrupted(self, workdir, small_data, killed_at, where, count, more):
        arguments = [*TINY, "--episodes", "2", "--seeds", "1", *more]
        run.main([*arguments, "--out", "whole"])
        summary, _ = read("whole")
        assert all(history["skipped"] == 0 for history in summary["meta_training"].values())
        with killed_at(*where, count):
            run.main([*arguments, "--out", "r"])
        if where is ADAM:
            # of the piece that was running, the longest and so the first, some episodes are kept
            (checkpoint,) = (workdir / "r/parts").glob("*.[jp]*")
            assert checkpoint.name.startswith("attacked-fold0-phi0-eps")
            kept = torch.load(checkpoint, weights_only=True)
            assert 0 < kept["episodes"] < kept["settings"]["episodes"]
        run.main([*arguments, "--out", "r", "--resume"])
        assert same_results("whole", "r") and next(iter(phis_of("r"))).startswith("attacked-")

    def test_load_skips_meta_training_and_gives_the_same_transfer(self, workdir, small_data):
        run.main([*self.arguments[:-1], "a"])
        run.main([*LOADING, "--out", "b", "--load", "a/meta_optimizer.pt"])
        (a, rows_a), (b, rows_b) = read("a"), read("b")
        assert rows_a == rows_b
        assert a["meta_training"] and not b["meta_training"]
        # another ε may use the only φ there is
        run.main([*LOADING, "--out", "c", "--load", "b/meta_optimizer.pt", "--eps", "0.2"])
        words = r"φ from stand-in, fgsm, ε 0\.1 \(checksum \w{12}\) · quick miniature$"
        assert re.search(words, read("c")[0]["title"])
        a, c = ((workdir / out / "meta_optimizer.pt").read_bytes() for out in "ac")
        assert a == c
        resumed = [*LOADING, "--out", "b", "--load", "a/meta_optimizer.pt", "--resume"]
        run.main(resumed)
        changed = read_checkpoint(workdir / "a/meta_optimizer.pt")
        next(iter(changed["phis"].values()))["linear"]["state_dict"]["head.bias"] += 1
        write_checkpoint(workdir / "a/meta_optimizer.pt", changed)
        with pytest.raises(InputError, match="b was run with φ stand-in.*, not stand-in"):
            run.main(resumed)

    def test_load_brings_the_settings_of_its_phi(self, workdir, small_data):
        logistic = "--optimizee", "logistic"
        more = [*logistic, "--recipe", "robust", "--average", "0.5"]
        run.main([*self.arguments[:-1], "a", *more])
        run.main([*LOADING, "--load", "a/meta_optimizer.pt", *logistic])
        out = "runs/mnist-fgsm-loaded-quick"  # chosen before φ is read
        (_, rows_a), (b, rows_b) = read("a"), read(out)
        assert rows_a == rows_b and "recipe robust" in b["title"]
        settings = config_of(out)["settings"]
        assert settings["odd"] and settings["input_alpha"] == 1.0 and settings["average"] == 0.5
        assert phis_of("a")["attacked-fold0-phi0-eps0.1"]["linear"]["settings"]["odd"]

    def test_load_refuses_what_does_not_fit(self, workdir, small_data):
        run.main(["--dataset", "quadratic", *TINY, "--out", "q"])
        run.main([*self.arguments[:-1], "a", "--eps", "0.1", "0.3"])
        for file, arguments, words in (
            ("q/meta_optimizer.pt", [], "no φ for linear parameters .* only for quadratic"),
            ("nowhere.pt", [], "no file nowhere.pt"),
            ("q/metrics.csv", [], "metrics.csv cannot be read"),
            ("a/meta_optimizer.pt", ["--seed", "1"], "another half: that of .*, seed 0"),
            ("a/meta_optimizer.pt", ["--folds", "2"], "this run needs .*fold1"),
            ("a/meta_optimizer.pt", ["--eps", "0.2"], "this run needs attacked.*eps0.2"),
            (
                "a/meta_optimizer.pt",
                ["--eval-on", "validation"],
                "another half: that of .*--eval-on test",
            ),
        ):
            with pytest.raises(InputError, match=words):
                run.main([*LOADING, "--load", file, *arguments, "--out", "x"])
            assert not (workdir / "x").exists()
        run.main([*self.arguments[:-1], "c", "--eval-on", "validation"])  # sees a part of the half
        run.main([*LOADING, "--load", "c/meta_optimizer.pt", "--out", "x"])

    def test_a_helper_that_finds_other_data_computes_nothing(self, workdir, small_data):
        config = cli.parse([*self.arguments, "--seeds", "1"])
        for found, count in ({}, 0), (run.ready(config)[0].data, 1):
            run.work(config, workdir / "r", found, 1)
            assert (len(list(workdir.glob("r/parts/*.json"))) > 0) == count

    def test_other_data_are_refused(self, workdir, small_digits, monkeypatch):
        def serve(**changes):
            served = replace(small_digits, **changes)
            monkeypatch.setattr(data, "load", lambda name, data_dir, **options: served)

        resume = [*self.arguments, "--resume"]
        serve(source="MNIST")
        run.main(self.arguments)
        serve(source="MNIST", checksum="1" * 64)
        with pytest.raises(InputError, match="checksum 000000000000.*not.*111111111111"):
            run.main(resume)
        # the same pixels from another layout have another order, so other halves
        serve(source="MNIST (PNG folders)")
        with pytest.raises(InputError, match="not MNIST .PNG folders."):
            run.main(resume)
        with pytest.raises(InputError, match="another half: that of MNIST .checksum 0000"):
            run.main([*LOADING, "--out", "b", "--load", "r/meta_optimizer.pt"])

    def test_a_continued_run_names_both_environments(self, workdir, small_data, monkeypatch):
        run.main(self.arguments)
        monkeypatch.setattr(machine, "git_commit", lambda: "f" * 40)
        run.main([*self.arguments, "--resume"])
        environment = config_of("r")["environment"]
        assert environment["git_commit"] != "f" * 40
        assert [e["git_commit"] for e in environment["continued_in"]] == ["f" * 40]
        assert "--resume" not in read("r")[0]["command"]

    def test_other_settings_are_refused(self, workdir, small_data):
        run.main([*self.arguments])
        for changed, words in (
            (["--meta-lr", "0.5"], "--meta-lr 0.003, not 0.5"),
            (["--episode-steps", "3"], r"--episode-steps .4., not .3."),
            (["--optimizee", "logistic"], "--optimizee mlp, not logistic"),
            (["--images", "40"], "--images None, not 40"),
        ):
            with pytest.raises(InputError, match=f"run with {words}"):
                run.main([*self.arguments, *changed, "--resume"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--dataset", "svhn"], "invalid choice: 'svhn'"),
        (["--attack", "cw"], "--attack is cw: it must be fgsm, pgd, none, or MODULE"),
        (["--eps", "big"], "'big' is not a number"),
        (["--eps", "-0.1"], "--eps is -0.1: it must be between 0 and 1"),
        (["--eps", "0.1", "0.1"], "free of repeats"),
        (["--alpha", "2"], "--alpha is 2.0: it must be in .0, 1."),
        (["--penalty", "1", "--alpha", "0"], "--penalty is 1: it must be left out with --alpha 0"),
        (["--compare", "mine"], "^mine cannot be imported"),
        (["--eval-attack", "nowhere:f"], "^nowhere:f cannot be imported"),
        (["--p", "0"], "--p is 0: it must be above 0 and at most 80"),
        (["--seed", "9" * 30], "below 2.63"),
        (["--eps", "9" * 400 + "/1"], "is not a number"),
        (["--device", "tpu9"], "--device tpu9 is not available"),
        (["--average", "0", "--load", "x.pt"], "leave out --average, --episode-steps, --episodes"),
        (["--out", "other", "--resume"], "--out other is taken, but not by a run"),
        (["--meta-lr", "inf"], "--meta-lr is inf"),
        (["--folds", "3"], "--folds: invalid choice: 3"),
        (["--dataset", "quadratic", "--attack", "fgsm"], "--attack is fgsm: it must be none"),
        (["--dataset", "cifar10", "--optimizee", "mlp"], "'mlp' does not go with cifar10"),
        (["--dataset", "cifar10", "--optimizee", "examples.networks:tanh"],
         "examples.networks:tanh does not take images of cifar10 to logits .mat1 and mat2"),
        (["--optimizee", "torch.nn:Linear"], "torch.nn:Linear does not take .* missing 2 required"),
        (["--optimizee", "builtins:list"], "builtins:list does not take images of mnist"),
        (["--curriculum", "0.5"], "--curriculum: expected 2 arguments"),
        (["--episode-steps", "9", "8"], "--episode-steps is 9 8: .*smallest and largest"),
        (["--images", "31"], "--images is 31: it must be at least --batch-size, 32"),
        (["--images", "501"], "501 images are asked for but a candidate trains on 500 .* stand-in"),
        (["--dataset", "quadratic", "--images", "500"], "--images is 500: it must be left out"),
        (["--dataset", "quadratic", "--compare", "torch.optim:RAdam"], "RAdam: it must be left"),
        (["--jobs", "0"], "--jobs is 0: it must be at least 1"),
        (["--load", ""], "--load is empty: it must be given a name, or left out"),
        (["--data-dir", ""], "--data-dir is empty: it must be given a name, or left out"),
        (["--out", "file"], "--out file is taken, but not by a run"),
        (["--out", "full"], "--out full is not empty: add --resume"),
        (["--out", "broken", "--resume"], "config.json is broken"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_sentence(workdir, small_data, monkeypatch, arguments, words):
    if "full" in arguments:  # that is said before data are read
        monkeypatch.setattr(data, "load", None)
    (workdir / "file").touch()
    for name, content in (("full/config", "{}"), ("broken/config", "{"), ("other/file", "")):
        (workdir / name).parent.mkdir()
        (workdir / f"{name}.json").write_text(content)
    before = sorted(workdir.rglob("[!.]*"))
    with pytest.raises(InputError, match=words) as caught:
        run.main([*TINY, *arguments])
    assert "\n" not in str(caught.value)
    assert sorted(workdir.rglob("[!.]*")) == before  # nothing but a lock
