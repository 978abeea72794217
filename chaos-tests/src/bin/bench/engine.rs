//! The engine of one host beside Debian's dockerd, on the same work, in pairs.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use skep_chaos_tests::Rig;

use crate::peer::{Maker, Peer, REGISTRY};
use crate::report;

const PAIRS: usize = 15;
const PARALLEL: usize = 200;
/// Lines that one container writes as fast as it can.
const LINES: usize = 400_000;

pub(crate) fn engine() {
    let rig = Rig::new(2);
    let ours = Peer::by_docker_client(rig.host(1));
    ours.start();
    let own_client = Peer::of(rig.host(1), Maker::Skep);
    let theirs = Maker::all().contains(&Maker::Docker).then(|| Peer::of(rig.host(2), Maker::Docker));
    theirs.iter().for_each(Peer::start);
    let daemons: Vec<&Peer<'_>> = [Some(&ours), theirs.as_ref()].into_iter().flatten().collect();
    let all: Vec<&Peer<'_>> = [Some(&ours), Some(&own_client), theirs.as_ref()].into_iter().flatten().collect();
    for peer in &daemons {
        peer.import_busybox();
    }
    pairs("run --rm --network none busybox true", &all, |peer| {
        peer.run(&["run", "--rm", "--network", "none", "busybox", "true"])
    });
    pairs("run --rm busybox true, on the bridge", &all, |peer| peer.run(&["run", "--rm", "busybox", "true"]));
    for peer in &daemons {
        peer.run(&["run", "-d", "--name", "box", "busybox", "sleep", "100000"]);
    }
    pairs("exec box true", &all, |peer| peer.run(&["exec", "box", "true"]));
    build(&all, rig.host(1).dir());
    for peer in &daemons {
        parallel(peer);
        log_throughput(peer);
        peer.run(&["rm", "-f", "box"]);
    }
}

/// A large image from a registry on the same host; and what unpacking its layers takes by itself.
pub(crate) fn pull() {
    const LAYERS: usize = 10;
    const LAYER_LEN: usize = 50 << 20;
    let rig = Rig::new(2);
    let ours = Peer::of(rig.host(1), Maker::Skep);
    ours.start();
    let theirs = Maker::all().contains(&Maker::Docker).then(|| Peer::of(rig.host(2), Maker::Docker));
    theirs.iter().for_each(Peer::start);
    rig.host(1).start_registry();
    let image = format!("{REGISTRY}/large:1");
    push_large(&ours, rig.host(1).dir(), &image, LAYERS, LAYER_LEN);
    let peers: Vec<&Peer<'_>> = [Some(&ours), theirs.as_ref()].into_iter().flatten().collect();
    let mut times = vec![Vec::new(); peers.len() + 1];
    for _ in 0..5 {
        for (peer, times) in peers.iter().zip(&mut times) {
            times.push(peer.run(&["pull", &image]));
            peer.run(&["rmi", &image]);
        }
        times[peers.len()].push(untar(rig.host(1).dir()));
    }
    let names = peers.iter().map(|peer| peer.name).chain(["tar x of its layers, one by one"]);
    for (name, times) in names.zip(times) {
        report(&format!("{} layers of {} MiB: {name}", LAYERS, LAYER_LEN >> 20), times);
    }
}

/// Pushes an image whose layers are half of what can be compressed and half of what cannot, in files of a megabyte.
fn push_large(peer: &Peer<'_>, dir: &Path, image: &str, layers: usize, layer_len: usize) {
    const FILE_LEN: usize = 1 << 20;
    let context = dir.join("large");
    let mut text = "FROM scratch\n".to_owned();
    let mut random = std::fs::File::open("/dev/urandom").expect("it is there");
    for layer in 0..layers {
        let files = context.join(format!("layer{layer}"));
        std::fs::create_dir_all(&files).expect("a directory can be made");
        for number in 0..layer_len / FILE_LEN {
            let mut content = vec![0; FILE_LEN / 2];
            random.read_exact(&mut content).expect("there is always more");
            content
                .extend(std::iter::repeat_n(*b"what programs are made of, text above all; ", FILE_LEN / 88).flatten());
            std::fs::write(files.join(number.to_string()), content).expect("a file can be written");
        }
        writeln!(text, "COPY layer{layer} /layer{layer}").expect("a string takes all");
    }
    std::fs::write(context.join("Dockerfile"), text).expect("a file can be written");
    peer.run(&["build", "-q", "-t", image, &context.display().to_string()]);
    peer.run(&["push", image]);
    peer.run(&["rmi", image]);
    peer.run(&["system", "prune", "-a", "-f"]);
    std::fs::remove_dir_all(&context).expect("it is ours");
}

/// What the registry holds, unpacked by tar.
fn untar(dir: &Path) -> Duration {
    let blobs = dir.join("registry/data/docker/registry/v2/blobs");
    let into = dir.join("untarred");
    std::fs::create_dir_all(&into).expect("a directory can be made");
    let script = format!(
        "find {} -name data -size +1M | while read file; do tar -xzf $file -C {}; done",
        blobs.display(),
        into.display()
    );
    let start = Instant::now();
    let unpacked = std::process::Command::new("sh").args(["-c", &script]).status().expect("a shell runs");
    let took = start.elapsed();
    assert!(unpacked.success(), "the layers cannot be unpacked");
    std::fs::remove_dir_all(&into).expect("it is ours");
    took
}

/// Each peer in turn, again and again: what disturbs one disturbs the other.
fn pairs(what: &str, peers: &[&Peer<'_>], work: impl Fn(&Peer<'_>) -> Duration) {
    let mut times = vec![Vec::new(); peers.len()];
    for _ in 0..PAIRS {
        for (peer, times) in peers.iter().zip(&mut times) {
            times.push(work(peer));
        }
    }
    for (peer, times) in peers.iter().zip(times) {
        report(&format!("{what}: {}", peer.name), times);
    }
}

/// A Dockerfile of twenty steps, from nothing and again.
fn build(peers: &[&Peer<'_>], dir: &Path) {
    let context = dir.join("twenty");
    std::fs::create_dir_all(&context).expect("a directory can be made");
    let mut text = "FROM busybox\n".to_owned();
    for step in 0..10 {
        writeln!(text, "RUN echo {step} > /file{step}\nENV STEP{step}={step}").expect("a string takes all");
    }
    std::fs::write(context.join("Dockerfile"), text).expect("a file can be written");
    let context = context.display().to_string();
    for (what, more) in [("cold", &["--no-cache"][..]), ("cached", &[])] {
        let mut times = vec![Vec::new(); peers.len()];
        for _ in 0..5 {
            for (peer, times) in peers.iter().zip(&mut times) {
                times.push(peer.run(&[&["build", "-q", "-t", "twenty"], more, &[context.as_str()]].concat()));
            }
        }
        for (peer, times) in peers.iter().zip(times) {
            report(&format!("build of 20 steps, {what}: {}", peer.name), times);
        }
    }
}

/// Containers started by several clients at once.
fn parallel(peer: &Peer<'_>) {
    const CLIENTS: usize = 8;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                for number in (client..PARALLEL).step_by(CLIENTS) {
                    peer.run(&["run", "-d", "--name", &format!("many{number}"), "busybox", "sleep", "100000"]);
                }
            });
        }
    });
    let rate = PARALLEL as f64 / start.elapsed().as_secs_f64();
    println!("{:<58} {rate:.1} a second", format!("{PARALLEL} containers by {CLIENTS} clients: {}", peer.name));
    let names: Vec<String> = (0..PARALLEL).map(|number| format!("many{number}")).collect();
    let names: Vec<&str> = ["rm", "-f"].into_iter().chain(names.iter().map(String::as_str)).collect();
    peer.run(&names);
}

/// One container writes as fast as it can; every line has to be there.
fn log_throughput(peer: &Peer<'_>) {
    let script = format!("yes 'a line of some sixty bytes, as programs write them all the time' | head -n {LINES}");
    let start = Instant::now();
    peer.run(&["run", "--name", "writer", "-d", "busybox", "sh", "-c", &script]);
    peer.run(&["wait", "writer"]);
    let took = start.elapsed().as_secs_f64();
    let output = peer.command(&["logs", "writer"]).output().expect("the client runs").stdout;
    let kept = output.iter().filter(|&&byte| byte == b'\n').count();
    let rate = LINES as f64 / took;
    println!(
        "{:<58} {rate:.0} lines a second, {kept} of {LINES} kept",
        format!("output of one container: {}", peer.name)
    );
    peer.run(&["rm", "writer"]);
}
