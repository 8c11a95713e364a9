"""Schemas of the files in cluster/ for which no schema can be had offline.

They know the keys that the files use, as the page above each describes them, and refuse all others:
a misspelt key is found.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}


def exactly(required: dict[str, Schema], **optional: Schema) -> Schema:
    """Return the schema of a mapping that has these keys and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **optional},
        "additionalProperties": False,
    }


def items(schema: Schema, least: int = 1) -> Schema:
    return {"type": "array", "minItems": least, "items": schema}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


_QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(m|Ki|Mi|Gi)?$"}
_AMOUNTS = exactly({"cpu": _QUANTITY, "memory": _QUANTITY}, **{"nvidia.com/gpu": _QUANTITY})
_RESOURCES = exactly({"requests": _AMOUNTS, "limits": _AMOUNTS})
_CONTAINER = exactly(
    {
        "name": TEXT,
        "image": TEXT,
        "resources": _RESOURCES,
        "volumeMounts": items(
            exactly({"name": TEXT, "mountPath": TEXT}, readOnly={"type": "boolean"})
        ),
        "securityContext": exactly(
            {
                "allowPrivilegeEscalation": {"const": False},
                "capabilities": exactly({"drop": {"const": ["ALL"]}}),
            }
        ),
    },
    ports=items(exactly({"containerPort": COUNT, "name": TEXT})),
)
_VOLUME: Schema = {
    "oneOf": [
        exactly(
            {
                "name": TEXT,
                "emptyDir": exactly({"medium": {"const": "Memory"}, "sizeLimit": _QUANTITY}),
            }
        ),
        exactly({"name": TEXT, "configMap": exactly({"name": TEXT})}),
    ]
}
_POD = exactly(
    {
        "serviceAccountName": TEXT,
        "restartPolicy": {"const": "Never"},
        "securityContext": exactly(
            {
                "runAsNonRoot": {"const": True},
                "runAsUser": {"type": "integer", "minimum": 1},
                "runAsGroup": {"type": "integer", "minimum": 1},
                "fsGroup": {"type": "integer", "minimum": 1},
            }
        ),
        "containers": {**items(_CONTAINER), "maxItems": 1},
        "volumes": items(_VOLUME),
    },
    tolerations=items(
        exactly({"key": TEXT, "operator": one_of("Exists"), "effect": one_of("NoSchedule")})
    ),
)
# Kubernetes and KubeRay want text also where `ray start` takes a number.
_RAY_START = exactly(
    {"num-cpus": TEXT, "object-store-memory": TEXT},
    **{"num-gpus": TEXT, "dashboard-host": TEXT},
)
_TEMPLATE = exactly({"spec": _POD})

# https://docs.ray.io/en/master/kuberay/references/api.html
RAYJOB = exactly(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": exactly({"name": TEXT}),
        "spec": exactly(
            {
                "entrypoint": TEXT,
                "backoffLimit": {"type": "integer", "minimum": 1},
                "shutdownAfterJobFinishes": {"const": True},
                "ttlSecondsAfterFinished": COUNT,
                "rayClusterSpec": exactly(
                    {
                        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
                        "authOptions": exactly({"mode": {"const": "token"}}),
                        "enableInTreeAutoscaling": {"const": True},
                        "autoscalerOptions": exactly(
                            {
                                "version": one_of("v1", "v2"),
                                "idleTimeoutSeconds": COUNT,
                                "upscalingMode": one_of("Default", "Aggressive", "Conservative"),
                                "resources": _RESOURCES,
                            }
                        ),
                        "headGroupSpec": exactly(
                            {"rayStartParams": _RAY_START, "template": _TEMPLATE}
                        ),
                        "workerGroupSpecs": items(
                            exactly(
                                {
                                    "groupName": TEXT,
                                    "replicas": COUNT,
                                    "minReplicas": COUNT,
                                    "maxReplicas": {"type": "integer", "minimum": 1},
                                    "rayStartParams": _RAY_START,
                                    "template": _TEMPLATE,
                                }
                            )
                        ),
                    }
                ),
            }
        ),
    }
)
SERVICE_ACCOUNT = exactly(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "ServiceAccount"},
        "metadata": exactly(
            {
                "name": TEXT,
                "annotations": exactly(
                    {
                        "eks.amazonaws.com/role-arn": {
                            "type": "string",
                            "pattern": r"^arn:aws:iam::\w+:role/[\w-]+$",
                        }
                    }
                ),
            }
        ),
    }
)

# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
SKYPILOT = exactly(
    {
        "name": TEXT,
        "workdir": TEXT,
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": exactly(
            {
                "infra": {"type": "string", "pattern": r"^aws/\w+$"},
                "cpus": {"type": "integer", "minimum": 1},
                "memory": {"type": "integer", "minimum": 1},
                "use_spot": {"const": True},
                "job_recovery": exactly(
                    {
                        "strategy": one_of("FAILOVER", "EAGER_NEXT_REGION"),
                        "max_restarts_on_errors": {"type": "integer", "minimum": 1},
                    }
                ),
            }
        ),
        # Given at launch, never written into the file.
        "secrets": exactly({"RAY_AUTH_TOKEN": {"type": "null"}}),
        "setup": TEXT,
        "run": TEXT,
    }
)

# https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements.html
_ONE_OR_MORE: Schema = {"anyOf": [TEXT, items(TEXT)]}
IAM_POLICY = exactly(
    {
        "Version": {"const": "2012-10-17"},
        "Statement": items(
            exactly(
                {
                    "Sid": {"type": "string", "pattern": r"^[A-Za-z0-9]+$"},
                    "Effect": {"const": "Allow"},
                    "Action": _ONE_OR_MORE,
                    "Resource": _ONE_OR_MORE,
                },
                Condition={"type": "object"},
            )
        ),
    }
)
