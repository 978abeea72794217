//! `make demo`: a swarm of five hosts on this machine, told step by step.

#![allow(clippy::print_stdout, reason = "telling is what it does")]

use std::time::Instant;

use skep_chaos_tests::{LIMIT, Rig, is_root, wait_until};

fn main() {
    if !is_root() {
        eprintln!("The demo makes network namespaces and containers, and needs root: run it with sudo.");
        std::process::exit(1);
    }
    let rig = raise();
    create(&rig);
    change(&rig);
    let other = kill_the_leader(&rig);
    remove(&rig, other);
    drop(rig);
    say("That was it. The hosts, their networks and their files are gone.");
}

fn raise() -> Rig {
    say("Raising five hosts on this machine, each with its own network, and Skep's daemon on each.");
    let start = Instant::now();
    let rig = Rig::new(5);
    rig.hosts().for_each(skep_chaos_tests::Host::start_daemon);
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
    say("Removing the service, the secret and the config.");
    let start = Instant::now();
    rig.host(other).ok(&["service", "rm", "web"]);
    rig.host(other).ok(&["secret", "rm", "password"]);
    rig.host(other).ok(&["config", "rm", "motd"]);
    rig.await_no_container();
    done("no container is left on any node", start);
}

fn say(text: &str) {
    println!("\n== {text}");
}

fn done(text: &str, start: Instant) {
    println!("   {text} ({:.2} s).", start.elapsed().as_secs_f64());
}
