//! Answers of the Engine API against the shapes that its description gives them: a checking
//! [`Api`](skep_chaos_tests::Api) looks at each.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use serde_json::{Value, json};
use skep_chaos_tests::{Api, LIMIT, Rig, Scene, take_turn, wait_until};

/// Gets what must be there.
#[track_caller]
fn get(api: &mut Api, path: &str) -> Value {
    let answer = api.get(path).unwrap();
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    answer.body
}

/// Posts what must be taken; returns the id of what was made, if the answer has one.
#[track_caller]
fn post(api: &mut Api, path: &str, body: &Value) -> String {
    let answer = api.post(path, body).unwrap();
    assert!(matches!(answer.status, 200..=204), "{path}: {answer:?}");
    let id = ["Id", "ID", "Name"].iter().find_map(|key| answer.body[key].as_str());
    id.unwrap_or_default().to_owned()
}

#[test]
fn answers_of_one_host_have_their_shapes() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let api = &mut scene.host().api();
    for path in
        ["/info", "/version", "/system/df", "/plugins", "/containers/json", "/volumes", "/networks", "/images/json"]
    {
        get(api, path);
    }
    let volume = post(api, "/volumes/create", &json!({ "Name": "data", "Labels": { "a": "b" } }));
    get(api, "/volumes");
    get(api, &format!("/volumes/{volume}"));
    let network =
        post(api, "/networks/create", &json!({ "Name": "lan", "IPAM": { "Config": [{ "Subnet": "10.9.0.0/24" }] } }));
    let container = post(
        api,
        "/containers/create?name=web",
        &json!({
            "Image": "busybox", "Cmd": ["sh", "-c", "echo one; sleep 1000"], "ExposedPorts": { "80/tcp": {} },
            "Healthcheck": { "Test": ["CMD", "true"], "Interval": 1_000_000_000 },
            "HostConfig": { "NetworkMode": "lan", "PortBindings": { "80/tcp": [{ "HostPort": "8080" }] },
                "Binds": ["data:/data"], "Memory": 64 << 20, "Tmpfs": { "/t": "size=1m" } },
        }),
    );
    get(api, &format!("/containers/{container}/json"));
    post(api, &format!("/containers/{container}/start"), &json!({}));
    wait_until("it is healthy", LIMIT, || {
        let state = get(api, "/containers/web/json")["State"].clone();
        (state["Health"]["Status"] == "healthy", state.to_string())
    });
    for path in ["json?size=1", "top", "stats?stream=0", "stats?stream=0&one-shot=1", "changes"] {
        get(api, &format!("/containers/web/{path}"));
    }
    let exec = post(api, "/containers/web/exec", &json!({ "Cmd": ["true"], "AttachStdout": true }));
    get(api, &format!("/exec/{exec}/json"));
    for path in ["/containers/json?all=1&size=1", "/networks", "/networks/lan", "/volumes", "/system/df", "/info"] {
        get(api, path);
    }
    post(api, "/containers/web/update", &json!({ "Memory": 32 << 20 }));
    post(api, "/containers/web/stop?t=0", &json!({}));
    post(api, "/containers/web/wait", &json!({}));
    get(api, "/containers/web/json");
    post(api, "/commit?container=web&repo=committed", &json!({}));
    for path in ["/images/json?manifests=1", "/images/committed/json", "/images/committed/history", "/system/df"] {
        get(api, path);
    }
    assert_eq!(api.delete("/containers/web?v=1").unwrap().status, 204);
    assert_eq!(api.delete("/images/committed").unwrap().status, 200);
    for kind in ["containers", "images", "volumes", "networks", "build"] {
        post(api, &format!("/{kind}/prune"), &json!({}));
    }
    assert_eq!(api.get(&format!("/networks/{network}")).unwrap().status, 404);
    for path in
        ["/containers/none/json", "/images/none/json", "/volumes/none", "/exec/none/json", "/services", "/nowhere"]
    {
        assert!(api.get(path).unwrap().status >= 400, "{path}");
    }
}

#[test]
fn answers_of_a_swarm_have_their_shapes() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    let api = &mut host.api();
    assert_eq!(
        api.post("/swarm/init", &json!({ "ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": "10.77.0.1" })).unwrap().status,
        200
    );
    let secret = post(api, "/secrets/create", &json!({ "Name": "key", "Data": "aGVsbG8=" }));
    let config = post(api, "/configs/create", &json!({ "Name": "conf", "Data": "aGVsbG8=", "Labels": { "a": "b" } }));
    let network = post(api, "/networks/create", &json!({ "Name": "web-net", "Driver": "overlay", "Attachable": true }));
    let service = post(
        api,
        "/services/create",
        &json!({
            "Name": "web",
            "TaskTemplate": {
                "ContainerSpec": {
                    "Image": "skep/whoami",
                    "Env": ["A=b"],
                    "Secrets": [{ "SecretID": secret, "SecretName": "key", "File": { "Name": "key", "UID": "0", "GID": "0", "Mode": 292 } }],
                    "Configs": [{ "ConfigID": config, "ConfigName": "conf", "File": { "Name": "/conf", "UID": "0", "GID": "0", "Mode": 292 } }],
                },
                "Networks": [{ "Target": network, "Aliases": ["w"] }],
                "Resources": { "Limits": { "MemoryBytes": 64 << 20 } },
                "RestartPolicy": { "Condition": "any" },
                "Placement": { "Constraints": ["node.role==manager"] },
            },
            "Mode": { "Replicated": { "Replicas": 2 } },
            "UpdateConfig": { "Parallelism": 1, "FailureAction": "rollback", "Order": "start-first" },
            "EndpointSpec": { "Ports": [{ "Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080 }] },
        }),
    );
    wait_until("both run", LIMIT, || {
        let tasks = get(api, "/tasks?filters=%7B%22desired-state%22%3A%5B%22running%22%5D%7D");
        let running = tasks.as_array().unwrap().iter().filter(|task| task["Status"]["State"] == "running").count();
        (running == 2, tasks.to_string())
    });
    for path in [
        "/swarm",
        "/nodes",
        "/services?status=1",
        "/tasks",
        "/secrets",
        "/configs",
        "/networks",
        "/networks/web-net?verbose=1",
        "/info",
        "/containers/json",
        "/system/df",
    ] {
        get(api, path);
    }
    for (kind, id) in [("services", &service), ("secrets", &secret), ("configs", &config)] {
        get(api, &format!("/{kind}/{id}"));
    }
    let task = get(api, "/tasks")[0]["ID"].as_str().unwrap().to_owned();
    get(api, &format!("/tasks/{task}"));
    let mut spec = get(api, "/services/web");
    spec["Spec"]["TaskTemplate"]["ForceUpdate"] = json!(1);
    let version = spec["Version"]["Index"].clone();
    post(api, &format!("/services/web/update?version={version}"), &spec["Spec"]);
    assert!(api.post(&format!("/services/web/update?version={version}"), &spec["Spec"]).unwrap().status >= 400);
    get(api, "/services/web");
    for path in ["/services/none", "/tasks/none", "/nodes/none", "/secrets/none", "/configs/none"] {
        assert_eq!(api.get(path).unwrap().status, 404, "{path}");
    }
    assert_eq!(api.delete("/services/web").unwrap().status, 200);
}
