//! What happens to a swarm when what is under it fails: disks that fill, clocks that jump, links that are slow.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, Rig, skip, take_turn, wait_until};

/// A jump of an hour is nothing to anyone. Where a clock is beyond what certificates are good for, the swarm says so, and
/// all is well once it is right again.
#[test]
fn clocks_that_jump_cost_no_task_and_are_named() {
    const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime";
    take_turn!();
    if !std::path::Path::new(FAKETIME).exists() {
        eprintln!("SKIPPED: {FAKETIME} is not there (scripts/bootstrap installs it)");
        return;
    }
    let rig = Rig::new(3);
    for host in rig.hosts() {
        host.set_clock("+0");
        host.start_daemon();
    }
    rig.form_swarm(3);
    let (first, third) = (rig.host(1), rig.host(3));
    first.ok(&["service", "create", "-d", "--name", "web", "--replicas", "6", "skep/whoami"]);
    first.await_replicas("web", "6/6");
    let before = rig.running();
    for (number, offset) in [(1, "+1h"), (1, "-1h"), (2, "-1h"), (2, "+1h")] {
        rig.host(number).set_clock(offset);
        std::thread::sleep(Duration::from_secs(2));
        third.ok(&["config", "create", &format!("n{number}{}", offset.replace('+', "")), "/etc/hostname"]);
        rig.host(number).set_clock("+0");
    }
    first.set_clock("+400d");
    wait_until("a wrong clock is named", LIMIT, || {
        let refused = third.run(&["config", "create", "late", "/etc/hostname"]);
        (!refused.success && refused.stderr.contains("compare the clocks"), format!("{refused:?}"))
    });
    first.set_clock("+0");
    third.ok(&["config", "create", "late", "/etc/hostname"]);
    // Longer than anyone is waited for.
    std::thread::sleep(Duration::from_secs(4));
    third.await_replicas("web", "6/6");
    assert_eq!(rig.running(), before);
}

/// A disk that fills up: first nothing new is taken, then the manager goes, while containers and the engine go on; all is
/// back once there is room, without anyone's help.
#[test]
fn a_manager_whose_disk_is_full_says_so_and_comes_back_when_there_is_room() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    std::fs::create_dir_all(host.data()).unwrap();
    // Of the host's own namespace, and gone with it.
    assert!(host.exec("mount", &["-t", "tmpfs", "-o", "size=64m", "tmpfs", host.data().to_str().unwrap()]).success);
    host.start_daemon();
    rig.form_swarm(1);
    host.ok(&["service", "create", "-d", "--name", "web", "--replicas", "2", "skep/whoami"]);
    host.await_replicas("web", "2/2");
    host.ok(&["config", "create", "before", "/etc/hostname"]);
    let before = rig.running();
    let leave = |kib: u64| {
        assert!(host.exec("rm", &["-f", &host.data().join("fill").display().to_string()]).success);
        let room = host.exec("df", &["--output=avail", host.data().to_str().unwrap()]).stdout;
        let room: u64 = room.lines().last().unwrap().trim().parse().unwrap();
        let fill = format!("of={}", host.data().join("fill").display());
        // The last of it may be the daemon's.
        let _ = host.exec("dd", &["if=/dev/zero", &fill, "bs=1k", &format!("count={}", room - kib)]);
    };
    leave(8 << 10);
    let refused = host.fails(&["config", "create", "late", "/etc/hostname"]);
    assert!(refused.contains("disk of the leading manager is full"), "{refused}");
    assert!(host.ok(&["config", "ls"]).contains("before"));
    host.ok(&["config", "rm", "before"]);
    leave(0);
    wait_until("the manager is away", LIMIT, || {
        let ran = host.run(&["node", "update", "--label-add", &format!("a={}", "x".repeat(4000)), "n1"]);
        (ran.stderr.contains("No space left"), format!("{ran:?}"))
    });
    let told = host.ok(&["info"]);
    assert!(told.contains("No space left"), "{told}");
    // Also where the daemon starts on it.
    host.kill_daemon();
    host.start_daemon();
    assert_eq!(host.ok(&["ps", "-q"]).lines().count(), 2);
    leave(40 << 10);
    host.await_replicas("web", "2/2");
    host.ok(&["config", "create", "late", "/etc/hostname"]);
    assert!(!host.ok(&["config", "ls"]).contains("before"));
    assert_eq!(rig.running(), before);
}

/// One manager's link carries a tenth of what the swarm writes: that one falls behind, and nobody else waits for it.
#[test]
fn a_slow_link_holds_up_nobody_else() {
    const CONFIGS: usize = 16;
    take_turn!();
    let rig = Rig::swarm(3, 3);
    let leader = rig.leader(1);
    let slow = rig.host(if leader == 3 { 2 } else { 3 });
    let file = rig.host(leader).dir().join("payload");
    std::fs::write(&file, vec![7; 400_000]).unwrap();
    slow.slow(Some("2mbit"));
    for number in 0..CONFIGS {
        let start = Instant::now();
        rig.host(leader).ok(&["config", "create", &format!("c{number}"), file.to_str().unwrap()]);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }
    let nodes = rig.host(leader).ok(&["node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.ManagerStatus}}"]);
    assert!(nodes.contains(&format!("n{leader} Ready Leader")) && nodes.matches("Ready").count() == 3, "{nodes}");
    slow.slow(None);
    wait_until("it has caught up", LIMIT, || {
        let known = slow.run(&["config", "ls", "-q"]);
        (known.stdout.lines().count() == CONFIGS, format!("{known:?}"))
    });
    assert_eq!(rig.leader(1), leader);
}

/// What a newer version wrote is not misread by an older one, and not touched.
/// Managers on other continents: a packet there and its answer take 160 ms.
#[test]
fn managers_that_are_far_apart_agree_once_they_are_told() {
    take_turn!();
    let rig = Rig::new(3);
    if !rig.hosts().all(|host| host.delay("80ms")) {
        return skip("this kernel delays no packets: it has no netem");
    }
    rig.hosts().for_each(|host| host.start_daemon_with(&["--raft-heartbeat", "500ms"]));
    rig.form_swarm(3);
    let first = rig.host(1);
    first.ok(&["service", "create", "-d", "--name", "web", "--replicas", "3", "skep/whoami"]);
    first.await_replicas("web", "3/3");
    let leader = rig.host(rig.leader(1));
    assert!(!leader.log().contains("leads no more"), "{}", leader.log());
    leader.kill_daemon();
    let other = rig.hosts().find(|host| host.name() != leader.name()).unwrap();
    wait_until("another leads", LIMIT, || {
        let ran = other.run(&["service", "scale", "-d", "web=5"]);
        (ran.success, ran.stderr)
    });
    leader.start_daemon_with(&["--raft-heartbeat", "500ms"]);
    other.await_replicas("web", "5/5");
}

#[test]
fn a_data_directory_of_a_newer_version_is_refused_by_name() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    host.ok(&["config", "create", "kept", "/etc/hostname"]);
    host.stop_daemon();
    let file = host.data().join("swarm/state.json");
    let written = std::fs::read_to_string(&file).unwrap();
    let newer = r#"{"format": 99, "what": "nobody knows yet"}"#;
    std::fs::write(&file, newer).unwrap();
    host.spawn_daemon();
    host.wait_daemon_failed();
    let log = host.log();
    assert!(log.contains("state.json has format 99") && log.contains("upgrade skep on this node"), "{log}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), newer);
    std::fs::write(&file, written).unwrap();
    host.start_daemon();
    assert!(host.ok(&["config", "ls"]).contains("kept"));
}

fn roles(host: &Host) -> String {
    host.ok(&["node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.ManagerStatus}}"])
}

fn await_roles(host: &Host, want: &[&str]) {
    wait_until("the nodes are what they should be", LIMIT, || {
        let list = roles(host);
        let seen: Vec<_> = list.lines().map(str::trim_end).collect();
        (want.iter().all(|want| seen.contains(want)), list)
    });
}

#[test]
fn one_manager_goes_on_alone_after_the_others_are_lost_for_good() {
    take_turn!();
    let rig = Rig::swarm(4, 3);
    let [first, second, third, worker] = [1, 2, 3, 4].map(|number| rig.host(number));
    std::fs::write(first.dir().join("key"), "hidden").unwrap();
    first.ok(&["secret", "create", "key", first.dir().join("key").to_str().unwrap()]);
    first.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "web",
        "--replicas",
        "4",
        "--secret",
        "key",
        "-p",
        "8080:8000",
        "skep/whoami",
    ]);
    first.await_replicas("web", "4/4");
    let kept = [first, worker].map(Host::running);
    assert!(worker.fails(&["swarm", "init", "--force-new-cluster"]).contains("is a worker"));
    [second, third].into_iter().for_each(Host::kill_daemon);
    wait_until("no majority is left", LIMIT, || {
        let ran = first.run(&["service", "ls"]);
        (ran.stderr.contains("does not have a leader"), format!("{ran:?}"))
    });

    let told = first.ok(&["swarm", "init", "--force-new-cluster", "--advertise-addr", first.addr()]);
    assert!(told.contains("is now a manager"), "{told}");
    await_roles(first, &["n1 Ready Leader", "n2 Down", "n3 Down", "n4 Ready"]);
    first.await_replicas("web", "4/4");
    assert_eq!(first.ok(&["secret", "ls", "--format", "{{.Name}}"]).trim(), "key");
    let now = [first, worker].map(Host::running);
    let all_kept = kept.iter().zip(&now).all(|(kept, now)| kept.iter().all(|task| now.contains(task)));
    assert!(all_kept, "{kept:?} {now:?}");
    assert!(worker.curl(&format!("http://{}:8080/", first.addr())).contains("Hostname"));
    first.kill_daemon();
    first.start_daemon();
    first.ok(&["service", "update", "-d", "--label", "a=new", "web"]);

    what_comes_back_turns_to_the_recovered_swarm(&rig);
}

fn what_comes_back_turns_to_the_recovered_swarm(rig: &Rig) {
    let [first, second, third] = [1, 2, 3].map(|number| rig.host(number));
    // A majority of what was before comes back, out of its sight: two swarms, but none overwrites the other.
    first.cut(true);
    let sessions = |host: &Host| host.log().matches("the session with the leader is open").count();
    let before = [second, third].map(sessions);
    [second, third].into_iter().for_each(Host::start_daemon);
    wait_until("the old ones find each other", LIMIT, || {
        let ran = second.run(&["service", "update", "-d", "--label", "a=old", "web"]);
        (ran.success, ran.stderr)
    });
    wait_until("the old ones work as a swarm", LIMIT, || {
        let now = [second, third].map(sessions);
        (now[0] > before[0] && now[1] > before[1], format!("{before:?} {now:?}"))
    });
    first.cut(false);
    wait_until("they refuse each other", LIMIT, || {
        let logs = [second, third].map(Host::log).concat();
        (logs.contains("the swarm was recovered without this manager"), logs)
    });
    let label = first.ok(&["service", "inspect", "--format", "{{.Spec.Labels.a}}", "web"]);
    assert_eq!(label.trim(), "new");
    assert!(roles(first).contains("n1 Ready Leader"), "{}", roles(first));
    third.ok(&["swarm", "leave", "--force"]);
    // Whoever has no leader of its own any more turns to the recovered swarm, as a worker, and may be promoted.
    await_roles(first, &["n1 Ready Leader", "n2 Ready", "n3 Down", "n4 Ready"]);
    first.ok(&["node", "promote", "n2"]);
    await_roles(first, &["n2 Ready Reachable"]);
    first.ok(&["node", "rm", "--force", "n3"]);
    let token = first.ok(&["swarm", "join-token", "-q", "manager"]);
    let target = format!("{}:2377", first.addr());
    third.ok(&["swarm", "join", "--token", token.trim(), "--advertise-addr", third.addr(), &target]);
    await_roles(first, &["n3 Ready Reachable"]);
    wait_until("all managers say the same", LIMIT, || {
        let ran =
            [second, third].map(|host| host.run(&["service", "inspect", "--format", "{{.Spec.Labels.a}}", "web"]));
        (ran.iter().all(|ran| ran.stdout.trim() == "new"), format!("{ran:?}"))
    });
    first.kill_daemon();
    wait_until("they are managers in full", LIMIT, || {
        let ran = second.run(&["service", "update", "-d", "--label", "a=newer", "web"]);
        (ran.success, ran.stderr)
    });
}

#[test]
fn a_copy_of_a_manager_s_directory_is_a_backup() {
    take_turn!();
    let rig = Rig::new(2);
    let [old, new] = [1, 2].map(|number| rig.host(number));
    old.start_daemon();
    old.ok(&["swarm", "init", "--advertise-addr", old.addr()]);
    old.ok(&["service", "create", "-d", "--name", "web", "skep/whoami"]);
    old.await_replicas("web", "1/1");
    old.stop_daemon();
    std::fs::create_dir_all(new.data()).unwrap();
    let [from, to] = [old.data().join("swarm"), new.data()];
    let copied = std::process::Command::new("cp").arg("-a").args([&from, &to]).status().unwrap();
    assert!(copied.success());
    new.start_daemon();
    // What fails on the way gives nothing up.
    let init = ["swarm", "init", "--force-new-cluster", "--advertise-addr", new.addr()];
    let nowhere = new.fails(&[&init[..], &["--listen-addr", "10.123.0.1:2377"]].concat());
    assert!(nowhere.contains("10.123.0.1") && nowhere.contains("cannot be listened on"), "{nowhere}");
    new.ok(&init);
    new.await_replicas("web", "1/1");
    let addr = new.ok(&["info", "--format", "{{.Swarm.NodeAddr}}"]);
    assert_eq!(addr.trim(), new.addr());
    assert!(new.ok(&["swarm", "join-token", "worker"]).contains(new.addr()));
    // On a node that is in no swarm it is as if it were not said.
    new.ok(&["swarm", "leave", "--force"]);
    new.ok(&["swarm", "init", "--force-new-cluster", "--advertise-addr", new.addr()]);
    assert_eq!(new.ok(&["service", "ls", "-q"]), "");
}
