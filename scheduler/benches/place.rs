//! The scheduler alone, on the sizes of SwarmKit's own benchmark. `SKEP_BENCH_TINY=1` runs each
//! once on little input, so that it cannot rot.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use skep_api::task::TaskSpec;
use skep_api::{ServiceId, TaskId, node::testing};
use skep_scheduler::{ClusterView, Group, Occupant, place};

fn cluster(nodes: u128, labels: bool) -> ClusterView {
    let mut view = ClusterView::default();
    for number in 1..=nodes {
        let mut node = testing::node(number);
        if labels {
            node.spec.labels.insert("even".into(), (number % 2 == 0).to_string());
        }
        view.set_node(Arc::new(node));
    }
    view
}

/// `tasks` tasks in `services` services.
fn groups(tasks: u128, services: u128, constraint: Option<&str>) -> Vec<Group> {
    let mut spec = TaskSpec::default();
    spec.placement.constraints.extend(constraint.map(str::to_owned));
    let spec = Arc::new(spec);
    (0..services)
        .map(|service| Group {
            occupant: Occupant { service: ServiceId::from_u128(service), spec: spec.clone(), ports: vec![] },
            tasks: (0..tasks / services).map(|n| TaskId::from_u128(service << 64 | n)).collect(),
        })
        .collect()
}

fn measure(name: &str, view: &ClusterView, groups: &[Group], rounds: usize) {
    let mut times: Vec<Duration> = (0..rounds)
        .map(|_| {
            let mut view = view.clone();
            let start = Instant::now();
            let plan = place(&mut view, groups);
            let took = start.elapsed();
            assert!(plan.refusals.is_empty(), "every task has a place");
            took
        })
        .collect();
    times.sort();
    println!("{name:<58} {:>9.1} ms (median of {rounds})", times[rounds / 2].as_secs_f64() * 1e3);
}

fn main() {
    let tiny = std::env::var_os("SKEP_BENCH_TINY").is_some();
    let (scale, rounds) = if tiny { (1000, 1) } else { (1, 5) };
    let even = Some("node.labels.even==true");
    for (nodes, tasks, services, constraint) in [
        (1_000, 100_000, 1, None),
        (1_000, 100_000, 1_000, None),
        (1_000, 100_000, 100_000, None),
        (5_000, 100_000, 1, even),
        (5_000, 100_000, 1_000, even),
        (100_000, 100_000, 1, None),
        (100_000, 1_000_000, 1, None),
        (100_000, 1_000_000, 10_000, None),
    ] {
        let (nodes, tasks, services) = (nodes / scale, tasks / scale, (services / scale).max(1));
        let name = format!(
            "{nodes} nodes, {tasks} tasks of {services} services{}",
            if constraint.is_some() { ", constraint" } else { "" }
        );
        measure(&name, &cluster(nodes.max(2), constraint.is_some()), &groups(tasks, services, constraint), rounds);
    }
}
