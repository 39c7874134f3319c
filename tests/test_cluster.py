"""cluster/ without a cluster: schemas that refuse what they do not know, and asserts for what no schema sees."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from typer.main import get_command

from fwm_audit import __version__, metrics
from fwm_audit.errors import ErrorCode

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
README = (ROOT / "README.md").read_text()
SCHEDULES_AND_JOBS = ("cronjob.yaml", "rayjob-audit.yaml", "rayjob-embed.yaml", "raycronjob.yaml")
MANIFESTS = ("base.yaml", "raycluster.yaml", *SCHEDULES_AND_JOBS)
#: Of KubeRay's own secret of the cluster `fwm-audit`, which the operator makes.
TOKEN_SECRET = "fwm-audit"


def shell(*command, **environment):
    """A finished process."""
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def documents(*names):
    return [(name, d) for name in names or MANIFESTS for d in yaml.safe_load_all((CLUSTER / name).read_text())]


def of_kind(kind, *names):
    return [document for _, document in documents(*names) if document["kind"] == kind]


def pods(*names):
    """(where it is, labels, pod spec) of every pod that the manifests lead to, the operator's own containers apart."""

    def walk(where, value):
        if isinstance(value, dict):
            if "containers" in value:
                yield where, value
            for key, inner in value.items():
                if key == "template":
                    yield from walk((*where, inner.get("metadata", {}).get("labels")), inner)
                else:
                    yield from walk(where, inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(where, inner)

    return [(f"{name}: {d['kind']}", where[-1], spec) for name, d in documents(*names) for where, spec in walk((), d)]


def containers():
    return [(where, container) for where, _, spec in pods() for container in spec["containers"]]


def closed(schema):
    """The same schema, refusing what it does not name: a structural schema of Kubernetes prunes it silently."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(inner) for key, inner in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    return schema


@functools.cache
def kuberay_schema(kind):
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's CRDs")
    crd = yaml.load((Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)  # 20,000 lines
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("raycluster.yaml", "RayCluster"),
        ("rayjob-audit.yaml", "RayJob"),
        ("rayjob-embed.yaml", "RayJob"),
        ("raycronjob.yaml", "RayCronJob"),
    ],
)
def test_kuberay_knows_every_field(name, kind):
    schema = kuberay_schema(kind)
    (document,) = of_kind(kind, name)
    schema.validate(document)
    document["spec"]["nosuchfield"] = 1
    with pytest.raises(jsonschema.ValidationError, match="nosuchfield"):
        schema.validate(document)


def core():
    return [(f"{name}: {d['kind']} {d['metadata']['name']}", d) for name, d in documents("base.yaml", "cronjob.yaml")]


@pytest.mark.parametrize(("where", "document"), core(), ids=[where for where, _ in core()])
def test_kubernetes_knows_every_field(where, document):
    kubernetes_validate.validate(document, "1.33", strict=True)
    document["spec" if "spec" in document else "metadata"]["nosuchfield"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.33", strict=True)


def test_pod_templates_of_ray_are_pods():
    """KubeRay's schema has the pods' fields in full; the same by Kubernetes' own, strictly."""
    for _, labels, spec in pods("raycluster.yaml", "rayjob-embed.yaml"):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": labels}, "spec": spec}
        kubernetes_validate.validate(pod, "1.33", strict=True)


def test_one_version_everywhere():
    versions = set(re.findall(r"^ray==(\S+)", (CLUSTER / "constraints.txt").read_text(), re.MULTILINE))
    clusters = [d["spec"] for d in of_kind("RayCluster")] + [
        d["spec"]["rayClusterSpec"] for d in of_kind("RayJob") if "rayClusterSpec" in d["spec"]
    ]
    assert len(clusters) == 2
    assert versions == {ray.__version__} == {spec["rayVersion"] for spec in clusters}
    images = {container["image"] for _, container in containers()}
    cloud = yaml.safe_load((CLUSTER / "aws.yaml").read_text())["docker"]["image"]
    release = __version__.partition(".dev")[0] + (".0" if __version__.count(".") == 1 else "")
    assert {image.rpartition("-")[0] for image in {*images, cloud}} == {f"registry.example.com/fwm-audit:{release}"}
    assert {image.rpartition("-")[2] for image in images} == {"cpu", "cuda"}
    for _, container in containers():
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith("-cuda" if gpu else "-cpu")


def test_every_pod_is_confined():
    """What the profile `restricted` asks for, and more: no token, nothing to write to but what is mounted."""
    for where, _, spec in pods():
        user = spec["securityContext"]
        assert (user["runAsNonRoot"], user["runAsUser"]) == (True, 1000), where
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}, where
        autoscaling = spec["serviceAccountName"] == "fwm-audit-head"
        assert spec["automountServiceAccountToken"] is autoscaling, where
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostPath"} & {*spec}, where
        for volume in spec["volumes"]:
            assert {*volume} - {"name"} < {"secret", "emptyDir"}, where
    confined = [c["securityContext"] for _, c in containers()]
    confined += [d["spec"]["autoscalerOptions"]["securityContext"] for d in of_kind("RayCluster")]
    assert len(confined) == 7
    for context in confined:
        assert context == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_what_is_written_to_has_a_place():
    """Ray's sessions and its object store, the latter in memory and large enough."""
    for where, _, spec in pods("raycluster.yaml", "rayjob-embed.yaml"):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in spec["containers"]:
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert "emptyDir" in mounts["/tmp"], where
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory", where
            assert mounts["/dev/shm"]["emptyDir"]["sizeLimit"] == "512Mi", where
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"], where
    params = [
        group["rayStartParams"]
        for spec in [d["spec"].get("rayClusterSpec", d["spec"]) for d in of_kind("RayCluster") + of_kind("RayJob")]
        if "headGroupSpec" in spec
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    assert len(params) == 5
    assert all(int(p["object-store-memory"]) < 512 << 20 for p in params)


def test_secrets_are_named_mounted_and_made():
    """Every secret is made by a command of the README, or by the operator; none is a value in a manifest."""
    made = set(re.findall(r"create secret generic (\S+)", README)) | {TOKEN_SECRET}
    named = set()
    for where, _, spec in pods():
        named |= {volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume}
        for container in spec["containers"]:
            named |= {s["secretRef"]["name"] for s in container.get("envFrom", []) if "secretRef" in s}
            for variable in container.get("env", []):
                source = variable.get("valueFrom", {}).get("secretKeyRef")
                named |= {source["name"]} if source else set()
                # A value is a path or a setting; tokens come by reference.
                assert source or not re.search(r"TOKEN$|SECRET|PASSWORD|KEY_ID", variable["name"]), where
    assert named == made
    assert not of_kind("Secret")
    for where, _, spec in pods("raycluster.yaml", "rayjob-embed.yaml"):
        for container in spec["containers"]:
            (path,) = (v["value"] for v in container["env"] if v["name"] == "FWM_MASTER_KEY_FILE")
            (mount,) = (m for m in container["volumeMounts"] if m["name"] == "master")
            assert Path(path).parent == Path(mount["mountPath"]), where
            assert mount["readOnly"], where
    assert re.search(rf"generic fwm-master-key \S*--from-file={Path(path).name}", README)


def test_token_authentication_is_on():
    for spec in [d["spec"].get("rayClusterSpec", d["spec"]) for d in of_kind("RayCluster") + of_kind("RayJob")]:
        assert "clusterSelector" in spec or spec["authOptions"] == {"mode": "token"}
    (cron,) = of_kind("CronJob")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": TOKEN_SECRET, "key": "auth_token"}
    (cluster,) = of_kind("RayCluster")
    assert variables["RAY_ADDRESS"]["value"] == f"http://{cluster['metadata']['name']}-head-svc:8265"


def test_accounts_exist_and_are_used():
    accounts = {d["metadata"]["name"] for d in of_kind("ServiceAccount")}
    assert accounts == {spec["serviceAccountName"] for _, _, spec in pods()}
    assert all(d["automountServiceAccountToken"] is False for d in of_kind("ServiceAccount"))
    elsewhere = [d["kind"] for _, d in documents() if d["metadata"].get("namespace") != "fwm-audit"]
    assert elsewhere == ["Namespace"]


def selects(selector, labels):
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def test_network_policies_select_the_pods_that_there_are():
    """Every selector meets a pod, and every pod meets what it needs and nothing else."""
    policies = {d["metadata"]["name"]: d["spec"] for d in of_kind("NetworkPolicy")}
    labels = [labels for _, labels, _ in pods()]
    for name, spec in policies.items():
        assert any(selects(spec["podSelector"], each) for each in labels), name
        for rule in spec.get("ingress", []) + spec.get("egress", []):
            for peer in rule.get("from", rule.get("to", [])):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    assert any(selects(peer["podSelector"], each) for each in labels), name
                # Nothing is open to everybody, and the metadata service to nobody.
                assert peer.get("ipBlock", {}).get("cidr") not in {"0.0.0.0/0", "::/0", "169.254.169.254/32"}
                assert peer != {}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for each in labels:
        mine = {name for name, spec in policies.items() if selects(spec["podSelector"], each)} - {"nothing-else"}
        if each["app.kubernetes.io/name"] == "fwm-submit":
            assert mine == {"submit"}
        else:
            head = {"heads"} if each["app.kubernetes.io/component"] == "head" else set()
            assert mine == {"store-and-names", "metrics", f"ray-{each['app.kubernetes.io/instance']}"} | head
    # Ports are those that the containers open.
    ports = {port["containerPort"] for _, container in containers() for port in container.get("ports", [])}
    assert {8080, 8265} <= ports


def test_the_schedule_lets_one_night_run_at_a_time_and_lets_it_end():
    (cron,) = of_kind("CronJob")
    spec, job = cron["spec"], cron["spec"]["jobTemplate"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert (spec["timeZone"], job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == ("Etc/UTC", 0, "Never")
    (command,) = (c["command"] for c in job["template"]["spec"]["containers"])
    assert command == ["bash", "/app/cluster/nightly.sh"]
    (opt_in,) = of_kind("RayCronJob")
    assert (opt_in["spec"]["schedule"], opt_in["spec"]["timeZone"]) == (spec["schedule"], spec["timeZone"])


def test_clusters_end_or_shrink():
    (cluster,) = of_kind("RayCluster")
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    assert [(g["groupName"], g["minReplicas"], g["replicas"]) for g in cluster["spec"]["workerGroupSpecs"]] == [
        ("cpu", 0, 0),
        ("gpu", 0, 0),
    ]
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for job in [*of_kind("RayJob"), *(d["spec"] | {"spec": d["spec"]["jobTemplate"]} for d in of_kind("RayCronJob"))]:
        spec = job["spec"]
        assert spec["activeDeadlineSeconds"] > 0
        if "clusterSelector" in spec:
            assert spec["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
            assert not spec.get("shutdownAfterJobFinishes")  # it is not this job's cluster
            assert not spec.get("backoffLimit")  # the operator refuses it there: no schema says so
        else:
            assert spec["shutdownAfterJobFinishes"] is True
            assert spec["ttlSecondsAfterFinished"] > 0


def entrypoints():
    """Every command in a manifest that runs one of our jobs, as its shell would see it."""
    (settings,) = of_kind("ConfigMap")
    (cron,) = of_kind("CronJob")
    jobs = [d["spec"] for d in of_kind("RayJob")] + [d["spec"]["jobTemplate"] for d in of_kind("RayCronJob")]
    for job in jobs:
        assert job["submissionMode"] == "HTTPMode"  # else the shell is one that does not know the settings
        yield job["entrypoint"], settings["data"]
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (options,) = (v["value"] for v in container["env"] if v["name"] == "FWM_OPTIONS")
    script = (CLUSTER / "nightly.sh").read_text()
    (command,) = re.findall(r"^audit=\((.*)\)$", script, re.MULTILINE)
    yield f"run=nightly-2026-01-01; echo {command} {options}", settings["data"]


def test_the_commands_in_manifests_are_ours():
    """The shell's own expansion, then the parser of the real command: wrong options and unset variables fail."""
    seen = set()
    for line, settings in entrypoints():
        script = f"set -u; python() {{ printf '%s\\n' python \"$@\"; }}; {line}"
        told = shell("bash", "-c", script, **settings)
        assert told.returncode == 0, told.stderr
        module, *arguments = shlex.split(told.stdout)[2:]
        command = get_command(importlib.import_module(module).app)
        with command.make_context(module, arguments, resilient_parsing=False) as context:
            assert context.params["keys"] == settings["FWM_KEYS"]
            if module == "jobs.audit":
                assert context.params["actors"], "without workers at its start, a run has to ask for some"
                assert context.params["run_id"], "a retry has to resume"
            else:
                assert context.params["storage_"] == settings["FWM_STORAGE"]
        seen.add(module)
    assert seen == {"jobs.audit", "jobs.embed"}


@pytest.mark.parametrize("script", ["nightly.sh", "local.sh"])
def test_scripts_are_shell(script):
    done = shell("bash", "-n", CLUSTER / script)
    assert done.returncode == 0, done.stderr


def test_the_image_copies_what_there_is_and_installs_what_was_tested():
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    for sources in re.findall(r"^COPY (.+) \S+$", lines, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    assert re.findall(r"^USER (\S+)$", lines, re.MULTILINE) == ["1000:1000"]
    for command in re.findall(r"^RUN (.+)$", lines, re.MULTILINE):
        assert shell("bash", "-n", "-c", command).returncode == 0, command
        for install in re.findall(r"pip install .*?(?:&&|$)", command):
            assert "-c constraints.txt" in install or '"$(version' in install
    python = re.search(r"^FROM python:(\d+\.\d+)", lines, re.MULTILINE)[1]
    assert f"CPython {python}" in (CLUSTER / "constraints.txt").read_text()


def test_ray_up_is_accepted_by_ray_itself():
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    validate_config(fillout_defaults(config))
    kinds = config["available_node_types"]
    assert {name: kind.get("min_workers", 0) for name, kind in kinds.items()} == {"head": 0, "cpu": 0, "gpu": 0}
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) <= config["max_workers"]
    assert kinds[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    with pytest.raises(Exception, match="nosuchfield"):
        validate_config(fillout_defaults(config | {"nosuchfield": 1}))


# --------------------------------------------------------------------------------------------- watching


def metric_names():
    """What the code exports, as Prometheus sees it."""
    source = Path(metrics.__file__).read_text()
    return {f"ray_{name}" for name in re.findall(r'metrics\.\w+\(\s*"(\w+)"', source)}


def expressions():
    dashboard = json.loads((CLUSTER / "dashboard.json").read_text())
    rules = yaml.safe_load((CLUSTER / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels, [rule["expr"] for rule in rules]


def test_dashboard_and_alerts_ask_for_metrics_that_there_are():
    panels, rules = expressions()
    asked = {name for expr in panels + rules for name in re.findall(r"ray_fwm_\w+", expr)}
    assert asked == metric_names()
    codes = {
        code for expr in rules for codes in re.findall(r'error_code=~"([^"]+)"', expr) for code in codes.split("|")
    }
    assert codes <= {code.value for code in ErrorCode}
    ids = [panel["id"] for panel in json.loads((CLUSTER / "dashboard.json").read_text())["panels"]]
    assert len(ids) == len(set(ids)) > 8


def test_the_readme_says_what_to_do_about_each_alert():
    rules = yaml.safe_load((CLUSTER / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(re.findall(r"`(Fwm\w+)`", README))


def promtool(*arguments):
    """Exit code and what it said."""
    name = shutil.which("promtool")
    if name is None:
        pytest.skip("promtool is not installed (it is in Debian's package prometheus)")
    done = shell(name, *map(str, arguments))
    return done.returncode, done.stdout + done.stderr


def test_promtool_accepts_rules_dashboard_and_configuration(tmp_path):
    code, said = promtool("check", "rules", CLUSTER / "alerts.yaml")
    assert code == 0, said
    # Grafana's variables stand for durations.
    panels = [re.sub(r"\$__(range|rate_interval)", "5m", expr) for expr in expressions()[0]]
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(panels)]
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    code, said = promtool("check", "rules", tmp_path / "alerts.yaml")
    assert code == 0, said
    # Debian's build knows no Kubernetes: everything else of the configuration, then.
    config = yaml.safe_load((CLUSTER / "prometheus.yaml").read_text())
    for job in config["scrape_configs"]:
        (discovery,) = job.pop("kubernetes_sd_configs")
        assert discovery["namespaces"]["names"] == ["fwm-audit"]
        job["static_configs"] = [{"targets": ["127.0.0.1:8080"]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    code, said = promtool("check", "config", tmp_path / "prometheus.yaml")
    assert code == 0, said


def test_alerts_go_off_when_they_should_and_not_otherwise():
    code, said = promtool("test", "rules", ROOT / "tests" / "alerts_test.yaml")
    assert code == 0, said
    tested = {t["alertname"] for case in ALERT_TESTS["tests"] for t in case["alert_rule_test"] if t["exp_alerts"]}
    assert tested == {
        rule["alert"] for rule in yaml.safe_load((CLUSTER / "alerts.yaml").read_text())["groups"][0]["rules"]
    }


ALERT_TESTS = yaml.safe_load((ROOT / "tests" / "alerts_test.yaml").read_text())
