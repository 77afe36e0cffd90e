"""The YAML of launch/gke.sh: against a strict schema, and what the fields mean together."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import split

import pytest
import yaml
from jsonschema import Draft202012Validator
from launching import ROOT, launch, program

SCHEMA = json.loads((Path(__file__).parent / "schemas/jobset.json").read_text())
TPU = split("tpu dpo --image docker.example/mllm-align:1 --accelerator tpu-v5-lite-podslice --topology 4x4")
GPU = split("gpu dpo --image docker.example/mllm-align:1 --accelerator nvidia-h100-80gb --hosts 2")
REST = ["--bucket", "my-bucket", "--dry-run"]
RUN = ["--", "train", "configs/dpo_llava16_7b.py"]


def jobset(*words: str) -> dict:
    done = launch("gke.sh", *words)
    assert done.returncode == 0, done.stderr
    assert "${" not in done.stdout.partition("\n")[2]
    return yaml.safe_load(done.stdout)


def parts(spec: dict) -> tuple[dict, dict, dict]:
    """The Job's, the Pod's and the container's spec."""
    (replicated,) = spec["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


CASES = {
    "tpu": [*TPU, *REST, *RUN],
    "tpu slices": [*TPU, "--slices", "2", "--spot", "--unprivileged", *REST, *RUN],
    "tpu named null": ["tpu", "null", *TPU[2:], "--namespace", "yes", *REST, *RUN],
    "gpu": [*GPU, *REST, *RUN],
    "gpu spot": [*GPU, "--spot", "--per-host", "4", "--service-account", "trainer", *REST, *RUN],
}


@pytest.mark.parametrize("case", CASES)
def test_the_yaml_fits_the_schema(case):
    errors = [
        f"{e.json_path}: {e.message}"
        for e in Draft202012Validator(SCHEMA).iter_errors(jobset(*CASES[case]))
    ]
    assert not errors


def test_the_schema_is_a_schema_and_is_strict():
    Draft202012Validator.check_schema(SCHEMA)
    validator = Draft202012Validator(SCHEMA)
    for path, value in {
        ("kind",): "Job",
        ("spec", "sucessPolicy"): {},
        ("spec", "failurePolicy", "rules", 0, "action"): "Fail",
        ("spec", "replicatedJobs", 0, "template", "spec", "parallelism"): "4",
        (
            "spec",
            "replicatedJobs",
            0,
            "template",
            "spec",
            "podFailurePolicy",
            "rules",
            0,
            "onExitCodes",
            "values",
        ): [0],
        ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"): "Always",
    }.items():
        document = jobset(*CASES["tpu"])
        assert validator.is_valid(document)
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        assert not validator.is_valid(document), path


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_what_exit_statuses_do(kind):
    document = jobset(*CASES[kind])
    job, pod, container = parts(document)
    rules = job["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"]
    assert [rule["onExitCodes"]["values"] for rule in rules[:2]] == [[2, 3], [75]]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[:2]} == {container["name"]}
    assert rules[2]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    # Any other failure fails its Job at once, and the JobSet starts all Jobs again, so many times.
    assert job["backoffLimit"] == 0 and document["spec"]["failurePolicy"]["maxRestarts"] == 20
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert pod["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_volumes_resources_and_hosts_agree(kind):
    job, pod, container = parts(jobset(*CASES[kind]))
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


@pytest.mark.parametrize(
    ("accelerator", "topology", "more", "hosts", "chips"),
    [
        ("tpu-v5-lite-podslice", "4x4", [], 4, 4),
        ("tpu-v5-lite-podslice", "2x4", ["--per-host", "8"], 1, 8),
        ("tpu-v6e-slice", "16x16", [], 64, 4),
        ("tpu-v6e-slice", "1x1", ["--per-host", "1"], 1, 1),
        ("tpu-v4-podslice", "2x2x4", [], 4, 4),
        ("tpu-v5p-slice", "4x4x8", [], 32, 4),
        ("tpu7x", "2x2x1", [], 1, 4),
    ],
)
def test_hosts_of_a_slice_follow_from_its_topology(accelerator, topology, more, hosts, chips):
    words = [*TPU[:4], "--accelerator", accelerator, "--topology", topology, *more, *REST, *RUN]
    job, pod, container = parts(jobset(*words))
    assert job["parallelism"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }


def test_tpu_slices_have_node_pools_of_their_own():
    document = jobset(*CASES["tpu slices"])
    assert document["spec"]["replicatedJobs"][0]["replicas"] == 2
    place = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert document["metadata"]["annotations"] == place
    _, pod, container = parts(document)
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert container["securityContext"]["privileged"] is False
    assert "env" not in container  # GKE itself tells TPU pods who they are


def test_gpu_hosts_find_the_first_one_by_name():
    document = jobset(*CASES["gpu"])
    _, pod, container = parts(document)
    env = {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"]}
    name, worker = document["metadata"]["name"], document["spec"]["replicatedJobs"][0]["name"]
    assert document["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": name}
    port = container["ports"][0]["containerPort"]
    assert env == {
        "JAX_COORDINATOR_ADDRESS": f"{name}-{worker}-0-0.{name}:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    }
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_names_that_yaml_would_read_as_something_else_stay_names():
    document = jobset(*CASES["tpu named null"])
    assert (document["metadata"]["name"], document["metadata"]["namespace"]) == ("null", "yes")


def test_the_program_gets_its_words_unchanged():
    words = ["train", 'a "b"', "back\\slash", "$(HOME)", "${NAME}", "& # : [x]", "", "true", "ä"]
    _, _, container = parts(yaml.safe_load(launch("gke.sh", *TPU, *REST, "--", *words).stdout))
    # Kubernetes reads $(HOME) as a variable, and $$(HOME) as the text.
    assert container["args"] == [w.replace("$(", "$$(") for w in words]


def test_without_dry_run_it_goes_to_kubectl(tmp_path):
    program(tmp_path, "kubectl", f'echo "$@" >{tmp_path}/words; cat >{tmp_path}/yaml')
    done = launch("gke.sh", *TPU, *REST[:2], *RUN, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "yaml").read_text()) == jobset(*CASES["tpu"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "it must be tpu or gpu"),
        (["tpu", "My_Job"], "NAME is 'My_Job'"),
        (["tpu", "x" * 41], "40 characters at most"),
        ([*TPU, *REST], "what shall be run"),
        ([*TPU, "--dry-run", *RUN], "--bucket is ''"),
        ([*TPU, "--bucket", "gs://b", *RUN], "without gs://"),
        ([*TPU, "--accelerator", "v5e", *REST, *RUN], "--accelerator is 'v5e'"),
        ([*TPU, "--topology", "2x2x4", *REST, *RUN], "must have 2 sides, as 4x4"),
        ([*TPU, "--topology", "4x4x", *REST, *RUN], "--topology is '4x4x'"),
        ([*TPU, "--topology", "1x1", *REST, *RUN], "give --per-host"),
        ([*TPU, "--hosts", "4", *REST, *RUN], "follows from --topology"),
        ([*TPU, "--image", "a b", *REST, *RUN], "--image is 'a b'"),
        ([*TPU, *REST, "--", "train", "a\nb"], "line breaks"),
        ([*GPU, "--topology", "4x4", *REST, *RUN], "--topology is for tpu"),
        ([*GPU, "--accelerator", "h100", *REST, *RUN], "must look like nvidia-h100-80gb"),
        ([*GPU[:6], *REST, *RUN], "--hosts is ''"),
        ([*GPU, "--cheap", *REST, *RUN], "unknown option '--cheap'"),
    ],
)
def test_mistakes_are_told_in_one_line(words, says):
    done = launch("gke.sh", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("gke.sh: error: ") and says in done.stderr and done.stderr.count("\n") == 1
    )


def test_every_place_in_a_template_is_filled_by_the_launcher():
    script = (ROOT / "launch/gke.sh").read_text()
    for template in (ROOT / "launch/gke").glob("*.yaml"):
        for place in template.read_text().split("${")[1:]:
            name = place.split("}")[0]
            assert name == "..." or f'"{name}=' in script, (template, name)
