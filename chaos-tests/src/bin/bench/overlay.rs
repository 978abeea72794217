//! The data path of the swarm's networks, beside wireguard-go.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, Rig, within_network_of};

/// The hosts' addresses on the wire between them.
pub(crate) const WIRE: [&str; 2] = ["10.97.0.1", "10.97.0.2"];

/// Two hosts in one swarm, joined by nothing but a pair of veth.
pub(crate) fn two_hosts() -> Rig {
    let rig = Rig::new(2);
    let (first, second) = (rig.host(1), rig.host(2));
    let far = second.holder_pid().to_string();
    let ok = |host: &Host, words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        let ran = host.exec("ip", &words);
        assert!(ran.success, "ip {words:?}: {ran:?}");
    };
    ok(first, &format!("link add wire type veth peer name wire netns {far}"));
    for (host, addr) in rig.hosts().zip(WIRE) {
        ok(host, &format!("addr add {addr}/24 dev wire"));
        ok(host, "link set wire up");
    }
    rig.hosts().for_each(Host::start_daemon);
    first.ok(&["swarm", "init", "--advertise-addr", WIRE[0]]);
    let token = first.ok(&["swarm", "join-token", "-q", "worker"]).trim().to_owned();
    let leader = format!("{}:2377", WIRE[0]);
    second.ok(&["swarm", "join", "--token", &token, "--advertise-addr", WIRE[1], &leader]);
    rig
}

/// One stream from host to host and from container to container, beside wireguard-go and bare VXLAN
/// between the hosts, in turns so that the machine's moods hit all alike; and the time of one exchange.
pub(crate) fn overlay() {
    const ROUNDS: usize = 5;
    let rig = two_hosts();
    let (first, second) = (rig.host(1), rig.host(2));
    for (network, option) in [("green", "encrypted=true"), ("plain", "encrypted=false")] {
        first.ok(&["network", "create", "--opt", option, network]);
        let create = ["service", "create", "-d", "--name", network, "--mode", "global", "--network", network];
        first.ok(&[&create[..], &["skep/whoami"]].concat());
        first.await_replicas(network, "2/2");
    }
    let far = |network: &str| {
        let own = Command::new("nsenter").args(["-t", &pid_of(second, network), "-n", "hostname", "-I"]).output();
        String::from_utf8_lossy(&own.expect("hostname runs").stdout).trim().to_owned()
    };
    let _ended_with_us = WireguardGo::start(&rig);
    bare_vxlan(&rig);
    let holders = [first.holder_pid().to_string(), second.holder_pid().to_string()];
    let [near_host, far_host] = &holders;
    let hosts = |name, addr: &str| (name, near_host.clone(), far_host.clone(), addr.to_owned());
    let containers = |name, service| (name, pid_of(first, service), pid_of(second, service), far(service));
    let ways = [
        hosts("host to host, no tunnel", WIRE[1]),
        hosts("bare VXLAN of the kernel, host to host", "10.98.0.2"),
        hosts("wireguard-go of Debian, host to host", "10.99.0.2"),
        containers("encrypted network, container to container", "green"),
        containers("unencrypted network, container to container", "plain"),
    ];
    let only = std::env::args().nth(2).unwrap_or_default();
    let ways: Vec<_> = ways.into_iter().filter(|(name, ..)| name.starts_with(&only)).collect();
    for (_, _, server, _) in &ways {
        serve_iperf(second, server);
    }
    for (name, client, server, addr) in &ways {
        let mut times = exchanges(client, server, addr);
        times.sort();
        let micros = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
        println!("exchange, {name:<46} median {:.0} µs, p99 {:.0} µs of {}", micros(50), micros(99), times.len());
    }
    for (kind, args) in [("TCP", [].as_slice()), ("UDP", &["-u", "-b", "0", "-l", "1300"])] {
        let mut measured = vec![Vec::new(); ways.len()];
        for _ in 0..ROUNDS {
            for ((_, client, _, addr), measured) in ways.iter().zip(&mut measured) {
                measured.push(stream(client, addr, args));
            }
        }
        for ((name, ..), measured) in ways.iter().zip(measured) {
            let median = |mut values: Vec<f64>| {
                values.sort_by(f64::total_cmp);
                values[ROUNDS / 2]
            };
            let rate = median(measured.iter().map(|(rate, _)| *rate).collect());
            let cpu = median(measured.iter().map(|(_, cpu)| *cpu).collect());
            println!("{kind} {name:<48} median {rate:.2} Gbit/s, {cpu:.2} CPU s per Gbit, of {ROUNDS}");
        }
    }
}

/// The first process of a service's one container on a host.
pub(crate) fn pid_of(host: &Host, service: &str) -> String {
    let found = host.running().into_iter().find(|(name, _)| name.starts_with(service));
    found.expect("the service runs here").1.to_string()
}

fn serve_iperf(host: &Host, namespace: &str) {
    let file = host.dir().join(format!("iperf-{namespace}")).display().to_string();
    let args = ["-t", namespace, "-n", "iperf3", "-s", "-D", "-I", &file];
    let started = Command::new("nsenter").args(args).status();
    assert!(started.is_ok_and(|status| status.success()), "iperf3 serves (scripts/bootstrap bench installs it)");
}

/// Gbit/s that arrive of one stream, and the CPU seconds of the whole machine for each Gbit.
fn stream(namespace: &str, addr: &str, args: &[&str]) -> (f64, f64) {
    let before = busy_seconds();
    let args = [&["-t", namespace, "-n", "iperf3", "-c", addr, "-t", "3", "-J"], args].concat();
    let output = Command::new("nsenter").args(args).output().expect("iperf3 runs");
    let busy = busy_seconds() - before;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("iperf3 reports in JSON");
    let end = &report["end"];
    let received = if end["sum_received"]["bytes"].is_null() { &end["sum"] } else { &end["sum_received"] };
    let number = |value: &serde_json::Value| value.as_f64();
    // Of UDP, what was lost on the way has not arrived.
    let arrived = 1.0 - number(&end["sum"]["lost_percent"]).unwrap_or(0.0) / 100.0;
    let measured = number(&received["bits_per_second"]).zip(number(&received["bytes"]));
    let (rate, bytes) = measured.unwrap_or_else(|| panic!("no rate to {addr}: {report}"));
    (rate * arrived / 1e9, busy / (bytes * arrived * 8.0 / 1e9))
}

/// How long one byte there and one back take over TCP.
fn exchanges(client: &str, server: &str, addr: &str) -> Vec<Duration> {
    const COUNT: usize = 10_000;
    let pid = |text: &str| text.parse().expect("a process's number");
    let listener = within_network_of(pid(server), || TcpListener::bind(("0.0.0.0", 0)).expect("a port is free"));
    let port = listener.local_addr().expect("it is bound").port();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the client comes");
        stream.set_nodelay(true).expect("TCP has it");
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
    });
    let mut stream = within_network_of(pid(client), || TcpStream::connect((addr, port)).expect("the server answers"));
    stream.set_nodelay(true).expect("TCP has it");
    let mut exchange = || {
        let begun = Instant::now();
        let mut byte = [1];
        stream.write_all(&byte).and_then(|()| stream.read_exact(&mut byte)).expect("the server answers");
        begun.elapsed()
    };
    let times = (0..COUNT).map(|_| exchange()).collect();
    drop(stream);
    echo.join().expect("the server ends");
    times
}

/// What all processors have worked since the machine's start.
pub(crate) fn busy_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|text| text.parse().ok()).collect();
    // User, nice, system; idle and waiting are left out; interrupts.
    [0, 1, 2, 5, 6].iter().filter_map(|&at| ticks.get(at)).sum::<f64>() / 100.0
}

/// The kernel's own VXLAN between the two hosts: 10.98.0.1 and 10.98.0.2.
fn bare_vxlan(rig: &Rig) {
    for (own, other) in [(1, 2), (2, 1)] {
        let host = rig.host(own);
        let script = format!(
            "set -e; ip link add vx{own} type vxlan id 42 dstport 4999 local {} remote {}; \
             ip addr add 10.98.0.{own}/24 dev vx{own}; ip link set vx{own} up mtu 1450",
            WIRE[own - 1],
            WIRE[other - 1]
        );
        let ran = host.exec("sh", &["-c", &script]);
        assert!(ran.success, "{ran:?}");
    }
}

/// A tunnel of wireguard-go between the two hosts: 10.99.0.1 and 10.99.0.2.
pub(crate) struct WireguardGo;

impl WireguardGo {
    pub(crate) fn start(rig: &Rig) -> Self {
        Self::end();
        let key = |host: &Host| host.exec("sh", &["-c", "wg genkey"]).stdout.trim().to_owned();
        let keys = [key(rig.host(1)), key(rig.host(2))];
        let public =
            |key: &str| rig.host(1).exec("sh", &["-c", &format!("echo {key} | wg pubkey")]).stdout.trim().to_owned();
        for (own, other) in [(1, 2), (2, 1)] {
            let (host, peer) = (rig.host(own), WIRE[other - 1]);
            let script = format!(
                "set -e; umask 077; echo {} > {dir}/wg-key; wireguard-go skepbench{own}; \
                 for try in 1 2 3 4 5 6 7 8 9 10; do \
                 wg set skepbench{own} private-key {dir}/wg-key listen-port 51820 peer {} allowed-ips 10.99.0.{other}/32 \
                 endpoint {}:51820 && break; sleep 0.2; done; \
                 ip addr add 10.99.0.{own}/24 dev skepbench{own}; ip link set skepbench{own} up mtu 1420",
                keys[own - 1],
                public(&keys[other - 1]),
                peer,
                dir = host.dir().display(),
            );
            let ran = host.exec("sh", &["-c", &script]);
            assert!(ran.success, "wireguard-go (scripts/bootstrap bench installs it): {ran:?}");
        }
        Self
    }

    /// It would outlive its hosts, and its socket is the whole machine's.
    fn end() {
        // None may run.
        drop(Command::new("pkill").args(["-f", "wireguard-go skepbench"]).status());
        for own in [1, 2] {
            drop(std::fs::remove_file(format!("/var/run/wireguard/skepbench{own}.sock")));
        }
    }
}

impl Drop for WireguardGo {
    fn drop(&mut self) {
        Self::end();
    }
}
