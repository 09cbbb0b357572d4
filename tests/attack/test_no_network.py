"""G16: a Hub that goes away after the preflight, and a machine without any network, change neither results nor exit code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hub_server import HubServer

import reasonrun
from toy_server import final_bytes

pytestmark = pytest.mark.attack

RECIPE = """\
defaults: [star_arith]
model: {name: null, hub: acme/tiny}
task: {num_train: 12, num_dev: 6, num_test: 6}
method: {rounds: 1, steps_start: 3, sft: {batch_size: 8}}
evaluate: {num_samples: 1}
"""
PACKAGE = Path(reasonrun.__file__).parent


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """A folder with a recipe and a cache of what the Hub gave, and the bytes of a run during which the Hub stayed."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "mine.yaml").write_text(RECIPE)
    with closing(HubServer(PACKAGE / "assets" / "tiny-1")) as hub:
        process = start(folder, "clean", hub.url)
        assert process.wait(300) == 0, (folder / "clean.log").read_text()
        assert any("model.safetensors" in path for path in hub.asked), hub.asked
    yield folder, final_bytes(folder / "clean")


def start(folder: Path, run: str, url: str, *before: str, cache: str = "hub") -> subprocess.Popen[bytes]:
    """Run or continue the recipe with a Hub at ``url``."""
    command = [*before, sys.executable, "-m", "reasonrun.cli.main", "train", "mine.yaml", "--run", run]
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))},
        "HF_ENDPOINT": url,
        "HF_HUB_CACHE": str(folder / cache),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(PACKAGE.parent),
    }
    with open(folder / f"{run}.log", "ab") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)


@pytest.mark.promise("G16", "Hubs gone after the preflight")
def test_a_hub_that_goes_away_after_the_preflight_is_not_missed(work: tuple[Path, dict[str, bytes]]) -> None:
    folder, expected = work
    with closing(HubServer(PACKAGE / "assets" / "tiny-1")) as hub:
        process = start(folder, "left", hub.url, cache="another")
        while process.poll() is None and not (folder / "left/steps/preflight/grade/_OK.json").exists():
            time.sleep(0.05)
        assert process.poll() is None, (folder / "left.log").read_text()
    assert process.wait(300) == 0, (folder / "left.log").read_text()
    assert final_bytes(folder / "left") == expected


@pytest.fixture
def alone(tmp_path: Path) -> list[str]:
    """What to put before a command to run it where no network is, not even this machine's own."""
    for command in (["unshare", "--net"], ["unshare", "--net", "--map-root-user"]):
        with suppress(OSError):
            if (
                shutil.which("unshare")
                and not subprocess.run([*command, "true"], capture_output=True, check=False).returncode
            ):
                return command
    pytest.skip("no network namespace may be made here")


@pytest.mark.promise("G16", "runs in a namespace without network")
def test_without_any_network_the_run_is_the_same(work: tuple[Path, dict[str, bytes]], alone: list[str]) -> None:
    folder, expected = work
    reach = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    unreachable = subprocess.run([*alone, sys.executable, "-c", reach], capture_output=True, text=True, check=False)
    assert "Network is unreachable" in unreachable.stderr, unreachable.stderr
    process = start(folder, "alone", "http://127.0.0.1:9", *alone)
    assert process.wait(300) == 0, (folder / "alone.log").read_text()
    assert final_bytes(folder / "alone") == expected


@pytest.mark.promise("G16", "unfinished runs continued without network")
def test_an_unfinished_run_goes_on_without_network(work: tuple[Path, dict[str, bytes]], alone: list[str]) -> None:
    folder, expected = work
    shutil.copytree(folder / "clean", folder / "cut")
    for name in ("_OK.json", "metrics.jsonl", "steps/round-001/train", "steps/final-trainings=1"):
        path = folder / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    process = start(folder, "cut", "http://127.0.0.1:9", *alone)
    assert process.wait(300) == 0, (folder / "cut.log").read_text()
    assert final_bytes(folder / "cut") == expected
