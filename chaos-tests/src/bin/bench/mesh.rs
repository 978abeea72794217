//! The routing mesh, beside HAProxy and beside no proxy at all.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, Rig};
use socket2::{Domain, Protocol, Socket, Type};

use super::overlay::{WIRE, two_hosts};
use super::report;

/// The task is on the second host; whoever asks is on the first.
const MESH_PORT: u16 = 8080;
const DIRECT_PORT: u16 = 8000;
const PROXY_PORT: u16 = 8081;

pub(crate) fn mesh() {
    let rig = two_hosts();
    let first = rig.host(1);
    // As whoever runs a proxy sets it, or its own connections run out of ports.
    // (The ports that are used again and again below are left out.)
    for setting in ["net.ipv4.ip_local_port_range=22000 65535", "net.ipv4.tcp_tw_reuse=1"] {
        assert!(first.exec("sysctl", &["-qw", setting]).success, "{setting}");
    }
    first_answers(&rig);
    first.ok(&[&ON_SECOND[..], &["--name", "direct", "--network", "host", "skep/whoami"]].concat());
    first.await_replicas("direct", "1/1");
    proxy(first);
    first.ok(&[&ON_SECOND[..], &["--name", "mesh", "--publish", "8080:8000", "skep/whoami"]].concat());
    first.await_replicas("mesh", "1/1");
    measure(first);
}

const ON_SECOND: [&str; 5] = ["service", "create", "-d", "--constraint", "node.hostname==n2"];

fn measure(first: &Host) {
    let ways = [
        ("direct", format!("{}:{DIRECT_PORT}", WIRE[1])),
        ("the mesh, encrypted", format!("{}:{MESH_PORT}", WIRE[0])),
        ("HAProxy in TCP mode", format!("{}:{PROXY_PORT}", WIRE[0])),
    ];
    for (name, to) in &ways {
        let to = to.parse().expect("an address");
        let mut times = first.within_network(|| reused_ports(to));
        times.sort();
        let millis = |at: usize| times[at].as_secs_f64() * 1e3;
        println!(
            "5,000 connections from 1,000 ports, {name:<21} median {:.2} ms, worst {:.2} ms",
            millis(times.len() / 2),
            millis(times.len() - 1)
        );
    }
    connections(first, &ways);
}

/// From the creation of a service to the first answer through the port of a node without its task.
fn first_answers(rig: &Rig) {
    const ROUNDS: usize = 10;
    let first = rig.host(1);
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let args = "service create -d --name quick --publish 8080:8000 --constraint node.hostname==n2 skep/whoami";
        first.ok(&args.split(' ').collect::<Vec<_>>());
        let to = SocketAddr::new(WIRE[0].parse().expect("an address"), MESH_PORT);
        first.within_network(|| {
            while ask(&mut connect(to, None)).is_none() {
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        times.push(begun.elapsed());
        first.ok(&["service", "rm", "quick"]);
        rig.await_no_container();
    }
    report("service create to the first answer through another node", times);
}

/// New connections a second, one request on each, in turns.
fn connections(from: &Host, ways: &[(&str, String)]) {
    const ROUNDS: usize = 5;
    let mut measured = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for ((_, to), measured) in ways.iter().zip(&mut measured) {
            let url = format!("http://{to}/");
            let ran = from.exec("wrk", &["-t1", "-c16", "-d2s", "--latency", "-H", "Connection: close", &url]);
            let word = |label: &str| {
                let line = ran.stdout.lines().find(|line| line.trim_start().starts_with(label));
                line.and_then(|line| line.split_whitespace().nth(1)).map(str::to_owned).unwrap_or_default()
            };
            let rate: f64 = word("Requests/sec:").parse().unwrap_or_else(|_| panic!("wrk (bootstrap bench): {ran:?}"));
            measured.push((rate, word("99%")));
        }
    }
    for ((name, _), mut measured) in ways.iter().zip(measured) {
        measured.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (rate, p99) = &measured[ROUNDS / 2];
        println!("new connections, {name:<40} median {rate:.0} a second, p99 {p99}, of {ROUNDS}");
    }
}

fn proxy(host: &Host) {
    let file = host.dir().join("haproxy.cfg");
    let text = format!(
        "global\n  nbthread 2\n  maxconn 4000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  \
         timeout server 30s\nfrontend in\n  bind :{PROXY_PORT}\n  default_backend out\nbackend out\n  server one {}:{}\n",
        WIRE[1], DIRECT_PORT
    );
    std::fs::write(&file, text).expect("a file can be written");
    host.spawn("haproxy", &["-f", &file.display().to_string()]);
    let to = SocketAddr::new(WIRE[0].parse().expect("an address"), PROXY_PORT);
    host.within_network(|| {
        while ask(&mut connect(to, None)).is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

/// A connection, from a port of one's choice if there is one.
fn connect(to: SocketAddr, from: Option<u16>) -> Option<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).ok()?;
    if let Some(port) = from {
        socket.set_reuse_address(true).ok()?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into()).ok()?;
    }
    socket.connect_timeout(&to.into(), Duration::from_secs(5)).ok()?;
    Some(socket.into())
}

/// One request, and the answer to its end.
fn ask(stream: &mut Option<TcpStream>) -> Option<String> {
    let stream = stream.as_mut()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.contains("Hostname:").then_some(answer)
}

/// How long each of many connections takes from a client that uses its ports again and again.
fn reused_ports(to: SocketAddr) -> Vec<Duration> {
    let once = |number: u16| {
        let begun = Instant::now();
        let answer = ask(&mut connect(to, Some(20_000 + number % 1000)));
        assert!(answer.is_some(), "connection {number} to {to} is answered");
        begun.elapsed()
    };
    (0..5000).map(once).collect()
}
