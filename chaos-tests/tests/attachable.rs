//! Single containers in networks of the swarm.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};

fn run(host: &Host, name: &str, args: &[&str]) {
    let all = [&["run", "-d", "--name", name], args, &["skep/whoami"]].concat();
    host.ok(&all);
}

/// What a container's neighbour answers, by its name.
#[track_caller]
fn ask(host: &Host, container: &str, name: &str) -> String {
    let mut told = String::new();
    wait_until("the name answers", LIMIT, || {
        let found = host.look_up(container, name);
        let answers = |address: &String| {
            told = host.inside(container, &["curl", "-s", "-m", "3", &format!("http://{address}:8000/")]);
            told.contains("Hostname:")
        };
        (found.iter().any(answers), format!("{container} asks {name} at {found:?}"))
    });
    told
}

#[test]
fn containers_of_any_node_join_an_attachable_network() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let (manager, second, third) = (rig.host(1), rig.host(2), rig.host(3));
    manager.ok(&["network", "create", "-d", "overlay", "--attachable", "--subnet", "10.7.0.0/24", "open"]);
    manager.ok(&["network", "create", "-d", "overlay", "closed"]);
    manager.ok(&["service", "create", "-d", "--name", "web", "--replicas", "2", "--network", "open", "skep/whoami"]);
    manager.await_replicas("web", "2/2");

    run(second, "db", &["--network", "open", "--network-alias", "store", "--ip", "10.7.0.77"]);
    run(third, "app", &["--network", "open", "-p", "8080:8000"]);
    // Workers' containers and services find each other, by every name.
    assert_eq!(third.look_up("app", "db"), ["10.7.0.77".to_owned()].into());
    for name in ["db", "store", "web", "tasks.web"] {
        ask(third, "app", name);
    }
    ask(second, "db", "app");
    let by_port = third.exec("curl", &["-s", "-m", "3", &format!("http://{}:8080/", third.addr())]).stdout;
    assert!(by_port.contains("Hostname:"), "{by_port}");

    // A service's name is its own; what cannot be is refused by name.
    run(second, "thief", &["--network", "open", "--network-alias", "web"]);
    let vip = third.look_up("app", "web");
    assert!(vip.len() == 1 && !vip.contains(second.look_up("db", "thief").first().unwrap()), "{vip:?}");
    for (host, args, want) in [
        (second, ["--network", "closed"].as_slice(), "closed is not manually attachable"),
        (manager, &["--network", "closed"], "closed: it is not manually attachable"),
        (second, &["--network", "nowhere"], "network nowhere not found"),
        (second, &["--network", "open", "--ip", "10.7.0.77"], "10.7.0.77 of network open is in use"),
        (second, &["--network", "open", "--ip", "10.9.0.7"], "10.7.0.0/24"),
        (second, &["--network", "ingress"], "ingress is not manually attachable"),
    ] {
        let told = host.fails(&[&["run", "-d", "--name", "odd"], args, &["skep/whoami"]].concat());
        assert!(told.contains(want), "{args:?}: {told}");
        // It was created, as Docker does, unless that much was known.
        drop(host.run(&["rm", "-f", "odd"]));
    }

    let told = manager.fails(&["network", "rm", "open"]);
    assert!(told.contains("in use by service web"), "{told}");
    manager.ok(&["service", "rm", "web"]);
    wait_until("only containers are in it", LIMIT, || {
        let told = manager.fails(&["network", "rm", "open"]);
        (told.contains("in use by container"), told)
    });
    let inspected = second.ok(&["network", "inspect", "open"]);
    assert!(inspected.contains("\"db\"") && inspected.contains("10.7.0.77"), "{inspected}");

    // Their ends give everything back.
    second.ok(&["rm", "-f", "db", "thief"]);
    third.ok(&["rm", "-f", "app"]);
    wait_until("the network can go", LIMIT, || {
        let ran = manager.run(&["network", "rm", "open"]);
        (ran.success, ran.stderr)
    });
    wait_until("nothing is left of it", LIMIT, || {
        let links = third.exec("ip", &["-br", "link"]).stdout;
        (!links.contains("skep-mesh"), links)
    });
}

#[test]
fn a_running_container_joins_and_leaves_networks_of_both_kinds() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let (manager, worker) = (rig.host(1), rig.host(2));
    manager.ok(&["network", "create", "-d", "overlay", "--attachable", "wide"]);
    worker.ok(&["network", "create", "-d", "bridge", "near"]);
    run(manager, "far", &["--network", "wide"]);
    run(worker, "side", &["--network", "near"]);
    run(worker, "both", &["--network", "near", "--network-alias", "middle", "-p", "8080:8000"]);
    ask(worker, "both", "side");

    worker.ok(&["network", "connect", "--alias", "bridge-head", "wide", "both"]);
    ask(worker, "both", "side");
    ask(worker, "both", "far");
    ask(manager, "far", "bridge-head");
    ask(worker, "side", "middle");
    // A newcomer to the host's own network is seen by it, too.
    run(worker, "late", &["--network", "near"]);
    ask(worker, "both", "late");
    let by_port = || worker.exec("curl", &["-s", "-m", "3", &format!("http://{}:8080/", worker.addr())]).stdout;
    assert!(by_port().contains("Hostname:"));
    let networks = worker.ok(&["inspect", "-f", "{{json .NetworkSettings.Networks}}", "both"]);
    assert!(networks.contains("\"wide\"") && networks.contains("\"near\""), "{networks}");
    assert!(worker.ok(&["ps", "-q", "--filter", "network=wide"]).lines().count() == 1);

    // Off the host's own network, everything goes by the swarm's.
    worker.ok(&["network", "disconnect", "near", "both"]);
    ask(worker, "both", "far");
    assert!(worker.look_up("both", "side").is_empty());
    assert!(by_port().contains("Hostname:"), "the port is led by the network that is left");
    let route = worker.inside("both", &["ip", "route"]);
    assert!(route.contains("default via 10."), "{route}");
    worker.ok(&["rename", "both", "other"]);
    ask(manager, "far", "other");
    assert!(manager.look_up("far", "both").is_empty(), "the old name is gone");

    worker.ok(&["network", "connect", "near", "other"]);
    worker.ok(&["network", "disconnect", "wide", "other"]);
    ask(worker, "other", "side");
    wait_until("its names are gone", LIMIT, || {
        let found = manager.look_up("far", "bridge-head");
        (found.is_empty(), format!("{found:?}"))
    });
}

#[test]
fn an_attached_container_outlives_daemons_and_leaders() {
    take_turn!();
    let rig = Rig::swarm(4, 3);
    let worker = rig.host(4);
    let first = rig.host(1);
    first.ok(&["network", "create", "-d", "overlay", "--attachable", "wide"]);
    run(worker, "stays", &["--network", "wide", "--restart", "always"]);
    run(first, "asks", &["--network", "wide"]);
    let address = first.look_up("asks", "stays");
    ask(first, "asks", "stays");

    worker.kill_daemon();
    ask(first, "asks", "stays");
    worker.start_daemon();
    rig.host(2).kill_daemon();
    rig.host(2).start_daemon();
    first.kill_daemon();
    first.start_daemon();
    // Its node says again what it has; nobody takes the address meanwhile.
    wait_until("the manager is back", LIMIT, || {
        let ran = first.run(&["node", "ls"]);
        (ran.success, ran.stderr)
    });
    ask(first, "asks", "stays");
    assert_eq!(first.look_up("asks", "stays"), address);

    // Started again, it has a place again, whichever that is; one that ended while its daemon was away gives
    // its own back.
    worker.ok(&["restart", "-t", "0", "stays"]);
    ask(first, "asks", "stays");
    let pid = worker.running().into_iter().find(|(name, _)| name == "stays").unwrap().1;
    worker.kill_daemon();
    assert!(worker.exec("kill", &["-9", &pid.to_string()]).success);
    worker.start_daemon();
    ask(first, "asks", "stays");
    // As after a start of the host: its networks come up after the daemon does.
    worker.ok(&["stop", "-t", "0", "stays"]);
    worker.stop_daemon();
    worker.start_daemon();
    ask(first, "asks", "stays");
    // A host that leaves the swarm takes its containers off what it has left, those that do not run as well.
    worker.ok(&["create", "--name", "idle", "--network", "wide", "skep/whoami"]);
    worker.ok(&["swarm", "leave"]);
    for name in ["stays", "idle"] {
        assert_eq!(worker.ok(&["inspect", "-f", "{{json .NetworkSettings.Networks}}", name]).trim(), "{}");
    }
    assert!(worker.fails(&["network", "disconnect", "nothing", "stays"]).contains("network nothing not found"));
    worker.ok(&["restart", "-t", "0", "stays"]);
    worker.ok(&["start", "idle"]);
    worker.ok(&["rm", "-f", "stays", "idle"]);
    first.ok(&["node", "rm", "-f", "n4"]);
    wait_until("its name is gone", LIMIT, || {
        let found = first.look_up("asks", "stays");
        (found.is_empty(), format!("{found:?}"))
    });
}
