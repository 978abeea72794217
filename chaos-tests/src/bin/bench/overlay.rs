//! The data path of the swarm's networks, beside wireguard-go.

use std::process::Command;

use skep_chaos_tests::{Host, Rig};

/// One TCP stream from host to host and from container to container, beside wireguard-go between the
/// hosts, in turns so that the machine's moods hit all alike.
pub(crate) fn overlay() {
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
