"""What befalls runs: another in their folder, files that changed, a full disk, signals."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import call_script

import run
from l2l_ref import pretrained
from l2l_ref.errors import InputError
from l2l_ref.experiment import folder
from l2l_ref.files import read_checkpoint, read_json, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--dataset", "quadratic", "--quick", "--episodes", "2", "--steps", "10", "--seeds", "1",
         "--jobs", "1"]  # fmt: skip
LONG = ["--dataset", "quadratic", "--episodes", "2000", "--steps", "100"]


def begin(*arguments, workdir, shell=()):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*shell, sys.executable, str(ROOT / "run.py"), *arguments], cwd=workdir, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(path: Path, process) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder of a run that has come to its end."""
    folder = tmp_path_factory.mktemp("once")
    run.main([*SHORT, "--out", str(folder)])
    return folder


@pytest.fixture
def finished(once, workdir):
    """A copy of it, which is r of the current folder."""
    return shutil.copytree(once, workdir / "r")


class TestTwoRunsAndOneFolder:
    def test_of_default_runs_each_has_its_own(self, workdir):
        several = [begin(*SHORT, workdir=workdir) for _ in range(2)]
        for process in several:
            _, said = process.communicate()
            assert process.returncode == 0, said
        names = ["quadratic-none-paper-quick" + number for number in ("", "-2")]
        assert {path.name for path in Path("runs").iterdir()} == set(names)
        assert all(Path("runs", name, "summary.json").exists() for name in names)

    def test_one_that_is_alive_is_not_written_over(self, workdir):
        alive = begin(*LONG, "--out", "r", workdir=workdir)
        wait_for(Path("r/config.json"), alive)
        for more, words in ((["--resume", "--seed", "1"], "seed 0, not 1"), ([], "is not empty")):
            with pytest.raises(InputError, match=words):
                run.main([*LONG, "--out", "r", *more])
        alive.kill()
        alive.wait()

    def test_of_two_that_chose_the_same_folder_one_ends(self, workdir, monkeypatch):
        """The data take their time: one claims what the other chose before."""
        prepare = run.prepare

        def slow(config, number):
            if config.seed == 2:
                run.main([*SHORT, "--seed", "1", "--out", "r"])
            return prepare(config, number)

        monkeypatch.setattr(run, "prepare", slow)
        with pytest.raises(InputError, match="--out r is not empty"):
            run.main([*SHORT, "--seed", "2", "--out", "r"])
        assert read_json(Path("r/config.json"), "")["settings"]["seed"] == 1

    def test_a_mistake_leaves_no_folder(self, workdir):
        with pytest.raises(InputError):
            run.main(["--data-dir", "nowhere", "--strict-data", "--load", "no.pt", "--out", "r"])
        assert list(workdir.iterdir()) == []

    def test_a_claim_that_came_to_nothing_is_no_run(self, workdir):
        Path("r").mkdir()
        Path("r", folder.LOCK).touch()
        run.main([*SHORT, "--out", "r"])
        assert Path("r/summary.json").exists()


def flipped(path: Path, noise: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[noise.randrange(len(content))] ^= 1 << noise.randrange(8)
    path.write_bytes(content)


def same(a, b) -> bool:
    """Equal in every bit, nan with nan."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


class TestFlippedBits:
    """A flip is refused, or every value is what it was."""

    @pytest.mark.parametrize(
        "name, read, flips",
        [
            ("meta_optimizer.pt", pretrained.read, 400),
            ("parts/attacked-fold0-phi0-eps0.0.pt", read_checkpoint, 100),
            ("parts/attacked-fold0-phi0-eps0.0.json", lambda path: read_json(path, "x"), 300),
            ("config.json", lambda path: read_json(path, "x"), 300),
        ],
    )
    def test_in_what_a_run_left(self, finished, name, read, flips, capsys):
        noise, path, refused = random.Random(0), finished / name, 0
        content, before = path.read_bytes(), read(path)
        for _ in range(flips):
            flipped(path, noise)
            try:
                after = read(path)
            except InputError as error:
                refused += 1
                assert str(path) in str(error)
            else:
                seal = {key: value for key, value in after.items() if key not in before}
                assert len(seal) <= 1  # a flip in the word "checksum" itself
                assert same({k: v for k, v in after.items() if k not in seal}, before)
            path.write_bytes(content)
        assert refused > 0.95 * flips

    def test_in_the_package(self, tmp_path, monkeypatch):
        name = pretrained.list_pretrained()[0]
        for kind in ("json", "pt"):
            (tmp_path / f"{name}.{kind}").write_bytes(
                (pretrained.FOLDER / f"{name}.{kind}").read_bytes()
            )
        monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
        before, noise = pretrained.load(name).state_dict(), random.Random(1)
        for kind in ("json", "pt"):
            path = tmp_path / f"{name}.{kind}"
            content = path.read_bytes()
            for _ in range(50):
                flipped(path, noise)
                try:
                    assert same(dict(pretrained.load(name).state_dict()), dict(before))
                except InputError as error:
                    assert name in str(error)
                path.write_bytes(content)

    def test_the_run_names_the_file(self, finished):
        part = next((finished / "parts").glob("run-*.json"))
        part.write_text(part.read_text().replace("0.", "1.", 1))
        with pytest.raises(InputError, match=re.escape(f"{part.name} is broken: delete it")):
            run.main([*SHORT, "--out", "r", "--resume"])
        part.unlink()
        run.main([*SHORT, "--out", "r", "--resume"])


def test_what_carries_no_checksum_is_refused(finished):
    """However well formed: nothing but this version has written files."""
    for name in ("config.json", "parts/run-SGD-eps0.0-fold0-seed0.json"):
        path, before = finished / name, (finished / name).read_bytes()
        value = json.loads(before)
        del value["checksum"]
        path.write_text(json.dumps(value))
        with pytest.raises(InputError, match=re.escape(f"{path.name} is broken")):
            run.main([*SHORT, "--out", "r", "--resume"])
        path.write_bytes(before)
    torch.save(torch.load("r/meta_optimizer.pt", weights_only=True), "resaved.pt")
    with pytest.raises(InputError, match="resaved.pt cannot be read"):
        run.main([*SHORT[:3], "--load", "resaved.pt"])


def test_a_phi_that_does_not_say_where_it_is_from_is_not_compared(finished):
    saved = read_checkpoint(Path("r/meta_optimizer.pt"))
    del saved["config"]
    write_checkpoint(Path("edited.pt"), saved)
    with pytest.raises(InputError, match=r"edited\.pt does not say"):
        run.main([*SHORT[:3], "--load", "edited.pt"])


class TestTheDisk:
    def test_full_in_mid_run_and_then_resumed(self, workdir, monkeypatch):
        """At each file in turn there is no room, once."""
        run.main([*SHORT, "--out", "whole"])
        write, count = Path.write_bytes, len(list(Path("whole").rglob("*.pt")))
        for at in (0, count - 1):
            calls = iter(range(10**6))

            def full(path, content, at=at, calls=calls):
                if next(calls) == at:
                    write(path, content[: len(content) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(path, content)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "write_bytes", full)
                with pytest.raises(OSError, match="No space left on device: .*pt'"):
                    run.main([*SHORT, "--out", f"r{at}"])
            assert not list(Path(f"r{at}").rglob("*.partial"))
            run.main([*SHORT, "--out", f"r{at}", "--resume"])
            assert Path(f"r{at}/metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()

    def test_it_is_one_sentence(self, workdir):
        (workdir / "file").touch()
        done = call_script(*SHORT, "--out", "x" * 300, cwd=workdir)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "x" * 290 in done.stderr and "Traceback" not in done.stderr
        for out in ("file/x", "/proc/no/such"):
            with pytest.raises((InputError, OSError), match=out):
                run.main([*SHORT, "--out", out])


def test_a_reader_that_leaves_ends_a_run_that_can_be_resumed(tmp_path):
    process = begin(*SHORT, "--out", "r", workdir=tmp_path)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 2
    assert process.stderr.read() == "run.py: Broken pipe (stopped; --resume continues)\n"
    assert call_script(*SHORT, "--out", "r", "--resume", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_a_program_with_a_word(name, capsys):
    number = getattr(signal, name)
    stops = signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(each, signal.SIG_DFL) for each in stops]
    try:
        with pytest.raises(SystemExit) as end:
            run.cli.run_as_script("x.py", lambda _: signal.raise_signal(number), "stopped")
    finally:
        for each, handler in zip(stops, before, strict=True):
            signal.signal(each, handler)
    assert end.value.code == 128 + number and capsys.readouterr().err == "\nstopped\n"


def test_nohup_is_heard(workdir):
    process = begin(*SHORT, "--out", "r", workdir=workdir, shell=["nohup"])
    wait_for(Path("r/config.json"), process)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate()
    assert process.returncode == 0, said


def test_a_long_value_is_cut(tmp_path):
    done = call_script("--dataset", "x" * 5000, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr) < 1000 and "choose from" in done.stderr
