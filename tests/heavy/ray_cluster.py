"""A real Ray cluster on this machine, in a process of its own: a head and two nodes, commands on standard input.

``lose INDEX`` kills a node without a farewell, ``add`` starts another one. Each command is answered with a line.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20


def main() -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    add = {"num_cpus": 1, "resources": {"gen": 1}, "object_store_memory": STORE_BYTES}
    nodes = [cluster.add_node(**add) for _ in range(2)]
    print(json.dumps({"address": cluster.address, "nodes": [node.node_id for node in nodes]}), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "lose":
            cluster.remove_node(nodes[int(arguments[0])], allow_graceful=False)
        else:
            nodes.append(cluster.add_node(**add))
        print(json.dumps({"nodes": [node.node_id for node in nodes]}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
