//! `make demo`: a swarm of five hosts on this machine, told step by step.

#![allow(clippy::print_stdout, reason = "telling is what it does")]

use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, Rig, is_root, wait_until};

fn main() {
    if !is_root() {
        eprintln!("The demo makes network namespaces and containers, and needs root: run it with sudo.");
        std::process::exit(1);
    }
    let rig = raise();
    create(&rig);
    change(&rig);
    mesh(&rig);
    wire(&rig);
    lose_a_node(&rig);
    let other = kill_the_leader(&rig);
    remove(&rig, other);
    drop(rig);
    say("That was it. The hosts, their networks and their files are gone.");
}

fn raise() -> Rig {
    say("Raising five hosts on this machine, each with its own network, and Skep's daemon on each.");
    let start = Instant::now();
    let rig = Rig::new(5);
    rig.hosts().for_each(Host::start_daemon);
    rig.form_swarm(3);
    done("five nodes are one swarm: three managers, two workers", start);
    print!("{}", rig.host(2).ok(&["node", "ls"]));
    rig
}

fn create(rig: &Rig) {
    say("Creating a secret, a config, and a service of six replicas that uses both.");
    let file = rig.host(1).dir().join("password");
    std::fs::write(&file, "open sesame").expect("a file can be written");
    let file = file.display().to_string();
    rig.host(1).ok(&["secret", "create", "password", &file]);
    rig.host(1).ok(&["config", "create", "motd", &file]);
    rig.host(1).ok(&["network", "create", "shop"]);
    let start = Instant::now();
    rig.host(1).ok(&[
        "service",
        "create",
        "--detach",
        "--name",
        "web",
        "--replicas",
        "6",
        "--secret",
        "password",
        "--config",
        "motd",
        "--network",
        "shop",
        "--publish",
        "8080:8000",
        "--env",
        "COLOUR=blue",
        "--update-parallelism",
        "2",
        "--update-monitor",
        "1s",
        "skep/whoami",
    ]);
    rig.host(1).await_replicas("web", "6/6");
    done("six replicas run", start);
    print!("{}", rig.host(1).ok(&["service", "ps", "web"]));
}

fn change(rig: &Rig) {
    say("Scaling to twelve, asked of another manager.");
    let start = Instant::now();
    rig.host(3).ok(&["service", "scale", "--detach", "web=12"]);
    rig.host(3).await_replicas("web", "12/12");
    done("twelve replicas run", start);

    say("Updating every replica, two at a time.");
    let start = Instant::now();
    rig.host(2).ok(&["service", "update", "--detach", "--env", "COLOUR=green", "web"]);
    rig.host(2).await_update("web", "completed");
    done("all twelve are renewed, and were watched for a second", start);

    say("Rolling that back.");
    let start = Instant::now();
    rig.host(2).ok(&["service", "rollback", "--detach", "web"]);
    rig.host(2).await_update("web", "rollback_completed");
    rig.host(2).await_replicas("web", "12/12");
    done("all twelve are as before", start);
}

fn mesh(rig: &Rig) {
    say("Asking every node's port 8080 from n5: any of them answers, and the service sees who really asks.");
    for asked in rig.hosts() {
        let answer = rig.host(5).curl(&format!("http://{}:8080/", asked.addr()));
        let field = |name: &str| answer.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("nobody");
        println!("   {} -> container{}, which sees{}", asked.addr(), field("Hostname:"), field("RemoteAddr:"));
        assert!(answer.contains(&format!("RemoteAddr: {}:", rig.host(5).addr())), "{answer}");
    }
}

fn wire(rig: &Rig) {
    say("Listening on n1's wire while n1 is asked again and again.");
    let capture = rig.host(1).dir().join("capture");
    let told = rig.host(1).dir().join("capture-log");
    let line = format!("tcpdump -i eth0 -s 0 -U -w {} udp port 4789 2> {}", capture.display(), told.display());
    rig.host(1).spawn("sh", &["-c", &line]);
    let log = || std::fs::read_to_string(&told).unwrap_or_default();
    wait_until("tcpdump listens", LIMIT, || (log().contains("listening on"), log()));
    for _ in 0..20 {
        assert!(rig.host(1).curl("http://127.0.0.1:8080/").contains("COLOUR=blue"));
    }
    let read = || std::fs::read(&capture).unwrap_or_default();
    // Most of the answers came from other nodes.
    wait_until("the packets are captured", LIMIT, || (read().len() > 5000, format!("{} bytes", read().len())));
    let bytes = read();
    let holds = |word: &[u8]| bytes.windows(word.len()).any(|window| window == word);
    assert!(!holds(b"COLOUR") && !holds(b"HTTP"), "plain text on the wire");
    println!("   {} bytes between the nodes: neither the answers nor the word HTTP are among them.", bytes.len());
    let shown = rig.host(1).exec("tcpdump", &["-r", &capture.display().to_string(), "-nn", "-c", "3"]).stdout;
    shown.lines().for_each(|line| println!("   {line}"));
}

fn lose_a_node(rig: &Rig) {
    say("Cutting n4 off the network under load: eight clients ask n1 all the time.");
    let load = rig.host(5).dir().join("load");
    let line = format!("wrk -t1 -c8 -d8s --timeout 2s http://{}:8080/ > {} 2>&1", rig.host(1).addr(), load.display());
    let start = Instant::now();
    rig.host(5).spawn("sh", &["-c", &line]);
    std::thread::sleep(Duration::from_secs(1));
    rig.host(4).cut(true);
    let others = || rig.hosts().filter(|host| host.name() != "n4").map(|host| host.running().len()).sum::<usize>();
    wait_until("twelve replicas run without n4", LIMIT, || (others() == 12, others().to_string()));
    done("n4's replicas run elsewhere", start);
    let report = || std::fs::read_to_string(&load).unwrap_or_default();
    wait_until("the load is over", LIMIT, || (report().contains("requests in"), report()));
    let lines: Vec<String> = report().lines().map(str::to_owned).collect();
    let told = lines.iter().filter(|line| line.contains("requests in") || line.contains("Socket errors"));
    told.for_each(|line| println!("  {line}"));
    println!("   (What was on its way to n4 when it was cut off could not be answered; all else was.)");
    rig.host(4).cut(false);
    rig.host(1).await_replicas("web", "12/12");
}

/// Returns a manager that was there all the time.
fn kill_the_leader(rig: &Rig) -> usize {
    let leader = rig.leader(1);
    say(&format!("Killing the leader's daemon (n{leader}) with kill -9, and writing to another manager at once."));
    let other = if leader == 1 { 2 } else { 1 };
    rig.host(leader).kill_daemon();
    let start = Instant::now();
    wait_until("a write is accepted", LIMIT, || {
        let ran = rig.host(other).run(&["service", "scale", "--detach", "web=8"]);
        (ran.success, ran.stderr)
    });
    done("the first write after the leader's death was accepted", start);
    rig.host(other).await_replicas("web", "8/8");
    done("and eight replicas run", start);
    rig.host(leader).start_daemon();
    println!("   n{leader} is back; n{} leads.", rig.leader(other));
    other
}

fn remove(rig: &Rig, other: usize) {
    say("Removing the service, the secret, the config and the network.");
    let start = Instant::now();
    rig.host(other).ok(&["service", "rm", "web"]);
    rig.host(other).ok(&["secret", "rm", "password"]);
    rig.host(other).ok(&["config", "rm", "motd"]);
    rig.await_no_container();
    wait_until("the network can go", LIMIT, || {
        let ran = rig.host(other).run(&["network", "rm", "shop"]);
        (ran.success, ran.stderr)
    });
    done("no container is left on any node", start);
}

fn say(text: &str) {
    println!("\n== {text}");
}

fn done(text: &str, start: Instant) {
    println!("   {text} ({:.2} s).", start.elapsed().as_secs_f64());
}
