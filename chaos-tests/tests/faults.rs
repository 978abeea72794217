//! What happens to a swarm when what is under it fails: disks that fill, clocks that jump, links that are slow.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::time::{Duration, Instant};

use skep_chaos_tests::{LIMIT, Rig, skip, take_turn, wait_until};

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
