//! The routing mesh, beside HAProxy and beside no proxy at all.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, Rig, wait_until, within_network_of};
use socket2::{Domain, Protocol, Socket, Type};

use super::overlay::{WIRE, WireguardGo, busy_seconds, pid_of, two_hosts};
use super::report;

/// The task is on the second host; whoever asks is on the first.
const MESH_PORT: u16 = 8080;
const DIRECT_PORT: u16 = 8000;
const PROXY_PORT: u16 = 8081;
/// UDP, of the second host itself.
const FLOWS_PORT: u16 = 8082;

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
    publish(first);
    measure(first, "the mesh, encrypted");
    flows(&rig);
    // As HAProxy and the direct way do without encryption, so may the mesh.
    first.ok(&["service", "rm", "mesh"]);
    wait_until("nobody is left in the ingress network", LIMIT, || {
        let ran = first.run(&["network", "rm", "ingress"]);
        (ran.success, ran.stderr)
    });
    first.ok(&["network", "create", "--ingress", "--opt", "encrypted=false", "open"]);
    publish(first);
    measure(first, "the mesh, not encrypted");
}

fn publish(host: &Host) {
    let published = ["--name", "mesh", "--publish", "8080:8000", "--publish", "8080:8000/udp", "skep/whoami"];
    host.ok(&[&ON_SECOND[..], &published].concat());
    host.await_replicas("mesh", "1/1");
    let to = SocketAddr::new(WIRE[0].parse().expect("an address"), MESH_PORT);
    host.within_network(|| {
        while ask(&mut connect(to, None)).is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
}

const ON_SECOND: [&str; 5] = ["service", "create", "-d", "--constraint", "node.hostname==n2"];

fn measure(first: &Host, mesh: &str) {
    let ways = [
        ("direct", format!("{}:{DIRECT_PORT}", WIRE[1])),
        (mesh, format!("{}:{MESH_PORT}", WIRE[0])),
        ("HAProxy in TCP mode", format!("{}:{PROXY_PORT}", WIRE[0])),
    ];
    // All, or those that begin so: for a profile.
    let only = std::env::args().nth(2).unwrap_or_default();
    let ways: Vec<_> = ways.into_iter().filter(|(name, _)| name.starts_with(&only)).collect();
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

/// New flows of datagrams a second, as QUIC begins them: two exchanges of full datagrams on each, from a port of its own.
fn flows(rig: &Rig) {
    const ROUNDS: usize = 5;
    let (first, second) = (rig.host(1), rig.host(2));
    let _ended_with_us = WireguardGo::start(rig);
    let on_host = second.holder_pid();
    let in_task = pid_of(second, "mesh").parse().expect("a process's number");
    let ways = [
        ("direct", on_host, WIRE[1], FLOWS_PORT),
        ("the mesh, encrypted", in_task, WIRE[0], MESH_PORT),
        ("direct by wireguard-go", on_host, "10.99.0.2", FLOWS_PORT),
    ];
    for (server, port) in [(on_host, FLOWS_PORT), (in_task, DIRECT_PORT)] {
        let socket = within_network_of(server, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a free port"));
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                // Who is gone needs no answer.
                drop(socket.send_to(&buffer[..len], from));
            }
        });
    }
    let mut measured = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for ((_, _, address, port), measured) in ways.iter().zip(&mut measured) {
            let to = SocketAddr::new(address.parse().expect("an address"), *port);
            measured.push(first.within_network(|| flows_to(to)));
        }
    }
    for ((name, ..), mut measured) in ways.iter().zip(measured) {
        measured.sort_by(|a, b| a.rate.total_cmp(&b.rate));
        let Flows { rate, p99, cpu, .. } = measured[ROUNDS / 2];
        let lost: usize = measured.iter().map(|flows| flows.lost).sum();
        println!(
            "new flows of UDP, {name:<41} median {rate:.0} a second, p99 {:.2} ms, {:.0} CPU µs each, {lost} lost, of {ROUNDS}",
            p99.as_secs_f64() * 1e3,
            cpu * 1e6
        );
    }
}

/// What came of flows in a second.
#[derive(Clone, Copy)]
struct Flows {
    rate: f64,
    p99: Duration,
    /// Seconds of the whole machine's for each flow.
    cpu: f64,
    lost: usize,
}

fn flows_to(to: SocketAddr) -> Flows {
    const CLIENTS: usize = 16;
    const LASTS: Duration = Duration::from_secs(1);
    let (begun, busy) = (Instant::now(), busy_seconds());
    let flow = || {
        let started = Instant::now();
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        socket.connect(to).ok()?;
        let mut datagram = [1; 1200];
        for _ in 0..2 {
            socket.send(&datagram).ok()?;
            socket.recv(&mut datagram).ok()?;
        }
        Some(started.elapsed())
    };
    let client = || {
        let mut times = Vec::new();
        while begun.elapsed() < LASTS {
            times.push(flow());
        }
        times
    };
    let all: Vec<Option<Duration>> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients.into_iter().flat_map(|client| client.join().expect("a client ends")).collect()
    });
    let (took, busy) = (begun.elapsed().as_secs_f64(), busy_seconds() - busy);
    let mut times: Vec<Duration> = all.iter().flatten().copied().collect();
    times.sort();
    let count = times.len().max(1);
    let p99 = times.get(count * 99 / 100).copied().unwrap_or_default();
    Flows { rate: times.len() as f64 / took, p99, cpu: busy / count as f64, lost: all.len() - times.len() }
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
