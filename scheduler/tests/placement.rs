//! Placement as a table: nodes and tasks as text in, the plan as text out.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use skep_api::service::{PortConfig, PublishMode};
use skep_api::task::{PlacementPreference, Resources, SpreadOver, TaskSpec};
use skep_api::units::{ByteSize, NanoCpus};
use skep_api::{Availability, NodeId, NodeState, ServiceId, TaskId, node::testing};
use skep_scheduler::{ClusterView, Group, Occupant, Plan, place};

/// Reads `n1 cpu=2 web=1 zone=a; n2 drain`: a count names the service that runs there.
fn cluster(text: &str) -> ClusterView {
    let mut view = ClusterView::default();
    for line in text.split(';').map(str::trim).filter(|line| !line.is_empty()) {
        let mut words = line.split_whitespace();
        let number: u128 = words.next().unwrap()[1..].parse().unwrap();
        let mut node = testing::node(number);
        let mut running = Vec::new();
        let mut failing = false;
        for word in words {
            match word.split_once('=') {
                Some(("cpu", cpus)) => node.description.resources.nano_cpus = NanoCpus(nanos(cpus)),
                Some(("used", cpus)) => running.push((service("other"), nanos(cpus), 1)),
                Some(("arch", arch)) => node.description.platform.architecture = arch.into(),
                Some((name @ ("web" | "api"), count)) => running.push((service(name), 0, count.parse().unwrap())),
                Some((label, value)) => drop(node.spec.labels.insert(label.into(), value.into())),
                None if word == "down" => node.status.state = NodeState::Down,
                None if word == "failing" => failing = true,
                None => node.spec.availability = word.parse::<Availability>().unwrap(),
            }
        }
        let id = node.id;
        view.set_node(Arc::new(node));
        for (service, cpus, count) in running {
            for _ in 0..count {
                view.add_task(id, &occupant(service, spec(&format!("cpu={}", cpus as f64 / 1e9)), vec![]));
            }
        }
        view.set_failing(id, service("web"), failing);
    }
    view
}

fn nanos(cpus: &str) -> i64 {
    (cpus.parse::<f64>().unwrap() * 1e9) as i64
}

fn service(name: &str) -> ServiceId {
    ServiceId::from_u128(name.bytes().map(u128::from).sum())
}

fn occupant(service: ServiceId, spec: TaskSpec, ports: Vec<PortConfig>) -> Occupant {
    Occupant { service, spec: Arc::new(spec), ports }
}

fn spec(words: &str) -> TaskSpec {
    let mut spec = TaskSpec::default();
    for word in words.split_whitespace() {
        let (key, value) = word.split_once('=').unwrap();
        match key {
            "cpu" => {
                spec.resources.reservations = Some(Resources {
                    nano_cpus: NanoCpus(nanos(value)),
                    memory_bytes: ByteSize(0),
                    ..Resources::default()
                });
            }
            "max" => spec.placement.max_replicas = value.parse().unwrap(),
            "on" => spec.placement.constraints.push(value.replace('~', "==")),
            "spread" => spec
                .placement
                .preferences
                .push(PlacementPreference { spread: SpreadOver { spread_descriptor: format!("node.labels.{value}") } }),
            "arch" => spec
                .placement
                .platforms
                .push(skep_api::task::Platform { architecture: value.into(), os: "linux".into() }),
            "port" => {}
            other => panic!("{other}?"),
        }
    }
    spec
}

/// Reads `web*3 cpu=1`: three tasks of web.
fn group(text: &str) -> Group {
    let (head, rest) = text.split_once(' ').unwrap_or((text, ""));
    let (name, count) = head.split_once('*').unwrap();
    let ports = rest.split_whitespace().filter_map(|word| word.strip_prefix("port=")).map(|port| PortConfig {
        published_port: port.parse().unwrap(),
        publish_mode: PublishMode::Host,
        ..PortConfig::default()
    });
    Group {
        tasks: (1..=count.parse().unwrap()).map(TaskId::from_u128).collect(),
        occupant: occupant(service(name), spec(rest), ports.collect()),
    }
}

/// Writes how many tasks each node got, and why others wait.
fn summary(plan: &Plan) -> String {
    let mut counts: BTreeMap<NodeId, usize> = BTreeMap::new();
    for (_, node) in &plan.placements {
        *counts.entry(*node).or_default() += 1;
    }
    let name = |id: &NodeId| format!("n{}", u128::from_be_bytes(id.to_bytes()));
    let placed = counts.iter().map(|(node, count)| format!("{}:{count}", name(node)));
    let waits = plan.refusals.iter().map(|refusal| format!("{} wait: {}", refusal.tasks.len(), refusal.reason));
    placed.chain(waits).collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn check(nodes: &str, tasks: &str, want: &str) {
    assert_eq!(summary(&place(&mut cluster(nodes), &[group(tasks)])), want, "{tasks} on {nodes}");
}

#[test]
fn tasks_spread_by_service_before_load() {
    check("n1; n2; n3", "web*3", "n1:1 n2:1 n3:1");
    check("n1 api=5; n2", "web*2", "n1:1 n2:1");
    check("n1 web=2; n2 api=9", "web*2", "n2:2");
    check("n1 web=1; n2", "web*4", "n1:2 n2:2");
    check("n1 api=3; n2 api=1", "web*1", "n2:1");
}

#[test]
fn a_node_that_cannot_take_a_task_is_passed_over_and_the_reason_is_told() {
    check("n1 cpu=2 used=2; n2 cpu=4", "web*1 cpu=1", "n2:1");
    check("n1 cpu=2 used=2", "web*1 cpu=1", "1 wait: no suitable node (insufficient resources on 1 node)");
    check("n1 cpu=2", "web*3 cpu=1", "n1:2 1 wait: no suitable node (insufficient resources on 1 node)");
    check(
        "n1 drain; n2 pause; n3 down; n4 cpu=1",
        "web*1 cpu=2",
        "1 wait: no suitable node (3 nodes not available for new tasks; insufficient resources on 1 node)",
    );
    check("", "web*1", "1 wait: no suitable node (the swarm has no nodes)");
    check(
        "n1 zone=a; n2 zone=b",
        "web*2 on=node.labels.zone~c",
        "2 wait: no suitable node (scheduling constraints not satisfied on 2 nodes)",
    );
    check("n1 zone=a; n2 zone=b", "web*2 on=node.labels.zone~b", "n2:2");
    check("n1 arch=aarch64; n2", "web*2 arch=amd64", "n2:2");
    check("n1; n2", "web*3 port=80", "n1:1 n2:1 1 wait: no suitable node (host-mode port already in use on 2 nodes)");
    check(
        "n1; n2; n3",
        "web*5 max=1",
        "n1:1 n2:1 n3:1 2 wait: no suitable node (max replicas per node limit exceeded on 3 nodes)",
    );
    check("n1 web=1; n2", "web*1 max=1", "n2:1");
}

#[test]
fn preferences_spread_over_label_values_first() {
    check("n1 zone=a; n2 zone=a; n3 zone=b", "web*4 spread=zone", "n1:1 n2:1 n3:2");
    check("n1 zone=a; n2 zone=b; n3", "web*3 spread=zone", "n1:1 n2:1 n3:1");
    check("n1 zone=a web=3; n2 zone=b", "web*2 spread=zone", "n2:2");
    check("n1 zone=a rack=1; n2 zone=a rack=2; n3 zone=b rack=1", "web*4 spread=zone spread=rack", "n1:1 n2:1 n3:2");
    check("n1 zone=a cpu=1; n2 zone=b cpu=4", "web*4 spread=zone cpu=1", "n1:1 n2:3");
}

#[test]
fn a_node_where_the_service_keeps_failing_comes_last() {
    check("n1 failing; n2 web=3", "web*1", "n2:1");
    check("n1 failing; n2 drain", "web*1", "n1:1");
}

proptest! {
    /// Whatever the cluster: no node is overfilled, every task is placed or refused, replicas
    /// differ by at most one where nothing is in the way, and the same input gives the same plan.
    #[test]
    fn plans_hold_what_they_promise(cpus in prop::collection::vec(1u8..8, 1..12), tasks in 1usize..60, cpu in 0u8..3) {
        let nodes: Vec<_> = cpus.iter().enumerate().map(|(i, c)| format!("n{} cpu={c}", i + 1)).collect();
        let text = format!("web*{tasks} cpu={cpu}");
        let plan = place(&mut cluster(&nodes.join(";")), &[group(&text)]);
        prop_assert_eq!(&plan, &place(&mut cluster(&nodes.join(";")), &[group(&text)]));
        let waiting: usize = plan.refusals.iter().map(|r| r.tasks.len()).sum();
        prop_assert_eq!(plan.placements.len() + waiting, tasks);
        let mut per_node = vec![0usize; cpus.len()];
        for (_, node) in &plan.placements {
            per_node[u128::from_be_bytes(node.to_bytes()) as usize - 1] += 1;
        }
        for (count, cpus) in per_node.iter().zip(&cpus) {
            prop_assert!(count * usize::from(cpu) <= usize::from(*cpus));
        }
        if cpu == 0 {
            let (least, most) = (per_node.iter().min().unwrap(), per_node.iter().max().unwrap());
            prop_assert!(most - least <= 1);
        } else if waiting > 0 {
            // Nothing waits while there is room.
            prop_assert!(per_node.iter().zip(&cpus).all(|(n, c)| (n + 1) * usize::from(cpu) > usize::from(*c)));
        }
    }

    /// What is added and removed again leaves no trace.
    #[test]
    fn a_removed_task_gives_everything_back(cpu in 1u8..4, port in 1u16..9) {
        let mut view = cluster("n1 cpu=4; n2 cpu=4");
        let group = group(&format!("web*1 cpu={cpu} port={port}"));
        let before = summary(&place(&mut view.clone(), std::slice::from_ref(&group)));
        view.add_task(NodeId::from_u128(1), &group.occupant);
        view.remove_task(NodeId::from_u128(1), &group.occupant);
        prop_assert_eq!(before, summary(&place(&mut view, &[group])));
    }
}
