"""Cluster files of every kind, and the schemas of those who read them.

The schemas are written from the makers' own: the MPI operator's types.go (v2beta1) and Kubernetes' pod, SkyPilot's
schemas.py and reference, dstack's configurations.py and profiles.py. They are strict: a key that is not listed fails.
"""

import re
from typing import Any

import yaml

from fastdistil.launch.cluster import Cluster, ClusterKind, cluster_file


class Required:
    def __init__(self, schema: Any) -> None:
        self.schema = schema


def check(value: Any, schema: Any, where: str = "") -> None:
    """A schema is a type, a tuple of alternatives, [of items], {key: of its value}, a set of values, or a pattern."""
    match schema:
        case dict():
            assert isinstance(value, dict), f"{where}: {value!r} is not a mapping"
            for key, inner in value.items():
                assert key in schema or str in schema, f"{where}: unknown key {key}"
                entry = schema.get(key, schema.get(str))
                check(inner, entry.schema if isinstance(entry, Required) else entry, f"{where}.{key}")
            missing = [key for key, entry in schema.items() if isinstance(entry, Required) and key not in value]
            assert not missing, f"{where}: {missing} missing"
        case list():
            assert isinstance(value, list) and value, f"{where}: {value!r} is not a list"
            for number, item in enumerate(value):
                check(item, schema[0], f"{where}[{number}]")
        case set() | frozenset():
            assert value in schema, f"{where}: {value!r} is none of {schema}"
        case re.Pattern():
            assert isinstance(value, str) and schema.fullmatch(value), f"{where}: {value!r} does not match {schema.pattern}"
        case _:
            assert type(value) is schema, f"{where}: {value!r} is not {schema}"


LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # of Kubernetes (RFC 1035) and dstack
POD = {
    "terminationGracePeriodSeconds": int,
    "volumes": [
        {
            "name": Required(LABEL),
            "emptyDir": {"medium": {"", "Memory"}, "sizeLimit": str},
            "persistentVolumeClaim": {"claimName": Required(LABEL), "readOnly": bool},
            "configMap": {"name": Required(LABEL), "items": list},
        }
    ],
    "containers": Required(
        [
            {
                "name": Required(LABEL),
                "image": Required(str),
                "command": [str],
                "args": [str],
                "volumeMounts": [
                    {"name": Required(LABEL), "mountPath": Required(re.compile(r"/.*")), "readOnly": bool},
                ],
                "resources": {"limits": {str: int}, "requests": {str: int}},
            }
        ]
    ),
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "template": Required({"spec": Required(POD)}),
}
MPIJOB = {
    "apiVersion": Required({"kubeflow.org/v2beta1"}),
    "kind": Required({"MPIJob"}),
    "metadata": Required({"name": Required(LABEL), "namespace": LABEL, "labels": {str: str}}),
    "spec": Required(
        {
            "slotsPerWorker": int,
            "runPolicy": {
                "cleanPodPolicy": {"All", "Running", "None"},
                "ttlSecondsAfterFinished": int,
                "activeDeadlineSeconds": int,
                "backoffLimit": int,
                "suspend": bool,
            },
            "mpiReplicaSpecs": Required({"Launcher": Required(REPLICAS), "Worker": Required(REPLICAS)}),
            "sshAuthMountPath": str,
            "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
        }
    ),
}
CONFIG_MAP = {
    "apiVersion": Required({"v1"}),
    "kind": Required({"ConfigMap"}),
    "metadata": Required({"name": Required(LABEL)}),
    "data": Required({str: str}),
}
SKYPILOT = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {
        "infra": str,
        "accelerators": str,
        "cpus": str,
        "memory": str,
        "instance_type": str,
        "use_spot": bool,
        "disk_size": int,
        "network_tier": {"standard", "best"},
        "image_id": str,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": list},
    },
    "envs": {str: str},
    "file_mounts": {
        str: {"name": str, "source": str, "mode": {"MOUNT", "COPY", "MOUNT_CACHED"}, "persistent": bool},
    },
    "setup": str,
    "run": str,
}
DURATION = re.compile(r"[0-9]+[smhdw]")
DSTACK = {
    "type": Required({"task"}),
    "name": re.compile(r"[a-z][a-z0-9-]{1,40}"),
    "nodes": int,
    "image": str,
    "python": {"3.9", "3.10", "3.11", "3.12", "3.13"},
    "repos": [str],
    "files": [str],
    "env": [str],
    "shell": {"sh", "bash"},
    "commands": Required([str]),
    "resources": {"gpu": str, "cpu": str, "memory": str, "shm_size": str, "disk": str},
    "volumes": [str],
    "max_duration": DURATION,
    "stop_duration": DURATION,
    "retry": {"on_events": Required([{"no-capacity", "interruption", "error"}]), "duration": DURATION},
}
SCHEMAS = {"mpijob": MPIJOB, "skypilot": SKYPILOT, "dstack": DSTACK}
GIVEN: dict[ClusterKind, dict[str, Any]] = {
    "slurm": {"time": "8h", "gpus": "H100:8"},
    "mpijob": {"time": "8h", "gpus": "8", "image": "registry/fastdistil:1", "storage": "claim"},
    "skypilot": {"gpus": "H100:8", "storage": "s3://bucket"},
    "dstack": {"time": "8h", "gpus": "H100:8", "storage": "/mnt/disk"},
}


def text_of(kind: ClusterKind, **more: Any) -> str:
    defaults: dict[str, Any] = {
        "command": "train",
        "recipe": "distilbert",
        "overrides": ["data.train=my corpus/", "teacher.path=bert-base-uncased"],
        "run_name": "Distil_BERT-7",
        "nodes": 2,
    }
    return cluster_file(kind, Cluster(**{**defaults, **GIVEN[kind], **more}))


def documents(kind: ClusterKind, **more: Any) -> list[Any]:
    return list(yaml.safe_load_all(text_of(kind, **more)))


def shell_of(kind: ClusterKind, document: Any) -> str:
    """The script that starts the ranks."""
    match kind:
        case "mpijob":
            return str(
                document["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["args"][0],
            )
        case "skypilot":
            return str(document["run"])
        case _:
            return "\n".join(document["commands"])
