"""Reading groups, adding up demand, and who has no place."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from actors.cluster.plan import Cluster, NodeGroup, place, problems, read_cluster
from actors.cluster.resources import RoleDemand, bundles, run_demand, stage_demand, total_resources
from rlproxi.config.loading import build_config
from rlproxi.errors import ConfigError

JPEG = {"rewards": {"train": [{"name": "jpeg"}], "heldout": []}}


def cluster(*groups: NodeGroup, most: int = 10) -> Cluster:
    return Cluster((NodeGroup("head", {"CPU": 0.0}, 1, 1, head=True), *groups), most)


# -- demand -------------------------------------------------------------------------------


def test_what_each_role_asks_for():
    config = build_config(
        {
            "rewards": {
                "train": [{"name": "jpeg", "replicas": 3, "num_gpus": 0.5, "max_replicas": 6}],
                "heldout": [{"name": "judge", "num_cpus": 1}],
                "num_cpus": 0.25,
                "replicas": 2,
            }
        },
        [
            "resources.rollout_actors=4",
            "resources.rollout_gpus=1",
            "resources.learner_workers=2",
            "resources.learner_gpus=1",
            "rl.prompts_per_step=16",
        ],
    )
    demands = stage_demand(config)
    assert [(a.role, a.count, a.resources) for a in demands] == [
        ("rollout", 4, {"CPU": 0.5, "GPU": 1.0}),
        ("learner", 2, {"CPU": 0.5, "GPU": 1.0}),
        ("reward", 3, {"CPU": 0.25, "GPU": 0.5}),
        ("reward", 2, {"CPU": 1.0}),
    ]
    assert total_resources(demands) == {"CPU": 4 * 0.5 + 2 * 0.5 + 3 * 0.25 + 2, "GPU": 4 + 2 + 1.5}
    assert len(bundles(demands)) == 11
    assert stage_demand(config, largest=True)[2].count == 6
    assert [a.role for a in stage_demand(config, "pretrain")] == ["learner"] and stage_demand(config, "report") == []
    assert {a.role for a in stage_demand(config, "after")} == {"rollout", "reward"}
    assert run_demand(config) == demands


def test_placement_adds_a_little_of_the_roles_resource_unless_told_otherwise():
    config = build_config(JPEG, ["resources.placement=roles", "resources.learner_resources={big: 2}"])
    assert [a.resources for a in stage_demand(config)] == [
        {"CPU": 0.5, "rollout": 0.001},
        {"CPU": 0.5, "big": 2.0},
        {"CPU": 0.25, "reward": 0.001},
    ]
    one = {
        "rewards": {"train": [{"name": "jpeg", "resources": {"judge_node": 1}}], "heldout": [], "resources": {"all": 1}}
    }
    assert stage_demand(build_config(one))[-1].resources == {"CPU": 0.25, "judge_node": 1.0}
    one["rewards"]["train"][0].pop("resources")
    assert stage_demand(build_config(one))[-1].resources == {"CPU": 0.25, "all": 1.0}
    one["rewards"]["resources"] = {}
    assert stage_demand(build_config(one, ["resources.placement=roles"]))[-1].resources == {"CPU": 0.25}, (
        "{} frees a role"
    )


def test_what_ray_counts_itself_is_refused_as_a_custom_resource():
    with pytest.raises(ConfigError, match="resources.rollout_resources names 'GPU'.*rollout_gpus"):
        stage_demand(build_config(JPEG, ["resources.rollout_resources={GPU: 1}"]))
    with pytest.raises(ConfigError, match="rollout_resources.x = 0"):
        build_config(JPEG, ["resources.rollout_resources={x: 0}"])


# -- placing ------------------------------------------------------------------------------


def test_the_sentence_of_the_issue():
    demands = [RoleDemand("reward", "replicas of hpsv2.1", {"GPU": 1.0}, 4)]
    (text,) = problems(demands, cluster(NodeGroup("reward", {"CPU": 8.0, "GPU": 1.0}, 0, 2)))
    assert text.startswith("this run asks for 4 reward GPUs, the cluster tops out at 2: raise the maximum of reward")
    assert problems(demands, cluster(NodeGroup("reward", {"GPU": 1.0}, 0, 4))) == []


def test_what_no_node_offers_what_is_taken_by_others_and_the_ceiling_of_all():
    big = [RoleDemand("learner", "learner ranks", {"GPU": 1.0, "learner": 0.001}, 2)]
    (text,) = problems(big, cluster(NodeGroup("any", {"GPU": 8.0}, 0, 2)))
    assert "no node of the cluster offers 1 GPU, 0.001 learner" in text and "resources.placement" in text
    two = [
        RoleDemand("rollout", "rollout actors", {"GPU": 1.0}, 2),
        RoleDemand("learner", "learner ranks", {"GPU": 1.0}, 2),
    ]
    (text,) = problems(two, cluster(NodeGroup("any", {"GPU": 1.0}, 0, 3)))
    assert "not beside the other roles" in text
    (text,) = problems(two[:1], cluster(NodeGroup("any", {"GPU": 1.0}, 0, 5), most=1))
    assert "tops out at 1" in text and "max_workers is 1" in text


def test_small_demands_share_a_node_and_do_not_open_gpu_nodes():
    groups = (NodeGroup("gpu", {"CPU": 8.0, "GPU": 1.0}, 0, 4), NodeGroup("cpu", {"CPU": 4.0}, 0, 4))
    used, short = place(
        [RoleDemand("rollout", "r", {"CPU": 4.0, "GPU": 0.5}, 4), RoleDemand("prepare", "p", {"CPU": 4.0}, 1)],
        cluster(*groups),
    )
    assert used == {"gpu": 2, "cpu": 1} and not short
    used, short = place(
        [RoleDemand("rollout", "r", {"CPU": 1.0, "GPU": 0.5}, 1), RoleDemand("prepare", "p", {"CPU": 4.0}, 1)],
        cluster(*groups),
    )
    assert used == {"gpu": 1, "cpu": 0}, "a node that runs already is taken first"


@given(
    demands=st.lists(
        st.builds(
            RoleDemand,
            st.just("rollout"),
            st.just("r"),
            st.fixed_dictionaries(
                {"CPU": st.sampled_from([0.25, 0.5, 1.0, 2.0]), "GPU": st.sampled_from([0.25, 0.5, 1.0])}
            ),
            st.integers(1, 6),
        ),
        max_size=4,
    ),
    nodes=st.integers(0, 6),
    gpus=st.integers(1, 4),
)
def test_nobody_is_lost_and_no_node_is_overfull(demands, nodes, gpus):
    used, short = place(demands, cluster(NodeGroup("g", {"CPU": 4.0, "GPU": float(gpus)}, 0, nodes)))
    placed = sum(a.total("GPU") for a in demands) - sum(s.total("GPU") for s in short)
    assert placed <= used["g"] * gpus + 1e-9 and used["g"] <= nodes
    assert bool(problems(demands, cluster(NodeGroup("g", {"CPU": 4.0, "GPU": float(gpus)}, 0, nodes)))) == bool(short)


# -- reading ------------------------------------------------------------------------------


def write(tmp_path, values):
    path = tmp_path / "c.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "is not YAML"),
        ("a: 1", "neither"),
        ("", "neither"),
        ("kind: RayCluster\nspec: {}", "headGroupSpec"),
        ("kind: RayJob", "spec"),
        ("provider: {type: aws}\navailable_node_types: {g: 3}", "compare it with the files"),
    ],
)
def test_what_is_no_cluster_file_is_told_of(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as error:
        read_cluster(write(tmp_path, text))
    assert str(tmp_path) in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; a cluster file is one"):
        read_cluster(tmp_path / "none.yaml")


def test_a_group_is_no_larger_than_all_together(tmp_path):
    types = {
        "a-head": {"resources": {"CPU": 2}, "node_config": {}},
        "g": {"resources": {"GPU": 1}, "node_config": {}, "max_workers": 9},
    }
    values = {"provider": {"type": "aws"}, "head_node_type": "a-head", "available_node_types": types}
    assert read_cluster(write(tmp_path, {**values, "max_workers": 4})).groups[1].most == 4
    assert read_cluster(write(tmp_path, values)).max_workers == 2, "Ray's default"


@pytest.mark.parametrize(
    "group, offers",
    [
        ({"rayStartParams": {"num-cpus": "3", "resources": '"{\\"rollout\\": 1}"'}}, {"CPU": 3, "rollout": 1}),
        ({"limits": {"cpu": "1500m", "nvidia.com/gpu": 2}}, {"CPU": 2, "GPU": 2}),
        (
            {"resources": {"CPU": "1", "x": "4"}, "limits": {"cpu": "8", "nvidia.com/gpu": "1"}},
            {"CPU": 1, "GPU": 1, "x": 4},
        ),
    ],
)
def test_what_a_pod_offers(tmp_path, group, offers):
    pod = {"spec": {"containers": [{"name": "c", "resources": {"limits": group.pop("limits", {})}}]}}
    spec = {
        "enableInTreeAutoscaling": False,
        "headGroupSpec": {"template": pod},
        "workerGroupSpecs": [
            {"groupName": "g", "replicas": 2, "minReplicas": 1, "maxReplicas": 5, "template": pod, **group}
        ],
    }
    found = read_cluster(write(tmp_path, {"kind": "RayCluster", "spec": spec}))
    assert found.groups[1].resources == offers
    assert (found.groups[1].least, found.groups[1].most) == (2, 2) and "enableInTreeAutoscaling" in found.warnings[0]
