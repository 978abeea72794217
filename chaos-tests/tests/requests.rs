//! What clients ask that is seldom asked, and gets what Docker's users are used to.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use serde_json::json;
use skep_chaos_tests::{LIMIT, Rig, has_docker, take_turn, wait_until};

#[test]
fn a_reload_is_told_and_in_force() {
    take_turn!();
    if !has_docker() {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.host(1);
    let file = host.dir().join("daemon.json");
    std::fs::write(&file, "{}").unwrap();
    host.start_daemon_with(&["--config-file", &file.display().to_string(), "--tlsverify=false", "-l", "debug"]);
    let told = "{{.RegistryConfig.Mirrors}} {{.RegistryConfig.InsecureRegistryCIDRs}}";
    assert_eq!(host.docker(&["info", "-f", told]).trim(), "[] [127.0.0.0/8]");
    std::fs::write(&file, r#"{"registry-mirrors": ["http://mirror:5000"], "insecure-registries": ["10.9.0.0/16"]}"#)
        .unwrap();
    assert!(host.exec("kill", &["-HUP", &host.daemon_pid().to_string()]).success);
    wait_until("it is in force", LIMIT, || {
        let now = host.docker(&["info", "-f", told]);
        (now.trim() == "[http://mirror:5000/] [10.9.0.0/16 127.0.0.0/8]", now)
    });
    wait_until("the reload is told of", LIMIT, || {
        let event = host.docker(&["events", "--since", "1m", "--until", "0s", "--filter", "type=daemon"]);
        let mirrors = "registry-mirrors=[\"http://mirror:5000\"]";
        (event.contains(" daemon reload ") && event.contains(mirrors), event)
    });
    assert!(host.log().contains("Calling GET "), "{}", host.log());
}

#[test]
fn containers_stay_within_the_hierarchy_of_cgroups() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    let climbing = "../../../../../../skep-climbed";
    host.docker(&["run", "-d", "--name", "climber", "--cgroup-parent", climbing, "busybox", "sleep", "600"]);
    let pid = host.docker(&["inspect", "-f", "{{.State.Pid}}", "climber"]);
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", pid.trim())).unwrap();
    assert!(cgroups.contains(":/skep-climbed/") && !cgroups.contains(".."), "{cgroups}");
    assert!(!std::path::Path::new("/skep-climbed").exists());
    host.docker(&["rm", "-f", "climber"]);
    for entry in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        // Gone already where the host has one hierarchy alone.
        let _ = std::fs::remove_dir(entry.path().join("skep-climbed"));
    }
    let _ = std::fs::remove_dir("/sys/fs/cgroup/skep-climbed");
}

/// A container may name another that is not there yet, and share what that one shares itself.
#[test]
fn networks_are_shared_from_container_to_container() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    host.docker(&["create", "--name", "third", "--net", "container:second", "busybox", "cat", "/etc/hosts"]);
    assert!(host.docker_fails(&["start", "-a", "third"]).contains("No such container: second"));
    host.docker(&["run", "-d", "--name", "first", "-h", "first-host", "busybox", "sleep", "600"]);
    host.docker(&["run", "-d", "--name", "second", "--net", "container:first", "busybox", "sleep", "600"]);
    assert!(host.docker(&["start", "-a", "third"]).contains("first-host"));
    let myself = host.docker_fails(&["run", "--name", "me", "--net", "container:me", "busybox", "true"]);
    assert!(myself.contains("cannot join own network"), "{myself}");
    host.docker(&["stop", "-t", "0", "second"]);
    assert!(host.docker_fails(&["start", "-a", "third"]).contains("cannot join network of a non running container"));
}

/// Whoever sees the end of a container's process may remove its network at once.
#[test]
fn a_network_is_free_as_soon_as_its_containers_have_ended() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    let mut api = host.api();
    for _ in 0..10 {
        host.docker(&["network", "create", "front"]);
        host.docker(&["run", "-d", "--name", "box", "--net", "front", "busybox", "sleep", "0.2"]);
        let pid = host.docker(&["inspect", "-f", "{{.State.Pid}}", "box"]);
        let process = format!("/proc/{}/stat", pid.trim());
        // Its memory, and with that its program, goes a moment before itself.
        let has_ended = || std::fs::read_to_string(&process).map_or(true, |stat| stat.contains(") Z "));
        wait_until("its process has ended", LIMIT, || (has_ended(), String::new()));
        let removed = api.delete("/networks/front").unwrap();
        assert_eq!(removed.status, 204, "{}", removed.body);
        host.docker(&["rm", "-f", "box"]);
    }
}

/// Also where the kernel has bridges filter, as those do that other container engines have been on.
#[test]
fn a_container_reaches_its_own_port_by_the_host() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    for filters in ["0", "1"] {
        let set = host.exec("sysctl", &["-w", &format!("net.bridge.bridge-nf-call-iptables={filters}")]);
        if !set.success {
            eprintln!("SKIPPED: the kernel has no br_netfilter");
            continue;
        }
        let serve = "while true; do echo it works | nc -lp 80; done";
        host.docker(&["run", "-d", "--name", "web", "-p", "8080:80", "busybox", "sh", "-c", serve]);
        let ask = ["sh", "-c", &format!("nc -w 5 {} 8080 < /dev/null", host.addr())].map(str::to_owned);
        let ask: Vec<&str> = ask.iter().map(String::as_str).collect();
        assert_eq!(host.docker(&[&["run", "--rm", "busybox"], &ask[..]].concat()), "it works\n", "filters: {filters}");
        assert_eq!(host.docker(&[&["exec", "web"], &ask[..]].concat()), "it works\n", "filters: {filters}");
        host.docker(&["rm", "-f", "web"]);
    }
}

#[test]
fn what_is_asked_before_a_container_runs_is_as_it_will_be() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    let mut api = host.api();
    // Its working directory is there.
    host.docker(&["create", "--name", "waiting", "-w", "/home/of/it", "busybox", "sleep", "600"]);
    host.docker(&["cp", "waiting:/home/of/it", &host.dir().join("it").display().to_string()]);
    assert!(host.dir().join("it").is_dir());
    // An exec that was not started is gone with what it was for.
    host.docker(&["start", "waiting"]);
    let exec = api.post("/containers/waiting/exec", &json!({"Cmd": ["true"]})).unwrap();
    let path = format!("/exec/{}/start", exec.body["Id"].as_str().unwrap());
    host.docker(&["restart", "-t", "0", "waiting"]);
    assert_eq!(api.post(&path, &json!({"Detach": true})).unwrap().status, 404);
    // Clients of long ago know of one network for a start.
    for name in ["front", "back"] {
        host.docker(&["network", "create", name]);
    }
    let several = json!({"Image": "busybox", "Cmd": ["true"], "HostConfig": {"NetworkMode": "front"},
        "NetworkingConfig": {"EndpointsConfig": {"front": {}, "back": {}}}});
    let old = api.post("/v1.43/containers/create", &several).unwrap();
    assert_eq!(old.status, 400, "{}", old.body);
    assert!(old.body["message"].as_str().unwrap().contains("network endpoints: front, back"), "{}", old.body);
    let new = api.post("/v1.44/containers/create", &several).unwrap();
    assert_eq!(new.status, 201, "{}", new.body);
    // The host's own network gives no names, which keeps nobody from having some in another one.
    let named = |name: &str| {
        json!({"Image": "busybox", "Cmd": ["true"], "HostConfig": {"NetworkMode": "bridge"},
            "NetworkingConfig": {"EndpointsConfig": {"bridge": {}, name: {"Aliases": ["other"]}}}})
    };
    assert_eq!(api.post("/v1.44/containers/create", &named("front")).unwrap().status, 201);
    assert_eq!(api.post("/v1.44/containers/create", &named("bridge")).unwrap().status, 400);
    // They know a container by its short id, too, and expect others to share its memory.
    let at = |version: &str, name: &str| host.api().get(&format!("/v1.{version}/containers/{name}/json")).unwrap().body;
    let made = |version: &str, name: &str| {
        let body = json!({"Image": "busybox", "Cmd": ["true"], "WorkingDir": "/tmp//x/", "HostConfig": {"NetworkMode": "front"}});
        assert_eq!(
            host.api().post(&format!("/v1.{version}/containers/create?name={name}"), &body).unwrap().status,
            201
        );
        at("44", name)
    };
    let (old, new) = (made("39", "old"), made("44", "new"));
    assert_eq!([&old, &new].map(|made| made["HostConfig"]["IpcMode"].as_str().unwrap()), ["shareable", "private"]);
    assert_eq!(new["Config"]["WorkingDir"], "/tmp/x");
    let short = &new["Id"].as_str().unwrap()[..12];
    let aliases = |version: &str| at(version, "new")["NetworkSettings"]["Networks"]["front"]["Aliases"].clone();
    assert_eq!([aliases("43"), aliases("44")], [json!([short]), json!(null)]);
    // A place that a container does not hold yet can be asked for anew.
    host.docker(&["create", "--name", "joining", "--net", "front", "busybox", "sleep", "600"]);
    host.docker(&["network", "connect", "--alias", "late", "front", "joining"]);
    host.docker(&["start", "joining"]);
    assert!(host.docker(&["inspect", "joining"]).contains("\"late\""));
    let twice = host.docker_fails(&["network", "connect", "front", "joining"]);
    assert!(
        twice.contains("already exists in network front") && twice.contains("already attached to network"),
        "{twice}"
    );
    // What takes room on the disk is told by its kind, if that is asked for.
    let usage = api.get("/system/df?type=volume&type=container").unwrap().body;
    assert!(usage["Volumes"].is_array() && usage["Containers"].is_array(), "{usage}");
    assert!(usage["Images"].is_null() && usage["BuildCache"].is_null() && usage["LayersSize"] == 0, "{usage}");
    assert!(api.get("/system/df").unwrap().body["Images"].is_array());
    assert_eq!(api.get("/system/df?type=everything").unwrap().status, 400);
}

/// An image in use is kept, in the words that clients look for; the one that the program carries comes when it is named.
#[test]
fn networks_are_told_as_they_were_asked_for() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    let create =
        ["network", "create", "--attachable", "--ipam-opt", "a=b", "--ipv6", "--subnet", "fd71:0:0a::/64", "net"];
    host.docker(&create);
    let told =
        host.docker(&["network", "inspect", "-f", "{{.Attachable}} {{.IPAM.Options}} {{json .IPAM.Config}}", "net"]);
    assert!(told.starts_with("true map[a:b] ") && told.contains("fd71:0:0a::/64"), "{told}");
    // The address itself has the usual form.
    host.docker(&["run", "-d", "--name", "in", "--network", "net", "busybox", "sleep", "600"]);
    let address = host.docker(&["inspect", "-f", "{{.NetworkSettings.Networks.net.GlobalIPv6Address}}", "in"]);
    assert_eq!(address.trim(), "fd71:0:a::2");
    // Labels are taken where nothing could have them.
    host.docker(&["run", "--rm", "--security-opt", "label=level:s0:c100", "busybox", "true"]);
    assert!(host.docker_fails(&["run", "--security-opt", "label=colour:red", "busybox", "true"]).contains("colour"));
}

#[test]
fn images_go_when_nobody_needs_them() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    assert_eq!(host.docker(&["images", "--format", "{{.Repository}}"]), "busybox\n");
    host.docker(&["tag", "busybox", "other/name:1"]);
    let id = host.docker(&["inspect", "-f", "{{.Id}}", "busybox"]);
    let id = id.trim();
    assert!(
        host.docker_fails(&["rmi", id]).contains("(must be forced) - image is referenced in multiple repositories")
    );
    host.docker(&["rmi", "other/name:1"]);
    host.docker(&["run", "-d", "--name", "user", "busybox", "sleep", "600"]);
    assert!(
        host.docker_fails(&["rmi", "-f", id]).contains("(cannot be forced) - image is being used by running container")
    );
    // By its name it only loses that.
    assert_eq!(host.docker(&["rmi", "-f", "busybox"]), "Untagged: busybox:latest\n");
    host.docker(&["exec", "user", "true"]);
    host.docker(&["tag", id, "busybox"]);
    host.docker(&["stop", "-t", "0", "user"]);
    assert!(host.docker_fails(&["rmi", id]).contains("(must be forced) - image is being used by stopped container"));
    assert!(
        host.docker_fails(&["rmi", "busybox"])
            .contains("unable to remove repository reference \"busybox\" (must force)")
    );
    host.docker(&["rmi", "-f", "busybox"]);
    host.docker(&["run", "-d", "--name", "carried", "skep/whoami"]);
    assert_eq!(host.docker(&["images", "--format", "{{.Repository}}"]), "skep/whoami\n");
}
