from __future__ import annotations

from pathlib import Path

import pytest

from reasonrun.trackers._wandb_privacy import Scrubber, has_api_key, secret_values


@pytest.mark.promise("G18", "trackers")
def test_paths_and_environment_leave_the_recipe() -> None:
    recipe = {
        "seed": 3,
        "method": {"name": "star", "sft": {"lr": 2e-4, "lora": None}, "flags": [True, 1]},
        "model": {"path": "~/models/llama", "hub": "org/model", "name": "tiny"},
        "task": {"train_path": "data/train.jsonl", "path": "C:\\data", "files": ["a/b", "plain"]},
        "launcher": {
            "python": "bin/python",
            "env": {"HTTPS_PROXY": "x"},
            "scratch": "/tmp/x",
            "where": "${oc.env:HOME}/x",
        },
        "engine": {"url": "https://user:pass@host/v1"},
        "trackers": [{"name": "wandb"}],
    }
    assert Scrubber(()).recipe(recipe) == {
        "seed": 3,
        "method": {"name": "star", "sft": {"lr": 2e-4, "lora": None}, "flags": [True, 1]},
        "model": {"hub": "org/model", "name": "tiny"},
        "task": {"files": ["plain"]},
        "launcher": {},
        "engine": {"url": "https://host/v1"},
        "trackers": [{"name": "wandb"}],
    }


def test_secrets_are_known_by_the_names_of_their_variables() -> None:
    environment = {"HF_TOKEN": "abcdefgh", "MY_API_KEY": "abcdefghij", "SHORT_KEY": "abc", "LANG": "en_US.UTF-8"}
    values = secret_values(environment)
    assert values == ("abcdefghij", "abcdefgh")
    # The longer one first, or its tail would stay.
    assert Scrubber(values).text("x abcdefghij y abcdefgh abc en_US.UTF-8") == "x *** y *** abc en_US.UTF-8"


@pytest.mark.parametrize(
    ("machine", "environment", "expected"),
    [
        ("", {"WANDB_API_KEY": "k" * 40}, True),
        ("", {}, False),
        ("api.wandb.ai", {}, True),
        ("github.com", {}, False),
        ("api.wandb.ai", {"WANDB_BASE_URL": "https://wandb.my.org:8080/x"}, False),
        ("wandb.my.org", {"WANDB_BASE_URL": "https://wandb.my.org:8080/x"}, True),
    ],
)
def test_where_a_key_is_found(tmp_path: Path, machine: str, environment: dict[str, str], expected: bool) -> None:
    if machine:
        (tmp_path / ".netrc").write_text(f"machine {machine}\n  login user\n  password p0123456789\n")
        (tmp_path / ".netrc").chmod(0o600)
    home = {"HOME": str(tmp_path)}
    assert has_api_key({**home, **environment}) is expected
    assert ("p0123456789" in secret_values(home)) is bool(machine)
