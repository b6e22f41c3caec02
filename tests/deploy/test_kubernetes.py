"""deploy/kubernetes.yaml: by the published schemas, and what datapipe needs of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from datapipe import settings
from datapipe.errors import ConfigError
from datapipe.settings import Settings
from tests.deploy.test_compose import PEAK_BYTES, STOP_S
from tests.service import ROOT

FILE = ROOT / "deploy/kubernetes.yaml"
VERSIONS = ("1.30", kubernetes_validate.latest_version())
UID = 10001  # of the image: tests/deploy/test_image.py


def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(FILE.read_text()))


def named(kind: str) -> dict[str, Any]:
    return next(each for each in objects() if each["kind"] == kind)


def pod() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod that the StatefulSet makes, and its container."""
    spec: dict[str, Any] = named("StatefulSet")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_know_every_word(version: str) -> None:
    kinds = [each["kind"] for each in objects()]
    assert sorted(kinds) == [
        "ConfigMap", "PodDisruptionBudget", "Secret", "Service", "Service", "StatefulSet",
    ]  # fmt: skip
    for each in objects():
        kubernetes_validate.validate(each, version, strict=True)
    wrong = named("StatefulSet")
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_all_find_the_pods() -> None:
    spec = named("StatefulSet")["spec"]
    labels = spec["template"]["metadata"]["labels"]
    services = {each["metadata"]["name"]: each for each in objects() if each["kind"] == "Service"}
    assert spec["serviceName"] in services
    assert services[spec["serviceName"]]["spec"]["clusterIP"] == "None"
    budget = named("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    selectors = [each["spec"]["selector"] for each in services.values()]
    assert all(each == labels for each in [*selectors, spec["selector"]["matchLabels"], budget])
    ports = {each["name"]: each["containerPort"] for each in pod()[1]["ports"]}
    assert ports == {"http": Settings().port}
    assert all(each["spec"]["ports"][0]["targetPort"] == "http" for each in services.values())


def test_a_pod_can_do_no_more_than_it_must() -> None:
    spec, container = pod()
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    ids = ("runAsUser", "runAsGroup", "fsGroup")
    assert {spec["securityContext"][each] for each in ids} == {UID}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_a_pod_has_time_and_room() -> None:
    spec, container = pod()
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > STOP_S + pause
    assert container["resources"]["limits"]["memory"] == "512Mi"
    assert 2 * PEAK_BYTES < 512 * 2**20
    (claim,) = named("StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "4Gi"
    assert 2 * Settings().journal_max_bytes < 4 * 2**30
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness")}
    # one that asks for more than a living process would restart it while the database is away
    assert {probe["path"] for probe in probes.values()} == {"/healthz"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_the_settings_are_understood(tmp_path: Path) -> None:
    _, container = pod()
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    content: dict[str, str] = {**named("ConfigMap")["data"], **named("Secret")["stringData"]}
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    env = {}
    for each in container["env"]:
        folder, _, file = each["value"].rpartition("/")
        assert folder in mounts.values()
        env[each["name"]] = str(tmp_path / file)
    told = settings.load(environ=env)
    assert told.mirror_kind == "journal"
    assert told.load_interval == json.loads(content["datapipe.json"])["load_interval"]
    assert told.admin_key == content["admin_key"]
    # the image says where data_dir is
    assert mounts["data"] == "/var/lib/datapipe"
    assert "DATAPIPE_DATA_DIR=/var/lib/datapipe" in (ROOT / "Dockerfile").read_text()


def test_variables_of_services_are_kept_out() -> None:
    """Kubernetes makes them of each Service's name, and that of ours begins as our settings do."""
    assert pod()[0]["enableServiceLinks"] is False
    with pytest.raises(ConfigError):
        settings.load(environ={"DATAPIPE_PORT": "tcp://10.96.7.7:80"})
