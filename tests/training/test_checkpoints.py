"""Checkpoints: whole or absent, whatever happens while they are written."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from ast_fast.hub import CheckpointError
from ast_fast.training import CheckpointStore, CheckpointWriteError


def writer(value):
    def write(folder):
        folder.mkdir()
        save_file({"w": torch.full((4,), float(value))}, folder / "model.safetensors")

    return write


def save(store, step, **options):
    tensors = {"moment": torch.arange(3.0) * step}
    return store.save(step, writer(step), tensors, {"step": step}, **options)


def names(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def test_what_is_saved_is_loaded_bitwise(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 7)
        found = store.load()
    assert found.state == {"step": 7}
    assert torch.equal(found.tensors["moment"], torch.tensor([0.0, 7.0, 14.0]))
    weights = load_file(found.folder / "model" / "model.safetensors")
    assert torch.equal(weights["w"], torch.full((4,), 7.0))


def test_the_newest_and_the_best_are_kept(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in range(1, 7):
            save(store, step, best=step == 2)
        assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
        assert store.pointer("best") == "step-00000002"
        assert store.load().state["step"] == 6


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with CheckpointStore(tmp_path / "new") as store:
        assert store.load() is None


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "json", "schema", "missing-meta"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(damage, tmp_path, caplog):
    with CheckpointStore(tmp_path) as store:
        save(store, 1)
        newest = save(store, 2)
        tensors = newest / "state.safetensors"
        if damage == "flip":
            content = bytearray(tensors.read_bytes())
            content[-1] ^= 1
            tensors.write_bytes(content)
        elif damage == "cut":
            tensors.write_bytes(tensors.read_bytes()[:-4])
        elif damage == "delete":
            (newest / "model" / "model.safetensors").unlink()
        elif damage == "json":
            (newest / "state.json").write_text("{")
        elif damage == "schema":
            meta = json.loads((newest / "state.json").read_text())
            (newest / "state.json").write_text(json.dumps({**meta, "schema": 99}))
        else:
            (newest / "state.json").unlink()
        assert store.load().state["step"] == 1
        assert "trying an older checkpoint" in caplog.text
        (tmp_path / "step-00000001" / "state.json").write_text("[]")
        with pytest.raises(CheckpointError, match="no checkpoint can be used"):
            store.load()


def test_half_written_folders_are_ignored_and_cleared(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 3)
    (tmp_path / ".tmp-step-00000004-999").mkdir()
    with CheckpointStore(tmp_path) as store:
        assert store.load().state["step"] == 3
    assert not list(tmp_path.glob(".tmp-*"))


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with CheckpointStore(tmp_path), pytest.raises(CheckpointWriteError, match="another process"):
        CheckpointStore(tmp_path)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        save(store, 1)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ast_fast.training.checkpoints.save_file", full)
        with pytest.raises(CheckpointWriteError, match=r"No space left on device.*intact"):
            save(store, 2)
        assert store.load().state["step"] == 1
        assert names(tmp_path) == ["step-00000001"] and not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A real limit on file size: the kernel refuses the write."""
    script = f"""
        import resource, signal, torch
        from ast_fast.training import CheckpointStore, CheckpointWriteError
        from safetensors.torch import save_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        def write(folder):
            folder.mkdir(); save_file({{"w": torch.zeros(8)}}, folder / "model.safetensors")
        with CheckpointStore({str(tmp_path)!r}) as store:
            store.save(1, write, {{"a": torch.zeros(10)}}, {{"step": 1}})
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            try:
                store.save(2, write, {{"a": torch.zeros(100000)}}, {{"step": 2}})
            except CheckpointWriteError as error:
                print("refused:", error)
            assert store.load().state["step"] == 1
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and "earlier ones are intact" in done.stdout


def test_a_folder_that_cannot_be_made_is_a_named_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match="cannot be written"):
        CheckpointStore(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_named_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointWriteError, match="Permission denied"):
        CheckpointStore(tmp_path / "run")


def test_killed_at_any_moment_of_a_save_the_last_checkpoint_loads(tmp_path):
    """SIGKILL at twenty points in time while a process does nothing but save."""
    script = f"""
        import torch
        from ast_fast.training import CheckpointStore
        from safetensors.torch import save_file
        def write(folder):
            folder.mkdir(); save_file({{"w": torch.randn(20000)}}, folder / "model.safetensors")
        torch.set_num_threads(1)
        with CheckpointStore({str(tmp_path)!r}, keep=1) as store:
            found = store.load()
            step = found.state["step"] if found else 0
            while True:
                step += 1
                store.save(step, write, {{"a": torch.randn(20000)}}, {{"step": step}})
    """
    reached = 0
    # one import for all twenty: the children are forked from a process that has everything loaded
    for kill in range(20):
        child = os.fork()
        if child == 0:
            try:
                exec(textwrap.dedent(script), {})
            finally:
                os._exit(1)
        time.sleep(0.03 + 0.0037 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with CheckpointStore(tmp_path, keep=1) as store:
            found = store.load()
            step = found.state["step"] if found else 0
        assert step >= reached
        reached = step
    assert reached >= 3  # it did get somewhere between the kills
