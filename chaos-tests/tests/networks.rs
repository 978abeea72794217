//! The swarm's networks on real hosts: names, virtual addresses, the routing mesh, and what must not
//! pass.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeSet;
use std::time::Duration;

use skep_api::grpc::{FactsHeld, Heartbeat, Hello, ManagerMessage, WorkerMessage, manager_message, worker_message};
use skep_api::overlay::{Digests, Fact};
use skep_api::session::Outgoing;
use skep_api::{encoding, session};
use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};
use skep_manager::transport::Channels;
use skep_pki::{NodeIdentity, TlsIdentity};

/// Two services in a network, one in another, each with one task on n1 and one on n2.
fn three_services(rig: &Rig) {
    let host = rig.host(1);
    for network in ["green", "blue"] {
        host.ok(&["network", "create", network]);
    }
    for (name, network) in [("a", "name=green,alias=first"), ("b", "green"), ("c", "blue")] {
        host.ok(&["service", "create", "-d", "--name", name, "--mode", "global", "--network", network, "skep/whoami"]);
    }
    for name in ["a", "b", "c"] {
        host.await_replicas(name, "2/2");
    }
}

#[test]
fn services_reach_each_other_by_name_and_nobody_reaches_into_other_networks() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    three_services(&rig);
    let (first, second) = (rig.host(1), rig.host(2));
    let vip = first.look_up("a.", "b");
    assert_eq!(vip.len(), 1, "{vip:?}");
    assert_eq!(vip, second.look_up("a.", "b"), "the address is the same everywhere");
    assert_eq!(first.look_up("b.", "first"), first.look_up("b.", "a"), "an alias is another name for it");
    let tasks = first.look_up("a.", "tasks.b");
    assert_eq!(tasks.len(), 2, "{tasks:?}");
    assert!(first.look_up("a.", "c").is_empty() && first.look_up("c.", "b").is_empty(), "names stay in networks");
    let nothing = first.inside("a.", &["busybox", "nslookup", "nobody", "127.0.0.11"]);
    assert!(nothing.contains("NXDOMAIN"), "{nothing}");

    let links = first.inside("a.", &["ip", "-6", "addr", "show", "dev", "eth0"]);
    assert!(!links.contains("fe80"), "a network without IPv6 has no such address: {links}");

    // By its virtual address, both tasks of b answer, and see who asks.
    let vip = vip.first().unwrap();
    let own = first.look_up("b.", "tasks.a");
    let answers: Vec<_> =
        (0..6).map(|_| first.inside("a.", &["curl", "-s", "-m", "3", &format!("http://{vip}:8000/")])).collect();
    let hosts: BTreeSet<_> = answers.iter().filter_map(|answer| answer.lines().next()).collect();
    assert_eq!(hosts.len(), 2, "{answers:?}");
    for answer in &answers {
        assert!(own.iter().any(|address| answer.contains(&format!("RemoteAddr: {address}:"))), "{answer} {own:?}");
    }
    // A task reaches itself by its service's address.
    let own_vip = first.look_up("b.", "b");
    for _ in 0..4 {
        let url = format!("http://{}:8000/", own_vip.first().unwrap());
        let answer = first.inside("b.", &["curl", "-s", "-m", "3", &url]);
        assert!(answer.contains("Hostname:"), "{answer}");
    }
    // From another network neither a task, near or far, nor a virtual address is reached.
    for address in tasks.iter().chain([vip]) {
        let url = format!("http://{address}:8000/");
        let answer = first.inside("c.", &["curl", "-sS", "-m", "1", &url]);
        assert!(!answer.contains("Hostname:"), "{address} is reached from another network: {answer}");
    }
    // A container does not get far with an address that is not its own.
    let spoofed = "10.0.1.77";
    let _ = first.inside("a.", &["ip", "addr", "add", &format!("{spoofed}/32"), "dev", "eth0"]);
    for address in &tasks {
        let url = format!("http://{address}:8000/");
        let answer = first.inside("a.", &["curl", "-sS", "-m", "1", "--interface", spoofed, &url]);
        assert!(!answer.contains("Hostname:"), "{address} answers {spoofed}: {answer}");
    }
}

/// A load on a host's port, new connections or kept ones, until it is told to end.
struct Load(std::process::Child);

impl Load {
    fn on(rig: &Rig, from: usize, port: u16, kept: bool) -> Self {
        let url = format!("http://{}:{port}/", rig.host(1).addr());
        let pid = rig.host(from).holder_pid().to_string();
        let close: &[&str] = if kept { &[] } else { &["-H", "Connection: close"] };
        let child = std::process::Command::new("nsenter")
            .args(["-t", &pid, "-n", "wrk", "-t1", "-c8", "-d60s", "--timeout", "5s"])
            .args(close)
            .arg(url)
            .stdout(std::process::Stdio::piped())
            .spawn();
        Self(child.expect("wrk is installed (scripts/bootstrap installs it)"))
    }

    /// Ends the load; fails if any request did.
    fn end(mut self, what: &str) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        let mut output = String::new();
        std::io::Read::read_to_string(&mut self.0.stdout.take().unwrap(), &mut output).unwrap();
        self.0.wait().unwrap();
        eprintln!("{what}: {}", output.lines().find(|line| line.contains("requests in")).unwrap_or(&output));
        assert!(output.contains("requests in"), "{output}");
        assert!(!output.contains("Socket errors") && !output.contains("Non-2xx"), "{what}: {output}");
    }
}

#[test]
fn no_request_fails_while_tasks_come_and_go() {
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
        "4",
        "--publish",
        "8080:8000",
        "--update-parallelism",
        "2",
        "--update-monitor",
        "500ms",
        "skep/whoami",
    ]);
    manager.await_replicas("web", "4/4");
    for kept in [false, true] {
        let load = Load::on(&rig, 3, 8080, kept);
        for (order, value) in [("stop-first", "1"), ("start-first", "2")] {
            let env = format!("ROUND={kept}{value}");
            manager.ok(&["service", "update", "-d", "--update-order", order, "--env", &env, "web"]);
            manager.await_update("web", "completed");
        }
        manager.ok(&["service", "scale", "-d", "web=10"]);
        manager.await_replicas("web", "10/10");
        manager.ok(&["service", "scale", "-d", "web=2"]);
        manager.await_replicas("web", "2/2");
        manager.ok(&["service", "scale", "-d", "web=4"]);
        manager.await_replicas("web", "4/4");
        manager.ok(&["node", "update", "--availability", "drain", "n2"]);
        wait_until("n2 gives up its tasks", LIMIT, || {
            (rig.host(2).running().is_empty(), format!("{:?}", rig.host(2).running()))
        });
        manager.await_replicas("web", "4/4");
        load.end(if kept { "kept connections" } else { "new connections" });
        manager.ok(&["node", "update", "--availability", "active", "n2"]);
    }
    nobody_meddled(&rig);
}

#[test]
fn packets_go_on_without_daemons_and_what_is_broken_is_mended() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let (first, second) = (rig.host(1), rig.host(2));
    first.ok(&[
        "service",
        "create",
        "-d",
        "--name",
        "web",
        "--publish",
        "8080:8000",
        "--constraint",
        "node.hostname==n2",
        "skep/whoami",
    ]);
    first.await_replicas("web", "1/1");
    let url = format!("http://{}:8080/", first.addr());
    let answers = || rig.host(3).curl(&url).contains("RemoteAddr: 10.77.0.3:");
    wait_until("the port answers", LIMIT, || (answers(), String::new()));

    // The daemons die under load, and come back to the rules as they are.
    let table = |host: &Host| {
        let overlay = format!("--net={}", host.dir().join("run/overlay/netns").display());
        let told = host.exec("nsenter", &[&overlay, "nft", "-a", "-t", "list", "table", "ip", "skep"]).stdout;
        told.lines().next().unwrap_or_default().to_owned()
    };
    wait_until("every daemon has looked at its rules", LIMIT, || {
        let noted = |host: &Host| host.dir().join("run/overlay/rules.json").exists();
        (rig.hosts().all(noted), String::new())
    });
    let tables: Vec<_> = rig.hosts().map(table).collect();
    let load = Load::on(&rig, 3, 8080, true);
    wait_until("the load runs", LIMIT, || (answers(), String::new()));
    rig.hosts().for_each(Host::kill_daemon);
    for _ in 0..20 {
        assert!(answers(), "packets go on without daemons");
    }
    rig.hosts().for_each(Host::start_daemon);
    wait_until("the swarm is back", LIMIT, || {
        let list = first.run(&["node", "ls", "--format", "{{.Status}}"]).stdout;
        (list.lines().filter(|line| *line == "Ready").count() == 3, list)
    });
    assert!(answers());
    load.end("daemons killed and back");
    assert_eq!(rig.hosts().map(table).collect::<Vec<_>>(), tables, "rules are taken over, not made anew");
    assert!(tables[0].contains("# handle"), "{tables:?}");

    nobody_meddled(&rig);

    // Somebody changes a rule while there is no daemon.
    let overlay = format!("--net={}", second.dir().join("run/overlay/netns").display());
    second.kill_daemon();
    let ran = second.exec("nsenter", &[&overlay, "nft", "insert", "rule", "ip", "skep", "reach", "drop"]);
    assert!(ran.success && !answers(), "nothing passes any more: {ran:?}");
    second.start_daemon();
    wait_until("the daemon mends what was changed without it", LIMIT, || (answers(), second.log()));

    // Somebody tears rules and data path down.
    for (what, command) in [
        ("the rules are torn down", vec!["nsenter", &overlay, "nft", "delete", "table", "ip", "skep"]),
        ("one rule is changed", vec!["nsenter", &overlay, "nft", "add", "rule", "ip", "skep", "reach", "drop"]),
        ("the data path is killed", vec!["pkill", "-9", "-f", "datapath.*n2/"]),
        ("its device is deleted", vec!["nsenter", &overlay, "ip", "link", "del", "wire0"]),
    ] {
        let mended = || second.log().matches("it is mended").count();
        let before = mended();
        let ran = second.exec(command[0], &command[1..]);
        assert!(ran.success, "{what}: {ran:?}");
        let start = std::time::Instant::now();
        wait_until(what, LIMIT, || (answers() && mended() > before, second.log()));
        eprintln!("{what}: answered again after {:?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(5), "{what}: {:?}", start.elapsed());
    }
}

/// No node takes its own doing for somebody else's.
fn nobody_meddled(rig: &Rig) {
    for host in rig.hosts() {
        assert!(!host.log().contains("it is mended"), "{}", host.log());
    }
}

#[test]
fn a_node_that_was_cut_off_is_passed_over_and_taken_up_again() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let manager = rig.host(1);
    manager.ok(&["network", "create", "green"]);
    for name in ["web", "ask"] {
        manager.ok(&[
            "service",
            "create",
            "-d",
            "--name",
            name,
            "--mode",
            "global",
            "--network",
            "green",
            "skep/whoami",
        ]);
        manager.await_replicas(name, "3/3");
    }
    let before = manager.look_up("ask.", "tasks.web");
    assert_eq!(before.len(), 3, "{before:?}");
    wait_until("nothing is found wrong", LIMIT, || {
        let found = manager.run(&["network", "diagnose", "web"]);
        let well = found.stdout.contains("ok       tunnel to n3") && found.stdout.contains("3 tasks of web");
        (found.success && well, format!("{found:?}"))
    });
    rig.host(3).cut(true);
    wait_until("the lost node's task is in no answer", LIMIT, || {
        let now = manager.look_up("ask.", "tasks.web");
        (now.len() == 2, format!("{now:?}"))
    });
    let vip = manager.look_up("ask.", "web");
    let url = format!("http://{}:8000/", vip.first().unwrap());
    for _ in 0..10 {
        let answer = manager.inside("ask.", &["curl", "-s", "-m", "2", &url]);
        assert!(answer.contains("Hostname:"), "{answer}");
    }
    rig.host(3).cut(false);
    for name in ["web", "ask"] {
        manager.await_replicas(name, "3/3");
    }
    wait_until("what ran on n3 while it was lost is gone", LIMIT, || {
        let running = rig.host(3).running();
        (running.len() == 2, format!("{running:?}"))
    });
    wait_until("all three are known on every node again", LIMIT, || {
        let found: Vec<_> = rig.hosts().map(|host| host.look_up("ask.", "tasks.web").len()).collect();
        (found == [3, 3, 3], format!("{found:?}"))
    });
    for host in rig.hosts() {
        for address in host.look_up("ask.", "tasks.web") {
            let answer = host.inside("ask.", &["curl", "-s", "-m", "2", &format!("http://{address}:8000/")]);
            assert!(answer.contains("Hostname:"), "{address} from {}: {answer}", host.name());
        }
    }
}

#[test]
fn traffic_is_encrypted_between_nodes_unless_the_user_says_no() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let (first, second) = (rig.host(1), rig.host(2));
    first.ok(&["network", "create", "secret"]);
    first.ok(&["network", "create", "--opt", "encrypted=false", "open"]);
    for (name, network) in [("hidden", "secret"), ("shown", "open")] {
        let word = format!("WORD=the-word-of-{name}");
        first.ok(&[
            "service",
            "create",
            "-d",
            "--name",
            name,
            "--mode",
            "global",
            "--network",
            network,
            "--env",
            &word,
            "skep/whoami",
        ]);
        first.await_replicas(name, "2/2");
    }
    let capture = first.dir().join("capture");
    let file = capture.display().to_string();
    let started = first.dir().join("started").display().to_string();
    first.spawn("sh", &["-c", &format!("tcpdump -i eth0 -s 0 -U -w {file} udp 2> {started}")]);
    wait_until("the capture runs", LIMIT, || {
        let log = std::fs::read_to_string(&started).unwrap_or_default();
        (log.contains("listening on"), log)
    });
    for name in ["hidden", "shown"] {
        let own = second.inside(name, &["hostname", "-I"]);
        let far = first.look_up(name, &format!("tasks.{name}"));
        let far = far.iter().find(|address| own.contains(*address)).unwrap_or_else(|| panic!("{far:?} {own}"));
        let answer = first.inside(name, &["curl", "-s", "-m", "3", &format!("http://{far}:8000/")]);
        assert!(answer.contains(&format!("the-word-of-{name}")), "{name}: {answer}");
        // Large datagrams pass, in pieces.
        let ran = first.inside(name, &["busybox", "ping", "-c", "2", "-W", "2", "-s", "60000", far]);
        assert!(ran.contains("2 packets received"), "{name}: {ran}");
    }
    wait_until("the open word is on the wire", LIMIT, || {
        let bytes = std::fs::read(&capture).unwrap();
        let holds = |word: &[u8]| bytes.windows(word.len()).any(|window| window == word);
        assert!(!holds(b"the-word-of-hidden"), "an encrypted network's words are on the wire");
        (holds(b"the-word-of-shown"), format!("{} bytes", bytes.len()))
    });
}

#[test]
fn addresses_come_back_and_none_is_given_twice() {
    take_turn!();
    let rig = Rig::swarm(3, 3);
    let host = rig.host(1);
    // Gateway, one virtual address, and four for tasks.
    host.ok(&["network", "create", "--subnet", "10.50.0.0/29", "small"]);
    host.ok(&["service", "create", "-d", "--name", "web", "--replicas", "4", "--network", "small", "skep/whoami"]);
    host.await_replicas("web", "4/4");
    host.ok(&["service", "scale", "-d", "web=6"]);
    wait_until("the full network is told", LIMIT, || {
        let list = host.ok(&["service", "ps", "--no-trunc", "web"]);
        (list.matches("no address is left in network small").count() == 2, list)
    });
    let refused = host.fails(&["network", "rm", "small"]);
    assert!(refused.contains("in use by service web"), "{refused}");
    host.ok(&["service", "scale", "-d", "web=4"]);
    host.await_replicas("web", "4/4");
    // Renewed again and again, with a leader lost on the way.
    for round in 0..3 {
        let leader = rig.host(rig.leader(1));
        let asked = rig.hosts().find(|host| host.name() != leader.name()).unwrap();
        if round == 1 {
            leader.kill_daemon();
        }
        let env = format!("ROUND={round}");
        asked.ok(&[
            "service",
            "update",
            "-d",
            "--update-parallelism",
            "2",
            "--update-monitor",
            "100ms",
            "--env",
            &env,
            "web",
        ]);
        if round == 1 {
            leader.start_daemon();
        }
        asked.await_update("web", "completed");
        asked.await_replicas("web", "4/4");
        let tasks = asked.api().get("/tasks").unwrap().body;
        let running = tasks.as_array().unwrap().iter().filter(|task| task["Status"]["State"] == "running");
        let addresses: Vec<String> =
            running.map(|task| task["NetworksAttachments"][0]["Addresses"][0].as_str().unwrap().to_owned()).collect();
        let different: BTreeSet<_> = addresses.iter().collect();
        assert_eq!((addresses.len(), different.len()), (4, 4), "{addresses:?}");
    }
    host.ok(&["service", "rm", "web"]);
    rig.await_no_container();
    wait_until("the network can be removed", LIMIT, || {
        let ran = host.run(&["network", "rm", "small"]);
        (ran.success, ran.stderr)
    });
    let list = host.ok(&["network", "ls"]);
    assert!(!list.contains("small") && list.contains("ingress"), "{list}");
}

/// Speaks for a node whose daemon is away: sends what it is to hold, and hears what it is told.
async fn speak_for(identity: NodeIdentity, manager: &str) {
    let channels = Channels::new(TlsIdentity::new(identity).unwrap());
    let connection = channels.session(&format!("{manager}:2377")).await.unwrap();
    let (mut from_manager, mut to_manager) = session::split::<_, ManagerMessage>(connection);
    let description = encoding::encode(&skep_api::NodeDescription::default());
    let hello = worker_message::Kind::Hello(Hello { description, bulk_port: 1 });
    to_manager.send(&WorkerMessage { kind: Some(hello) }).await.unwrap();
    // Waits up to 3 s, with a beat now and then: a node that is silent for that long counts as down.
    let mut told = async |to_manager: &mut Outgoing<_>| {
        let beat = WorkerMessage { kind: Some(worker_message::Kind::Heartbeat(Heartbeat {})) };
        for _ in 0..6 {
            to_manager.send(&beat).await.unwrap();
            let facts = async {
                loop {
                    let message = from_manager.next().await.unwrap().unwrap();
                    if let Some(manager_message::Kind::Facts(facts)) = message.kind {
                        return facts;
                    }
                }
            };
            if let Ok(facts) = tokio::time::timeout(Duration::from_millis(500), facts).await {
                return Some(facts);
            }
        }
        None
    };
    let first = told(&mut to_manager).await.unwrap();
    let facts: Vec<Fact> = first.facts.iter().map(|bytes| encoding::decode(bytes).unwrap()).collect();
    let mut digests: Digests = facts.iter().collect();
    let hold = |digests: &Digests| {
        let held = FactsHeld { revision: first.revision, digests: encoding::encode(digests) };
        WorkerMessage { kind: Some(worker_message::Kind::FactsHeld(held)) }
    };
    to_manager.send(&hold(&digests)).await.unwrap();
    assert_eq!(told(&mut to_manager).await, None, "it has what it was told");
    let task = facts.iter().find(|fact| matches!(fact, Fact::Task(_))).unwrap();
    digests.remove(task);
    to_manager.send(&hold(&digests)).await.unwrap();
    let anew = told(&mut to_manager).await.expect("what is missing is noticed");
    assert!(anew.complete && anew.facts.len() == first.facts.len(), "{} facts", anew.facts.len());
}

#[test]
fn a_node_that_has_something_else_than_it_was_told_is_told_anew() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    three_services(&rig);
    let (manager, node) = (rig.host(1), rig.host(2));
    node.stop_daemon();
    let identity = NodeIdentity::load(&node.data().join("swarm/certificates"), None).unwrap().unwrap();
    node.within_network(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(speak_for(identity, manager.addr()));
    });
    wait_until("the manager says so", LIMIT, || {
        let log = manager.log();
        (log.contains("has not what it was told") && log.contains("of=\"network "), log)
    });
}

/// A node whose addresses are of the other family since its daemon was last there.
#[test]
fn a_device_for_the_other_family_is_made_anew() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let (first, second) = (rig.host(1), rig.host(2));
    first.ok(&["network", "create", "--opt", "encrypted=false", "open"]);
    let create = ["service", "create", "-d", "--name", "web", "--mode", "global", "--network", "open", "skep/whoami"];
    first.ok(&create);
    first.await_replicas("web", "2/2");
    let own = second.inside("web", &["hostname", "-I"]);
    let answers = || first.inside("web", &["curl", "-s", "-m", "1", &format!("http://{}:8000/", own.trim())]);
    wait_until("the other node's task answers", LIMIT, || (answers().contains("Hostname:"), answers()));
    second.kill_daemon();
    let overlay = format!("--net={}", second.dir().join("run/overlay/netns").display());
    let swap = "ip link del plain0; ip link add plain0 type vxlan id 7 dstport 4790 local ::1 nolearning";
    let ran = second.exec("nsenter", &[&overlay, "sh", "-c", swap]);
    assert!(ran.success && !answers().contains("Hostname:"), "{ran:?}");
    second.start_daemon();
    wait_until("the other node's task answers again", LIMIT, || (answers().contains("Hostname:"), second.log()));
}

#[test]
fn a_network_comes_up_the_moment_after_the_last_one_went() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    for _ in 0..4 {
        host.ok(&["network", "create", "--opt", "encrypted=false", "open"]);
        let create =
            ["service", "create", "-d", "--name", "web", "--replicas", "8", "--network", "open", "skep/whoami"];
        host.ok(&create);
        host.await_replicas("web", "8/8");
        // The kernel takes its time to clear away what nine namespaces held.
        host.ok(&["service", "rm", "web"]);
        wait_until("the network is gone", LIMIT, || {
            let ran = host.run(&["network", "rm", "open"]);
            (ran.success, ran.stderr)
        });
    }
    assert!(!host.log().contains("is not as it should be"), "{}", host.log());
}

/// Its tunnels are found at its new address, also by a node whose data path is new and has never heard from it.
#[test]
fn a_node_that_moves_to_another_address_is_reached_there() {
    take_turn!();
    let rig = Rig::new(2);
    let (manager, moved) = (rig.host(1), rig.host(2));
    rig.hosts().for_each(Host::start_daemon);
    manager.ok(&["swarm", "init", "--advertise-addr", manager.addr()]);
    let token = manager.ok(&["swarm", "join-token", "-q", "worker"]);
    // Without an address of its own choice.
    moved.ok(&["swarm", "join", "--token", token.trim(), &format!("{}:2377", manager.addr())]);
    let place = format!("node.hostname=={}", moved.name());
    for (network, flags) in [("green", &[][..]), ("plain", &["--opt", "encrypted=false"])] {
        manager.ok(&[&["network", "create", "--attachable"], flags, &[network]].concat());
        let create = ["service", "create", "-d", "--name", network, "--network", network, "--constraint", &place];
        manager.ok(&[&create[..], &["skep/whoami"]].concat());
        manager.await_replicas(network, "1/1");
    }
    // The second address goes with the first, where the kernel holds it to be subordinate.
    let add = "ip addr replace 10.77.0.77/24 dev eth0";
    let changed = moved.exec("sh", &["-c", &format!("{add} && ip addr del 10.77.0.2/24 dev eth0 && {add}")]);
    assert!(changed.success, "{changed:?}");
    wait_until("the node is seen at its new address", LIMIT, || {
        let told = manager.ok(&["node", "inspect", moved.name()]);
        (told.contains("\"Addr\": \"10.77.0.77\"") && told.contains("\"State\": \"ready\""), told)
    });
    for network in ["green", "plain"] {
        manager.await_replicas(network, "1/1");
        let name = format!("ask-{network}");
        manager.ok(&["run", "-d", "--name", &name, "--network", network, "skep/whoami"]);
        let address = manager.look_up(&name, network).into_iter().next().unwrap();
        let answer = manager.inside(&name, &["curl", "-s", "-m", "10", &format!("http://{address}:8000/")]);
        assert!(answer.contains("Hostname:"), "{network}: {answer}\n{}", moved.log());
        manager.ok(&["rm", "-f", &name]);
    }
    let own = |host: &Host| host.docker(&["info", "--format", "{{.Swarm.NodeAddr}}"]);
    assert_eq!(own(moved).trim(), "10.77.0.77");
    // Nor is the leader where only itself reaches it.
    let leader = manager.ok(&["node", "inspect", "self"]);
    assert!(leader.contains("\"Addr\": \"10.77.0.1\""), "{leader}");
}
