//! The host's ports that containers have: who reaches them, and what else of the host is left alone.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};

use skep_chaos_tests::{Host, LIMIT, Scene, take_turn, wait_until, within_network_of};

/// The pid of the process at the host's published ports, if there is one.
fn listener_pid(host: &Host) -> Option<String> {
    let socket = host.dir().join("run/ports.sock").display().to_string();
    let found = host.exec("pgrep", &["-f", &format!("forward {socket}")]).stdout;
    found.lines().next().map(str::to_owned)
}

/// Whether a program of the host's could have the port.
fn is_free(host: &Host, port: u16) -> bool {
    host.within_network(|| {
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
            && TcpListener::bind((Ipv6Addr::LOCALHOST, port)).is_ok()
    })
}

#[test]
fn clients_of_ipv6_reach_a_container_that_has_none() {
    take_turn!();
    let scene = Scene::with_hosts(2);
    let (host, other) = (scene.host(), scene.rig.host(2));
    for (number, host) in (1..).zip(scene.rig.hosts()) {
        let link = host.exec("ip", &["-o", "-4", "addr", "show", "to", host.addr()]).stdout;
        let link = link.split_whitespace().nth(1).unwrap().to_owned();
        let address = format!("fd77::{number}/64");
        assert!(host.exec("ip", &["-6", "addr", "add", &address, "dev", &link, "nodad"]).success);
    }
    host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        "8080:8000",
        "-p",
        "[::1]:8081:8000",
        "-p",
        "9000:9000/udp",
        "skep/whoami",
    ]);
    let answers = |host: &Host, url: &str| host.curl(url).contains("Hostname:");
    let here = |url: &'static str| {
        wait_until(&format!("{url} answers"), LIMIT, || (answers(host, url), host.log()));
    };
    here("http://[::1]:8080/");
    here("http://[::1]:8081/");
    here("http://127.0.0.1:8080/");
    assert!(answers(other, "http://[fd77::1]:8080/"));
    // An address that was asked for is obeyed.
    assert!(!answers(other, "http://[fd77::1]:8081/"), "::1 is for the host alone");
    assert!(!answers(host, "http://127.0.0.1:8081/"), "IPv6 was asked for");
    let ports = host.ok(&["port", "web"]);
    for line in ["8000/tcp -> 0.0.0.0:8080", "8000/tcp -> [::]:8080", "8000/tcp -> [::1]:8081"] {
        assert!(ports.contains(line), "{ports}");
    }

    // By UDP, from several clients at a time.
    let pid: u32 = host.ok(&["inspect", "-f", "{{.State.Pid}}", "web"]).trim().parse().unwrap();
    let echo = within_network_of(pid, || UdpSocket::bind("0.0.0.0:9000").unwrap());
    std::thread::spawn(move || {
        let mut word = [0; 64];
        while let Ok((len, from)) = echo.recv_from(&mut word) {
            echo.send_to(&word[..len], from).unwrap();
        }
    });
    let clients: Vec<_> =
        [host, other, other].map(|from| from.within_network(|| UdpSocket::bind("[::]:0").unwrap())).into();
    for (number, client) in (0..).zip(&clients) {
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.send_to(&[number; 3], "[fd77::1]:9000").unwrap();
    }
    for (number, client) in (0..).zip(&clients) {
        let mut word = [9; 64];
        assert_eq!(client.recv(&mut word).unwrap(), 3);
        assert_eq!(word[..3], [number; 3]);
    }

    // Without the daemon, and with another.
    host.kill_daemon();
    assert!(answers(other, "http://[fd77::1]:8080/"));
    host.start_daemon();
    assert!(answers(other, "http://[fd77::1]:8080/"));
    let first = listener_pid(host).unwrap();
    assert!(host.exec("kill", &["-9", &first]).success);
    here("http://[::1]:8081/");
    assert_ne!(listener_pid(host), Some(first));
    assert!(!is_free(host, 8080));
    host.ok(&["restart", "-t", "0", "web"]);
    here("http://[::1]:8080/");

    host.ok(&["rm", "-f", "web"]);
    assert!(is_free(host, 8080) && is_free(host, 8081));
    wait_until("nobody listens for nothing", LIMIT, || (listener_pid(host).is_none(), host.log()));
}

#[test]
fn ports_lead_into_a_container_once_it_is_in_a_network_that_they_reach() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    host.ok(&["network", "create", "-d", "bridge", "--internal", "inner"]);
    host.ok(&["network", "create", "-d", "bridge", "outer"]);
    host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "inner",
        "-p",
        "8080:8000",
        "-p",
        "127.0.0.1:8081:8000",
        "skep/whoami",
    ]);
    assert_eq!(host.ok(&["port", "web"]), "");
    assert_eq!(host.curl("http://127.0.0.1:8080/") + &host.curl("http://[::1]:8080/"), "");
    host.ok(&["network", "connect", "outer", "web"]);
    for url in ["http://127.0.0.1:8080/", "http://[::1]:8080/"] {
        wait_until(&format!("{url} answers"), LIMIT, || (host.curl(url).contains("Hostname:"), host.log()));
    }
    let told = host.ok(&["port", "web"]);
    assert!(told.contains("8000/tcp -> 0.0.0.0:8080") && told.contains("8000/tcp -> 127.0.0.1:8081"), "{told}");
    host.ok(&["network", "disconnect", "outer", "web"]);
    assert_eq!(host.curl("http://127.0.0.1:8080/") + &host.curl("http://[::1]:8080/"), "");
}

/// The address is the host's once the network's first container is there.
#[test]
fn a_network_s_own_gateway_publishes_its_ports() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let create = ["network", "create", "-d", "bridge", "--subnet", "10.60.0.0/24", "-o"];
    let binding = "com.docker.network.bridge.host_binding_ipv4=10.60.0.1";
    host.ok(&[&create[..], &[binding, "bound"]].concat());
    for _ in 0..2 {
        host.ok(&["run", "-d", "--name", "web", "--network", "bound", "-p", "5000:8000", "skep/whoami"]);
        assert_eq!(host.ok(&["port", "web", "8000"]).trim(), "10.60.0.1:5000");
        let answer = || host.curl("http://10.60.0.1:5000/");
        wait_until("the gateway answers", LIMIT, || (answer().contains("Hostname:"), host.log()));
        assert_eq!(host.curl("http://127.0.0.1:5000/"), "");
        host.ok(&["rm", "-f", "web"]);
    }
    // What is published twice is refused there as anywhere.
    host.ok(&["run", "-d", "--name", "web", "--network", "bound", "-p", "5000:8000", "skep/whoami"]);
    let again = host.run(&["run", "-d", "--network", "bound", "-p", "5000:8000", "skep/whoami"]).stderr;
    assert!(again.contains("Bind for 10.60.0.1:5000 failed: port is already allocated"), "{again}");
}

#[test]
fn what_another_program_of_the_host_has_is_not_taken() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let held = host.within_network(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 7000)).unwrap());
    let run = |ports: &str| host.run(&["run", "-d", "--name", "web", "-p", ports, "skep/whoami"]);
    let refused = run("7000:8000").stderr;
    assert!(refused.contains("7000/tcp: address already in use"), "{refused}");
    host.ok(&["rm", "-f", "web"]);
    // Any other of a range will do.
    let ran = run("7000-7001:8000");
    assert!(ran.success, "{}", ran.stderr);
    assert_eq!(host.ok(&["port", "web", "8000"]).lines().next(), Some("0.0.0.0:7001"));
    host.ok(&["rm", "-f", "web"]);
    let refused = run("192.0.2.9:7002:8000").stderr;
    assert!(refused.contains("cannot assign requested address"), "{refused}");
    host.ok(&["rm", "-f", "web"]);
    drop(held);
    assert!(run("7000:8000").success);
    assert!(!is_free(host, 7000), "what is published is nobody else's");
    host.ok(&["rm", "-f", "web"]);

    // Nobody listens where that is not wanted, not even who did before; what is taken is seen all the same.
    host.ok(&["run", "-d", "--name", "before", "-p", "7003:8000", "skep/whoami"]);
    assert!(listener_pid(host).is_some());
    host.kill_daemon();
    host.start_daemon_with(&["--userland-proxy=false"]);
    wait_until("nobody listens any more", LIMIT, || (listener_pid(host).is_none(), host.log()));
    assert!(host.curl("http://127.0.0.1:7003/").contains("Hostname:"));
    assert!(run("7000:8000").success);
    assert_eq!(host.ok(&["port", "web", "8000"]).trim(), "0.0.0.0:7000");
    assert_eq!((listener_pid(host), is_free(host, 7000)), (None, true));
    host.ok(&["rm", "-f", "web"]);
    let held = host.within_network(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7000)).unwrap());
    assert!(run("7000:8000").stderr.contains("address already in use"));
    drop(held);
}
