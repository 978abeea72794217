//! Whole-system figures on hosts of this machine; `make bench` runs it with the release binary.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod engine;
mod mesh;
mod overlay;
mod peer;
mod swarm;
mod withdrawal;
mod workers;

use std::time::Duration;

use skep_chaos_tests::{is_root, program};

fn main() {
    assert!(is_root(), "the benchmark makes namespaces and containers and needs root");
    println!("binary: {}", program().display());
    let figures: [(&str, fn()); 14] = [
        ("one-node", swarm::one_node),
        ("leader-killed", swarm::leader_killed),
        ("leader-cut", swarm::leader_cut),
        ("leader-stopped", swarm::clean_stop),
        ("lost-node", swarm::lost_node),
        ("writes", swarm::writes),
        ("stored-tasks", swarm::stored_tasks),
        ("workers", workers::workers),
        ("rejoin", swarm::rejoin),
        ("overlay", overlay::overlay),
        ("mesh", mesh::mesh),
        ("withdrawal", withdrawal::withdrawal),
        ("engine", engine::engine),
        ("pull", engine::pull),
    ];
    let only = std::env::args().nth(1);
    let names = figures.map(|(name, _)| name);
    assert!(only.as_deref().is_none_or(|only| names.contains(&only)), "figures are one of {names:?}");
    for (name, measure) in figures {
        if only.as_deref().is_none_or(|only| only == name) {
            measure();
        }
    }
}

fn report(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index"
        )]
        let index = ((times.len() - 1) as f64 * share).round() as usize;
        times[index].as_secs_f64()
    };
    println!("{name:<58} median {:.3} s, worst {:.3} s of {}", at(0.5), at(1.0), times.len());
}

/// Resident and proportional memory of processes, in MB.
fn memory(pids: &[String]) -> String {
    let megabytes = |field| kilobytes(pids, field) / 1000.0;
    format!("{:.1} MB resident, {:.1} MB proportional", megabytes("Rss:"), megabytes("Pss:"))
}

/// What the kernel says of the memory of processes, in all.
fn kilobytes(pids: &[String], field: &str) -> f64 {
    let of = |pid: &String| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        line.split_whitespace().next().and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0)
    };
    pids.iter().map(of).sum()
}
