"""The files of cluster/: valid for Ray and for KubeRay, and what the recipes of configs/ ask for."""

import json
from pathlib import Path

import pytest
import yaml

from actors.cluster.plan import PROVIDER_KEYS, place, placeholders, problems, read_cluster
from actors.cluster.resources import ROLES, run_demand
from rlproxi.config.loading import load_config

ROOT = Path(__file__).parents[2]
RAY_UP = [ROOT / "cluster" / f"{name}.yaml" for name in ("aws", "gcp", "local")]
KUBERAY = {
    "RayCluster": ROOT / "cluster" / "kuberay" / "raycluster.yaml",
    "RayJob": ROOT / "cluster" / "kuberay" / "rayjob.yaml",
}
FILES = [*RAY_UP, *KUBERAY.values()]
GROUPED = [path for path in FILES if path.stem != "local"]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
CRDS = ROOT.parent / "shared" / "kuberay-crds"


def name(path: Path) -> str:
    return path.stem


def document(kind: str) -> dict:
    return next(d for d in yaml.safe_load_all(KUBERAY[kind].read_text()) if d["kind"] == kind)


def test_no_file_is_forgotten():
    there = {p for p in (ROOT / "cluster").rglob("*.yaml") if "monitoring" not in p.parts}
    assert there == set(FILES)


# -- Ray's own opinion --------------------------------------------------------------------


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_ray_takes_the_file(path):
    util = pytest.importorskip("ray.autoscaler._private.util")  # half private
    prepared = util.prepare_config(yaml.safe_load(path.read_text()))
    util.validate_config(prepared)
    # What Ray makes of it is what our reader says.
    cluster = read_cluster(path)
    if path.stem == "local":
        assert prepared["available_node_types"]["local.cluster.node"]["max_workers"] == cluster.max_workers
        return
    types = prepared["available_node_types"]
    assert {g.name: (g.least, g.most, g.resources) for g in cluster.groups if not g.head} == {
        key: (t["min_workers"], t["max_workers"], t["resources"])
        for key, t in types.items()
        if key != prepared["head_node_type"]
    }


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_ray_reads_every_provider_key(path):
    provider = yaml.safe_load(path.read_text())["provider"]
    assert set(provider) <= PROVIDER_KEYS[provider["type"]] and read_cluster(path).warnings == (
        () if path.stem != "local" else read_cluster(path).warnings[-1:]
    )


def test_an_unknown_provider_key_passes_ray_and_is_told(tmp_path):
    util = pytest.importorskip("ray.autoscaler._private.util")
    values = yaml.safe_load(RAY_UP[0].read_text())
    values["provider"]["availability_zones"] = values["provider"].pop("availability_zone")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    util.validate_config(util.prepare_config(values))
    (warning,) = read_cluster(tmp_path / "c.yaml").warnings
    assert "availability_zones" in warning and "ignores" in warning


@pytest.mark.parametrize("kind", KUBERAY)
def test_rays_autoscaler_reads_the_same_groups_from_the_manifest(kind):
    kuberay = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    spec = document(kind)["spec"]
    types = kuberay._generate_available_node_types_from_ray_cr_spec(
        spec if kind == "RayCluster" else spec["rayClusterSpec"]
    )
    types.pop("headgroup")
    for t in types.values():
        t["resources"].pop("memory")
    assert {g.name: (g.least, g.most, g.resources) for g in read_cluster(KUBERAY[kind]).groups if not g.head} == {
        key: (t["min_workers"], t["max_workers"], t["resources"]) for key, t in types.items()
    }


def closed(schema):
    """The schema with unknown keys refused: Kubernetes drops them without a word."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if (
        isinstance(schema.get("properties"), dict)
        and "type" in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        found.setdefault("additionalProperties", False)
    return found


@pytest.mark.parametrize("kind", KUBERAY)
def test_kuberays_schema_takes_the_manifest(kind):
    jsonschema = pytest.importorskip("jsonschema")
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRD schemas are not in {CRDS}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in Python these files of 20,000 lines take ten seconds
    versions = yaml.load(path.read_text(), loader)["spec"]["versions"]
    schema = closed(next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    check = jsonschema.Draft202012Validator(schema)
    assert [f"{'/'.join(map(str, e.path))}: {e.message}" for e in check.iter_errors(document(kind))] == []
    broken = json.loads(json.dumps(document(kind)))
    (broken["spec"] if kind == "RayCluster" else broken["spec"]["rayClusterSpec"])["workerGroupSpecs"][0][
        "maxReplica"
    ] = 3
    assert any("maxReplica" in e.message for e in check.iter_errors(broken)), "the schema refuses what it does not know"


def test_the_job_makes_the_cluster_of_the_other_manifest():
    assert document("RayJob")["spec"]["rayClusterSpec"] == document("RayCluster")["spec"]


# -- what the issue asks of every cluster -------------------------------------------------


@pytest.mark.parametrize("path", GROUPED, ids=name)
def test_a_head_without_work_and_a_group_for_each_role(path):
    cluster = read_cluster(path)
    (head,) = [g for g in cluster.groups if g.head]
    assert head.resources.get("CPU") == 0 and not head.resources.get("GPU")
    groups = {g.name: g for g in cluster.groups if not g.head}
    assert set(groups) == set(ROLES)
    for role, group in groups.items():
        assert set(group.resources) == {"CPU", "GPU", role} and group.least == 0 < group.most
    assert cluster.max_workers >= max(g.most for g in groups.values())
    assert placeholders(path), "nobody's account is in the files"


@pytest.mark.parametrize("path", RAY_UP, ids=name)
def test_every_start_uses_the_token(path):
    values = yaml.safe_load(path.read_text())
    for commands in (values["head_start_ray_commands"], values["worker_start_ray_commands"]):
        assert sum("ray start" in c for c in commands) == 1 and all(
            "RAY_AUTH_MODE=token ray start" in c for c in commands if "ray start" in c
        )
    assert values["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "/shared" in json.dumps(values["initialization_commands"])


def test_spot_is_for_rollouts_alone():
    aws, gcp = (yaml.safe_load(path.read_text())["available_node_types"] for path in RAY_UP[:2])
    assert [k for k, t in aws.items() if "InstanceMarketOptions" in t["node_config"]] == ["rollout"]
    assert [k for k, t in gcp.items() if t["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"] == [
        "rollout"
    ]
    groups = document("RayCluster")["spec"]["workerGroupSpecs"]
    assert [
        g["groupName"]
        for g in groups
        if any("spot" in json.dumps(t).lower() for t in g["template"]["spec"]["tolerations"])
    ] == ["rollout"]


def test_every_pod_sees_the_shared_folder_and_the_token_is_on():
    spec = document("RayCluster")["spec"]
    assert spec["authOptions"]["mode"] == "token" and spec["enableInTreeAutoscaling"]
    (claim,) = [
        d for d in yaml.safe_load_all(KUBERAY["RayCluster"].read_text()) if d["kind"] == "PersistentVolumeClaim"
    ]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert {"name": "shared", "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        limits = pod["containers"][0]["resources"]["limits"]
        offered = group["resources"]
        assert limits.get("nvidia.com/gpu", "0") == offered.get("GPU", "0")
        assert offered["CPU"] in (limits["cpu"], "0")


def test_machines_one_has_are_of_every_role():
    start = " ".join(yaml.safe_load(RAY_UP[2].read_text())["worker_start_ray_commands"])
    assert all(f"ROLE={role}" in start for role in ROLES)


# -- the recipes --------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
@pytest.mark.parametrize("path", GROUPED, ids=name)
def test_every_recipe_fits_with_each_role_on_its_own_group(recipe, path):
    config = load_config(recipe, ["resources.placement=roles"])
    cluster, demands = read_cluster(path), run_demand(config)
    assert demands and problems(demands, cluster) == []
    used, short = place(demands, cluster)
    assert not short
    for demand in demands:
        if demand.role in ROLES:
            takers = [
                g.name for g in cluster.groups if all(g.resources.get(k, 0) >= v for k, v in demand.resources.items())
            ]
            assert takers == [demand.role] and used[demand.role] > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipe_alone_asks_for_no_labelled_machine(recipe):
    for demand in run_demand(load_config(recipe)):
        assert set(demand.resources) <= {"CPU", "GPU"}
