//! Whole-system figures on hosts of this machine; `make bench` runs it with the release binary.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::process::Command;
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, Rig, is_root, program, wait_until};

fn main() {
    assert!(is_root(), "the benchmark makes namespaces and containers and needs root");
    println!("binary: {}", program().display());
    one_node();
    lost_leader("kill -9", Host::kill_daemon, Host::start_daemon);
    lost_leader("link down", |host| host.cut(true), |host| host.cut(false));
    clean_stop();
    lost_node();
}

fn report(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index"
        )]
        let index = ((times.len() - 1) as f64 * share).round() as usize;
        times[index].as_secs_f64()
    };
    println!("{name:<58} median {:.3} s, worst {:.3} s of {}", at(0.5), at(1.0), times.len());
}

fn one_node() {
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    std::thread::sleep(Duration::from_secs(2));
    println!("idle manager and worker: {}", memory(&daemon_pids(host)));
    let created = (0..10).map(|number| {
        let name = format!("one{number}");
        let start = Instant::now();
        host.ok(&["service", "create", "-d", "--name", &name, "skep/whoami"]);
        host.await_replicas(&name, "1/1");
        start.elapsed()
    });
    report("service create, image present, to 1/1 running", created.collect());
    let start = Instant::now();
    host.ok(&["service", "scale", "-d", "one0=100"]);
    host.await_replicas("one0", "100/100");
    println!("{:<58} {:.2} s", "scale 1 to 100 replicas on one node", start.elapsed().as_secs_f64());
    println!("one shim (of 109): {}", memory(&shim_pids(host)[..1]));
    println!("daemon with 109 containers: {}", memory(&daemon_pids(host)));
}

fn pids(host: &Host, word: &str) -> Vec<String> {
    let pattern = format!("{word}.*{}", host.dir().display());
    let found = Command::new("pgrep").args(["-f", &pattern]).output().expect("pgrep runs (package procps)");
    String::from_utf8_lossy(&found.stdout).lines().map(str::to_owned).collect()
}

fn daemon_pids(host: &Host) -> Vec<String> {
    pids(host, "/[^ ]* daemon")
}

fn shim_pids(host: &Host) -> Vec<String> {
    pids(host, "shim-watch")
}

/// Resident and proportional memory of processes, in MB.
fn memory(pids: &[String]) -> String {
    let field = |pid: &str, name: &str| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) / 1000.0
    };
    let sum = |name: &str| pids.iter().map(|pid| field(pid, name)).sum::<f64>();
    format!("{:.1} MB resident, {:.1} MB proportional", sum("Rss:"), sum("Pss:"))
}

fn lost_leader(how: &str, lose: fn(&Host), bring_back: fn(&Host)) {
    let rig = Rig::swarm(3, 3);
    rig.host(1).ok(&["service", "create", "-d", "--name", "web", "--replicas", "0", "skep/whoami"]);
    let mut times = Vec::new();
    for trial in 0..10 {
        let asked = (1..=3).find(|&n| rig.host(n).run(&["node", "ls"]).success).expect("a manager answers");
        let leader = rig.leader(asked);
        let other = (1..=3).find(|&n| n != leader).expect("three managers");
        lose(rig.host(leader));
        let start = Instant::now();
        let label = format!("trial={trial}");
        wait_until("a write is accepted", LIMIT, || {
            let ran = rig.host(other).run(&["service", "update", "-d", "--label", &label, "web"]);
            (ran.success, ran.stderr)
        });
        times.push(start.elapsed());
        bring_back(rig.host(leader));
        wait_until("three managers again", LIMIT, || {
            let list = rig.host(other).run(&["node", "ls", "--format", "{{.Status}} {{.ManagerStatus}}"]).stdout;
            (
                list.lines().filter(|line| line.starts_with("Ready")).count() == 3
                    && list.matches("Unreachable").count() == 0,
                list,
            )
        });
    }
    report(&format!("first write after the leader of three is lost ({how})"), times);
}

fn clean_stop() {
    let rig = Rig::swarm(3, 3);
    rig.host(1).ok(&["service", "create", "-d", "--name", "web", "--replicas", "0", "skep/whoami"]);
    let mut times = Vec::new();
    for trial in 0..10 {
        let leader = rig.leader(1);
        let other = (1..=3).find(|&n| n != leader).expect("three managers");
        let writer = rig.host(other);
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| rig.host(leader).stop_daemon());
            let mut worst = Duration::ZERO;
            let mut number = 0;
            while !stopping.is_finished() {
                let start = Instant::now();
                writer.ok(&["service", "update", "-d", "--label", &format!("t{trial}={number}"), "web"]);
                worst = worst.max(start.elapsed());
                number += 1;
            }
            times.push(worst);
        });
        rig.host(leader).start_daemon();
    }
    report("slowest write (read and update) around a clean stop", times);
}

fn lost_node() {
    let mut times = Vec::new();
    for _ in 0..3 {
        let rig = Rig::swarm(3, 1);
        rig.host(1).ok(&["service", "create", "-d", "--name", "web", "--replicas", "6", "skep/whoami"]);
        rig.host(1).await_replicas("web", "6/6");
        rig.host(3).cut(true);
        let start = Instant::now();
        wait_until("six again", LIMIT, || {
            let count: usize = [1, 2].iter().map(|&n| rig.host(n).running().len()).sum();
            (count == 6, count.to_string())
        });
        times.push(start.elapsed());
    }
    report("six replicas again after a node is lost", times);
}
