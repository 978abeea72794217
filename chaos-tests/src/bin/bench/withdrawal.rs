//! How soon an endpoint that goes is gone on every node: from the request to the kernel's rules of each, and to
//! the task's end, which waits for all of them. All nodes' disks are one disk here, unless TMPDIR names memory.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use serde_json::Value;
use skep_chaos_tests::{Host, Rig};
use skep_host_net::Netns;
use skep_host_net::nfnetlink::{GENERIC_LEN, messages};

use super::report;

const NODES: u8 = 25;
const MANAGERS: usize = 3;
const REPLICAS: usize = 10;
const ROUNDS: usize = 40;
/// Until what was there before has settled, and for one withdrawal.
const SETTLE: Duration = Duration::from_millis(500);
const LISTEN: Duration = Duration::from_millis(1500);
/// Longer than any task takes to end.
const LIMIT: Duration = Duration::from_secs(10);
/// So that whoever looks takes no time from those that are looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Of linux/netfilter/nf_tables.h: a rule that is new, and an element.
const NEW_RULE: u16 = 10 << 8 | 6;
const NEW_ELEMENT: u16 = 10 << 8 | 12;

/// With another service that is scaled up and down all the time, or without.
pub(crate) fn withdrawal() {
    let rig = Rig::swarm(NODES, MANAGERS);
    let first = rig.host(1);
    for (name, port) in [("web", "8080:8000"), ("churn", "8081:8000")] {
        let replicas = REPLICAS.to_string();
        first.ok(&["service", "create", "-d", "--name", name, "--replicas", &replicas, "-p", port, "skep/whoami"]);
        first.await_replicas(name, "10/10");
    }
    let changes: Vec<OwnedFd> = rig.hosts().map(changes_of).collect();
    measure(first, &changes, "withdrawn on each of 25 nodes, idle otherwise");
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| churn(first, &stop));
        measure(first, &changes, "withdrawn on each of 25 nodes, with churn");
        stop.store(true, Ordering::Relaxed);
    });
}

/// Scales a service up and down until it is told to end.
fn churn(host: &Host, stop: &AtomicBool) {
    let mut replicas = REPLICAS;
    while !stop.load(Ordering::Relaxed) {
        replicas = if replicas == REPLICAS { REPLICAS / 2 } else { REPLICAS };
        host.ok(&["service", "scale", "-d", &format!("churn={replicas}")]);
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn measure(host: &Host, changes: &[OwnedFd], what: &str) {
    let (mut nodes, mut slowest, mut stopped, mut answered) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        host.ok(&["service", "scale", "-d", &format!("web={REPLICAS}")]);
        host.await_replicas("web", &format!("{REPLICAS}/{REPLICAS}"));
        let before = endpoints(host);
        drop(told(changes, SETTLE));
        let (began, committed, gone, ended, seen) = std::thread::scope(|scope| {
            let listening = scope.spawn(|| told(changes, LISTEN));
            let mut api = host.api();
            let service = api.get("/services/web").expect("the daemon answers").body;
            let mut spec = service["Spec"].clone();
            spec["Mode"]["Replicated"]["Replicas"] = (REPLICAS - 1).into();
            let update = format!("/services/web/update?version={}", service["Version"]["Index"]);
            let began = Instant::now();
            let answer = api.post(&update, &spec).expect("the daemon answers");
            assert_eq!(answer.status, 200, "{answer:?}");
            let committed = began.elapsed();
            let gone = withdrawn(host, &before, began);
            let ended = ended_after(host, &gone.0, began);
            (began, committed, gone, ended, listening.join().expect("it does not panic"))
        });
        let mut times: Vec<Duration> = Vec::new();
        for (node, seen) in (1..).zip(seen) {
            let at = seen.iter().find(|change| change.takes_away(&before, gone.1));
            let at = at.unwrap_or_else(|| panic!("node {node} leads to {} still", gone.1)).at;
            times.push(at.saturating_duration_since(began));
        }
        slowest.push(*times.iter().max().expect("there are nodes"));
        nodes.append(&mut times);
        stopped.push(ended.saturating_sub(committed));
        answered.push(committed);
    }
    nodes.sort();
    let most = nodes[nodes.len() * 999 / 1000 - 1];
    println!("{what:<57} 99.9 % within {:.3} s", most.as_secs_f64());
    report(what, nodes);
    report("  until the request's answer", answered);
    report("  on the last of them", slowest);
    report("  from the request's answer until the task has ended", stopped);
}

/// The endpoint that goes.
fn withdrawn(host: &Host, before: &[(String, Ipv4Addr)], began: Instant) -> (String, Ipv4Addr) {
    loop {
        let after = endpoints(host);
        if let Some(gone) = before.iter().find(|(id, _)| !after.iter().any(|(other, _)| other == id)) {
            return gone.clone();
        }
        assert!(began.elapsed() < LIMIT, "one task is to go");
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The tasks that are to run: id and address that ports lead to.
fn endpoints(host: &Host) -> Vec<(String, Ipv4Addr)> {
    let filters = r#"{"service":["web"],"desired-state":["running"]}"#;
    let encoded: String = filters.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let answer = host.api().get(&format!("/tasks?filters={encoded}")).expect("the daemon answers");
    let tasks = answer.body.as_array().cloned().unwrap_or_default();
    let endpoint = |task: &Value| {
        let text = task["NetworksAttachments"][0]["Addresses"][0].as_str()?;
        Some((task["ID"].as_str()?.to_owned(), text.split('/').next()?.parse().ok()?))
    };
    tasks.iter().filter_map(endpoint).collect()
}

/// When a task's end was written down, by the clock that `began` is of.
fn ended_after(host: &Host, task: &str, began: Instant) -> Duration {
    loop {
        let answer = host.api().get(&format!("/tasks/{task}")).expect("the daemon answers");
        let state = answer.body["Status"]["State"].as_str().unwrap_or("gone").to_owned();
        if state != "running" {
            return began.elapsed();
        }
        assert!(began.elapsed() < LIMIT, "task {task} is {state} still");
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// What tells of changes to the rules of a node's overlay.
fn changes_of(host: &Host) -> OwnedFd {
    let inside = host.dir().join("run/overlay/netns");
    let path = format!("/proc/{}/root{}", host.holder_pid(), inside.display());
    let netns = Netns::open(path.as_ref()).expect("every node takes part in the mesh");
    let opened = std::thread::spawn(move || {
        netns.enter()?;
        skep_host_net::changes()
    });
    opened.join().expect("it does not panic").expect("the kernel tells of changes")
}

/// Rules and their elements that came together.
struct Seen {
    at: Instant,
    new: Vec<u8>,
}

impl Seen {
    /// Whether connections go to others of the endpoints from now on, and to one of them no more.
    fn takes_away(&self, endpoints: &[(String, Ipv4Addr)], gone: Ipv4Addr) -> bool {
        let leads_to = |address: Ipv4Addr| self.new.windows(4).any(|window| window == address.octets());
        endpoints.iter().any(|&(_, other)| other != gone && leads_to(other)) && !leads_to(gone)
    }
}

/// What is told by each socket for a while.
fn told(changes: &[OwnedFd], limit: Duration) -> Vec<Vec<Seen>> {
    // On time, however busy the nodes are: this is the clock.
    let own = nix::unistd::gettid().to_string();
    drop(Command::new("renice").args(["-n", "-15", "-p", &own]).output());
    let mut seen: Vec<Vec<Seen>> = changes.iter().map(|_| Vec::new()).collect();
    let mut buffer = vec![0; 256 << 10];
    let until = Instant::now() + limit;
    while Instant::now() < until {
        let mut waited: Vec<PollFd<'_>> =
            changes.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        poll(&mut waited, PollTimeout::from(20u8)).expect("sockets can be waited for");
        let at = Instant::now();
        for (socket, seen) in changes.iter().zip(&mut seen) {
            let mut now = Seen { at, new: Vec::new() };
            while let Ok(len) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                for (kind, body) in messages(&buffer[..len]) {
                    if matches!(kind, NEW_RULE | NEW_ELEMENT) {
                        now.new.extend_from_slice(body.get(GENERIC_LEN..).unwrap_or_default());
                    }
                }
            }
            seen.push(now);
        }
    }
    seen
}
