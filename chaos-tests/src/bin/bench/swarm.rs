//! The main job, beside Docker's swarm on the same work.

use std::time::{Duration, Instant};

use serde_json::json;
use skep_chaos_tests::{LIMIT, Rig, wait_until};

use crate::peer::{Maker, Peer, await_nodes, form_swarm, leader};
use crate::{kilobytes, memory, report};

/// Docker's elections and lost nodes take a minute each: its figure is told by few.
const fn trials(maker: Maker, ours: usize) -> usize {
    match maker {
        Maker::Skep => ours,
        Maker::Docker => 3,
    }
}

const SLEEPER: [&str; 3] = ["busybox", "sleep", "100000"];

pub(crate) fn one_node() {
    let rig = Rig::new(2);
    let peers: Vec<Peer<'_>> =
        Maker::all().into_iter().zip(rig.hosts()).map(|(maker, host)| Peer::of(host, maker)).collect();
    for peer in &peers {
        peer.start();
        form_swarm(std::slice::from_ref(peer), 1);
    }
    std::thread::sleep(Duration::from_secs(3));
    for peer in &peers {
        println!("idle manager and worker: {}: {}", peer.name, memory(&peer.daemon_pids()));
        peer.import_busybox();
    }
    let mut times = vec![Vec::new(); peers.len()];
    for round in 0..10 {
        for (peer, times) in peers.iter().zip(&mut times) {
            let name = format!("one{round}");
            let create = ["service", "create", "-d", "--no-resolve-image", "--name", &name];
            let start = Instant::now();
            peer.run(&[&create[..], &SLEEPER].concat());
            peer.await_replicas(&name, 1);
            times.push(start.elapsed());
        }
    }
    for (peer, times) in peers.iter().zip(times) {
        report(&format!("service create, image present, to 1/1: {}", peer.name), times);
    }
    for peer in &peers {
        let start = Instant::now();
        peer.run(&["service", "scale", "-d", "one0=100"]);
        peer.await_replicas("one0", 100);
        println!("{:<58} {:.2} s", format!("scale 1 to 100 on one node: {}", peer.name), start.elapsed().as_secs_f64());
        let shims = peer.shim_pids();
        println!("one of {} shims: {}: {}", shims.len(), peer.name, memory(&shims[..1]));
        println!("daemon with 109 containers: {}: {}", peer.name, memory(&peer.daemon_pids()));
        let services: Vec<String> = (0..10).map(|round| format!("one{round}")).collect();
        let remove = ["service", "rm"].into_iter().chain(services.iter().map(String::as_str));
        peer.run(&remove.collect::<Vec<_>>());
        wait_until("all containers are gone", LIMIT * 4, || (peer.running() == 0, peer.running().to_string()));
    }
}

/// A swarm of one maker on all hosts of a rig.
fn swarm(rig: &Rig, maker: Maker, managers: usize) -> Vec<Peer<'_>> {
    let peers: Vec<Peer<'_>> = rig.hosts().map(|host| Peer::of(host, maker)).collect();
    for peer in &peers {
        peer.start();
        peer.import_busybox();
    }
    form_swarm(&peers, managers);
    peers
}

/// A service of no replicas, for writes.
fn create_empty_service(peer: &Peer<'_>) {
    let create = ["service", "create", "-d", "--no-resolve-image", "--name", "web", "--replicas", "0"];
    peer.run(&[&create[..], &SLEEPER].concat());
}

/// One write over the API; false if it was not accepted.
fn write(peer: &Peer<'_>, value: &str) -> bool {
    let Some(mut service) = peer.ask("/v1.41/services/web") else { return false };
    service["Spec"]["Labels"]["written"] = value.into();
    let path = format!("/v1.41/services/web/update?version={}", service["Version"]["Index"]);
    peer.api().post(&path, &service["Spec"]).is_ok_and(|answer| answer.status == 200)
}

pub(crate) fn leader_killed() {
    lost_leader("kill -9", |peer| peer.kill(), |peer| peer.start());
}

pub(crate) fn leader_cut() {
    lost_leader("link down", |peer| peer.host.cut(true), |peer| peer.host.cut(false));
}

/// Its kernel asks once a second for the neighbours of one that was cut off: a trial begun before all
/// know each other again would measure that.
const NEIGHBOURS_FOUND: Duration = Duration::from_millis(1500);

fn lost_leader(how: &str, lose: fn(&Peer<'_>), bring_back: fn(&Peer<'_>)) {
    for maker in Maker::all() {
        let rig = Rig::new(3);
        let peers = swarm(&rig, maker, 3);
        create_empty_service(&peers[0]);
        let mut times = Vec::new();
        for trial in 0..trials(maker, 30) {
            let lost = leader(&peers);
            let other = &peers[usize::from(lost == 0)];
            lose(&peers[lost]);
            let start = Instant::now();
            wait_until("a write is accepted", LIMIT * 4, || (write(other, &trial.to_string()), String::new()));
            times.push(start.elapsed());
            bring_back(&peers[lost]);
            await_nodes(&peers[lost], 3);
            std::thread::sleep(NEIGHBOURS_FOUND);
        }
        report(&format!("first write after losing the leader of 3 ({how}): {}", maker.name()), times);
    }
}

pub(crate) fn clean_stop() {
    /// Writes go on for this long after the leader has gone.
    const AFTERWARDS: Duration = Duration::from_millis(500);
    let rig = Rig::new(3);
    let peers = swarm(&rig, Maker::Skep, 3);
    create_empty_service(&peers[0]);
    let mut times = Vec::new();
    let mut writes = 0;
    for trial in 0..30 {
        let leader = leader(&peers);
        let mut writer = peers[usize::from(leader == 0)].api();
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| {
                peers[leader].host.stop_daemon();
                std::thread::sleep(AFTERWARDS);
            });
            let mut worst = Duration::ZERO;
            while !stopping.is_finished() {
                let mut service = writer.get("/services/web").expect("the daemon answers").body;
                service["Spec"]["Labels"][format!("t{trial}")] = writes.to_string().into();
                let path = format!("/services/web/update?version={}", service["Version"]["Index"]);
                let start = Instant::now();
                let answer = writer.post(&path, &service["Spec"]).expect("the daemon answers");
                worst = worst.max(start.elapsed());
                assert_eq!(answer.status, 200, "no write fails: {answer:?}");
                writes += 1;
            }
            times.push(worst);
        });
        peers[leader].start();
        await_nodes(&peers[leader], 3);
    }
    report(&format!("slowest of {writes} writes around a clean stop of the leader"), times);
}

pub(crate) fn lost_node() {
    for maker in Maker::all() {
        let mut times = Vec::new();
        for _ in 0..trials(maker, 5) {
            let rig = Rig::new(3);
            let peers = swarm(&rig, maker, 1);
            let create = ["service", "create", "-d", "--no-resolve-image", "--name", "web", "--replicas", "6"];
            peers[0].run(&[&create[..], &SLEEPER].concat());
            peers[0].await_replicas("web", 6);
            rig.host(3).cut(true);
            let start = Instant::now();
            wait_until("six again", LIMIT * 4, || {
                let count: usize = peers[..2].iter().map(Peer::running).sum();
                (count == 6, count.to_string())
            });
            times.push(start.elapsed());
            rig.host(3).cut(false);
        }
        report(&format!("six replicas again after a node is lost: {}", maker.name()), times);
    }
}

/// Commits a second by clients that each write one config after the other, through the API.
pub(crate) fn writes() {
    const DURATION: Duration = Duration::from_secs(5);
    for maker in Maker::all() {
        let rig = Rig::new(3);
        let peers = swarm(&rig, maker, 3);
        let leading = &peers[leader(&peers)];
        for clients in [1, 64, 1024] {
            let before = log_activity(leading);
            let start = Instant::now();
            let written: usize = std::thread::scope(|scope| {
                let writers: Vec<_> = (0..clients)
                    .map(|client| scope.spawn(move || write_configs(leading, clients, client, start + DURATION)))
                    .collect();
                writers.into_iter().map(|writer| writer.join().expect("no writer fails")).sum()
            });
            let seconds = start.elapsed().as_secs_f64();
            let after = log_activity(leading);
            let (entries, flushes) = (after.0 - before.0, after.1 - before.1);
            println!(
                "{:<58} {:.0} a second{}",
                format!("writes of {clients} clients, three managers: {}", maker.name()),
                written as f64 / seconds,
                match maker {
                    Maker::Skep =>
                        format!(", {:.0} flushes a second, {:.1} entries each", flushes / seconds, entries / flushes),
                    Maker::Docker => String::new(),
                }
            );
        }
    }
}

fn write_configs(peer: &Peer<'_>, clients: usize, client: usize, until: Instant) -> usize {
    let mut api = peer.api();
    let mut written = 0;
    while Instant::now() < until {
        let config = json!({ "Name": format!("c{clients}-{client}-{written}"), "Data": "c2l4dGVlbiBieXRlcy4u" });
        let answer = api.post("/v1.41/configs/create", &config).expect("the daemon answers");
        assert_eq!(answer.status, 201, "{answer:?}");
        written += 1;
    }
    written
}

/// Entries and flushes of a daemon's log so far.
fn log_activity(peer: &Peer<'_>) -> (f64, f64) {
    let metrics = if peer.maker == Maker::Skep { peer.host.metrics() } else { Default::default() };
    let counter = |name: &str| metrics.iter().find(|(key, _)| key.starts_with(name)).map_or(0.0, |(_, value)| *value);
    (counter("swarm_raft_log_entries"), counter("swarm_raft_log_flushes"))
}

/// Memory of a manager for each task it has, of those that wait for a node.
pub(crate) fn stored_tasks() {
    const TASKS: u32 = 100_000;
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    let peer = Peer::of(host, Maker::Skep);
    std::thread::sleep(Duration::from_secs(3));
    let before = kilobytes(&peer.daemon_pids(), "Rss:");
    let count = TASKS.to_string();
    let nowhere = ["--constraint", "node.labels.nowhere==1", "--replicas", &count];
    host.ok(&[&["service", "create", "-d", "--name", "many"], &nowhere[..], &["skep/whoami"]].concat());
    wait_until("the tasks are written", LIMIT, || {
        let metrics = host.metrics();
        let counts = metrics.iter().filter(|(key, _)| key.starts_with("swarm_manager_tasks{")).map(|(_, count)| count);
        let written: f64 = counts.sum();
        (written >= f64::from(TASKS), format!("{written} tasks"))
    });
    // Time for what that took to be given back.
    std::thread::sleep(Duration::from_secs(25));
    let after = kilobytes(&peer.daemon_pids(), "Rss:");
    let each = (after - before) * 1000.0 / f64::from(TASKS);
    println!(
        "{:<58} {each:.0} bytes ({before:.0} kB before, {after:.0} kB with {TASKS})",
        "manager, for each stored task"
    );
}

/// From the start of a worker's daemon until it is ready, with many old tasks to its name.
pub(crate) fn rejoin() {
    const ROUNDS: usize = 20;
    const REPLICAS: usize = 500;
    let rig = Rig::swarm(2, 1);
    let (manager, worker) = (rig.host(1), rig.host(2));
    manager.ok(&["swarm", "update", "--task-history-limit", &(ROUNDS * 2).to_string()]);
    // Nobody has the image: each task is assigned, tried, and rejected.
    let there = ["--constraint", "node.hostname==n2", "--restart-condition", "none", "--no-resolve-image"];
    let at_once = ["--update-parallelism", "0", "--update-failure-action", "continue", "--update-monitor", "1ms"];
    let create = ["service", "create", "-d", "--name", "old", "--replicas"];
    let (replicas, image) = (REPLICAS.to_string(), "10.77.0.1:5000/none:1");
    manager.ok(&[&create[..], &[&replicas], &there, &at_once, &[image]].concat());
    let peer = Peer::of(manager, Maker::Skep);
    for round in 1..=ROUNDS {
        wait_until("the tasks of a round are rejected", LIMIT * 4, || {
            let tasks = peer.ask("/tasks?filters=%7B%22service%22%3A%5B%22old%22%5D%7D").unwrap_or_default();
            let all = tasks.as_array().map_or(&[][..], Vec::as_slice);
            let rejected = all.iter().filter(|task| task["Status"]["State"] == "rejected").count();
            (rejected == round * REPLICAS, format!("{rejected} of {}", all.len()))
        });
        if round < ROUNDS {
            manager.ok(&["service", "update", "-d", "--force", "old"]);
        }
    }
    let mut times = Vec::new();
    for _ in 0..5 {
        worker.kill_daemon();
        wait_until("the node is down", LIMIT, || (node_state(&peer, "n2") == "down", String::new()));
        let start = Instant::now();
        worker.spawn_daemon();
        wait_until("the node is ready", LIMIT, || (node_state(&peer, "n2") == "ready", String::new()));
        times.push(start.elapsed());
    }
    report(&format!("a worker with {} old tasks is back", ROUNDS * REPLICAS), times);
}

fn node_state(peer: &Peer<'_>, name: &str) -> String {
    let node = peer.ask(&format!("/nodes/{name}")).unwrap_or_default();
    node["Status"]["State"].as_str().unwrap_or_default().to_owned()
}
