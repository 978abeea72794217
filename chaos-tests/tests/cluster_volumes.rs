//! Volumes of the swarm, kept by a storage driver that refuses whatever the Container Storage Interface lets it refuse
//! (`shelf`): they follow their tasks, and are on no node that should not have them.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::path::PathBuf;

use serde_json::Value;
use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};

/// A swarm of which each host has the driver.
struct Shelved {
    rig: Rig,
    shelf: PathBuf,
}

impl Shelved {
    fn new(hosts: u8, managers: usize) -> Self {
        let rig = Rig::swarm(hosts, managers);
        let shelf = rig.host(1).dir().join("shelf");
        for (number, host) in rig.hosts().enumerate() {
            let socket = host.dir().join("run/csi/shelf.sock");
            let zone = if number == 0 { "a" } else { "b" };
            let args = [socket.to_str().unwrap(), shelf.to_str().unwrap(), host.name(), zone];
            host.spawn(env!("CARGO_BIN_EXE_shelf"), &args);
            host.import_busybox();
        }
        let shelved = Self { rig, shelf };
        let nodes = shelved.rig.host(1).ok(&["node", "ls", "-q"]);
        for node in nodes.lines() {
            wait_until("the node tells of its driver", LIMIT, || {
                let told = shelved.rig.host(1).ok(&["node", "inspect", node]);
                (told.contains("\"PluginName\": \"shelf\""), told)
            });
        }
        shelved
    }

    fn manager(&self) -> &Host {
        self.rig.host(1)
    }

    /// What the driver was asked, one call a line.
    fn calls(&self) -> String {
        std::fs::read_to_string(self.shelf.join("calls")).unwrap_or_default()
    }

    fn volume(&self, name: &str) -> Value {
        let text = self.manager().docker(&["volume", "inspect", name]);
        serde_json::from_str::<Value>(&text).unwrap()[0].take()
    }

    #[track_caller]
    fn await_volume(&self, name: &str, what: &str, is: impl Fn(&Value) -> bool) {
        wait_until(what, LIMIT, || {
            let volume = self.volume(name);
            (is(&volume), format!("{volume}\n{}", self.calls()))
        });
    }

    /// Waits until a task of the service runs on the host.
    #[track_caller]
    fn await_on(&self, service: &str, host: &Host) {
        wait_until("the task runs there", LIMIT, || {
            let format = "{{.Node}} {{.CurrentState}} {{.Error}}";
            let tasks = self.manager().ok(&["service", "ps", service, "--format", format]);
            let runs = tasks.lines().any(|task| task.starts_with(&format!("{} Running", host.name())));
            (runs, format!("{tasks}\n{}\n{}", self.calls(), host.log()))
        });
    }

    /// Waits until a task of the service waits for the reason.
    #[track_caller]
    fn await_refusal(&self, service: &str, reason: &str) {
        wait_until("the task is refused with the reason", LIMIT, || {
            let tasks = self.manager().ok(&["service", "ps", service, "--no-trunc", "--format", "{{.Error}}"]);
            (tasks.contains(reason), tasks)
        });
    }
}

fn mounts_of_volumes(host: &Host) -> usize {
    host.exec("cat", &["/proc/self/mountinfo"]).stdout.matches("/data/csi/").count()
}

fn is_made(volume: &Value) -> bool {
    volume["ClusterVolume"]["Info"]["VolumeID"].is_string()
}

fn nodes_with(volume: &Value) -> usize {
    volume["ClusterVolume"]["PublishStatus"].as_array().map_or(0, Vec::len)
}

/// What makes a service of tasks with a volume that fulfil a constraint and stay.
fn service<'a>(name: &'a str, constraint: &'a str, mount: &'a str, command: &[&'a str]) -> Vec<&'a str> {
    let flags =
        ["--stop-signal", "KILL", "--hostname", "{{.Node.Hostname}}", "--constraint", constraint, "--mount", mount];
    [&["service", "create", "-d", "--name", name], &flags[..], &["busybox"], command].concat()
}

const ANYWHERE: &str = "node.hostname!=nowhere";
const DATA: &str = "type=cluster,src=data,dst=/data";
const STAY: [&str; 2] = ["sleep", "1000"];

/// Appends the task's host to a file on the volume, and stays.
const NOTE: &str = "cat /etc/hostname >> /data/log; exec sleep 1000";

#[test]
fn a_volume_follows_its_task_and_is_where_that_is_alone() {
    take_turn!();
    let swarm = Shelved::new(3, 1);
    let (manager, second, third) = (swarm.manager(), swarm.rig.host(2), swarm.rig.host(3));
    manager.docker(&["volume", "create", "-d", "shelf", "--type", "mount", "--label", "of=test", "data"]);
    swarm.await_volume("data", "the driver has made it", is_made);
    let listed = manager.docker(&["volume", "ls", "--cluster", "--filter", "label=of=test"]);
    assert!(listed.contains("data") && listed.contains("created"), "{listed}");

    let on = |host: &Host| format!("node.hostname=={}", host.name());
    manager.docker(&service("keeper", &on(second), DATA, &["sh", "-c", NOTE]));
    swarm.await_on("keeper", second);
    assert!(manager.fails(&["volume", "rm", "data"]).contains("in use by 1 task(s), keeper.1."));

    // Who else asks for it hears why not, and who updates it what cannot be changed.
    manager.docker(&service("other", ANYWHERE, DATA, &STAY));
    swarm.await_refusal("other", "volume data is in use by another task");
    manager.docker(&["service", "rm", "other"]);

    // A daemon that dies takes nothing from its tasks, and the next one knows what is there.
    let running = second.running();
    second.kill_daemon();
    second.start_daemon();
    swarm.await_on("keeper", second);
    assert_eq!(second.running(), running);
    assert_eq!(mounts_of_volumes(second), 2, "staged and shown");

    // It moves with its task, and is taken from the one node before the other one has it.
    let (from, to) = (on(second), on(third));
    let update = ["service", "update", "-d", "--constraint-rm", &from, "--constraint-add", &to, "keeper"];
    manager.docker(&update);
    swarm.await_on("keeper", third);
    let log = || std::fs::read_to_string(find(&swarm.shelf, "log")).unwrap();
    assert_eq!(log(), format!("{}\n{}\n", second.name(), third.name()));
    let calls = swarm.calls();
    let at = |call: &str| calls.find(call).unwrap_or_else(|| panic!("no {call} in {calls}"));
    let (released, taken, given) = (
        at(&format!("{} NodeUnstageVolume", second.name())),
        at(&format!("ControllerUnpublishVolume:{}", second.name())),
        at(&format!("ControllerPublishVolume:{}", third.name())),
    );
    assert!(released < taken && taken < given, "{calls}");
    assert_eq!(mounts_of_volumes(second), 0);
}

#[test]
fn a_volume_that_is_set_aside_has_no_tasks_and_one_that_is_removed_leaves_nothing() {
    take_turn!();
    let swarm = Shelved::new(1, 1);
    let manager = swarm.manager();
    manager.ok(&["volume", "create", "-d", "shelf", "--type", "mount", "data"]);
    manager.ok(&service("keeper", ANYWHERE, DATA, &STAY));
    swarm.await_on("keeper", manager);
    manager.docker(&["volume", "update", "--availability", "drain", "data"]);
    swarm.await_refusal("keeper", "volume data is drained");
    swarm.await_volume("data", "no node has it", |volume| nodes_with(volume) == 0);
    manager.ok(&["volume", "update", "--availability", "active", "data"]);
    swarm.await_on("keeper", manager);

    manager.docker(&["service", "rm", "keeper"]);
    swarm.await_volume("data", "no node has it", |volume| nodes_with(volume) == 0);
    assert_eq!(mounts_of_volumes(manager), 0);
    manager.docker(&["volume", "rm", "data"]);
    wait_until("the volume is gone", LIMIT, || {
        let listed = manager.ok(&["volume", "ls", "--cluster", "--format", "{{.Name}}"]);
        (listed.is_empty(), listed)
    });
    assert_eq!(std::fs::read_dir(&swarm.shelf).unwrap().count(), 1, "but for the list of calls nothing is left");
}

/// The one file of that name on the shelf.
fn find(shelf: &std::path::Path, name: &str) -> PathBuf {
    let volumes = std::fs::read_dir(shelf).unwrap().flatten().map(|entry| entry.path().join(name));
    volumes.into_iter().find(|path| path.exists()).unwrap()
}

#[test]
fn a_volume_is_taken_from_a_node_that_is_lost_before_another_has_it() {
    take_turn!();
    let swarm = Shelved::new(3, 1);
    let (manager, second, third) = (swarm.manager(), swarm.rig.host(2), swarm.rig.host(3));
    manager.ok(&["volume", "create", "-d", "shelf", "--type", "mount", "data"]);
    manager.ok(&["node", "update", "--availability", "drain", third.name()]);
    manager.ok(&service("keeper", "node.role==worker", DATA, &STAY));
    swarm.await_on("keeper", second);
    manager.ok(&["node", "update", "--availability", "active", third.name()]);
    second.cut(true);
    swarm.await_on("keeper", third);
    let calls = swarm.calls();
    let fenced = calls.find(&format!("ControllerUnpublishVolume:{}", second.name()));
    let given = calls.find(&format!("ControllerPublishVolume:{}", third.name()));
    assert!(fenced.is_some() && fenced < given, "{calls}");
    // Back again, it lets go of what it has no more.
    second.cut(false);
    wait_until("the node has let go of it", LIMIT, || (mounts_of_volumes(second) == 0, second.log()));
    assert_eq!(nodes_with(&swarm.volume("data")), 1);
    // Nor does one keep any that leaves the swarm.
    third.ok(&["swarm", "leave"]);
    assert_eq!(mounts_of_volumes(third), 0, "{}", third.log());
}

#[test]
fn of_a_node_that_is_removed_a_shared_volume_is_taken_and_of_no_other() {
    take_turn!();
    let swarm = Shelved::new(3, 1);
    let (manager, gone) = (swarm.manager(), swarm.rig.host(3));
    let create = ["volume", "create", "-d", "shelf", "--type", "mount", "--scope", "multi", "--sharing", "all", "data"];
    manager.ok(&create);
    let all = service("keeper", "node.role==worker", DATA, &STAY);
    manager.ok(&[&all[..5], &["--mode", "global"], &all[5..]].concat());
    swarm.await_on("keeper", swarm.rig.host(2));
    swarm.await_on("keeper", gone);
    gone.kill_daemon();
    manager.ok(&["node", "rm", "--force", gone.name()]);
    swarm.await_volume("data", "one node has it", |volume| nodes_with(volume) == 1);
    let calls = swarm.calls();
    assert!(calls.contains(&format!("ControllerUnpublishVolume:{} ", gone.name())), "{calls}");
    assert_eq!(calls.matches("ControllerUnpublishVolume").count(), 1, "{calls}");
}

#[test]
fn a_new_leader_goes_on_where_the_last_one_stopped() {
    take_turn!();
    let swarm = Shelved::new(3, 3);
    let leader = swarm.rig.host(swarm.rig.leader(1));
    let others: Vec<&Host> = swarm.rig.hosts().filter(|host| host.name() != leader.name()).collect();
    let other = others[0];
    other.ok(&service("keeper", &format!("node.hostname=={}", other.name()), DATA, &STAY));
    other.ok(&["volume", "create", "-d", "shelf", "--type", "mount", "data"]);
    leader.kill_daemon();
    wait_until("the task runs", LIMIT, || (other.running().len() == 1, swarm.calls()));
    let made = std::fs::read_dir(&swarm.shelf).unwrap().flatten().filter(|entry| entry.path().is_dir());
    let volumes: Vec<_> = made.map(|entry| entry.file_name()).collect();
    assert_eq!(volumes.len(), 2, "one volume, and one list of who has it: {volumes:?}");
}

/// As the README says it: the driver runs in a container of the host that it serves.
#[test]
fn a_driver_may_be_a_container() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    let data = host.data();
    std::fs::create_dir_all(&data).unwrap();
    let data = data.to_str().unwrap();
    // As `/` is on a host that systemd started.
    let shared = host.exec("sh", &["-c", &format!("mount --bind {data} {data} && mount --make-shared {data}")]);
    assert!(shared.success, "{shared:?}");
    host.start_daemon();
    host.import_busybox();
    host.ok(&["swarm", "init", "--advertise-addr", host.addr()]);
    let context = host.dir().join("driver");
    std::fs::create_dir_all(context.join("lib")).unwrap();
    let program = env!("CARGO_BIN_EXE_shelf");
    std::fs::copy(program, context.join("shelf")).unwrap();
    let linked = std::process::Command::new("ldd").arg(program).output().unwrap().stdout;
    let linked = String::from_utf8(linked).unwrap();
    let libraries = linked.split_whitespace().filter(|word| word.starts_with('/'));
    let mut copies = String::new();
    for library in libraries {
        let name = library.rsplit('/').next().unwrap();
        std::fs::copy(library, context.join("lib").join(name)).unwrap();
        copies += &format!("COPY lib/{name} {library}\n");
    }
    std::fs::write(context.join("Dockerfile"), format!("FROM busybox\n{copies}COPY shelf /shelf\n")).unwrap();
    host.ok(&["build", "-t", "shelf", context.to_str().unwrap()]);
    let run = ["run", "-d", "--name", "disks", "--privileged", "-v"];
    let sockets = format!("{}:/csi", host.dir().join("run/csi").display());
    let mounts = format!("type=bind,src={data}/csi,dst={data}/csi,bind-propagation=rshared");
    let shelf = host.dir().join("shelf");
    let kept = format!("{}:/kept", shelf.display());
    let command = ["shelf", "/shelf", "/csi/disks.sock", "/kept", host.name()];
    host.ok(&[&run[..], &[&sockets, "-v", &kept, "--mount", &mounts], &command[..]].concat());
    host.ok(&["volume", "create", "-d", "disks", "--type", "mount", "data"]);
    host.ok(&service("keeper", ANYWHERE, DATA, &["sh", "-c", NOTE]));
    wait_until("the task has written to its volume", LIMIT, || {
        let tasks = host.ok(&["service", "ps", "keeper", "--no-trunc"]);
        let written = shelf.read_dir().is_ok_and(|mut volumes| {
            volumes.any(|volume| volume.is_ok_and(|volume| volume.path().join("log").exists()))
        });
        (written, format!("{tasks}\n{}", host.run(&["logs", "disks"]).stderr))
    });
    host.ok(&["service", "rm", "keeper"]);
    wait_until("nothing is mounted any more", LIMIT, || {
        let mounts = host.exec("cat", &["/proc/self/mountinfo"]).stdout;
        (!mounts.contains("/staging "), mounts)
    });
    host.ok(&["rm", "-f", "disks"]);
}

#[test]
fn a_stack_brings_its_volumes() {
    take_turn!();
    let swarm = Shelved::new(1, 1);
    let manager = swarm.manager();
    let file = manager.dir().join("stack.yml");
    std::fs::write(
        &file,
        "services:
  web:
    image: busybox
    command: sleep 1000
    stop_signal: KILL
    volumes:
      - {type: cluster, source: data, target: /data}
      - {type: cluster, source: 'group:pool', target: /pool}
volumes:
  data:
    driver: shelf
    driver_opts: {locked: 'yes'}
    x-cluster-spec:
      access_mode: {sharing: all, mount_volume: {}}
      capacity_range: {required_bytes: 1G}
      secrets: [{key: key, secret: key}]
  one:
    driver: shelf
    x-cluster-spec: {group: pool, access_mode: {mount_volume: {}}}
  nobody:
    driver: shelf
    x-cluster-spec: {access_mode: {mount_volume: {}}}
secrets:
  key: {content: sesame}
",
    )
    .unwrap();
    let file = file.to_str().unwrap();
    manager.ok(&["stack", "deploy", "-c", file, "shop"]);
    let inside = manager.ok(&["ps", "-q"]);
    let mounts = manager.ok(&["exec", inside.trim(), "cat", "/proc/mounts"]);
    assert!(mounts.contains(" /data ") && mounts.contains(" /pool "), "{mounts}");
    let volume = swarm.volume("shop_data");
    assert_eq!(volume["Labels"]["com.docker.stack.namespace"], "shop", "{volume}");
    assert_eq!(volume["ClusterVolume"]["Info"]["CapacityBytes"], 1 << 30, "{volume}");
    let listed = manager.ok(&["volume", "ls", "--cluster", "--format", "{{.Name}}"]);
    assert!(listed.contains("shop_one") && !listed.contains("nobody"), "{listed}");
    // A second time nothing is to be made, and the data outlives the stack.
    manager.ok(&["stack", "deploy", "-c", file, "shop"]);
    let removed = manager.ok(&["stack", "rm", "shop"]);
    assert!(removed.contains("Keeping secret shop_key, which volume shop_data needs"), "{removed}");
    swarm.await_volume("shop_data", "no node has it", |volume| nodes_with(volume) == 0);
    assert!(is_made(&swarm.volume("shop_data")));
}

#[test]
fn a_disk_follows_its_task() {
    take_turn!();
    let swarm = Shelved::new(2, 1);
    let manager = swarm.manager();
    // docker's client makes disks of volumes of which it is not told otherwise.
    manager.docker(&["volume", "create", "-d", "shelf", "--scope", "single", "disk"]);
    swarm.await_volume("disk", "the driver has made it", is_made);
    let script = "dd if=/dev/volume bs=16 count=1 2>/dev/null; hostname | dd of=/dev/volume conv=notrunc,fsync 2>/dev/null; \
                  exec sleep 1000";
    let [first, second] = [1, 2].map(|number| format!("node.hostname=={}", swarm.rig.host(number).name()));
    manager.docker(&service("writer", &first, "type=cluster,src=disk,dst=/dev/volume", &["sh", "-c", script]));
    swarm.await_on("writer", manager);
    manager.ok(&["service", "update", "-d", "--constraint-rm", &first, "--constraint-add", &second, "writer"]);
    swarm.await_on("writer", swarm.rig.host(2));
    wait_until("the second one has read what the first one wrote", LIMIT, || {
        let logs = manager.ok(&["service", "logs", "--raw", "writer"]);
        (logs.contains(manager.name()), logs)
    });
    manager.ok(&["service", "rm", "writer"]);
    swarm.await_volume("disk", "no node has it", |volume| nodes_with(volume) == 0);
    let shown = manager.exec("losetup", &["--list", "--noheadings"]).stdout;
    assert!(!shown.contains(swarm.shelf.to_str().unwrap()), "{shown}");
}

#[test]
fn what_a_driver_refuses_is_told_and_tried_again() {
    take_turn!();
    let swarm = Shelved::new(2, 1);
    let manager = swarm.manager();
    let problem = |name: &str, words: &str| {
        swarm.await_volume(name, words, |volume| {
            volume["Status"]["Problem"].as_str().is_some_and(|problem| problem.contains(words))
        });
    };
    manager.docker(&["volume", "create", "-d", "shelf", "--type", "mount", "-o", "fail=yes", "full"]);
    problem("full", "storage driver shelf refused CreateVolume: the shelf is full");
    manager.docker(&["volume", "create", "-d", "nowhere", "--type", "mount", "lost"]);
    problem("lost", "its socket is to be");
    let wrong =
        manager.docker_fails(&["volume", "create", "-d", "shelf", "--type", "mount", "--secret", "key=none", "x"]);
    assert!(wrong.contains("secret none does not exist: create it first"), "{wrong}");
    // Whoever waits for one of them is told the same, and it can be given up at any time.
    manager.ok(&service("waits", ANYWHERE, "type=cluster,src=full,dst=/data", &STAY));
    swarm.await_refusal(
        "waits",
        "volume full is not made yet: storage driver shelf refused CreateVolume: the shelf is full",
    );
    manager.ok(&["volume", "rm", "full", "lost"]);
    swarm.await_refusal("waits", "there is no cluster volume full");
    manager.ok(&["service", "rm", "waits"]);

    // With its secret, in its zone, and any of its group.
    let secret = manager.dir().join("key");
    std::fs::write(&secret, "sesame").unwrap();
    manager.ok(&["secret", "create", "key", secret.to_str().unwrap()]);
    for name in ["one", "two"] {
        let create = ["volume", "create", "-d", "shelf", "--type", "mount", "--group", "pool", "-o", "locked=yes"];
        let more = ["--secret", "key=key", "--topology-required", "zone=b", "--required-bytes", "1G", name];
        manager.docker(&[&create[..], &more[..]].concat());
        swarm.await_volume(name, "it is made", is_made);
    }
    let volume = swarm.volume("one");
    assert_eq!(volume["ClusterVolume"]["Info"]["CapacityBytes"], 1 << 30, "{volume}");
    assert!(manager.fails(&["secret", "rm", "key"]).contains("in use by volume "));
    manager.docker(&service("pooled", ANYWHERE, "type=cluster,src=group:pool,dst=/data", &STAY));
    manager.ok(&["service", "scale", "-d", "pooled=3"]);
    let runs = || {
        let format = "{{.Node}} {{.CurrentState}}";
        let tasks = manager.ok(&["service", "ps", "pooled", "--format", format]);
        tasks.matches(&format!("{} Running", swarm.rig.host(2).name())).count()
    };
    wait_until("two of them run in zone b", LIMIT, || (runs() == 2, swarm.calls()));
    swarm.await_refusal("pooled", "is in use by another task");
    assert_eq!(runs(), 2, "there is no third volume");

    let refused = manager.docker_fails(&["run", "--mount", "type=cluster,src=one,dst=/d", "busybox", "true"]);
    assert!(refused.contains("volumes of the swarm are for services"), "{refused}");
    let local = manager.docker_fails(&["volume", "create", "-d", "shelf", "x"]);
    assert!(local.contains("make a cluster volume"), "{local}");
    manager.ok(&["volume", "create", "local"]);
    let update = manager.docker_fails(&["volume", "update", "--availability", "pause", "local"]);
    assert!(!update.is_empty(), "{update}");
}
