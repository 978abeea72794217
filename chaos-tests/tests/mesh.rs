//! The routing mesh on real hosts: ports that every node serves, for whichever client, and the rules behind them.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use skep_chaos_tests::{Host, LIMIT, Rig, skip, take_turn, wait_until, within_network_of};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

#[test]
fn every_node_serves_a_published_port_and_the_client_is_seen_as_it_is() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let manager = rig.host(1);
    manager.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "web",
        "--replicas",
        "2",
        "--publish",
        "8080:8000",
        "--constraint",
        "node.hostname!=n1",
        "--replicas-max-per-node",
        "1",
        "skep/whoami",
    ]);
    manager.await_replicas("web", "2/2");
    // From outside the swarm's containers, through a node with a task and one without.
    for (asked, from) in [(1, 2), (2, 3), (3, 1), (1, 3)] {
        let url = format!("http://{}:8080/", rig.host(asked).addr());
        wait_until("the port answers", LIMIT, || {
            let answer = rig.host(from).curl(&url);
            (
                answer.contains(&format!("RemoteAddr: {}:", rig.host(from).addr())),
                format!("{url} from n{from}: {answer}"),
            )
        });
    }
    // Both replicas take their turns.
    let answers: BTreeSet<String> = (0..8)
        .map(|_| rig.host(2).curl(&format!("http://{}:8080/", manager.addr())))
        .filter_map(|answer| answer.lines().next().map(str::to_owned))
        .collect();
    assert_eq!(answers.len(), 2, "{answers:?}");
    // A process of the node itself, by either address.
    for url in ["http://127.0.0.1:8080/".to_owned(), format!("http://{}:8080/", manager.addr())] {
        assert!(manager.curl(&url).contains("Hostname:"), "{url}");
    }
    manager.ok(&["service", "rm", "web"]);
    rig.await_no_container();
    wait_until("nothing is left of the mesh", LIMIT, || {
        let links = rig.host(2).exec("ip", &["-br", "link"]).stdout;
        (!links.contains("skep-mesh"), links)
    });
}

#[test]
fn a_published_port_is_opened_where_it_was_asked_for_and_held_by_one_service() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let (first, second) = (rig.host(1), rig.host(2));
    first.ok(&["service", "create", "-d", "--name", "local", "--publish", "127.0.0.1:8080:8000", "skep/whoami"]);
    first.ok(&["service", "create", "-d", "--name", "any", "--publish", "8000", "skep/whoami"]);
    first.await_replicas("local", "1/1");
    first.await_replicas("any", "1/1");
    wait_until("the port answers where it is", LIMIT, || {
        let answer = first.curl("http://127.0.0.1:8080/");
        (answer.contains("Hostname:"), answer)
    });
    let ran = second.exec("curl", &["-sS", "-m", "1", &format!("http://{}:8080/", first.addr())]);
    assert!(!ran.success && !ran.stdout.contains("Hostname"), "{ran:?}");
    let port = first.ok(&["service", "inspect", "--format", "{{json .Endpoint.Ports}}", "any"]);
    let port: serde_json::Value = serde_json::from_str(&port).unwrap();
    let number = port[0]["PublishedPort"].as_u64().unwrap();
    assert!((30_000..=32_767).contains(&number), "{port}");
    wait_until("the picked port answers", LIMIT, || {
        let answer = first.curl(&format!("http://{}:{number}/", second.addr()));
        (answer.contains("Hostname:"), answer)
    });
    let taken = format!("{number}:80");
    let refused = first.fails(&["service", "create", "-d", "--name", "late", "--publish", &taken, "skep/whoami"]);
    assert!(refused.contains("already in use by service 'any'"), "{refused}");
    // Updated, it keeps its number; taken away, it is free.
    first.ok(&["service", "update", "-d", "--label", "a=1", "any"]);
    let again = first.ok(&["service", "inspect", "--format", "{{json .Endpoint.Ports}}", "any"]);
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&again).unwrap()[0]["PublishedPort"],
        port[0]["PublishedPort"]
    );
    first.ok(&["service", "update", "-d", "--publish-rm", "8000", "any"]);
    first.ok(&["service", "create", "-d", "--name", "late", "--publish", &taken, "skep/whoami"]);
    // A task on the host's own network sees what the host sees.
    first.ok(&["service", "create", "-d", "--name", "bare", "--mode", "global", "--network", "host", "skep/whoami"]);
    first.await_replicas("bare", "2/2");
    assert!(second.curl(&format!("http://{}:8000/", first.addr())).contains("Hostname:"));
}

/// Answers datagrams in the network of a container until nothing comes for a while; who asked is part of the answer.
fn echo(pid: u32, port: u16) -> std::thread::JoinHandle<()> {
    let socket = within_network_of(pid, || UdpSocket::bind(("0.0.0.0", port)).unwrap());
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(from.to_string().as_bytes(), from).unwrap();
        }
    })
}

#[test]
fn datagrams_reach_a_published_port_through_any_node() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let manager = rig.host(1);
    let create = ["service", "create", "-d", "--name", "echo", "--constraint", "node.hostname!=n1", "--mode", "global"];
    manager.ok(&[&create[..], &["--publish", "9000:9000/udp", "--publish", "8080:8000", "skep/whoami"]].concat());
    manager.await_replicas("echo", "2/2");
    let pid = |number: usize| u32::try_from(rig.host(number).running()[0].1).unwrap();
    let servers = [echo(pid(2), 9000), echo(pid(3), 9000)];
    for asked in 1..=3 {
        let asker = rig.host(if asked == 3 { 2 } else { 3 });
        let answers: BTreeSet<String> = (0..4)
            .map(|_| {
                let socket = asker.within_network(|| UdpSocket::bind((asker.addr(), 0)).unwrap());
                socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
                socket.send_to(b"who am I?", (rig.host(asked).addr(), 9000)).unwrap();
                let mut buffer = [0; 64];
                let (len, from) = socket.recv_from(&mut buffer).expect("an answer comes");
                assert_eq!(from.ip().to_string(), rig.host(asked).addr());
                let seen = String::from_utf8_lossy(&buffer[..len]).into_owned();
                assert_eq!(seen, socket.local_addr().unwrap().to_string(), "the asker is seen as it is");
                seen
            })
            .collect();
        assert_eq!(answers.len(), 4);
    }
    drop(servers.map(std::thread::JoinHandle::join));
}

/// A socket of SCTP, if the kernel has that.
fn sctp() -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(nix::libc::IPPROTO_SCTP)))?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(socket)
}

#[test]
fn sctp_reaches_a_published_port_through_any_node() {
    take_turn!();
    if let Err(error) = sctp() {
        return skip(&format!("this kernel has no SCTP: {error}"));
    }
    let rig = Rig::swarm(3, 1);
    let manager = rig.host(1);
    let create = ["service", "create", "-d", "--name", "web", "--constraint", "node.hostname!=n1", "--mode", "global"];
    manager.ok(&[&create[..], &["--publish", "9000:9000/sctp", "--publish", "9000:8000", "skep/whoami"]].concat());
    manager.await_replicas("web", "2/2");
    let address = |text: &str, port: u16| SockAddr::from(SocketAddr::new(text.parse().unwrap(), port));
    for number in [2, 3] {
        let pid = u32::try_from(rig.host(number).running()[0].1).unwrap();
        let listener = within_network_of(pid, || sctp().unwrap());
        listener.bind(&address("0.0.0.0", 9000)).unwrap();
        listener.listen(8).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, from)) = listener.accept() {
                stream.write_all(from.as_socket().unwrap().to_string().as_bytes()).unwrap();
            }
        });
    }
    for asked in 1..=3 {
        let asker = rig.host(if asked == 3 { 2 } else { 3 });
        for _ in 0..4 {
            let mut stream = asker.within_network(|| sctp().unwrap());
            stream.connect(&address(rig.host(asked).addr(), 9000)).unwrap();
            let mut seen = [0; 64];
            let len = stream.read(&mut seen).expect("an answer comes");
            let own = stream.local_addr().unwrap().as_socket().unwrap();
            assert_eq!(own.ip().to_string(), asker.addr());
            assert_eq!(String::from_utf8_lossy(&seen[..len]), own.to_string(), "the asker is seen as it is");
        }
    }
}

/// The overlay's rules on a host, but for what counts packets.
fn rules(host: &Host) -> String {
    let netns = host.dir().join("run/overlay/netns").display().to_string();
    let list =
        |family| host.exec("nsenter", &[&format!("--net={netns}"), "nft", "-n", "list", "table", family, "skep"]);
    list("ip").stdout + &list("ip6").stdout
}

#[test]
fn rules_that_were_changed_step_by_step_are_those_that_are_made_anew() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    host.ok(&["network", "create", "--ipv6", "green"]);
    let create = ["service", "create", "-d", "--name", "a", "--network", "green", "--replicas", "4"];
    host.ok(&[&create[..], &["--publish", "8080:8000", "--publish", "9000:9000/udp", "skep/whoami"]].concat());
    host.await_replicas("a", "4/4");
    // Who changes rules is told by the kernel: what this is about are those that no `nft` changed. (The directory for
    // files that it would include names this rig, so that the program ends with it.)
    let (dir, monitor) = (host.dir().display(), host.dir().join("generations"));
    let line = format!("exec nsenter --net={dir}/run/overlay/netns nft -I {dir} monitor > {}", monitor.display());
    host.spawn("sh", &["-c", &line]);
    // Services come, have their last task and their first again, and go.
    let other = ["service", "create", "-d", "--name", "b", "--network", "green", "--replicas", "1"];
    host.ok(&[&other[..], &["--publish", "8081:8000", "skep/whoami"]].concat());
    host.await_replicas("b", "1/1");
    for (replicas, of_b) in [(4, 0), (7, 2), (2, 0), (5, 1), (3, 3)] {
        host.ok(&["service", "scale", "-d", &format!("a={replicas}"), &format!("b={of_b}")]);
        host.await_replicas("a", &format!("{replicas}/{replicas}"));
        host.await_replicas("b", &format!("{of_b}/{of_b}"));
    }
    host.ok(&["service", "rm", "b"]);
    // Until what was scaled down has left: each link of those that are left has an address of either family.
    let settled = |host: &Host| {
        let (there, links) = (rules(host), host.running().len() * 2);
        let own = there.matches("\"skv").count() - there.matches("\"skv*").count();
        (there.contains("mod 3 map") && own == links * 2, format!("{links} links: {there}"))
    };
    let ours = || rig.hosts().map(|host| host.running().len()).sum::<usize>();
    wait_until("three tasks are left", LIMIT, || (ours() == 3, ours().to_string()));
    wait_until("the rules are theirs", LIMIT, || settled(host));
    let generations = std::fs::read_to_string(&monitor).unwrap_or_default();
    let by_itself = generations.lines().filter(|line| line.contains("new generation") && !line.contains("(nft)"));
    assert!(by_itself.count() > 10, "the daemon changes rules itself:\n{generations}");
    assert!(!generations.contains("(nft)"), "no script is needed:\n{generations}");
    for host in rig.hosts() {
        assert!(!host.log().contains("not as it should be"), "{}", host.log());
    }
    let before = rules(host);
    for _ in 0..6 {
        assert!(host.curl(&format!("http://{}:8080/", host.addr())).contains("Hostname:"));
    }
    host.kill_daemon();
    host.start_daemon();
    wait_until("the daemon has taken up its networks", LIMIT, || {
        let log = host.log();
        (log.matches("the data path to other nodes is up").count() > 1, log)
    });
    let sorted = |text: &str| {
        let mut words: Vec<String> = text.split([',', '{', '}', '\n']).map(|word| word.trim().to_owned()).collect();
        words.sort();
        words
    };
    wait_until("the rules that are made anew are the same", LIMIT, || {
        let after = rules(host);
        (sorted(&before) == sorted(&after), format!("before: {before}\nafter: {after}"))
    });
}

/// A frame of VXLAN in its datagram: a datagram of UDP within, from any address to any other.
fn forged(macs: [[u8; 6]; 2], from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    const VNI: [u8; 8] = [0x08, 0, 0, 0, 0, 0x10, 0, 0];
    let word = b"forged";
    let mut ip = [0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0].to_vec();
    ip.extend(from.octets().into_iter().chain(to.octets()));
    ip[3] = u8::try_from(20 + 8 + word.len()).unwrap();
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp = [4000_u16, port, u16::try_from(8 + word.len()).unwrap(), 0].map(u16::to_be_bytes);
    let [to, from] = macs;
    [&VNI[..], &to, &from, &[0x08, 0], &ip, udp.as_flattened(), word].concat()
}

#[test]
fn an_ingress_network_without_encryption_takes_clients_in_and_nothing_else() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let manager = rig.host(1);
    manager.ok(&["network", "rm", "--force", "ingress"]);
    manager.ok(&["network", "create", "--ingress", "--opt", "encrypted=false", "entry"]);
    manager.ok(&["network", "create", "secret"]);
    let create = ["service", "create", "-d", "--name", "web", "--mode", "global", "--constraint", "node.hostname!=n1"];
    manager.ok(&[&create[..], &["--publish", "8080:8000", "--network", "secret", "skep/whoami"]].concat());
    manager.await_replicas("web", "2/2");
    for (asked, from) in [(1, 2), (2, 3), (3, 1), (1, 3)] {
        let (url, from) = (format!("http://{}:8080/", rig.host(asked).addr()), rig.host(from));
        let seen = format!("RemoteAddr: {}:", from.addr());
        wait_until("the port answers", LIMIT, || {
            let answer = from.curl(&url);
            (answer.contains(&seen), format!("{url} from {}: {answer}", from.name()))
        });
    }
    // A host says what no node of the swarm would.
    let mac = |host: &Host| {
        let netns = format!("--net={}", host.dir().join("run/overlay/netns").display());
        let link = host.exec("nsenter", &[&netns, "ip", "-o", "link", "show", "plain0"]).stdout;
        let mac = link.split("link/ether ").nth(1).unwrap_or_else(|| panic!("{link}"));
        let bytes: Vec<u8> = mac[..17].split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        <[u8; 6]>::try_from(bytes).unwrap()
    };
    let (liar, victim) = (rig.host(3), rig.host(2));
    let macs = [mac(victim), mac(liar)];
    let tasks = manager.api().get("/tasks").unwrap().body;
    let pid = u32::try_from(victim.running()[0].1).unwrap();
    let task = tasks.as_array().unwrap().iter().find(|task| task["Status"]["ContainerStatus"]["PID"] == pid).unwrap();
    let address = |network: &str| -> Ipv4Addr {
        let attachments = task["NetworksAttachments"].as_array().unwrap();
        let place = attachments.iter().find(|place| place["Network"]["Spec"]["Name"] == network).unwrap();
        place["Addresses"][0].as_str().unwrap().split('/').next().unwrap().parse().unwrap()
    };
    let listen = || {
        let socket = UdpSocket::bind(("0.0.0.0", 7000)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        socket
    };
    let ears = [within_network_of(pid, listen), manager.within_network(listen)];
    let mouth = liar.within_network(|| UdpSocket::bind((liar.addr(), 0)).unwrap());
    let (client, other): (Ipv4Addr, Ipv4Addr) = (liar.addr().parse().unwrap(), manager.addr().parse().unwrap());
    for (what, from, to, taken) in [
        ("as a client's that came in there", client, address("entry"), true),
        ("a task's, to outside", address("entry"), other, false),
        ("a client's, to outside", client, other, false),
        ("a client's, to an encrypted network", client, address("secret"), false),
        ("of the encrypted network", address("secret"), address("secret"), false),
        ("a task's, to an encrypted network", address("entry"), address("secret"), false),
    ] {
        mouth.send_to(&forged(macs, from, to, 7000), (victim.addr(), 4790)).unwrap();
        let heard = ears.iter().any(|ear| ear.recv(&mut [0; 64]).is_ok());
        assert_eq!(heard, taken, "{what}: from {from} to {to}");
    }
}
