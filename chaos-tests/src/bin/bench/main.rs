//! Whole-system figures on hosts of this machine; `make bench` runs it with the release binary.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod engine;

use std::process::Command;
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, Rig, is_root, program, wait_until};

fn main() {
    assert!(is_root(), "the benchmark makes namespaces and containers and needs root");
    println!("binary: {}", program().display());
    let figures: [(&str, fn()); 7] = [
        ("one-node", one_node),
        ("leader-killed", || lost_leader("kill -9", Host::kill_daemon, Host::start_daemon)),
        ("leader-cut", || lost_leader("link down", |host| host.cut(true), |host| host.cut(false))),
        ("leader-stopped", clean_stop),
        ("lost-node", lost_node),
        ("overlay", overlay),
        ("engine", engine::engine),
    ];
    let only = std::env::args().nth(1);
    let names = figures.map(|(name, _)| name);
    assert!(only.as_deref().is_none_or(|only| names.contains(&only)), "figures are one of {names:?}");
    for (name, measure) in figures {
        if only.as_deref().is_none_or(|only| only == name) {
            measure();
        }
    }
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
        let mut writer = rig.host(other).api();
        let service = writer.get("/services/web").expect("the daemon answers").body;
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| rig.host(leader).stop_daemon());
            let mut worst = Duration::ZERO;
            let mut service = service;
            let mut number = 0_u32;
            while !stopping.is_finished() {
                service["Spec"]["Labels"][format!("t{trial}")] = number.to_string().into();
                let path = format!("/services/web/update?version={}", service["Version"]["Index"]);
                let start = Instant::now();
                let answer = writer.post(&path, &service["Spec"]).expect("the daemon answers");
                worst = worst.max(start.elapsed());
                assert_eq!(answer.status, 200, "no write fails: {answer:?}");
                service = writer.get("/services/web").expect("the daemon answers").body;
                number += 1;
            }
            times.push(worst);
        });
        rig.host(leader).start_daemon();
    }
    report("slowest write around a clean stop of the leader", times);
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

/// One TCP stream from host to host and from container to container, beside wireguard-go between the
/// hosts, in turns so that the machine's moods hit all alike.
fn overlay() {
    const ROUNDS: usize = 5;
    let rig = Rig::swarm(2, 1);
    let (first, second) = (rig.host(1), rig.host(2));
    first.ok(&["network", "create", "green"]);
    first.ok(&["network", "create", "--opt", "encrypted=false", "plain"]);
    for network in ["green", "plain"] {
        first.ok(&[
            "service",
            "create",
            "-d",
            "--name",
            network,
            "--mode",
            "global",
            "--network",
            network,
            "skep/whoami",
        ]);
        first.await_replicas(network, "2/2");
    }
    let far = |network: &str| {
        let own = Command::new("nsenter").args(["-t", &pid_of(second, network), "-n", "hostname", "-I"]).output();
        String::from_utf8_lossy(&own.expect("hostname runs").stdout).trim().to_owned()
    };
    wireguard_go(&rig);
    let holders = [first.holder_pid().to_string(), second.holder_pid().to_string()];
    let [near_host, far_host] = &holders;
    let ways = [
        ("host to host, no tunnel", near_host.clone(), far_host.clone(), second.addr().to_owned()),
        ("wireguard-go of Debian, host to host", near_host.clone(), far_host.clone(), "10.99.0.2".to_owned()),
        ("encrypted network, container to container", pid_of(first, "green"), pid_of(second, "green"), far("green")),
        ("unencrypted network, container to container", pid_of(first, "plain"), pid_of(second, "plain"), far("plain")),
    ];
    for (_, _, server, _) in &ways {
        serve_iperf(second, server);
    }
    let mut rates = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for ((_, client, _, addr), rates) in ways.iter().zip(&mut rates) {
            rates.push(stream(client, addr));
        }
    }
    for ((name, ..), mut rates) in ways.iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        println!("{name:<58} median {:.2} Gbit/s of {ROUNDS}", rates[ROUNDS / 2]);
    }
}

/// The first process of a service's one container on a host.
fn pid_of(host: &Host, service: &str) -> String {
    let found = host.running().into_iter().find(|(name, _)| name.starts_with(service));
    found.expect("the service runs here").1.to_string()
}

fn serve_iperf(host: &Host, namespace: &str) {
    let file = host.dir().join(format!("iperf-{namespace}")).display().to_string();
    let args = ["-t", namespace, "-n", "iperf3", "-s", "-D", "-I", &file];
    let started = Command::new("nsenter").args(args).status();
    assert!(started.is_ok_and(|status| status.success()), "iperf3 serves (scripts/bootstrap bench installs it)");
}

/// Gbit/s of one TCP stream.
fn stream(namespace: &str, addr: &str) -> f64 {
    let args = ["-t", namespace, "-n", "iperf3", "-c", addr, "-t", "3", "-J"];
    let output = Command::new("nsenter").args(args).output().expect("iperf3 runs");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("iperf3 reports in JSON");
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    rate.unwrap_or_else(|| panic!("no rate to {addr}: {report}")) / 1e9
}

/// A tunnel of wireguard-go between the two hosts: 10.99.0.1 and 10.99.0.2.
fn wireguard_go(rig: &Rig) {
    let key = |host: &Host| host.exec("sh", &["-c", "wg genkey"]).stdout.trim().to_owned();
    let keys = [key(rig.host(1)), key(rig.host(2))];
    let public =
        |key: &str| rig.host(1).exec("sh", &["-c", &format!("echo {key} | wg pubkey")]).stdout.trim().to_owned();
    for (own, other) in [(1, 2), (2, 1)] {
        let (host, peer) = (rig.host(own), rig.host(other));
        let script = format!(
            "set -e; umask 077; echo {} > {dir}/wg-key; wireguard-go wg{own}; \
             for try in 1 2 3 4 5 6 7 8 9 10; do \
             wg set wg{own} private-key {dir}/wg-key listen-port 51820 peer {} allowed-ips 10.99.0.{other}/32 \
             endpoint {}:51820 && break; sleep 0.2; done; \
             ip addr add 10.99.0.{own}/24 dev wg{own}; ip link set wg{own} up mtu 1420",
            keys[own - 1],
            public(&keys[other - 1]),
            peer.addr(),
            dir = host.dir().display(),
        );
        let ran = host.exec("sh", &["-c", &script]);
        assert!(ran.success, "wireguard-go (scripts/bootstrap bench installs it): {ran:?}");
    }
}
