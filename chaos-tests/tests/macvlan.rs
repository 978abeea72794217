//! Networks on a link of the host's: containers stand in the host's own network.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use skep_chaos_tests::{Host, LIMIT, Rig, has_docker, take_turn, wait_until};

const CREATE: [&str; 11] = [
    "network",
    "create",
    "-d",
    "macvlan",
    "--subnet",
    "10.77.0.0/24",
    "--gateway",
    "10.77.0.1",
    "-o",
    "parent=eth0",
    "lan",
];

fn answers(host: &Host, addr: &str) -> bool {
    host.exec("busybox", &["nc", "-w", "2", addr, "80"]).stdout == "hello\n"
}

#[test]
fn containers_stand_in_the_network_of_a_link() {
    take_turn!();
    let rig = Rig::new(2);
    let (host, other) = (rig.host(1), rig.host(2));
    host.start_daemon();
    host.import_busybox();
    host.ok(&CREATE);
    assert!(host.ok(&["network", "ls"]).contains("macvlan"));
    let serve = ["busybox", "sh", "-c", "while true; do echo hello | nc -l -p 80; done"];
    host.ok(&[&["run", "-d", "--name", "web", "--network", "lan", "--ip", "10.77.0.50"], &serve[..]].concat());
    host.ok(&["run", "-d", "--name", "more", "--network", "lan", "--ip", "10.77.0.51", "busybox", "sleep", "1000"]);
    wait_until("another host reaches it by its own address", LIMIT, || (answers(other, "10.77.0.50"), String::new()));
    // Neighbours know each other by name; the host itself is kept from them, as the kernel has it.
    assert_eq!(host.ok(&["exec", "more", "nc", "-w", "2", "web", "80"]), "hello\n");
    assert!(!answers(host, "10.77.0.50"));
    let route = host.ok(&["exec", "web", "ip", "route"]);
    assert!(route.contains("default via 10.77.0.1"), "{route}");
    assert_eq!(host.ok(&["exec", "more", "ping", "-c1", "-W2", "10.77.0.2"]).matches(" 0% packet loss").count(), 1);
    let seen = host.ok(&["network", "inspect", "-f", "{{.Driver}} {{.Options.parent}}", "lan"]);
    assert_eq!(seen.trim(), "macvlan eth0");
    // It outlives the daemon, and moves between networks.
    host.kill_daemon();
    host.start_daemon();
    assert!(answers(other, "10.77.0.50"));
    host.ok(&["network", "disconnect", "lan", "web"]);
    assert!(!answers(other, "10.77.0.50"));
    host.ok(&["network", "connect", "--ip", "10.77.0.52", "lan", "web"]);
    wait_until("it is back", LIMIT, || (answers(other, "10.77.0.52"), String::new()));
    assert!(host.fails(&["network", "rm", "lan"]).contains("active endpoints"));
    host.ok(&["rm", "-f", "web", "more"]);
    host.ok(&["network", "rm", "lan"]);
    // The link was the host's before, and is after.
    assert!(host.exec("ip", &["link", "show", "eth0"]).success);
    assert!(other.exec("busybox", &["ping", "-c1", "-W2", "10.77.0.1"]).success);
}

#[test]
fn without_a_link_it_leads_nowhere_and_what_cannot_be_is_refused() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    let create = ["network", "create", "-d", "macvlan"];
    let refused = host.fails(&[&create[..], &["-o", "parent=eth9", "lost"]].concat());
    assert!(refused.contains("eth9") && refused.contains("not there"), "{refused}");
    let refused = host.fails(&[&create[..], &["-o", "parent=eth0", "-o", "macvlan_mode=odd", "odd"]].concat());
    assert!(refused.contains("odd") && refused.contains("vepa"), "{refused}");
    host.ok(&CREATE);
    let second = [&create[..], &["--subnet", "10.78.0.0/24", "-o", "parent=eth0", "second"]].concat();
    assert!(host.fails(&second).contains("already using parent interface eth0"));
    host.ok(&["network", "rm", "lan"]);
    assert!(host.fails(&["network", "create", "-d", "ipvlan", "flat"]).contains("macvlan"));
    host.ok(&[&create[..], &["--internal", "alone"]].concat());
    host.ok(&["run", "-d", "--name", "one", "--network", "alone", "busybox", "sh", "-c", "echo hello | nc -l -p 80"]);
    assert_eq!(host.ok(&["run", "--rm", "--network", "alone", "busybox", "nc", "-w", "2", "one", "80"]), "hello\n");
    let none = host.ok(&["run", "--rm", "--network", "alone", "busybox", "ip", "route"]);
    assert!(!none.contains("default"), "{none}");
    host.ok(&["rm", "-f", "one"]);
    host.ok(&["network", "rm", "alone"]);
    let links = host.exec("ip", &["-o", "link"]).stdout;
    assert!(!links.contains("dm-"), "{links}");
    if has_docker() {
        host.docker(&["network", "create", "-d", "macvlan", "-o", "parent=eth0", "--subnet", "10.77.0.0/24", "lan"]);
        host.docker(&["run", "--rm", "--network", "lan", "--ip", "10.77.0.60", "busybox", "true"]);
        host.docker(&["network", "rm", "lan"]);
    }
}
