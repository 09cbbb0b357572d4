"""The cluster as a driver sees it: joining it, a place for one worker, and why a worker is gone."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from reasonrun.errors import EnvironmentProblem
from reasonrun.settings import Settings

_REACH_SECONDS = 5.0
_NODE_SECONDS = 20.0  # Ray itself takes up to about 15 s to say that a node is gone
_GRACE_SECONDS = 2.0  # a node that still answers so long after its actor died has not died with it
_POLL_SECONDS = 0.2
_HINT_START = "`ray start --head` starts one on this machine; launcher.address=local has the run start its own"


class Place(Settings):
    """What one worker needs and where it would rather be. ``what`` names it in messages, ``fewer`` is the way to less."""

    what: str
    fewer: str
    resources: dict[str, float]
    index: int
    spread: bool
    seconds: float


class NoRoomError(EnvironmentProblem):
    """No node had room in time."""


def connect(address: str) -> Any:
    """Join the cluster at ``address`` ("local" starts one, "" joins the one started on this machine or starts one).

    Returns the module ``ray``. Raises EnvironmentProblem when Ray is not installed, not reachable, or another version.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise EnvironmentProblem(
            f"launcher: ray needs the package ray: {error}", hint="pip install 'reasonrun[ray]', or launcher=local"
        ) from None
    _check_reachable(address)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"Ray at {address}" if address else "the Ray of this machine"
        said = " ".join(str(error).split())[:500]
        if "ersion mismatch" in said:
            raise EnvironmentProblem(
                f"{where} is another version than this one: {said}",
                hint=f"install the cluster's version here; this Python has ray {ray.__version__}",
            ) from None
        raise EnvironmentProblem(
            f"{where} cannot be joined: {said}",
            hint=f"this machine must be a node of the cluster: ray start --address={address or '<head>'}; a cluster that "
            f"demands a token needs RAY_AUTH_MODE=token here; {_HINT_START}",
        ) from None
    return ray


def _check_reachable(address: str) -> None:
    # ray.init itself tries for a minute and then ends the process.
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"nothing answers at launcher.address={address}: {error.strerror or error}",
            hint=f"correct the address (ray status prints it), or start Ray: {_HINT_START}",
        ) from None


def find_place(ray: Any, place: Place) -> Any:
    """A placement group with room for the worker. Raises NoRoomError after ``place.seconds``."""
    from ray.util.placement_group import placement_group

    began = time.monotonic()
    preferred = preferred_node(_alive(ray), place)
    group = placement_group([place.resources], strategy="STRICT_PACK", _soft_target_node_id=preferred)
    while not group.wait(_POLL_SECONDS):
        if time.monotonic() - began > place.seconds:
            raise _no_room(ray, place)
    return group


def preferred_node(nodes: Sequence[Mapping[str, Any]], place: Place) -> str | None:
    """The node that the worker would rather have, if it is free: as little as possible that it does not ask for, so that
    a worker without a GPU leaves those with one alone; the next ones for the next workers when they are to spread."""
    fitting = [node for node in nodes if _count(node["Resources"], place.resources)]
    if not fitting:
        return None

    def wasted(node: Mapping[str, Any]) -> tuple[int, str]:
        return len(_shown(node["Resources"]).keys() - place.resources.keys() - {"CPU"}), node["NodeID"]

    return str(sorted(fitting, key=wasted)[place.index % len(fitting) if place.spread else 0]["NodeID"])


def _no_room(ray: Any, place: Place) -> NoRoomError:
    nodes = _alive(ray)
    fits = sum(_count(node["Resources"], place.resources) for node in nodes)
    lines = [
        f"  node {node['NodeManagerHostname']}: {_amounts(node['Resources'])}"
        for node in nodes[:8] + ([{"NodeManagerHostname": "…", "Resources": {}}] if len(nodes) > 8 else [])
    ]
    free = _amounts(ray.available_resources())
    if fits:
        hint = f"wait until others are done, or ask for less: {place.fewer}; there is room for {fits} such at most"
    else:
        hint = f"no node is large enough: ask for less ({place.fewer}), or add a node"
    return NoRoomError(
        "\n".join(
            [
                f"{place.what} asks for {_amounts(place.resources)}, and no node of the Ray cluster had room for it in "
                f"{place.seconds:g} s; free is {free}, and there are",
                *lines,
            ]
        ),
        hint=hint,
    )


def _alive(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _count(has: Mapping[str, float], wants: Mapping[str, float]) -> int:
    needed = [(name, amount) for name, amount in wants.items() if amount]
    return min((math.floor(has.get(name, 0.0) / amount) for name, amount in needed), default=1)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(_shown(resources).items())) or "nothing"


def _shown(resources: Mapping[str, float]) -> dict[str, float]:
    """Without what Ray makes up: memory, a name for every node, groups already given out."""
    hidden = ("node:", "memory", "object_store_memory", "bundle", "accelerator_type:")
    return {name: amount for name, amount in resources.items() if not name.startswith(hidden) and "_group_" not in name}


def node_of(ray: Any, actor_node_id: str) -> dict[str, Any]:
    """What the cluster says about a node."""
    return next(node for node in ray.nodes() if node["NodeID"] == actor_node_id)


Fate = Literal["node lost", "actor died"]


def why_gone(ray: Any, node: Mapping[str, Any], error: BaseException) -> Fate:
    """Whether an actor that answers no more went with its node, or of itself."""
    from ray.exceptions import ActorDiedError

    began = time.monotonic()
    while (passed := time.monotonic() - began) < _NODE_SECONDS:
        with contextlib.suppress(Exception):  # the cluster's head may be gone too
            if not node_of(ray, node["NodeID"])["Alive"]:
                return "node lost"
        if not _answers(node["NodeManagerAddress"], node["NodeManagerPort"]):
            return "node lost"
        if isinstance(error, ActorDiedError) and passed > _GRACE_SECONDS:
            return "actor died"
        time.sleep(_POLL_SECONDS)
    return "node lost"  # it cannot be reached, whatever it does there


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _POLL_SECONDS * 5).close()
    except OSError:
        return False
    return True
