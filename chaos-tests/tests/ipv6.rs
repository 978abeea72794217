//! IPv6 in networks, of one host and of the swarm: between containers, from hosts, and to the outside.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeSet;

use serde_json::json;
use skep_chaos_tests::{Host, LIMIT, Rig, Scene, take_turn, wait_until};

/// Hosts that have addresses of IPv6, too.
fn scene() -> Scene {
    let scene = Scene::with_hosts(2);
    give_addresses(&scene.rig);
    scene
}

/// Gives every host an address more: fd77::N.
fn give_addresses(rig: &Rig) {
    for (number, host) in (1..).zip(rig.hosts()) {
        let link = host.exec("ip", &["-o", "-4", "addr", "show", "to", host.addr()]).stdout;
        let link = link.split_whitespace().nth(1).unwrap().to_owned();
        let address = format!("fd77::{number}/64");
        assert!(host.exec("ip", &["-6", "addr", "add", &address, "dev", &link, "nodad"]).success);
    }
}

#[test]
fn containers_have_ipv6_where_the_network_has() {
    take_turn!();
    let scene = scene();
    let (host, other) = (scene.host(), scene.rig.host(2));
    let create = ["network", "create", "-d", "bridge", "--ipv6"];
    host.ok(&[&create[..], &["--subnet", "10.60.0.0/24", "--subnet", "fd60::/64", "six"]].concat());
    let web = ["run", "-d", "--name", "web", "--network", "six", "--ip6", "fd60::50", "-p", "8080:8000", "skep/whoami"];
    host.ok(&web);
    host.ok(&["run", "-d", "--name", "box", "--network", "six", "busybox", "sleep", "1000"]);

    // By name, by address, and the one that calls is seen with its own.
    let inside = |command: &[&str]| host.ok(&[&["exec", "box"], command].concat());
    let names = inside(&["nslookup", "-type=aaaa", "web", "127.0.0.11"]);
    assert!(names.contains("fd60::50"), "{names}");
    assert!(inside(&["cat", "/etc/hosts"]).contains("fd60::2\t"));
    let get = ["timeout", "3", "wget", "-q", "-O", "-", "http://[fd60::50]:8000/"];
    wait_until("a neighbour answers", LIMIT, || {
        let ran = host.run(&[&["exec", "box"], &get[..]].concat());
        (ran.stdout.contains("fd60::"), ran.stdout + &ran.stderr)
    });
    let inspected = host.api().get("/containers/web/json").unwrap().body;
    let place = &inspected["NetworkSettings"]["Networks"]["six"];
    assert_eq!(
        [&place["GlobalIPv6Address"], &place["GlobalIPv6PrefixLen"], &place["IPv6Gateway"]],
        [&json!("fd60::50"), &json!(64), &json!("fd60::1")]
    );

    // Published ports by IPv6 from elsewhere, with the client's own address; not by the container's own.
    let answer = other.curl("http://[fd77::1]:8080/");
    assert!(answer.contains("fd77::2"), "{answer:?}");
    assert!(other.exec("ip", &["-6", "route", "add", "fd60::/64", "via", "fd77::1"]).success);
    assert_eq!(other.curl("http://[fd60::50]:8000/"), "", "its own address is not for others");
    // What goes out has the host's address: the other one knows no way back else.
    assert!(other.exec("ip", &["-6", "route", "del", "fd60::/64"]).success);
    let ping = ["ping", "-6", "-c", "1", "-W", "3", "fd77::2"];
    assert!(inside(&ping).contains("1 packets received"));

    let told = host.ok(&["port", "web"]);
    assert_eq!(told.lines().collect::<Vec<_>>(), ["8000/tcp -> 0.0.0.0:8080", "8000/tcp -> [::]:8080"]);

    // Other networks do not see it, and one without IPv6 has none.
    host.ok(&[&create[..], &["away"]].concat());
    host.ok(&["run", "-d", "--name", "stranger", "--network", "away", "busybox", "sleep", "1000"]);
    let subnets = host.ok(&["network", "inspect", "--format", "{{json .IPAM.Config}}", "away"]);
    assert!(subnets.contains("\"fd"), "one is picked: {subnets}");
    let from_away = host.run(&["exec", "stranger", "timeout", "2", "wget", "-q", "-O", "-", "http://[fd60::50]:8000/"]);
    assert!(!from_away.success, "{}", from_away.stdout);
    host.ok(&["network", "create", "-d", "bridge", "four"]);
    assert!(host.fails(&["run", "--network", "four", "--ip6", "fd60::9", "busybox", "true"]).contains("has no IPv6"));
    assert!(host.fails(&["run", "--network", "six", "--ip6", "fd60::50", "busybox", "true"]).contains("in use"));
    let overlapping = host.fails(&[&create[..], &["--subnet", "fd60::/60", "more"]].concat());
    assert!(overlapping.contains("overlaps"), "{overlapping}");
    let gateway = host.fails(&[&create[..], &["--subnet", "fd62::/64", "--gateway", "fd63::1", "astray"]].concat());
    assert!(gateway.contains("fd63::1"), "{gateway}");
    let alone = host.fails(&["network", "create", "-d", "bridge", "--subnet", "fd61::/64", "unasked"]);
    assert!(alone.contains("--ipv6"), "{alone}");

    // All of it is there after the daemon's death.
    host.kill_daemon();
    host.start_daemon();
    assert!(other.curl("http://[fd77::1]:8080/").contains("fd77::2"));
    host.ok(&[
        "run",
        "--rm",
        "--network",
        "six",
        "busybox",
        "timeout",
        "3",
        "wget",
        "-q",
        "-O",
        "/dev/null",
        "http://web:8000/",
    ]);
    host.ok(&["rm", "-f", "web", "box", "stranger"]);
    host.ok(&["network", "rm", "six", "away", "four"]);
    let rules = host.exec("nft", &["list", "tables"]).stdout;
    assert!(!rules.contains("ip6 skep"), "{rules}");
}

#[test]
fn networks_of_one_host_may_have_ipv6_alone() {
    take_turn!();
    let scene = scene();
    let (host, other) = (scene.host(), scene.rig.host(2));
    let create = ["network", "create", "-d", "bridge", "--ipv4=false", "--ipv6", "--subnet", "fd66::/64"];
    host.ok(&[&create[..], &["six"]].concat());
    let told = host.ok(&["network", "inspect", "-f", "{{.EnableIPv4}} {{.EnableIPv6}} {{json .IPAM.Config}}", "six"]);
    assert_eq!(told.trim(), r#"false true [{"Subnet":"fd66::/64","Gateway":"fd66::1"}]"#);
    host.ok(&["run", "-d", "--name", "web", "--network", "six", "-p", "8081:8000", "skep/whoami"]);
    host.ok(&["run", "-d", "--name", "box", "--network", "six", "busybox", "sleep", "1000"]);
    let check = || {
        let inside = |command: &[&str]| host.ok(&[&["exec", "box"], command].concat());
        assert_eq!(inside(&["ip", "-4", "-o", "addr", "show", "eth0"]), "", "it has no IPv4 address");
        assert!(inside(&["ip", "-6", "route", "show", "default"]).contains("via fd66::1"));
        assert!(inside(&["cat", "/etc/hosts"]).contains("fd66::3\t"));
        let names = inside(&["nslookup", "web", "127.0.0.11"]);
        assert!(names.contains("fd66::2") && !names.contains("NXDOMAIN"), "{names}");
        let get = ["run", "--rm", "--network", "six", "busybox", "timeout", "3", "wget", "-q", "-O", "-"];
        wait_until("a neighbour answers by its name", LIMIT, || {
            let ran = host.run(&[&get[..], &["http://web:8000/"]].concat());
            (ran.stdout.contains("fd66::"), ran.stdout + &ran.stderr)
        });
        // Its ports are the host's by IPv6, with the client's own address, and nowhere else.
        let answer = other.curl("http://[fd77::1]:8081/");
        assert!(answer.contains("fd77::2"), "{answer}");
        assert_eq!(other.curl(&format!("http://{}:8081/", host.addr())), "");
        assert!(inside(&["ping", "-6", "-c", "1", "-W", "3", "fd77::2"]).contains("1 packets received"));
    };
    check();
    let place = host.api().get("/containers/web/json").unwrap().body;
    let place = &place["NetworkSettings"]["Networks"]["six"];
    let shown =
        ["IPAddress", "Gateway", "GlobalIPv6Address", "IPv6Gateway"].map(|member| place[member].as_str().unwrap());
    assert_eq!((shown, &place["IPPrefixLen"]), (["", "", "fd66::2", "fd66::1"], &json!(0)));
    assert_eq!(host.ok(&["port", "web"]).trim(), "8000/tcp -> [::]:8081");
    host.kill_daemon();
    host.start_daemon();
    check();
    // Beside a network that has IPv4, both are there; neither sees the other's containers.
    host.ok(&["network", "create", "-d", "bridge", "--subnet", "10.66.0.0/24", "four"]);
    host.ok(&["network", "connect", "four", "box"]);
    let addresses = host.ok(&["exec", "box", "ip", "-o", "addr"]);
    assert!(addresses.contains("10.66.0.2/24") && addresses.contains("fd66::3/64"), "{addresses}");
    for (wrong, want) in [
        (&["network", "create", "-d", "bridge", "--ipv4=false", "nothing"][..], "IPv4 or IPv6 must be enabled"),
        (
            &[&create[..], &["--subnet", "10.67.0.0/24", "both"]].concat(),
            "10.67.0.0/24 is of IPv4, which is turned off",
        ),
        (&["run", "--network", "six", "--ip", "10.66.0.9", "busybox", "true"], "has IPv6 alone"),
    ] {
        let why = host.fails(wrong);
        assert!(why.contains(want), "{want}: {why}");
    }
    host.ok(&["rm", "-f", "web", "box"]);
    host.ok(&["network", "rm", "six", "four"]);
}

/// What answers inside the network of a container.
fn fetch_inside(host: &Host, container: &str, options: &[&str], address: &str) -> String {
    let url = format!("http://[{address}]:8000/");
    host.inside(container, &[&["curl", "-s", "-m", "2", "-g"], options, &[url.as_str()]].concat())
}

/// The IPv6 addresses that a container's own name server gives for a name.
fn look_up(host: &Host, container: &str, name: &str) -> Vec<String> {
    let answer = host.inside(container, &["busybox", "nslookup", "-type=aaaa", name, "127.0.0.11"]);
    let behind = answer.split("Name:").skip(1).collect::<String>();
    behind.lines().filter_map(|line| line.strip_prefix("Address:")).map(|text| text.trim().to_owned()).collect()
}

/// Services of two networks, one task on each of two nodes.
fn swarm_with_two_networks() -> Rig {
    let rig = Rig::new(3);
    give_addresses(&rig);
    rig.hosts().for_each(Host::start_daemon);
    rig.form_swarm(1);
    let host = rig.host(1);
    let create = ["network", "create", "--attachable", "--ipv6"];
    host.ok(&[&create[..], &["--subnet", "10.61.0.0/24", "--subnet", "fd61::/64", "green"]].concat());
    host.ok(&[&create[..], &["blue"]].concat());
    for (name, network) in [("a", "green"), ("b", "green"), ("c", "blue")] {
        let create = ["service", "create", "-d", "--name", name, "--mode", "global", "--network", network];
        host.ok(&[&create[..], &["--constraint", "node.hostname!=n3", "skep/whoami"]].concat());
    }
    for name in ["a", "b", "c"] {
        host.await_replicas(name, "2/2");
    }
    rig
}

#[test]
fn services_reach_each_other_by_ipv6_and_nobody_reaches_into_other_networks() {
    take_turn!();
    let rig = swarm_with_two_networks();
    let (first, second) = (rig.host(1), rig.host(2));
    let (vip, tasks) = (look_up(first, "a.", "b"), look_up(first, "a.", "tasks.b"));
    assert!(vip.len() == 1 && vip[0].starts_with("fd61::"), "{vip:?}");
    assert_eq!((look_up(second, "a.", "b"), tasks.len()), (vip.clone(), 2), "{tasks:?}");
    // Both tasks behind the virtual address answer, one here and one on the other node, and see who asks.
    let own = look_up(first, "a.", "tasks.a");
    let answers: Vec<String> = (0..6).map(|_| fetch_inside(first, "a.", &[], &vip[0])).collect();
    let hosts: BTreeSet<_> = answers.iter().filter_map(|answer| answer.lines().next()).collect();
    assert_eq!(hosts.len(), 2, "{answers:?}");
    for answer in &answers {
        assert!(own.iter().any(|address| answer.contains(&format!("RemoteAddr: [{address}]:"))), "{answer} {own:?}");
    }
    // Itself, by its own service's address.
    let own_vip = look_up(first, "b.", "b");
    assert!((0..4).all(|_| fetch_inside(first, "b.", &[], &own_vip[0]).contains("Hostname:")));
    let name = first.inside("a.", &["busybox", "nslookup", &tasks[0], "127.0.0.11"]);
    assert!(name.contains("b."), "{name}");

    // To the outside with the host's address.
    let out = first.inside("a.", &["busybox", "ping", "-6", "-c", "1", "-W", "3", "fd77::2"]);
    assert!(out.contains(" 0% packet loss"), "{out}");

    // Not from another network, and not with an address that is not one's own.
    for address in tasks.iter().chain(&vip) {
        let answer = fetch_inside(first, "c.", &[], address);
        assert!(!answer.contains("Hostname:"), "{address} is reached from another network: {answer}");
    }
    let _ = first.inside("a.", &["ip", "addr", "add", "fd61::77/128", "dev", "eth0", "nodad"]);
    for address in &tasks {
        let answer = fetch_inside(first, "a.", &["--interface", "fd61::77"], address);
        assert!(!answer.contains("Hostname:"), "{address} answers a strange address: {answer}");
    }

    // A single container of a node that had no part in it so far.
    let third = rig.host(3);
    third.import_busybox();
    third.ok(&["run", "-d", "--name", "single", "--network", "green", "busybox", "sleep", "1000"]);
    assert!(fetch_inside(third, "single", &[], &vip[0]).contains("Hostname:"));
    let place =
        "{{with .NetworkSettings.Networks.green}}{{.IPAddress}} {{.GlobalIPv6Address}}/{{.GlobalIPv6PrefixLen}}{{end}}";
    let told = third.ok(&["inspect", "-f", place, "single"]);
    let (v4, v6) = told.trim().split_once(' ').unwrap();
    let number: u8 = v4.rsplit('.').next().unwrap().parse().unwrap();
    assert_eq!(v6, format!("fd61::{number:x}/64"), "it follows from {v4}");
    let told = first.ok(&["network", "inspect", "-f", "{{.EnableIPv6}} {{json .IPAM.Config}}", "green"]);
    assert!(told.contains("true") && told.contains(r#""Gateway":"fd61::1""#), "{told}");
    let diagnosed = first.ok(&["network", "diagnose"]);
    assert!(!diagnosed.contains("mended"), "{diagnosed}");
}

#[test]
fn ports_are_published_by_ipv6_and_the_client_is_seen_as_it_is() {
    take_turn!();
    let rig = Rig::new(3);
    give_addresses(&rig);
    rig.hosts().for_each(Host::start_daemon);
    rig.form_swarm(1);
    let create = ["service", "create", "-d", "--name", "web", "--constraint", "node.hostname==n2", "-p", "8080:8000"];
    rig.host(1).ok(&[&create[..], &["skep/whoami"]].concat());
    rig.host(1).await_replicas("web", "1/1");
    for (asked, from) in [(2, 1), (1, 3), (3, 1), (3, 2)] {
        let url = format!("http://[fd77::{asked}]:8080/");
        wait_until("the port answers", LIMIT, || {
            let answer = rig.host(from).curl(&url);
            (answer.contains(&format!("RemoteAddr: [fd77::{from}]:")), format!("{url} from n{from}: {answer}"))
        });
    }
    // A process of the node itself; by ::1 it is refused at once.
    assert!(rig.host(1).curl("http://[fd77::1]:8080/").contains("Hostname:"));
    let began = std::time::Instant::now();
    assert_eq!(rig.host(1).curl("http://[::1]:8080/"), "");
    assert!(began.elapsed().as_secs() < 2, "it is not kept waiting");
    // On its own node alone.
    rig.host(1).ok(&["network", "create", "--ipv6", "six"]);
    let port = "mode=host,target=8000,published=9090";
    let create = ["service", "create", "-d", "--name", "one", "--constraint", "node.hostname==n2", "--network", "six"];
    rig.host(1).ok(&[&create[..], &["--publish", port, "skep/whoami"]].concat());
    rig.host(1).await_replicas("one", "1/1");
    assert!(rig.host(1).curl("http://[fd77::2]:9090/").contains("RemoteAddr: [fd77::1]:"));
    assert_eq!(rig.host(1).curl("http://[fd77::3]:9090/"), "");
    rig.host(1).ok(&["service", "rm", "web", "one"]);
    rig.await_no_container();
    wait_until("nothing is left of the mesh", LIMIT, || {
        let rules = rig.host(2).exec("nft", &["list", "tables"]).stdout;
        (!rules.contains("skep_mesh"), rules)
    });
}

#[test]
fn wrong_ipv6_addresses_are_refused_with_a_reason() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    let refused = |flags: &[&str], want: &str| {
        let answer = host.fails(&[&["network", "create", "-d", "overlay"], flags, &["wrong"]].concat());
        assert!(answer.contains(want), "{flags:?}: {answer}");
    };
    host.ok(&["network", "create", "--attachable", "--ipv6", "--subnet", "fd61::/64", "six"]);
    refused(&["--subnet", "fd62::/64"], "--ipv6");
    refused(&["--ipv6", "--subnet", "fd61::/60"], "which network six has");
    refused(&["--ipv6", "--subnet", "fd62::/124"], "fewer addresses");
    refused(&["--ipv6", "--subnet", "fd62::/64", "--gateway", "fd62::9"], "a task's address");
    refused(&["--ipv6", "--subnet", "fd62::/64", "--subnet", "fd63::/64"], "more than one IPv6 subnet");
    refused(&["--ipv6", "--opt", "com.docker.network.driver.mtu=1000"], "1280");
    host.import_busybox();
    let asked = host.fails(&["run", "--network", "six", "--ip6", "fd61::9", "busybox", "true"]);
    assert!(asked.contains("--ip"), "{asked}");
}

#[test]
fn a_swarm_needs_no_ipv4_between_its_nodes() {
    take_turn!();
    let rig = Rig::new(3);
    give_addresses(&rig);
    for host in rig.hosts() {
        assert!(host.exec("ip", &["-4", "addr", "flush", "scope", "global"]).success);
        host.start_daemon();
    }
    let first = rig.host(1);
    // The one address it has.
    first.ok(&["swarm", "init"]);
    let manager = first.ok(&["swarm", "join-token", "manager"]);
    assert!(manager.contains(" [fd77::1]:2377"), "{manager}");
    let token = |role: &str| first.ok(&["swarm", "join-token", "-q", role]).trim().to_owned();
    rig.host(2).ok(&["swarm", "join", "--token", &token("worker"), "[fd77::1]:2377"]);
    rig.host(3).ok(&["swarm", "join", "--token", &token("manager"), "--advertise-addr", "fd77::3", "[fd77::1]:2377"]);
    wait_until("every node is ready", LIMIT, || {
        let list = first.ok(&["node", "ls", "--format", "{{.Status}}"]);
        (list.lines().filter(|line| *line == "Ready").count() == 3, list)
    });
    for encrypted in [true, false] {
        let option = format!("encrypted={encrypted}");
        first.ok(&["network", "create", "--ipv6", "--opt", &option, "wide"]);
        let create = ["service", "create", "-d", "--name", "a", "--mode", "global", "--network", "wide"];
        first.ok(&[&create[..], &["--publish", "8080:8000", "skep/whoami"]].concat());
        first.await_replicas("a", "3/3");
        for address in rig.host(2).inside("a", &["hostname", "-I"]).split_whitespace() {
            let url = if address.contains(':') {
                format!("http://[{address}]:8000/")
            } else {
                format!("http://{address}:8000/")
            };
            let answer = first.inside("a", &["curl", "-s", "-m", "3", "-g", &url]);
            assert!(answer.starts_with("Hostname: "), "{option}, {url}: {answer:?}");
        }
        for asked in 1..=3 {
            let answer = rig.host(2).curl(&format!("http://[fd77::{asked}]:8080/"));
            assert!(answer.contains("fd77::2"), "{option}, the client of {asked} is seen: {answer:?}");
        }
        let told = first.ok(&["network", "diagnose"]);
        assert!(told.contains("[fd77::2]:4789"), "{told}");
        wait_until("output comes from all nodes", LIMIT, || {
            let said = first.ok(&["service", "logs", "a"]);
            (said.lines().filter(|line| line.contains("whoami listens")).count() == 3, said)
        });
        first.ok(&["service", "rm", "a"]);
        rig.await_no_container();
        first.ok(&["network", "rm", "wide"]);
    }
}

/// Makes the network 10.70.N.0/24, fd70:0:N::/64 with these gateway modes.
fn make(host: &Host, name: &str, number: u8, (v4, v6): (&str, &str), more: &[&str]) -> skep_chaos_tests::Ran {
    let mode = |family: u8, mode: &str| format!("com.docker.network.bridge.gateway_mode_ipv{family}={mode}");
    let (subnet, subnet_v6) = (format!("10.70.{number}.0/24"), format!("fd70:0:{number}::/64"));
    let flags = ["network", "create", "-d", "bridge", "--ipv6", "--subnet", &subnet, "--subnet", &subnet_v6];
    host.run(&[&flags[..], &["-o", &mode(4, v4), "-o", &mode(6, v6)], more, &[name]].concat())
}

/// By their own addresses from other hosts, at the ports that they publish: a network says so for each family.
#[test]
fn networks_are_reached_as_their_gateway_modes_say() {
    take_turn!();
    let scene = scene();
    let (host, other) = (scene.host(), scene.rig.host(2));
    assert!(other.exec("ip", &["route", "add", "10.70.0.0/16", "via", host.addr()]).success);
    assert!(other.exec("ip", &["-6", "route", "add", "fd70::/32", "via", "fd77::1"]).success);
    let made = make(host, "routed", 1, ("routed", "routed"), &[]);
    assert!(made.success, "{made:?}");
    assert!(make(host, "mixed", 2, ("nat", "routed"), &[]).success);
    let run = |name: &str, ports: &[&str]| {
        host.ok(&[&["run", "-d", "--name", name, "--network", name], ports, &["skep/whoami"]].concat());
    };
    // Two may publish the same port: it is none of the host's.
    run("routed", &["-p", "8000:8000", "-p", "8001"]);
    host.ok(&[
        "run",
        "-d",
        "--name",
        "neighbour",
        "--network",
        "routed",
        "-p",
        "8000:8000",
        "busybox",
        "sleep",
        "1000",
    ]);
    run("mixed", &["-p", "8070:8000"]);

    for url in ["http://10.70.1.2:8000/", "http://[fd70:0:1::2]:8000/", "http://[fd70:0:2::2]:8000/"] {
        let seen = if url.contains('[') { "fd77::2" } else { other.addr() };
        wait_until(url, LIMIT, || {
            let answer = other.curl(url);
            (answer.contains(seen), answer)
        });
    }
    assert!(other.curl(&format!("http://{}:8070/", host.addr())).contains(other.addr()), "by IPv4 as ever");
    for closed in [
        format!("http://{}:8000/", host.addr()),
        "http://[fd77::1]:8000/".to_owned(),
        "http://[fd77::1]:8070/".to_owned(),
        "http://10.70.2.2:8000/".to_owned(),
        // Not published, though somebody could listen there.
        "http://10.70.1.3:8000/".replace(".3:8000", ".3:22"),
    ] {
        assert_eq!(other.curl(&closed), "", "{closed}");
    }
    assert!(other.exec("busybox", &["ping", "-c", "1", "-W", "3", "10.70.1.2"]).success, "it answers to a ping");
    assert_eq!(host.ok(&["port", "routed"]).trim(), "");
    assert_eq!(host.ok(&["port", "mixed"]).trim(), "8000/tcp -> 0.0.0.0:8070");
    // What goes out goes with the container's own address.
    host.ok(&["exec", "neighbour", "ping", "-c", "1", "-W", "3", other.addr()]);
    let rules = host.exec("nft", &["list", "table", "ip", "skep"]).stdout;
    assert!(!rules.contains("saddr 10.70.1.0/24 oifname"), "{rules}");
    host.ok(&["rm", "-f", "routed", "neighbour", "mixed"]);
}

#[test]
fn networks_may_be_isolated_and_say_what_they_send_from() {
    take_turn!();
    let scene = scene();
    let (host, other) = (scene.host(), scene.rig.host(2));
    // The host has no address in one that is isolated.
    let refused = make(host, "alone", 3, ("isolated", "nat"), &[]);
    assert!(refused.stderr.contains("--internal"), "{refused:?}");
    assert!(make(host, "alone", 3, ("isolated", "isolated"), &["--internal"]).success);
    host.ok(&["run", "-d", "--name", "alone", "--network", "alone", "skep/whoami"]);
    let pinged = host.run(&["run", "--rm", "--network", "alone", "busybox", "ping", "-c", "1", "-W", "1", "10.70.3.1"]);
    assert!(!pinged.success, "{pinged:?}");
    let asked = ["run", "--rm", "--network", "alone", "busybox", "timeout", "3", "wget", "-q", "-O", "-"];
    wait_until("neighbours reach each other", LIMIT, || {
        let ran = host.run(&[&asked[..], &["http://10.70.3.2:8000/"]].concat());
        (ran.stdout.contains("10.70.3."), format!("{ran:?}"))
    });
    // What is sent has the address that is asked for.
    assert!(host.exec("ip", &["addr", "add", "10.99.9.9/32", "dev", "lo"]).success);
    assert!(other.exec("ip", &["route", "add", "10.99.9.9/32", "via", host.addr()]).success);
    host.ok(&["network", "create", "-d", "bridge", "-o", "com.docker.network.host_ipv4=10.99.9.9", "sent"]);
    host.ok(&["run", "--rm", "--network", "sent", "busybox", "ping", "-c", "1", "-W", "3", other.addr()]);
    assert!(host.exec("nft", &["list", "table", "ip", "skep"]).stdout.contains("snat to 10.99.9.9"));
    assert!(make(host, "wrong", 4, ("bridged", "nat"), &[]).stderr.contains("nat-unprotected"));
    host.ok(&["rm", "-f", "alone"]);
}
