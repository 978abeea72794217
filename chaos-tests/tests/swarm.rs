//! Whole stories on real hosts: the real daemons, real containers, real crashes.
//!
//! They take turns (the machine is small), need root, and say so where they have to be skipped.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, Rig, is_root, wait_for, wait_until};

const LIMIT: Duration = Duration::from_secs(60);

static TURN: Mutex<()> = Mutex::new(());

/// The turn of one test; `None`, said aloud, where the test cannot run.
fn turn() -> Option<MutexGuard<'static, ()>> {
    if !is_root() {
        eprintln!("SKIPPED: this test makes namespaces and containers and needs root");
        return None;
    }
    Some(TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

macro_rules! take_turn {
    () => {
        let Some(_turn) = turn() else { return };
    };
}

#[track_caller]
fn replicas(host: &Host, service: &str, want: &str) {
    wait_until(&format!("{service} has {want}"), LIMIT, || {
        let list = host.run(&["service", "ls", "--format", "{{.Name}} {{.Replicas}}"]);
        let found = list.stdout.lines().any(|line| line == format!("{service} {want}"));
        (found, format!("{list:?}\n{}", host.run(&["service", "ps", "--no-trunc", service]).stdout))
    });
}

#[track_caller]
fn update_state(host: &Host, service: &str, want: &str) {
    wait_until(&format!("{service}'s update is {want}"), LIMIT, || {
        let state = host.run(&["service", "inspect", "--format", "{{.UpdateStatus.State}}", service]);
        (
            state.stdout.trim() == want,
            format!("{state:?}\n{}", host.run(&["service", "ps", "--no-trunc", service]).stdout),
        )
    });
}

/// How many tasks run in each slot, over all hosts, by what the hosts themselves run.
fn per_slot(rig: &Rig) -> BTreeMap<String, usize> {
    let mut slots = BTreeMap::new();
    for (name, _) in rig.hosts().flat_map(Host::running) {
        let slot = name.rsplit_once('.').map_or_else(|| name.clone(), |(slot, _)| slot.to_owned());
        *slots.entry(slot).or_default() += 1;
    }
    slots
}

fn all_running(rig: &Rig) -> Vec<(String, i64)> {
    let mut all: Vec<_> = rig.hosts().flat_map(Host::running).collect();
    all.sort();
    all
}

fn no_container_left(rig: &Rig) {
    wait_until("no container is left", LIMIT, || {
        let left: Vec<String> = rig.hosts().map(|host| host.ok(&["ps", "-a"])).collect();
        (left.iter().all(|list| list.lines().count() == 1), left.concat())
    });
}

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
    replicas(first, "web", "6/6");
    check_payloads(&rig);

    rig.host(2).ok(&["service", "scale", "-d", "web=10"]);
    replicas(rig.host(3), "web", "10/10");
    let before = all_running(&rig);
    first.ok(&["service", "update", "-d", "--label", "team=a", "web"]);
    replicas(first, "web", "10/10");
    assert_eq!(before, all_running(&rig), "a label restarts nothing");

    first.ok(&["service", "update", "-d", "--env", "COLOUR=green", "web"]);
    update_state(first, "web", "completed");
    let logs = first.ok(&["service", "inspect", "--format", "{{json .Spec.TaskTemplate.ContainerSpec.Env}}", "web"]);
    assert!(logs.contains("COLOUR=green"), "{logs}");
    assert!(per_slot(&rig).values().all(|&count| count == 1), "{:?}", per_slot(&rig));
    first.ok(&["service", "rollback", "-d", "web"]);
    update_state(first, "web", "rollback_completed");
    replicas(first, "web", "10/10");

    let refused = first.fails(&["secret", "rm", "password"]);
    assert!(refused.contains("in use") && refused.contains("web"), "{refused}");
    first.ok(&["service", "rm", "web"]);
    no_container_left(&rig);
    first.ok(&["secret", "rm", "password"]);
    first.ok(&["config", "rm", "motd"]);
}

/// Each container sees the secret as asked for, on tmpfs; nothing of it lies on any disk.
fn check_payloads(rig: &Rig) {
    use std::os::unix::fs::MetadataExt as _;
    for (name, pid) in all_running(rig) {
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
fn the_leader_is_lost_twice_and_no_task_notices() {
    take_turn!();
    let rig = Rig::swarm(3, 3);
    rig.host(1).ok(&["service", "create", "-d", "--name", "web", "--replicas", "3", "skep/whoami"]);
    replicas(rig.host(1), "web", "3/3");
    let before = all_running(&rig);

    let killed = rig.leader(1);
    let other = if killed == 1 { 2 } else { 1 };
    rig.host(killed).kill_daemon();
    let start = Instant::now();
    wait_until("a write is accepted after kill -9", LIMIT, || {
        let ran = rig.host(other).run(&["service", "update", "-d", "--label", "a=1", "web"]);
        (ran.success, ran.stderr)
    });
    eprintln!("first write after kill -9 of the leader: {:?}", start.elapsed());
    rig.host(killed).start_daemon();
    let cut = rig.leader(other);
    let third = (1..=3).find(|&n| n != cut).unwrap();
    rig.host(cut).cut(true);
    wait_until("a write is accepted after the leader was cut off", LIMIT, || {
        let ran = rig.host(third).run(&["service", "update", "-d", "--label", "a=2", "web"]);
        (ran.success, ran.stderr)
    });
    // The side that is cut off refuses to write, and to answer from what may be old.
    let refused = rig.host(cut).fails(&["service", "ls"]);
    assert!(refused.contains("does not have a leader"), "{refused}");
    let refused = rig.host(cut).fails(&["service", "scale", "-d", "web=1"]);
    assert!(refused.contains("does not have a leader"), "{refused}");
    rig.host(cut).cut(false);
    replicas(rig.host(cut), "web", "3/3");
    wait_until("one task per slot again", LIMIT, || {
        let slots = per_slot(&rig);
        (slots.len() == 3 && slots.values().all(|&count| count == 1), format!("{slots:?}"))
    });
    let label = rig.host(cut).ok(&["service", "inspect", "--format", "{{.Spec.Labels.a}}", "web"]);
    assert_eq!(label.trim(), "2", "an acknowledged write is there on the manager that was cut off");
    let after = all_running(&rig);
    let kept = before.iter().filter(|task| after.contains(task)).count();
    assert!(kept >= 2, "tasks on nodes that were never away kept running: {before:?} {after:?}");
}

#[test]
fn a_lost_workers_tasks_run_elsewhere_and_its_own_are_ended_when_it_is_back() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let manager = rig.host(1);
    manager.ok(&["service", "create", "-d", "--name", "web", "--replicas", "6", "skep/whoami"]);
    replicas(manager, "web", "6/6");

    // A pause of a second is no reason to move anything.
    let before = all_running(&rig);
    rig.host(3).pause_daemon(true);
    std::thread::sleep(Duration::from_secs(1));
    rig.host(3).pause_daemon(false);
    replicas(manager, "web", "6/6");
    assert_eq!(before, all_running(&rig), "nothing moved");

    rig.host(3).cut(true);
    let start = Instant::now();
    wait_until("six replicas run without n3", LIMIT, || {
        let slots: usize = [1, 2].iter().map(|&n| rig.host(n).running().len()).sum();
        (slots == 6, format!("{slots}\n{}", manager.ok(&["service", "ps", "web"])))
    });
    eprintln!("six replicas again after a node was lost: {:?}", start.elapsed());
    assert_eq!(rig.host(3).running().len(), 2, "the lost node's containers go on for now");
    rig.host(3).cut(false);
    wait_until("the surplus is ended", LIMIT, || {
        (rig.host(3).running().is_empty(), format!("{:?}", rig.host(3).running()))
    });
    replicas(manager, "web", "6/6");
}

#[test]
fn daemons_die_and_come_back_and_no_container_stops() {
    take_turn!();
    let rig = Rig::swarm(3, 3);
    rig.host(1).ok(&["service", "create", "-d", "--name", "web", "--replicas", "6", "skep/whoami"]);
    replicas(rig.host(1), "web", "6/6");
    let before = all_running(&rig);
    rig.hosts().for_each(Host::kill_daemon);
    for (name, pid) in &before {
        assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "{name} died with the daemons");
    }
    rig.hosts().for_each(Host::start_daemon);
    replicas(rig.host(2), "web", "6/6");
    rig.host(1).stop_daemon();
    rig.host(1).start_daemon();
    replicas(rig.host(1), "web", "6/6");
    assert_eq!(before, all_running(&rig), "the same processes run");

    // What ends while the daemon is away is found out when it is back.
    let (name, pid) = rig.host(1).running().first().cloned().unwrap();
    rig.host(1).kill_daemon();
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    rig.host(1).start_daemon();
    wait_until("the lost exit is told", LIMIT, || {
        let list = rig.host(1).ok(&["service", "ps", "--no-trunc", "web"]);
        (list.contains("non-zero exit (137)"), format!("{name}: {list}"))
    });
    replicas(rig.host(1), "web", "6/6");
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
    replicas(host, "web", "3/3");
    host.ok(&["service", "update", "-d", "--args", "nonsense", "web"]);
    update_state(host, "web", "paused");
    let healthy = host.running().len();
    assert!(healthy >= 1, "the update stopped before it had taken every replica: {healthy}");
    host.ok(&["service", "update", "-d", "--args", "", "--update-failure-action", "rollback", "web"]);
    update_state(host, "web", "completed");
    replicas(host, "web", "3/3");
    host.ok(&["service", "update", "-d", "--args", "nonsense", "web"]);
    update_state(host, "web", "rollback_completed");
    replicas(host, "web", "3/3");
    let args = host.ok(&["service", "inspect", "web"]);
    assert!(!args.split("PreviousSpec").next().unwrap().contains("nonsense"), "{args}");
}

#[test]
fn nodes_are_drained_constrained_promoted_demoted_and_removed() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let manager = rig.host(1);
    manager.ok(&["node", "update", "--label-add", "zone=a", "n2"]);
    manager.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "near",
        "--replicas",
        "2",
        "--constraint",
        "node.labels.zone==a",
        "skep/whoami",
    ]);
    manager.ok(&["service", "create", "-d", "--name", "all", "--mode", "global", "skep/whoami"]);
    replicas(manager, "near", "2/2");
    replicas(manager, "all", "3/3");
    assert_eq!(rig.host(2).running().len(), 3, "both of near and one of all");

    manager.ok(&["node", "update", "--availability", "drain", "n2"]);
    wait_until("n2 gives up its tasks", LIMIT, || {
        (rig.host(2).running().is_empty(), format!("{:?}", rig.host(2).running()))
    });
    wait_until("the reason is told", LIMIT, || {
        let list = manager.ok(&["service", "ps", "--no-trunc", "near"]);
        let told = list.contains("1 node not available for new tasks")
            && list.contains("scheduling constraints not satisfied on 2 nodes");
        (told, list)
    });
    manager.ok(&["node", "update", "--availability", "active", "n2"]);
    replicas(manager, "near", "2/2");

    manager.ok(&["node", "promote", "n2"]);
    wait_until("n2 is a manager", LIMIT, || {
        let ran = rig.host(2).run(&["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"]);
        (ran.stdout.contains("n2 Reachable"), format!("{ran:?}\n{}", rig.host(2).log()))
    });
    rig.host(2).ok(&["service", "scale", "-d", "near=3"]);
    replicas(manager, "near", "3/3");
    rig.host(2).ok(&["node", "demote", "n2"]);
    wait_until("n2 is a worker again", LIMIT, || {
        let ran = rig.host(2).run(&["node", "ls"]);
        (ran.stderr.contains("not a swarm manager"), format!("{ran:?}\n{}", rig.host(2).log()))
    });
    let refused = manager.fails(&["node", "demote", "n1"]);
    assert!(refused.contains("last manager"), "{refused}");

    let refused = manager.fails(&["node", "rm", "n3"]);
    assert!(refused.contains("not down"), "{refused}");
    manager.ok(&["node", "rm", "--force", "n3"]);
    wait_until("the removed node is told", LIMIT, || {
        let state = rig.host(3).ok(&["info", "--format", "{{.Swarm.LocalNodeState}}"]);
        (state.trim() == "error", state)
    });
    rig.host(3).ok(&["swarm", "leave", "--force"]);
    assert!(rig.host(3).running().is_empty(), "its containers are gone with its place");
}

#[test]
fn wrong_and_rotated_tokens_let_nobody_in() {
    take_turn!();
    let rig = Rig::new(3);
    rig.hosts().for_each(Host::start_daemon);
    let (first, second, third) = (rig.host(1), rig.host(2), rig.host(3));
    first.ok(&["swarm", "init", "--advertise-addr", first.addr()]);
    let token = first.ok(&["swarm", "join-token", "-q", "worker"]).trim().to_owned();
    let target = format!("{}:2377", first.addr());
    let refused = second.fails(&["swarm", "join", "--token", "SWMTKN-1-abc-def", &target]);
    assert!(refused.contains("no join token"), "{refused}");

    // The right swarm, another secret.
    let (head, _) = token.rsplit_once('-').unwrap();
    let forged = format!("{head}-{}", "0".repeat(25));
    let refused = second.fails(&["swarm", "join", "--token", &forged, &target]);
    assert!(refused.contains("not valid"), "{refused}");

    // Another swarm's token: the manager is not even shown it.
    third.ok(&["swarm", "init", "--advertise-addr", third.addr()]);
    let other = third.ok(&["swarm", "join-token", "-q", "worker"]).trim().to_owned();
    let refused = second.fails(&["swarm", "join", "--token", &other, &target]);
    assert!(refused.contains("another swarm"), "{refused}");

    first.ok(&["swarm", "join-token", "--rotate", "worker"]);
    let refused = second.fails(&["swarm", "join", "--token", &token, &target]);
    assert!(refused.contains("rotated"), "{refused}");
    let state = second.ok(&["info", "--format", "{{.Swarm.LocalNodeState}}"]);
    assert_eq!(state.trim(), "inactive", "nothing is half done");
    let fresh = first.ok(&["swarm", "join-token", "-q", "worker"]).trim().to_owned();
    second.ok(&["swarm", "join", "--token", &fresh, &target]);
    let refused = second.fails(&["swarm", "init"]);
    assert!(refused.contains("already part of a swarm"), "{refused}");
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
        (create(&["--publish", "80:80"]), "not supported yet"),
        (create(&["--mode", "replicated-job"]), "not supported"),
        (create(&["--secret", "nope"]), "not found"),
        (create(&["--hostname", "{{.Node.ID}}"]), "template"),
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
fn a_tampered_store_is_found_at_start_and_never_served() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    for number in 0..20 {
        let name = format!("s{number}");
        host.ok(&["service", "create", "-d", "--name", &name, "--replicas", "0", "skep/whoami"]);
    }
    host.stop_daemon();
    let database = host.data().join("swarm/raft/store/db/db");
    let good = std::fs::read(&database).unwrap();
    let written = good.iter().rposition(|&byte| byte != 0).unwrap();
    let mut bad = good.clone();
    bad[written / 4..written].iter_mut().for_each(|byte| *byte ^= 0x5a);
    std::fs::write(&database, &bad).unwrap();
    host.spawn_daemon();
    host.wait_daemon_failed();
    let log = host.log();
    assert!(log.contains("cannot be used"), "{log}");
    std::fs::write(&database, &good).unwrap();
    host.start_daemon();
    assert_eq!(host.ok(&["service", "ls", "-q"]).lines().count(), 20);

    let key = host.data().join("swarm/raft/data.key");
    host.stop_daemon();
    std::fs::write(&key, "skep-data-key 1 plain\nnonsense\n").unwrap();
    host.spawn_daemon();
    host.wait_daemon_failed();
    assert!(host.log().contains("is damaged"), "{}", host.log());
}

#[test]
fn a_clean_stop_hands_leadership_over() {
    take_turn!();
    let rig = Rig::swarm(3, 3);
    let leader = rig.leader(1);
    let other = if leader == 1 { 2 } else { 1 };
    rig.host(other).ok(&["service", "create", "-d", "--name", "web", "--replicas", "0", "skep/whoami"]);
    rig.host(leader).stop_daemon();
    rig.host(other).ok(&["service", "update", "-d", "--label", "a=1", "web"]);
    assert!(rig.host(leader).log().contains("handed=true"), "{}", rig.host(leader).log());
    rig.host(leader).start_daemon();
    let found = rig.host(leader).ok(&["service", "inspect", "--format", "{{.Spec.Labels.a}}", "web"]);
    assert_eq!(found.trim(), "1");
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
    replicas(host, "web", "2/2");
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
    if Command::new("docker").arg("--version").output().is_err() {
        eprintln!("SKIPPED: there is no docker client on the PATH");
        return;
    }
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    let docker = |args: &[&str]| {
        let output = Command::new("docker").arg("-H").arg(host.socket()).args(args).output().unwrap();
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
}

/// A real registry, a real image, pulled by tag and pinned to its digest.
#[test]
fn images_come_from_a_registry_and_are_pinned_to_their_digest() {
    take_turn!();
    for tool in ["docker-registry", "skopeo", "umoci", "busybox"] {
        if Command::new("which").arg(tool).output().is_ok_and(|found| !found.status.success()) {
            eprintln!("SKIPPED: {tool} is not installed (scripts/bootstrap installs it)");
            return;
        }
    }
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    start_registry(host);
    push_busybox(host, "v1");
    let image = "10.77.0.1:5000/box:v1";
    host.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "box",
        "--mode",
        "global",
        "--init",
        image,
        "sh",
        "-c",
        "echo from $HOSTNAME; sleep 1000",
    ]);
    replicas(host, "box", "2/2");
    let pinned = host.ok(&["service", "inspect", "--format", "{{.Spec.TaskTemplate.ContainerSpec.Image}}", "box"]);
    assert!(pinned.contains("box:v1@sha256:"), "{pinned}");
    wait_until("output of both", LIMIT, || {
        let logs = host.ok(&["service", "logs", "box"]);
        (logs.matches("from ").count() == 2, logs)
    });
    for host in rig.hosts() {
        assert!(host.ok(&["images"]).contains("10.77.0.1:5000/box") || host.ok(&["images"]).contains("<none>"));
    }
}

fn start_registry(host: &Host) {
    let dir = host.dir().join("registry");
    std::fs::create_dir_all(&dir).unwrap();
    let config = dir.join("config.yml");
    let text = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 10.77.0.1:5000\n",
        dir.join("data").display()
    );
    std::fs::write(&config, text).unwrap();
    host.spawn("docker-registry", &["serve", &config.display().to_string()]);
    wait_until("the registry answers", LIMIT, || {
        let ran = host.exec("curl", &["-s", "-m", "2", "http://10.77.0.1:5000/v2/"]);
        (ran.success, format!("{ran:?}"))
    });
}

fn push_busybox(host: &Host, tag: &str) {
    let layout = host.dir().join("layout").display().to_string();
    let bundle = host.dir().join("bundle").display().to_string();
    let image = format!("{layout}:{tag}");
    let script = format!(
        "set -e; umoci init --layout {layout}; umoci new --image {image}; umoci unpack --image {image} {bundle}; \
         mkdir -p {bundle}/rootfs/bin {bundle}/rootfs/tmp; cp $(which busybox) {bundle}/rootfs/bin/busybox; \
         for a in sh sleep echo cat ls true; do ln -s busybox {bundle}/rootfs/bin/$a; done; \
         umoci repack --image {image} {bundle}; umoci config --image {image} --config.cmd sh; \
         skopeo --insecure-policy copy --dest-tls-verify=false oci:{image} docker://10.77.0.1:5000/box:{tag}"
    );
    let ran = host.exec("sh", &["-c", &script]);
    assert!(ran.success, "{ran:?}");
}
