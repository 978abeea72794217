//! What passes between the tasks of two nodes: large and small, while links and keys are what they may be.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, Rig, skip, take_turn, wait_until, within_network_of};

/// The first process of a container on a host.
fn pid_of(host: &Host, task: &str) -> u32 {
    let found = host.running().into_iter().find(|(name, _)| name.starts_with(task));
    u32::try_from(found.unwrap_or_else(|| panic!("{task} is not on {}", host.name())).1).unwrap()
}

/// Sends a datagram and a stream from one container to another; both must arrive as they were sent.
fn everything_crosses(from: u32, to: u32, address: IpAddr) {
    let large: Vec<u8> = (0..60_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let limit = Some(Duration::from_secs(10));
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

/// Sends a datagram every few milliseconds from one container to another, does `meanwhile` after a while, and says when
/// those were sent that never came back.
fn lost_within(secs: u64, from: u32, (to, address): (u32, &str), meanwhile: impl FnOnce() + Send) -> Vec<Duration> {
    let server = within_network_of(to, || UdpSocket::bind("0.0.0.0:0").unwrap());
    let port = server.local_addr().unwrap().port();
    server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let client = within_network_of(from, || UdpSocket::bind("0.0.0.0:0").unwrap());
    client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut lost = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 16];
            while let Ok((len, from)) = server.recv_from(&mut buffer) {
                server.send_to(&buffer[..len], from).unwrap();
            }
        });
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(2));
            meanwhile();
        });
        let began = Instant::now();
        for sent in 0u32.. {
            if began.elapsed() > Duration::from_secs(secs) {
                assert!(sent > 100, "only {sent} were sent");
                break;
            }
            client.send_to(&sent.to_be_bytes(), (address, port)).unwrap();
            let mut buffer = [0; 16];
            if client.recv(&mut buffer).ok() != Some(4) {
                lost.push(began.elapsed());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    lost
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

    assert_eq!(lost_within(20, pid_of(first, "a"), (pid_of(second, "a"), &address), || ()), []);
    let after: Vec<Vec<u8>> = keys();
    for (before, after) in before.iter().zip(&after) {
        assert!(after.chunks(32).all(|key| key != &before[..32]), "every node's key is another by now");
    }
    let told = first.ok(&["network", "diagnose"]);
    assert!(!told.contains("another key"), "{told}");
}

/// Whether the kernel of the hosts has WireGuard of its own.
fn kernel_has_wireguard(host: &Host) -> bool {
    let there = host.exec("ip", &["link", "add", "probe", "type", "wireguard"]).success;
    there && host.exec("ip", &["link", "del", "probe"]).success
}

/// Waits until packets from `host` to each of `others` pass through the kernel's WireGuard, or until none do.
fn await_in_kernel(host: &Host, others: &[&Host], want: bool) {
    let way = if want { "the kernel's WireGuard" } else { "the data path" };
    wait_until(&format!("packets pass through {way}"), Duration::from_secs(30), || {
        let told = host.run(&["network", "diagnose"]).stdout;
        let passes = |other: &&Host| told.contains(&format!("packets to {} pass through {way}", other.name()));
        (others.iter().all(passes), told)
    });
}

/// What the device of the kernel's WireGuard received, in bytes.
fn received_in_kernel(host: &Host) -> u64 {
    let netns = host.dir().join("run/overlay/netns");
    let netns = format!("--net={}", netns.display());
    let told = host.exec("nsenter", &[&netns, "cat", "/proc/net/dev"]).stdout;
    let device = told.lines().find_map(|line| line.trim().strip_prefix("wireguard0:")).unwrap_or_default();
    device.split_whitespace().next().map_or(0, |bytes| bytes.parse().unwrap())
}

#[test]
fn a_way_that_is_not_to_be_had_is_refused() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    let refused = |way: &str| {
        host.spawn_daemon_with(&["--data-path", way]);
        host.wait_daemon_failed();
        host.log()
    };
    let log = refused("tunnels");
    assert!(log.contains("data-path") && log.contains("auto, userspace or kernel"), "{log}");
    if !kernel_has_wireguard(host) {
        let log = refused("kernel");
        assert!(log.contains("this kernel has no WireGuard") && log.contains("modprobe wireguard"), "{log}");
    }
}

#[test]
fn packets_pass_through_the_kernel_s_wireguard_where_both_hosts_have_it() {
    take_turn!();
    let rig = Rig::new(3);
    let [first, second, third] = [1, 2, 3].map(|n| rig.host(n));
    if !kernel_has_wireguard(first) {
        return skip("this kernel has no WireGuard");
    }
    for host in [first, second] {
        host.start_daemon_with(&["--data-path", "kernel", "--overlay-key-period", "0s"]);
    }
    third.start_daemon_with(&["--data-path", "userspace"]);
    rig.form_swarm(1);
    // A node whose daemon is away for some seconds keeps its tasks.
    first.ok(&["swarm", "update", "--dispatcher-heartbeat", "30s"]);
    first.ok(&["network", "create", "--ipv6", "wide"]);
    first.ok(&["service", "create", "-d", "--name", "a", "--mode", "global", "--network", "wide", "skep/whoami"]);
    first.await_replicas("a", "3/3");
    await_in_kernel(first, &[second], true);
    await_in_kernel(second, &[first], true);
    let addresses = |host: &Host| -> Vec<IpAddr> {
        host.inside("a", &["hostname", "-I"]).split_whitespace().map(|text| text.parse().unwrap()).collect()
    };
    let before = received_in_kernel(second);
    for address in addresses(second) {
        everything_crosses(pid_of(first, "a"), pid_of(second, "a"), address);
    }
    assert!(received_in_kernel(second) - before > 40 << 20, "all of it passed through the kernel");
    // The host that does without is reached all the same.
    for (from, to) in [(first, third), (third, second)] {
        for address in addresses(to) {
            everything_crosses(pid_of(from, "a"), pid_of(to, "a"), address);
        }
    }

    // Daemons go, and come back; keys change.
    let address = addresses(second)[0].to_string();
    let (from, to) = (pid_of(first, "a"), pid_of(second, "a"));
    let again = |host: &Host| {
        host.kill_daemon();
        std::thread::sleep(Duration::from_secs(3));
        host.start_daemon_with(&["--data-path", "kernel", "--overlay-key-period", "40s"]);
    };
    let lost = lost_within(40, from, (to, &address), || [first, second].into_iter().for_each(again));
    assert_eq!(lost, [], "what is there is taken up");
    assert_eq!(lost_within(60, from, (to, &address), || ()), [], "keys change on both hosts");
    await_in_kernel(first, &[second], true);

    // A firewall closes the port: packets take the other way.
    let rules = |script: &str| assert!(second.exec("nft", &[script]).success, "{script}");
    let close = "add table inet closed; add chain inet closed arriving { type filter hook input priority 0; }; \
                 add rule inet closed arriving udp dport 4791 drop";
    let lost = lost_within(30, from, (to, &address), || rules(close));
    assert!(lost.len() < 60, "it takes some 14 s of half a second each to find out: {lost:?}");
    await_in_kernel(first, &[second], false);
    rules("delete table inet closed");
    await_in_kernel(first, &[second], true);
}

/// What passes through the kernel's WireGuard takes no fast path.
const OWN_DATA_PATH: [&str; 2] = ["--data-path", "userspace"];

/// A swarm of hosts, one manager, whose encrypted networks do without the kernel's WireGuard.
fn past_wireguard(count: u8) -> Rig {
    let rig = Rig::new(count);
    rig.hosts().for_each(|host| host.start_daemon_with(&OWN_DATA_PATH));
    rig.form_swarm(1);
    rig
}

/// The nodes of a swarm with a task of `name` on each, in a network of its own.
fn everywhere(manager: &Host, name: &str, network: &str, options: &[&str]) {
    manager.ok(&[&["network", "create", "--attachable"], options, &[network]].concat());
    manager.ok(&["service", "create", "-d", "--name", name, "--mode", "global", "--network", network, "skep/whoami"]);
    let nodes = manager.ok(&["node", "ls", "-q"]).lines().count();
    manager.await_replicas(name, &format!("{nodes}/{nodes}"));
}

fn addresses_of(host: &Host, container: &str) -> Vec<IpAddr> {
    host.inside(container, &["hostname", "-I"]).split_whitespace().map(|text| text.parse().unwrap()).collect()
}

/// How many packets the rules of a host's overlay have seen, since it was asked first.
fn seen_by_rules(host: &Host) -> u64 {
    let netns = format!("--net={}", host.dir().join("run/overlay/netns").display());
    let nft = |words: &str| host.exec("nsenter", &[&netns, "nft", words]);
    if !nft("list table inet seen").success {
        let chain = "add chain inet seen passing { type filter hook forward priority 10; }";
        assert!(nft(&format!("add table inet seen; {chain}; add rule inet seen passing counter")).success);
    }
    let told = nft("list table inet seen").stdout;
    let count = told.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
    count.unwrap_or_else(|| panic!("no count: {told}")).parse().unwrap()
}

/// Waits until a host's overlay takes no connection for open.
fn nothing_is_open(host: &Host) {
    let netns = format!("--net={}", host.dir().join("run/overlay/netns").display());
    wait_until("the rules know that connections have ended", Duration::from_secs(5), || {
        let known = host.exec("nsenter", &[&netns, "cat", "/proc/net/nf_conntrack"]).stdout;
        (!known.contains("ESTABLISHED"), known)
    });
}

/// Whether the hosts' kernel has the fast path; it is said if not.
fn has_fast_path(host: &Host) -> bool {
    let told = host.ok(&["network", "diagnose"]);
    let has = told.contains("packets of known flows take the fast path");
    if !has {
        assert!(told.contains("this kernel has no fast path"), "{told}");
        skip("this kernel has no fast path between containers");
    }
    has
}

#[test]
fn containers_of_two_nodes_speak_by_the_fast_path_while_there_are_daemons() {
    take_turn!();
    let rig = past_wireguard(2);
    let (first, second) = (rig.host(1), rig.host(2));
    // A node whose daemon is away for some seconds keeps its tasks.
    first.ok(&["swarm", "update", "--dispatcher-heartbeat", "30s"]);
    for (name, encrypted) in [("hidden", true), ("open", false)] {
        everywhere(first, name, name, &["--ipv6", "--opt", &format!("encrypted={encrypted}")]);
        if !has_fast_path(first) {
            return;
        }
        let (from, to) = (pid_of(first, name), pid_of(second, name));
        for address in addresses_of(second, name) {
            let seen = || {
                let before = [seen_by_rules(first), seen_by_rules(second)];
                everything_crosses(from, to, address);
                [seen_by_rules(first) - before[0], seen_by_rules(second) - before[1]]
            };
            let fast = seen();
            rig.hosts().for_each(nothing_is_open);
            assert!(fast.iter().all(|&count| count < 60), "{name}, {address}: rules saw {fast:?} packets");
            first.kill_daemon();
            let [long, still_fast] = seen();
            assert!(long > 200 && still_fast < 60, "{name}, {address}: rules saw {long} and {still_fast} packets");
            first.start_daemon_with(&OWN_DATA_PATH);
            wait_until("the fast path is back", Duration::from_secs(20), || {
                let seen = seen();
                (seen.iter().all(|&count| count < 60), format!("{seen:?}"))
            });
        }
        // What comes by the fast path is counted where users look.
        let links = second.inside(name, &["cat", "/proc/net/dev"]);
        let received = links.lines().find_map(|line| line.trim().strip_prefix("eth0:")).unwrap_or_default();
        let received: u64 = received.split_whitespace().next().map_or(0, |bytes| bytes.parse().unwrap());
        assert!(received > 120 << 20, "{links}");
    }
    let (from, to) = (pid_of(first, "open"), pid_of(second, "open"));
    let address = addresses_of(second, "open")[0].to_string();
    let again = |host: &Host| {
        host.kill_daemon();
        host.start_daemon_with(&OWN_DATA_PATH);
    };
    assert_eq!(lost_within(12, from, (to, &address), || rig.hosts().for_each(again)), [], "daemons killed and back");
}

/// A socket of a container's.
fn socket_of(pid: u32, port: u16) -> UdpSocket {
    let socket = within_network_of(pid, || UdpSocket::bind(("0.0.0.0", port)).unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    socket
}

/// One who answers what it is sent, and one who asks it, until their flow is known to both nodes.
struct Flow {
    asker: UdpSocket,
    answerer: UdpSocket,
    to: SocketAddr,
}

impl Flow {
    fn between(from: u32, to: u32, address: IpAddr) -> Self {
        let (asker, answerer) = (socket_of(from, 0), socket_of(to, 0));
        let to = SocketAddr::new(address, answerer.local_addr().unwrap().port());
        let flow = Self { asker, answerer, to };
        for _ in 0..5 {
            flow.ask().unwrap();
        }
        flow
    }

    fn ask(&self) -> std::io::Result<SocketAddr> {
        let mut buffer = [0; 16];
        self.asker.send_to(b"question", self.to)?;
        let (_, asker) = self.answerer.recv_from(&mut buffer)?;
        self.answerer.send_to(b"answer", asker)?;
        self.asker.recv(&mut buffer)?;
        Ok(asker)
    }

    /// What comes to the one who answers from a socket that claims to be the one who asks.
    fn forged(&self, as_if: IpAddr) -> std::io::Result<usize> {
        let source = SocketAddr::new(as_if, self.asker.local_addr().unwrap().port());
        UdpSocket::bind(source).unwrap().send_to(b"forged", self.to)?;
        self.answerer.recv(&mut [0; 16])
    }
}

#[test]
fn nobody_but_who_began_it_uses_a_known_flow() {
    take_turn!();
    let rig = past_wireguard(2);
    let (first, second) = (rig.host(1), rig.host(2));
    everywhere(first, "open", "open", &["--opt", "encrypted=false"]);
    everywhere(first, "hidden", "hidden", &[]);
    first.ok(&["run", "-d", "--name", "forger", "--network", "open", "skep/whoami"]);
    if !has_fast_path(first) {
        return;
    }
    let flow = |name: &str| {
        let address = addresses_of(second, name)[0];
        let flow = Flow::between(pid_of(first, name), pid_of(second, name), address);
        (flow, addresses_of(first, name)[0])
    };
    let (open, asker) = flow("open");
    let before = seen_by_rules(first);
    open.ask().unwrap();
    assert_eq!(seen_by_rules(first), before, "the flow is known");
    // A neighbour takes its address and its port.
    let _ = first.inside("forger", &["ip", "addr", "add", &format!("{asker}/32"), "dev", "eth0"]);
    let forged = within_network_of(pid_of(first, "forger"), || open.forged(asker));
    assert!(forged.is_err(), "a neighbour's datagram has arrived: {forged:?}");
    open.ask().unwrap();

    // A node sends what belongs into a tunnel beside it. What does not belong there arrives that way.
    let (hidden, hidden_asker) = flow("hidden");
    let netns = format!("--net={}", first.dir().join("run/overlay/netns").display());
    let ip = |words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        let ran = first.exec("nsenter", &[&[netns.as_str(), "ip"], words.as_slice()].concat());
        assert!(ran.success, "{words:?}: {ran:?}");
        ran.stdout
    };
    let routes = ip("route show dev plain0");
    let hop = routes.split_once("via ").and_then(|(_, rest)| rest.split(' ').next()).unwrap();
    ip(&format!("route add {} via {hop} dev plain0 onlink", hidden.to.ip()));
    for address in [asker, hidden_asker] {
        ip(&format!("addr add {address}/32 dev lo"));
    }
    let arrived = first.within_overlay(|| open.forged(asker));
    assert!(arrived.is_ok(), "the test's own way leads nowhere: {arrived:?}");
    let forged = first.within_overlay(|| hidden.forged(hidden_asker));
    assert!(forged.is_err(), "what came beside the tunnel was taken: {forged:?}");
}

#[test]
fn a_known_flow_follows_an_address_to_another_node() {
    take_turn!();
    let rig = past_wireguard(3);
    let first = rig.host(1);
    for (name, encrypted) in [("hidden", true), ("open", false)] {
        everywhere(first, name, name, &["--opt", &format!("encrypted={encrypted}")]);
        let asker = socket_of(pid_of(first, name), 0);
        let mut address = None;
        for number in [2, 3, 2] {
            let host = rig.host(number);
            let asked = address.map(|address: IpAddr| format!("--ip={address}"));
            let run = ["run", "-d", "--name", "moving", "--network", name];
            host.ok(&[&run[..], asked.as_deref().as_slice(), &["skep/whoami"]].concat());
            let to = *address.get_or_insert_with(|| addresses_of(host, "moving")[0]);
            let asker = asker.try_clone().unwrap();
            let answerer = socket_of(pid_of(host, "moving"), 7000);
            let flow = Flow { asker, answerer, to: SocketAddr::new(to, 7000) };
            wait_until("every node knows where the container is", Duration::from_secs(10), || {
                let asked = flow.ask();
                (asked.is_ok(), format!("{name} on {}: {asked:?}", host.name()))
            });
            for _ in 0..5 {
                flow.ask().unwrap_or_else(|error| panic!("{name} on {}: {error}", host.name()));
            }
            host.ok(&["rm", "-f", "moving"]);
        }
    }
}

#[test]
fn a_port_may_lead_to_a_task_by_both_of_its_addresses() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let (first, second) = (rig.host(1), rig.host(2));
    everywhere(first, "a", "open", &["--opt", "encrypted=false"]);
    first.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "b",
        "--network",
        "open",
        "--constraint",
        "node.hostname==n2",
        "skep/whoami",
    ]);
    first.await_replicas("b", "1/1");
    let virtual_address = first.look_up("a.", "b").pop_first().unwrap();
    let own = addresses_of(second, "b")[0].to_string();
    // From one port to both, and back and forth while both are open.
    let client = pid_of(first, "a");
    let mut streams: Vec<TcpStream> = [virtual_address, own]
        .iter()
        .map(|address| within_network_of(client, || connect_from(40_000, &format!("{address}:8000"))))
        .collect();
    for round in 0..5 {
        for stream in &mut streams {
            stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n").unwrap();
            let mut answer = [0; 4096];
            let len = stream.read(&mut answer).unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert!(answer[..len].starts_with(b"HTTP/1.1 200"), "round {round}");
        }
    }
}

/// A connection from a port that others may have, too.
fn connect_from(port: u16, to: &str) -> TcpStream {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket, sockopt};
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port)).unwrap();
    connect(socket.as_raw_fd(), &to.parse::<SockaddrIn>().unwrap()).unwrap();
    TcpStream::from(socket)
}
