//! IPv6 in the networks of one host: between containers, from the host and other hosts, and to the outside.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use serde_json::json;
use skep_chaos_tests::{Host, LIMIT, Scene, take_turn, wait_until};

/// Hosts that have addresses of IPv6, too: fd77::N.
fn scene() -> Scene {
    let scene = Scene::with_hosts(2);
    for (number, host) in (1..).zip(scene.rig.hosts()) {
        let link = host.exec("ip", &["-o", "-4", "addr", "show", "to", host.addr()]).stdout;
        let link = link.split_whitespace().nth(1).unwrap().to_owned();
        let address = format!("fd77::{number}/64");
        assert!(host.exec("ip", &["-6", "addr", "add", &address, "dev", &link, "nodad"]).success);
    }
    scene
}

/// What a server of a container answers one who asks from a host.
fn fetch(from: &Host, url: &str) -> String {
    from.exec("curl", &["-s", "-m", "3", "-g", url]).stdout
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
    let answer = fetch(other, "http://[fd77::1]:8080/");
    assert!(answer.contains("fd77::2"), "{answer:?}");
    assert!(other.exec("ip", &["-6", "route", "add", "fd60::/64", "via", "fd77::1"]).success);
    assert_eq!(fetch(other, "http://[fd60::50]:8000/"), "", "its own address is not for others");
    // What goes out has the host's address: the other one knows no way back else.
    assert!(other.exec("ip", &["-6", "route", "del", "fd60::/64"]).success);
    let ping = ["ping", "-6", "-c", "1", "-W", "3", "fd77::2"];
    assert!(inside(&ping).contains("1 packets received"));

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
    assert!(fetch(other, "http://[fd77::1]:8080/").contains("fd77::2"));
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
