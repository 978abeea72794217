//! A swarm on real hosts and what befalls it: leaders lost, nodes cut off, daemons killed, roles
//! changed, tokens forged, stores tampered with.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::process::Command;
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};

#[test]
fn the_leader_is_lost_twice_and_no_task_notices() {
    take_turn!();
    let rig = Rig::swarm(3, 3);
    rig.host(1).ok(&["service", "create", "-d", "--name", "web", "--replicas", "3", "skep/whoami"]);
    rig.host(1).await_replicas("web", "3/3");
    let before: Vec<_> = rig.hosts().map(Host::running).collect();

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
    rig.host(cut).await_replicas("web", "3/3");
    wait_until("one task per slot again", LIMIT, || {
        let slots = rig.per_slot();
        (slots.len() == 3 && slots.values().all(|&count| count == 1), format!("{slots:?}"))
    });
    let label = rig.host(cut).ok(&["service", "inspect", "--format", "{{.Spec.Labels.a}}", "web"]);
    assert_eq!(label.trim(), "2", "an acknowledged write is there on the manager that was cut off");
    for untouched in (1..=3).filter(|&n| n != killed && n != cut) {
        let (before, now) = (&before[untouched - 1], rig.host(untouched).running());
        assert!(before.iter().all(|task| now.contains(task)), "n{untouched} was never away: {before:?}, now {now:?}");
    }
}

/// Its connections stay open, and the kernel goes on to acknowledge what comes in: silence alone tells.
#[test]
fn a_leader_that_hangs_is_left_by_its_workers() {
    take_turn!();
    let rig = Rig::swarm(4, 3);
    let hung = rig.leader(1);
    let other = if hung == 1 { 2 } else { 1 };
    rig.host(hung).pause_daemon(true);
    let constraint = ["--constraint", "node.role==worker"];
    wait_until("a service is created", LIMIT, || {
        let create = ["service", "create", "-d", "--name", "web"];
        let ran = rig.host(other).run(&[&create[..], &constraint, &["skep/whoami"]].concat());
        (ran.success || ran.stderr.contains("exists"), ran.stderr)
    });
    rig.host(other).await_replicas("web", "1/1");
    let nodes = rig.host(other).ok(&["node", "ls", "--filter", "role=worker", "--format", "{{.Hostname}} {{.Status}}"]);
    assert_eq!(nodes.trim(), "n4 Ready", "the worker was never given up");
    rig.host(hung).pause_daemon(false);
}

#[test]
fn a_lost_workers_tasks_run_elsewhere_and_its_own_are_ended_when_it_is_back() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let manager = rig.host(1);
    manager.ok(&["service", "create", "-d", "--name", "web", "--replicas", "6", "skep/whoami"]);
    manager.await_replicas("web", "6/6");

    // A pause of a second is no reason to move anything.
    let before = rig.running();
    rig.host(3).pause_daemon(true);
    std::thread::sleep(Duration::from_secs(1));
    rig.host(3).pause_daemon(false);
    manager.await_replicas("web", "6/6");
    assert_eq!(before, rig.running(), "nothing moved");

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
    manager.await_replicas("web", "6/6");
}

#[test]
fn daemons_die_and_come_back_and_no_container_stops() {
    take_turn!();
    let rig = Rig::swarm(3, 3);
    rig.host(1).ok(&["service", "create", "-d", "--name", "web", "--replicas", "6", "skep/whoami"]);
    rig.host(1).await_replicas("web", "6/6");
    let before = rig.running();
    rig.hosts().for_each(Host::kill_daemon);
    for (name, pid) in &before {
        assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "{name} died with the daemons");
    }
    rig.hosts().for_each(Host::start_daemon);
    rig.host(2).await_replicas("web", "6/6");
    rig.host(1).stop_daemon();
    rig.host(1).start_daemon();
    rig.host(1).await_replicas("web", "6/6");
    assert_eq!(before, rig.running(), "the same processes run");

    // What ends while the daemon is away is found out when it is back.
    let (name, pid) = rig.host(1).running().first().cloned().unwrap();
    rig.host(1).kill_daemon();
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    rig.host(1).start_daemon();
    wait_until("the lost exit is told", LIMIT, || {
        let list = rig.host(1).ok(&["service", "ps", "--no-trunc", "web"]);
        (list.contains("non-zero exit (137)"), format!("{name}: {list}"))
    });
    rig.host(1).await_replicas("web", "6/6");
}

#[test]
fn a_leader_that_restarts_makes_no_task_twice() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    // Tasks that wait for a node cost nothing but their place in the log.
    let nowhere = ["--constraint", "node.labels.nowhere==1"];
    host.ok(
        &[&["service", "create", "-d", "--name", "many", "--replicas", "0"], &nowhere[..], &["skep/whoami"]].concat()
    );
    for round in 1..=4_usize {
        let wanted = round * 2000;
        host.ok(&["service", "scale", "-d", &format!("many={wanted}")]);
        wait_until("the tasks are written", LIMIT, || {
            let count = tasks_of(host, "many");
            (count >= wanted, count.to_string())
        });
        host.kill_daemon();
        host.start_daemon();
        // The leader looks again when anything changes, and would take nothing back.
        host.ok(&["node", "update", "--label-add", &format!("round={round}"), "n1"]);
        assert_eq!(tasks_of(host, "many"), wanted);
    }
}

fn tasks_of(host: &Host, service: &str) -> usize {
    let path = format!("/tasks?filters=%7B%22service%22%3A%5B%22{service}%22%5D%7D");
    let answer = host.api().get(&path).expect("the daemon answers");
    answer.body.as_array().map_or(0, Vec::len)
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
    manager.await_replicas("near", "2/2");
    manager.await_replicas("all", "3/3");
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
    manager.await_replicas("near", "2/2");

    manager.ok(&["node", "promote", "n2"]);
    wait_until("n2 is a manager", LIMIT, || {
        let ran = rig.host(2).run(&["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"]);
        (ran.stdout.contains("n2 Reachable"), format!("{ran:?}\n{}", rig.host(2).log()))
    });
    rig.host(2).ok(&["service", "scale", "-d", "near=3"]);
    manager.await_replicas("near", "3/3");
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
    assert!(refused.contains("invalid join token"), "{refused}");

    // The right swarm, another secret.
    let (head, _) = token.rsplit_once('-').unwrap();
    let forged = format!("{head}-{}", "0".repeat(25));
    let refused = second.fails(&["swarm", "join", "--token", &forged, &target]);
    assert!(refused.contains("a valid join token is necessary"), "{refused}");

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
fn snapshots_are_taken_as_often_as_asked_and_a_restart_begins_at_one() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    host.ok(&["swarm", "update", "--snapshot-interval", "10"]);
    host.ok(&["service", "create", "-d", "--name", "web", "--replicas", "0", "skep/whoami"]);
    for number in 0..30 {
        host.ok(&["service", "update", "-d", "--label", &format!("n={number}"), "web"]);
    }
    assert!(host.log().matches("a snapshot is taken").count() >= 2, "{}", host.log());
    host.kill_daemon();
    host.start_daemon();
    let label = host.ok(&["service", "inspect", "--format", "{{.Spec.Labels.n}}", "web"]);
    assert_eq!(label.trim(), "29");
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
fn every_manager_tells_prometheus_of_the_swarm_and_a_worker_of_itself() {
    take_turn!();
    let rig = Rig::swarm(3, 2);
    rig.host(1).ok(&["service", "create", "-d", "--name", "web", "--replicas", "3", "skep/whoami"]);
    rig.host(1).await_replicas("web", "3/3");
    wait_until("the other manager knows it too", LIMIT, || {
        let metrics = rig.host(2).metrics();
        (metrics.get("swarm_manager_tasks{state=\"running\"}") == Some(&3.0), format!("{metrics:?}"))
    });
    let leader = rig.host(1).metrics();
    for (name, value) in [
        ("swarm_manager_leader", 1.0),
        ("swarm_manager_nodes{state=\"ready\"}", 3.0),
        ("swarm_manager_services", 1.0),
        ("swarm_raft_members", 2.0),
        ("swarm_raft_reachable_members", 2.0),
        ("engine_daemon_container_states_containers{state=\"running\"}", 1.0),
    ] {
        assert_eq!(leader.get(name), Some(&value), "{name}: {leader:?}");
    }
    assert!(leader["swarm_raft_log_entries_total"] >= leader["swarm_raft_applied_index"], "{leader:?}");
    assert!(leader["swarm_raft_log_flushes_total"] > 0.0, "{leader:?}");
    assert_eq!(rig.host(2).metrics()["swarm_manager_leader"], 0.0);
    let worker = rig.host(3).metrics();
    assert_eq!(worker["swarm_node_manager"], 0.0);
    assert!(!worker.contains_key("swarm_manager_services"), "{worker:?}");
}

/// What lies on a manager's disk: its own keys, in the order of their names; and whether they are locked.
fn keys_on_disk(host: &Host) -> Vec<(String, bool)> {
    let dir = host.data().join("swarm");
    let paths = ["certificates/swarm-node.key", "certificates/swarm-node.lock", "raft/data.key"];
    let read = |path: &str| {
        let text = std::fs::read_to_string(dir.join(path)).ok()?;
        Some((path.rsplit('/').next().unwrap().to_owned(), text.starts_with("skep-locked 1\n")))
    };
    paths.into_iter().filter_map(read).collect()
}

#[track_caller]
fn await_keys(host: &Host, locked: bool) {
    wait_until(&format!("the keys of {} are as the swarm says", host.name()), LIMIT, || {
        let keys = keys_on_disk(host);
        let lock = keys.iter().any(|(name, _)| name.ends_with(".lock"));
        (lock == locked && keys.iter().all(|(_, is_locked)| *is_locked == locked), format!("{keys:?}"))
    });
}

fn unlock(host: &Host, key: &str) -> skep_chaos_tests::Ran {
    let skep = skep_chaos_tests::program();
    let script = format!("echo '{key}' | {} -H {} swarm unlock", skep.display(), host.socket());
    host.exec("sh", &["-c", &script])
}

fn state_of(host: &Host) -> String {
    host.run(&["info", "-f", "{{.Swarm.LocalNodeState}}"]).stdout.trim().to_owned()
}

fn lock_of(host: &Host) -> Vec<u8> {
    std::fs::read(host.data().join("swarm/certificates/swarm-node.lock")).unwrap()
}

fn restart(host: &Host) {
    host.kill_daemon();
    host.start_daemon();
}

fn key_of(host: &Host) -> String {
    host.ok(&["swarm", "unlock-key", "-q"]).trim().to_owned()
}

#[test]
fn managers_of_a_locked_swarm_wait_for_its_key_when_they_start_anew() {
    take_turn!();
    let rig = Rig::swarm(4, 3);
    let first = rig.host(1);
    first.ok(&["service", "create", "-d", "--name", "web", "--replicas", "4", "-p", "8080:8000", "skep/whoami"]);
    first.await_replicas("web", "4/4");
    assert!(first.fails(&["swarm", "unlock-key"]).contains("not locked"));
    assert!(unlock(first, "x").stderr.contains("not locked"));
    let told = first.ok(&["swarm", "update", "--autolock"]);
    let key = key_of(rig.host(2));
    assert!(told.contains(&key) && key.starts_with("SWMKEY-1-"), "{told}");
    (1..=3).for_each(|manager| await_keys(rig.host(manager), true));
    await_keys(rig.host(4), false);

    // One starts anew: its containers and the others do not mind; it says nothing before it has the key.
    let second = rig.host(2);
    let before = second.running();
    restart(second);
    assert_eq!((state_of(second).as_str(), second.running()), ("locked", before));
    // Its rules and tunnels lead to tasks on all nodes, and from others to its own.
    let asked: Vec<_> = (0..8).map(|_| rig.host(4).curl(&format!("http://{}:8080/", second.addr()))).collect();
    assert!(asked.iter().all(|answer| answer.contains(rig.host(4).addr())), "{asked:?}");
    for args in [&["node", "ls"][..], &["service", "ls"], &["swarm", "init"], &["swarm", "leave"]] {
        assert!(second.fails(args).contains("lock"), "{args:?}");
    }
    first.ok(&["service", "update", "-d", "--label", "a=1", "web"]);
    let other = key.replace(&key[12..16], "AAAA");
    for wrong in ["", "SWMKEY-1-", &other] {
        assert!(unlock(second, wrong).stderr.contains("invalid key"), "{wrong}");
    }
    let unlocked = unlock(second, &key);
    assert!(unlocked.success, "{unlocked:?}");
    wait_until("the unlocked manager serves", LIMIT, || {
        let ran = second.run(&["service", "inspect", "-f", "{{json .Spec.Labels}}", "web"]);
        (ran.stdout.contains(r#""a":"1""#) && state_of(second) == "active", format!("{ran:?}"))
    });

    // All of them, and another key since one of them went.
    rig.host(3).kill_daemon();
    let locks = [1, 2].map(|manager| lock_of(rig.host(manager)));
    let new = first.ok(&["swarm", "unlock-key", "--rotate", "-q"]).trim().to_owned();
    assert_ne!(new, key);
    let opens = |host: &Host, key: &str| unlock(host, key).success;
    wait_until("both have heard of the new key", LIMIT, || {
        let now = [1, 2].map(|manager| lock_of(rig.host(manager)));
        (now[0] != locks[0] && now[1] != locks[1], String::new())
    });
    (1..=2).for_each(|manager| rig.host(manager).kill_daemon());
    (1..=3).for_each(|manager| rig.host(manager).start_daemon());
    assert!(!opens(first, &key) && opens(first, &new), "the old key opens it no more");
    let lock = lock_of(rig.host(3));
    assert!(!opens(rig.host(3), &new) && opens(rig.host(3), &key), "it has not heard of the new one");
    wait_until("two of three are enough", LIMIT, || {
        let ran = first.run(&["service", "update", "-d", "--label", "a=2", "web"]);
        (ran.success, ran.stderr)
    });
    let third = rig.host(3);
    wait_until("it has heard of the new key", LIMIT, || (lock_of(third) != lock, state_of(third)));
    restart(third);
    assert!(opens(third, &new));
    first.await_replicas("web", "4/4");

    // One is given up with its keys.
    second.ok(&["swarm", "leave", "--force"]);
    assert_eq!((state_of(second).as_str(), second.running().len()), ("inactive", 0));
    // A worker needs no key; nor does anybody once the swarm is not locked.
    first.ok(&["node", "demote", "n2"]);
    wait_until("the one that left is no member any more", LIMIT, || {
        let ran = first.run(&["node", "rm", "--force", "n2"]);
        (ran.success, ran.stderr)
    });
    first.ok(&["node", "demote", "n3"]);
    await_keys(rig.host(3), false);
    first.ok(&["swarm", "update", "--autolock=false"]);
    await_keys(first, false);
    restart(first);
    assert_eq!(state_of(first), "active");
}

/// The leader's session with itself comes from nowhere that others could reach.
#[test]
fn what_the_leader_runs_is_told_and_placed_by_its_own_address() {
    take_turn!();
    let rig = Rig::swarm(2, 2);
    let leader = rig.leader(1);
    let (leader, other) = (rig.host(leader), rig.host(3 - leader));
    let place = format!("node.ip=={}", leader.addr());
    other.ok(&["service", "create", "-d", "--name", "web", "--constraint", &place, "skep/whoami"]);
    other.await_replicas("web", "1/1");
    assert_eq!(leader.running().len(), 1, "{:?}", other.running());
    wait_until("another manager tells what it says", LIMIT, || {
        let logs = other.run(&["service", "logs", "web"]);
        (logs.stdout.contains("whoami listens on port 8000"), format!("{logs:?}"))
    });
}
