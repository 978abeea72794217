//! Services on real hosts: declared, scaled, updated, rolled back and removed; what their containers
//! get to see; what is refused.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::process::Command;

use serde_json::json;
use skep_chaos_tests::{Host, LIMIT, Rig, has_docker, take_turn, wait_for, wait_until};

#[test]
fn a_service_is_created_scaled_updated_rolled_back_and_removed() {
    take_turn!();
    let rig = Rig::swarm(5, 3);
    let first = rig.host(1);
    let file = first.dir().join("payload");
    std::fs::write(&file, "open sesame").unwrap();
    let file = file.display().to_string();
    first.ok(&["secret", "create", "password", &file]);
    first.ok(&["config", "create", "motd", &file]);
    let reference = "source=password,target=/etc/pw,uid=1000,gid=1000,mode=0400";
    first.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "web",
        "--replicas",
        "6",
        "--secret",
        reference,
        "--config",
        "motd",
        "--env",
        "COLOUR=blue",
        "--update-parallelism",
        "3",
        "--update-monitor",
        "500ms",
        "--rollback-monitor",
        "500ms",
        "skep/whoami",
    ]);
    first.await_replicas("web", "6/6");
    check_payloads(&rig);

    rig.host(2).ok(&["service", "scale", "-d", "web=10"]);
    rig.host(3).await_replicas("web", "10/10");
    let before = rig.running();
    first.ok(&["service", "update", "-d", "--label", "team=a", "web"]);
    first.await_replicas("web", "10/10");
    assert_eq!(before, rig.running(), "a label restarts nothing");

    first.ok(&["service", "update", "-d", "--env", "COLOUR=green", "web"]);
    first.await_update("web", "completed");
    let logs = first.ok(&["service", "inspect", "--format", "{{json .Spec.TaskTemplate.ContainerSpec.Env}}", "web"]);
    assert!(logs.contains("COLOUR=green"), "{logs}");
    assert!(rig.per_slot().values().all(|&count| count == 1), "{:?}", rig.per_slot());
    first.ok(&["service", "rollback", "-d", "web"]);
    first.await_update("web", "rollback_completed");
    first.await_replicas("web", "10/10");

    let refused = first.fails(&["secret", "rm", "password"]);
    assert!(refused.contains("in use") && refused.contains("web"), "{refused}");
    first.ok(&["service", "rm", "web"]);
    rig.await_no_container();
    first.ok(&["secret", "rm", "password"]);
    first.ok(&["config", "rm", "motd"]);
}

/// Each container sees the secret as asked for, on tmpfs; nothing of it lies on any disk.
fn check_payloads(rig: &Rig) {
    use std::os::unix::fs::MetadataExt as _;
    for (name, pid) in rig.running() {
        let root = format!("/proc/{pid}/root");
        let secret = format!("{root}/etc/pw");
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "open sesame", "{name}");
        let meta = std::fs::metadata(&secret).unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o777), (1000, 1000, 0o400), "{name}");
        assert_eq!(std::fs::read_to_string(format!("{root}/motd")).unwrap(), "open sesame", "{name}");
        let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        let line = mounts.lines().find(|line| line.contains(" /etc/pw ")).unwrap();
        assert!(line.contains(" - tmpfs ") && line.contains(" ro,"), "{line}");
    }
    for host in rig.hosts() {
        let found = Command::new("grep").args(["-rl", "open sesame"]).arg(host.data()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&found.stdout), "", "the payload lies open on {}", host.name());
    }
}

#[test]
fn a_broken_update_pauses_or_rolls_back_as_asked() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    host.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "web",
        "--replicas",
        "3",
        "--restart-delay",
        "1s",
        "--update-monitor",
        "1s",
        "skep/whoami",
    ]);
    host.await_replicas("web", "3/3");
    host.ok(&["service", "update", "-d", "--args", "nonsense", "web"]);
    host.await_update("web", "paused");
    let healthy = host.running().len();
    assert!(healthy >= 1, "the update stopped before it had taken every replica: {healthy}");
    host.ok(&["service", "update", "-d", "--args", "", "--update-failure-action", "rollback", "web"]);
    host.await_update("web", "completed");
    host.await_replicas("web", "3/3");
    host.ok(&["service", "update", "-d", "--args", "nonsense", "web"]);
    host.await_update("web", "rollback_completed");
    host.await_replicas("web", "3/3");
    let args = host.ok(&["service", "inspect", "web"]);
    assert!(!args.split("PreviousSpec").next().unwrap().contains("nonsense"), "{args}");
}

#[test]
fn bad_input_is_refused_by_name_and_changes_nothing() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    let refused = host.fails(&["service", "ls"]);
    assert!(refused.contains("not a swarm manager"), "{refused}");
    host.ok(&["swarm", "init"]);
    fn create<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["service", "create", "-d", "--name", "web"], more, &["skep/whoami"]].concat()
    }
    host.ok(&create(&[]));
    for (args, why) in [
        (create(&[]), "already exists"),
        (create(&["--replicas", "99999999"]), "too many"),
        (create(&["--constraint", "zone==a"]), "not known"),
        (create(&["--limit-memory", "1k"]), "4 MiB"),
        (create(&["--publish", "80:80", "--endpoint-mode", "dnsrr"]), "dnsrr"),
        (create(&["--network", "nope"]), "not found"),
        (create(&["--network", "ingress"]), "ingress"),
        (vec!["network", "create", "-d", "weave", "n"], "weave"),
        (vec!["network", "create", "--subnet", "10.0.0.0/30", "n"], "/8 to /29"),
        (vec!["network", "create", "--subnet", "10.0.0.128/25", "n"], "overlaps"),
        (vec!["network", "create", "--gateway", "10.9.0.1", "n"], "--subnet"),
        (vec!["network", "create", "host"], "choose another name"),
        (vec!["network", "create", "--ingress", "n"], "already present"),
        (vec!["network", "rm", "nope"], "not found"),
        (vec!["network", "rm", "bridge"], "pre-defined"),
        (create(&["--mode", "replicated-jobs"]), "not known"),
        (create(&["--mode", "replicated-job", "--update-delay", "1s"]), "not supported for jobs"),
        (create(&["--mode", "replicated-job", "--replicas", "2", "--max-concurrent", "0"]), "at least 1"),
        (create(&["--mode", "global-job", "--replicas", "2"]), "replicated-job mode"),
        (create(&["--max-concurrent", "2"]), "replicated-job mode"),
        (vec!["service", "update", "-d", "--mode", "global-job", "web"], "mode change is not allowed"),
        (create(&["--secret", "nope"]), "not found"),
        (create(&["--hostname", "{{.Node.Colour}}"]), "Colour"),
        (create(&["--mount", "type=bind,source=rel,target=/x"]), "absolute"),
        (vec!["service", "scale", "-d", "web=-1"], "cannot be read"),
        (vec!["service", "inspect", "nope"], "not found"),
        (vec!["service", "rollback", "-d", "web"], "never updated"),
        (vec!["node", "update", "--availability", "asleep", "n1"], "asleep"),
        (vec!["node", "rm", "n1"], "demote"),
        (vec!["swarm", "update", "--cert-expiry", "10m"], "1 hour"),
        (vec!["swarm", "leave"], "--force"),
    ] {
        let refused = host.fails(&args);
        assert!(refused.contains(why), "{args:?}: {refused}");
    }
    let big = host.dir().join("big");
    std::fs::write(&big, vec![7; 512_000]).unwrap();
    let refused = host.fails(&["secret", "create", "big", &big.display().to_string()]);
    assert!(refused.contains("512000") && refused.contains("511999"), "{refused}");
    let list = host.ok(&["service", "ls", "-q"]);
    assert_eq!(list.lines().count(), 1, "{list}");
    // An image nobody has: the task says why, the service stays.
    host.ok(&["service", "create", "-d", "--name", "gone", "10.77.0.1:5000/nothing:1"]);
    wait_until("the missing image is told", LIMIT, || {
        let list = host.ok(&["service", "ps", "--no-trunc", "gone"]);
        (list.contains("Rejected") && list.contains("nothing:1 cannot be pulled"), list)
    });
}

#[test]
fn limits_ports_health_and_output_are_as_declared() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    host.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "web",
        "--mode",
        "global",
        "--publish",
        "mode=host,target=8000,published=8080",
        "--limit-memory",
        "64m",
        "--limit-pids",
        "50",
        "--cap-drop",
        "ALL",
        "--read-only",
        "--user",
        "1000",
        "--sysctl",
        "net.ipv4.ip_unprivileged_port_start=80",
        "--ulimit",
        "nofile=100:200",
        "skep/whoami",
    ]);
    host.await_replicas("web", "2/2");
    for (host, from) in [(rig.host(1), rig.host(2)), (rig.host(2), rig.host(1))] {
        let answer = from.exec("curl", &["-s", "-m", "5", &format!("http://{}:8080/", host.addr())]);
        assert!(answer.stdout.contains("Hostname:") && answer.stdout.contains(from.addr()), "{answer:?}");
    }
    let (_, pid) = host.running().remove(0);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim().to_owned();
    assert_eq!(field("CapBnd:"), "0000000000000000");
    assert_eq!(field("Seccomp:"), "2", "the system-call filter is on");
    assert!(field("Uid:").starts_with("1000"));
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let nofile = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert!(nofile.contains("100") && nofile.contains("200"), "{nofile}");
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = cgroup.lines().find_map(|line| line.split_once(":memory:").map(|(_, path)| path.to_owned()));
    if let Some(path) = path {
        let limit = std::fs::read_to_string(format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")).unwrap();
        assert_eq!(limit.trim(), (64 << 20).to_string());
    }
    let logs = wait_for("output of both nodes", LIMIT, || {
        let logs = host.ok(&["service", "logs", "web"]);
        if logs.matches("whoami listens on port 8000").count() == 2 { Ok(logs) } else { Err(logs) }
    });
    assert!(logs.contains("web."), "{logs}");
}

#[test]
fn containers_gain_no_privileges_unless_allowed_and_are_filtered_either_way() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    let mut api = host.api();
    // {"defaultAction": "SCMP_ACT_ALLOW"}
    let all_allowed = json!({"Mode": "custom", "Profile": "eyJkZWZhdWx0QWN0aW9uIjogIlNDTVBfQUNUX0FMTE9XIn0="});
    let off = json!({"NoNewPrivileges": true, "Seccomp": {"Mode": "unconfined"}, "AppArmor": {"Mode": "disabled"},
        "SELinuxContext": {"Disable": true}});
    for (name, privileges, want, filters) in [
        ("plain", json!({}), "1", "1"),
        ("strict", json!({"NoNewPrivileges": true, "Seccomp": {"Mode": "default"}}), "1", "1"),
        ("free", json!({"NoNewPrivileges": false, "AppArmor": {"Mode": "default"}}), "0", "1"),
        ("own", json!({"Seccomp": all_allowed}), "1", "1"),
        ("off", off, "1", "0"),
    ] {
        let container = json!({"Image": "skep/whoami", "Privileges": privileges});
        let spec = json!({"Name": name, "TaskTemplate": {"ContainerSpec": container}});
        let created = api.post("/services/create", &spec).unwrap();
        assert_eq!(created.status, 201, "{created:?}");
        host.await_replicas(name, "1/1");
        let (_, pid) = host.running().into_iter().find(|(task, _)| task.starts_with(name)).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim().to_owned();
        assert_eq!(field("NoNewPrivs:"), want, "{name}");
        assert_eq!(field("Seccomp_filters:"), filters, "{name}");
        assert_eq!(field("CapBnd:"), "00000000a80425fb", "{name}: Docker's fourteen");
        let told = api.get(&format!("/services/{name}")).unwrap().body;
        let told = &told["Spec"]["TaskTemplate"]["ContainerSpec"]["Privileges"];
        for kind in ["Seccomp", "SELinuxContext"] {
            assert_eq!(told[kind], privileges[kind], "{name}");
        }
    }
    for (seccomp, want) in [
        (json!({"Mode": "custom"}), "needs a profile"),
        (json!({"Mode": "custom", "Profile": "e30="}), "cannot be used"),
        (json!({"Mode": "default", "Profile": "e30="}), "needs mode custom"),
        (json!({"Mode": "other"}), "other"),
    ] {
        let container = json!({"Image": "skep/whoami", "Privileges": {"Seccomp": seccomp}});
        let spec = json!({"Name": "bad", "TaskTemplate": {"ContainerSpec": container}});
        let refused = api.post("/services/create", &spec).unwrap();
        let told = refused.body["message"].as_str().unwrap_or_default();
        assert!(refused.status == 400 && told.contains(want), "{refused:?}");
    }
}

/// Templates are filled in for each task; what cannot be filled is refused before there is any.
#[test]
fn tasks_differ_in_what_templates_come_to() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    for host in rig.hosts() {
        host.import_busybox();
    }
    let script = "hostname; echo $WHO; touch /data/$HOSTNAME; sleep 1000";
    let flags = [
        ["--replicas", "2", "--init", "--no-resolve-image"],
        ["--label", "hive=north", "--hostname", "{{.Node.Hostname}}-{{.Task.Slot}}"],
        ["--env", "WHO={{.Service.Name}} {{index .Service.Labels \"hive\"}} {{.Task.Name}}", "--mount", ""],
    ];
    let mut flags: Vec<_> = flags.concat();
    let mount = "type=volume,source=data-{{.Task.Slot}},target=/data";
    *flags.last_mut().unwrap() = mount;
    host.ok(&[&["service", "create", "-d", "--name", "told"], &flags[..], &["busybox", "sh", "-c", script]].concat());
    host.await_replicas("told", "2/2");
    wait_until("both have said who they are", LIMIT, || {
        let logs = host.ok(&["service", "logs", "--raw", "told"]);
        let told = |slot: u8| logs.contains(&format!("told north told.{slot}."));
        let named = |slot: u8| (1..=2).any(|node| logs.contains(&format!("n{node}-{slot}")));
        ((1..=2).all(|slot| told(slot) && named(slot)), logs)
    });
    let volumes: String = rig.hosts().map(|host| host.ok(&["volume", "ls", "-q"])).collect();
    assert!(volumes.contains("data-1") && volumes.contains("data-2"), "{volumes}");
    let refused = host.fails(&["service", "update", "--hostname", "{{.Task.Colour}}", "told"]);
    assert!(refused.contains("Colour"), "{refused}");
}

/// A file of the host's, by its path.
fn file(host: &Host, name: &str, text: &str) -> String {
    let path = host.dir().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn secrets_and_configs_are_filled_in_for_each_task() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    for host in rig.hosts() {
        host.import_busybox();
    }
    let file = |name: &str, text: &str| file(host, name, text);
    host.ok(&["secret", "create", "word", &file("word", "sesame")]);
    let text = "{{.Service.Name}}.{{.Task.Slot}} {{index .Service.Labels \"hive\"}} {{env \"WHO\"}} {{secret \"pass\"}}{{config \"/tail\"}}";
    host.ok(&["config", "create", "--template-driver", "golang", "told", &file("told", text)]);
    host.ok(&[
        "secret",
        "create",
        "--template-driver",
        "golang",
        "own",
        &file("own", "{{.Task.Slot}}-{{secret \"pass\"}}"),
    ]);
    // What is not said to be a template is left as it is, and what is put in is not filled in again.
    host.ok(&["config", "create", "tail", &file("tail", "{{end}}\n")]);
    let script = "cat /etc/told; cat /run/secrets/own; echo; sleep 1000";
    let flags = ["--replicas", "2", "--no-resolve-image", "--label", "hive=north", "--env", "WHO={{.Task.Slot}}th"];
    let payloads = ["--config", "source=told,target=/etc/told", "--config", "source=tail,target=/tail"];
    let secrets = ["--secret", "source=word,target=pass", "--secret", "own"];
    let create = [&["service", "create", "-d", "--name", "filled"], &flags[..], &payloads, &secrets].concat();
    host.ok(&[&create[..], &["busybox", "sh", "-c", script]].concat());
    host.await_replicas("filled", "2/2");
    wait_until("both have what is theirs", LIMIT, || {
        let logs = host.ok(&["service", "logs", "--raw", "filled"]);
        let told = |slot: u8| {
            logs.contains(&format!("filled.{slot} north {slot}th sesame{{{{end}}}}\n"))
                && logs.contains(&format!("{slot}-sesame\n"))
        };
        (told(1) && told(2), logs)
    });
    let shown = host.ok(&["config", "inspect", "-f", "{{json .Spec.Templating}}", "told"]);
    assert!(shown.contains("golang"), "{shown}");
}

#[test]
fn templates_that_cannot_be_filled_in_are_told_of_without_what_is_secret() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    host.import_busybox();
    let file = |name: &str, text: &str| file(host, name, text);
    for (name, driver, text, why) in
        [("wrong", "golang", "{{if}", "}}"), ("wrong", "jinja", "{{ x }}", "unrecognized template driver")]
    {
        let refused = host.fails(&["config", "create", "--template-driver", driver, name, &file(name, text)]);
        assert!(refused.contains(why), "{refused}");
    }
    // What cannot be filled in says so, and no task runs with half of it.
    host.ok(&["config", "create", "--template-driver", "golang", "missing", &file("missing", "{{secret \"nope\"}}")]);
    host.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "lost",
        "--no-resolve-image",
        "--config",
        "missing",
        "busybox",
        "true",
    ]);
    wait_until("the missing secret is told", LIMIT, || {
        let list = host.ok(&["service", "ps", "--no-trunc", "lost"]);
        (list.contains("Rejected") && list.contains("no secret with the target nope"), list)
    });
    // Who sees the task learns nothing of what is secret.
    let secret = file("leaky", "hunter2 {{.Nope \"hunter3\"}}");
    host.ok(&["secret", "create", "--template-driver", "golang", "leaky", &secret]);
    host.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "quiet",
        "--no-resolve-image",
        "--secret",
        "leaky",
        "busybox",
        "true",
    ]);
    wait_until("it is told that the secret cannot be filled in", LIMIT, || {
        let list = host.ok(&["service", "ps", "--no-trunc", "quiet"]);
        assert!(!list.contains("hunter"), "{list}");
        (list.contains("leaky cannot be filled in"), list)
    });
}

#[test]
fn an_unhealthy_task_is_replaced_and_says_why() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    host.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "ill",
        "--health-cmd",
        "true",
        "--health-interval",
        "200ms",
        "--health-retries",
        "2",
        "skep/whoami",
    ]);
    wait_until("the ill task is replaced", LIMIT, || {
        let list = host.ok(&["service", "ps", "--no-trunc", "ill"]);
        (list.contains("unhealthy container"), list)
    });
}

/// The stock client, where it is installed.
#[test]
fn the_docker_client_works_unchanged() {
    take_turn!();
    if !has_docker() {
        return;
    }
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    let docker = |args: &[&str]| {
        let mut client = Command::new("docker");
        client.env("DOCKER_BUILDKIT", "0").arg("-H").arg(host.socket()).args(args);
        let output = client.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };
    let ok = |args: &[&str]| {
        let (success, stdout, stderr) = docker(args);
        assert!(success, "docker {args:?}: {stderr}");
        stdout
    };
    assert!(ok(&["node", "ls"]).contains("Leader"));
    let out = ok(&["service", "create", "--name", "web", "--replicas", "3", "--update-monitor", "1s", "skep/whoami"]);
    assert!(out.contains("converged"), "{out}");
    assert!(ok(&["service", "ls"]).contains("3/3"));
    assert!(ok(&["service", "scale", "web=1"]).contains("converged"));
    assert!(ok(&["service", "ps", "web"]).contains("Running"));
    assert!(ok(&["service", "update", "--env-add", "A=1", "web"]).contains("converged"));
    assert!(ok(&["service", "logs", "web"]).contains("whoami listens"));
    assert!(ok(&["info", "-f", "{{.Swarm.LocalNodeState}}"]).contains("active"));
    let (success, _, stderr) = docker(&["service", "create", "--name", "web", "skep/whoami"]);
    assert!(!success && stderr.contains("already exists"), "{stderr}");
    ok(&["service", "rm", "web"]);
    let id = ok(&["network", "create", "-d", "overlay", "--subnet", "10.44.0.0/24", "--label", "team=a", "shop"]);
    assert_eq!(ok(&["network", "ls", "-q", "--no-trunc", "--filter", "name=shop"]), id);
    ok(&[
        "service",
        "create",
        "--name",
        "shop",
        "--replicas",
        "2",
        "--network",
        "name=shop,alias=store",
        "-p",
        "8080:8000",
        "--update-monitor",
        "1s",
        "skep/whoami",
    ]);
    assert!(ok(&["service", "ls"]).contains("*:8080->8000/tcp"));
    let vips = ok(&["service", "inspect", "-f", "{{json .Endpoint.VirtualIPs}}", "shop"]);
    assert!(vips.contains("10.44.0."), "{vips}");
    let verbose = ok(&["network", "inspect", "-v", "-f", "{{json .Services}}", "shop"]);
    assert!(verbose.contains("\"shop\"") && verbose.contains("10.44.0."), "{verbose}");
    let (success, _, stderr) = docker(&["network", "rm", "shop"]);
    assert!(!success && stderr.contains("in use"), "{stderr}");
    ok(&["service", "update", "--network-rm", "shop", "--publish-rm", "8000", "--update-monitor", "1s", "shop"]);
    wait_until("the network can be removed", LIMIT, || {
        let (success, _, stderr) = docker(&["network", "rm", "shop"]);
        (success, stderr)
    });
    ok(&["service", "create", "-d", "--name", "bare", "--network", "host", "skep/whoami"]);
    host.await_replicas("bare", "1/1");
    ok(&["service", "rm", "bare", "shop"]);
}

#[test]
fn a_task_whose_container_was_removed_by_hand_is_replaced() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    host.ok(&["service", "create", "-d", "--name", "web", "--restart-delay", "0s", "skep/whoami"]);
    host.await_replicas("web", "1/1");
    let first = host.ok(&["ps", "-q", "--no-trunc"]);
    host.ok(&["rm", "-f", first.trim()]);
    wait_until("the slot has another task", LIMIT, || {
        let tasks = host.ok(&["service", "ps", "--no-trunc", "web"]);
        let now = host.ok(&["ps", "-q", "--no-trunc"]);
        (!now.is_empty() && now != first, tasks)
    });
    // A daemon that has nothing to do does nothing, and stops when it is asked to.
    host.ok(&["swarm", "leave", "--force"]);
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", host.daemon_pid())).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks();
    std::thread::sleep(std::time::Duration::from_secs(2));
    let spent = ticks() - before;
    assert!(spent < 50, "{spent} ticks of 10 ms in 2 s");
    host.stop_daemon();
}

#[test]
fn tasks_reserve_what_nodes_name_or_count() {
    take_turn!();
    let rig = Rig::new(2);
    let (first, second) = (rig.host(1), rig.host(2));
    first.start_daemon_with(&["--node-generic-resource", "card=a", "--node-generic-resource", "card=b"]);
    second.start_daemon_with(&["--node-generic-resource", "card=c", "--node-generic-resource", "slot=5"]);
    rig.form_swarm(1);
    let has = first.ok(&["node", "inspect", "-f", "{{json .Description.Resources.GenericResources}}", "n1"]);
    assert!(has.contains(r#"{"NamedResourceSpec":{"Kind":"card","Value":"a"}}"#), "{has}");
    let create = |name: &str, replicas: &str, resources: &[&str]| {
        let mut flags = vec!["service", "create", "-d", "--name", name, "--replicas", replicas];
        resources.iter().for_each(|resource| flags.extend(["--generic-resource", resource]));
        first.ok(&[&flags[..], &["--restart-delay", "0s", "skep/whoami"]].concat());
    };
    create("one", "3", &["card=1"]);
    first.await_replicas("one", "3/3");
    let cards = |service: &str| {
        let tasks = first.ok(&["service", "ps", "-q", "--no-trunc", "--filter", "desired-state=running", service]);
        let assigned = tasks.lines().map(|id| first.ok(&["inspect", "-f", "{{json .AssignedGenericResources}}", id]));
        let mut cards: Vec<_> = assigned.map(|all| all.trim().to_owned()).collect();
        cards.sort();
        cards.concat()
    };
    let named = |name: &str| format!(r#"[{{"NamedResourceSpec":{{"Kind":"card","Value":"{name}"}}}}]"#);
    assert_eq!(cards("one"), ["a", "b", "c"].map(named).concat());
    let told = |host: &Host, service: &str| {
        let id = host.ok(&["ps", "-q", "--filter", &format!("name={service}.")]);
        host.run(&["inspect", "-f", "{{json .Config.Env}}", id.trim()]).stdout
    };
    assert!(told(second, "one").contains(r#""DOCKER_RESOURCE_CARD=c""#), "{}", told(second, "one"));
    // All are taken: one more waits until one is free.
    create("two", "1", &["card=1", "slot=5"]);
    wait_until("it waits", LIMIT, || {
        let tasks = first.ok(&["service", "ps", "--no-trunc", "two"]);
        (tasks.contains("insufficient resources on 2 nodes"), tasks)
    });
    first.ok(&["service", "scale", "-d", "one=0"]);
    first.await_replicas("two", "1/1");
    let both = told(second, "two");
    assert!(both.contains(r#""DOCKER_RESOURCE_CARD=c","DOCKER_RESOURCE_SLOT=5""#), "{both}");
    first.ok(&["service", "update", "-d", "--generic-resource-rm", "slot", "--generic-resource-add", "card=2", "two"]);
    wait_until("it has moved to where two are", LIMIT, || {
        let env = told(first, "two");
        (env.contains(r#""DOCKER_RESOURCE_CARD=a,b""#) && !env.contains("SLOT"), env)
    });
    for (wrong, why) in [("card=a", "reserve a number"), ("card", "write KIND=NUMBER"), ("card=0", "cannot be 0")] {
        let refused = first.fails(&["service", "create", "-d", "--generic-resource", wrong, "skep/whoami"]);
        assert!(refused.contains(why), "{wrong}: {refused}");
    }
}
