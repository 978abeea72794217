//! What passes between the tasks of two nodes: large and small, while links and keys are what they may be.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use skep_chaos_tests::{Host, Rig, take_turn, within_network_of};

/// The first process of a container on a host.
fn pid_of(host: &Host, task: &str) -> u32 {
    let found = host.running().into_iter().find(|(name, _)| name.starts_with(task));
    u32::try_from(found.unwrap_or_else(|| panic!("{task} is not on {}", host.name())).1).unwrap()
}

/// Sends a datagram and a stream from one container to another; both must arrive as they were sent.
fn everything_crosses(from: u32, to: u32, address: IpAddr) {
    let large: Vec<u8> = (0..60_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let limit = Some(std::time::Duration::from_secs(10));
    let receiver = within_network_of(to, || UdpSocket::bind("[::]:0").unwrap());
    receiver.set_read_timeout(limit).unwrap();
    let target = (address, receiver.local_addr().unwrap().port());
    let any = SocketAddr::new(if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, 0);
    within_network_of(from, || UdpSocket::bind(any).unwrap().send_to(&large, target).unwrap());
    let mut got = vec![0; 65_536];
    let len = receiver.recv(&mut got).expect("a datagram of many packets arrives");
    assert!(got[..len] == large, "the datagram is whole");

    let listener = within_network_of(to, || TcpListener::bind("[::]:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    let bulk: Vec<u8> = large.iter().copied().cycle().take(20 << 20).collect();
    let sent = bulk.clone();
    let sender = std::thread::spawn(move || {
        within_network_of(from, || TcpStream::connect((address, port)).unwrap().write_all(&sent))
    });
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(limit).unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).expect("the stream goes on");
    sender.join().unwrap().unwrap();
    assert!(got == bulk, "the stream is whole");
}

#[test]
fn large_datagrams_and_streams_cross_links_of_every_size() {
    take_turn!();
    let rig = Rig::new(2);
    let (first, second) = (rig.host(1), rig.host(2));
    for (mtu, encrypted) in [(1500, true), (9000, true), (1500, false), (9000, false)] {
        rig.set_mtu(mtu);
        rig.hosts().for_each(Host::start_daemon);
        rig.form_swarm(1);
        first.ok(&["network", "create", "--ipv6", "--opt", &format!("encrypted={encrypted}"), "wide"]);
        first.ok(&["service", "create", "-d", "--name", "a", "--mode", "global", "--network", "wide", "skep/whoami"]);
        first.await_replicas("a", "2/2");
        let shown = first.inside("a", &["ip", "-o", "link", "show", "eth0"]);
        let passes =
            shown.split_once("mtu ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u32>().ok()).unwrap();
        assert!(passes < mtu && passes > mtu - 100, "MTU {mtu}, encrypted {encrypted}: {passes}");
        let addresses = second.inside("a", &["hostname", "-I"]);
        let addresses: Vec<IpAddr> = addresses.split_whitespace().map(|text| text.parse().unwrap()).collect();
        assert_eq!(addresses.len(), 2, "one of IPv4 and one of IPv6: {addresses:?}");
        for address in addresses {
            everything_crosses(pid_of(first, "a"), pid_of(second, "a"), address);
        }
        for host in [second, first] {
            host.ok(&["swarm", "leave", "--force"]);
            host.stop_daemon();
        }
    }
}

#[test]
fn nothing_is_lost_while_the_keys_of_tunnels_change() {
    take_turn!();
    let rig = Rig::new(2);
    let (first, second) = (rig.host(1), rig.host(2));
    rig.hosts().for_each(|host| host.start_daemon_with(&["--overlay-key-period", "6s"]));
    rig.form_swarm(1);
    first.ok(&["network", "create", "wide"]);
    first.ok(&["service", "create", "-d", "--name", "a", "--mode", "global", "--network", "wide", "skep/whoami"]);
    first.await_replicas("a", "2/2");
    let address = second.inside("a", &["hostname", "-I"]).trim().to_owned();
    let keys = || rig.hosts().map(|host| std::fs::read(host.data().join("swarm/overlay.key")).unwrap()).collect();
    let before: Vec<Vec<u8>> = keys();

    // A datagram every few milliseconds, and what comes back of them.
    let server = within_network_of(pid_of(second, "a"), || UdpSocket::bind("0.0.0.0:0").unwrap());
    let target = (address, server.local_addr().unwrap().port());
    server.set_read_timeout(Some(std::time::Duration::from_secs(3))).unwrap();
    let echo = std::thread::spawn(move || {
        let (mut buffer, mut count) = ([0; 16], 0u32);
        while let Ok((len, from)) = server.recv_from(&mut buffer) {
            count += 1;
            server.send_to(&buffer[..len], from).unwrap();
        }
        count
    });
    let client = within_network_of(pid_of(first, "a"), || UdpSocket::bind("0.0.0.0:0").unwrap());
    client.set_read_timeout(Some(std::time::Duration::from_secs(1))).unwrap();
    let (mut lost, mut sent) = (0, 0u32);
    let began = std::time::Instant::now();
    while began.elapsed() < std::time::Duration::from_secs(20) {
        client.send_to(&sent.to_be_bytes(), (target.0.as_str(), target.1)).unwrap();
        let mut buffer = [0; 16];
        if client.recv(&mut buffer).ok() != Some(4) {
            lost += 1;
        }
        sent += 1;
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(lost, 0, "of {sent} datagrams");
    assert_eq!(echo.join().unwrap(), sent);
    let after: Vec<Vec<u8>> = keys();
    for (before, after) in before.iter().zip(&after) {
        assert!(after.chunks(32).all(|key| key != &before[..32]), "every node's key is another by now");
    }
    let told = first.ok(&["network", "diagnose"]);
    assert!(!told.contains("another key"), "{told}");
}
