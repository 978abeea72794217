//! One task of many changes: what it costs to say what is different, and to have the kernel take it.
//! `SKEP_BENCH_TINY=1` runs on little input, so that it cannot rot.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::time::{Duration, Instant};

use skep_host_net::Netns;
use skep_host_net::nfnetlink::PacketFilter;
use skep_overlay_net::measured::ManyServices;

/// Between two changes.
const PAUSE: Duration = Duration::from_millis(100);

fn main() {
    let tiny = std::env::var_os("SKEP_BENCH_TINY").is_some();
    let runtime = tokio::runtime::Runtime::new().expect("threads can be made");
    let sizes: &[u128] = if tiny { &[3] } else { &[10, 100, 1000] };
    for &services in sizes {
        let (plan, kernel) = runtime.block_on(measure(services, if tiny { 1 } else { 21 }));
        println!(
            "{services} services of 10 tasks, one task changes: planned in {plan:.1?}, in the kernel {kernel:.1?} later"
        );
    }
}

/// Medians of what each of both steps takes.
async fn measure(services: u128, rounds: usize) -> (Duration, Duration) {
    let mut many = ManyServices::new(services, 10);
    let dir = tempfile::tempdir().expect("a directory can be made");
    let path = dir.path().join("netns");
    let netns = Netns::create(&path).await.ok();
    if netns.is_none() {
        println!("not as root: the kernel is left out");
    }
    let mut times = (Vec::new(), Vec::new());
    let mut filter = None;
    if let Some(netns) = &netns {
        let rules = many.rules();
        netns.run(move || skep_host_net::apply(&rules)).await.expect("the kernel takes the rules");
        filter = netns.run(PacketFilter::open).await.ok();
    }
    for _ in 0..rounds {
        // The kernel clears away what was replaced before.
        tokio::time::sleep(PAUSE).await;
        let begun = Instant::now();
        let told = many.turn_one();
        times.0.push(begun.elapsed());
        let begun = Instant::now();
        if let Some(filter) = &filter {
            filter.commit(told).expect("the kernel takes a change");
        }
        times.1.push(begun.elapsed());
    }
    // One that was not made needs no removal.
    drop(Netns::remove(&path));
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    (median(times.0), median(times.1))
}
