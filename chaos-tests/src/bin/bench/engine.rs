//! The engine of one host beside Debian's dockerd, on the same work, in pairs.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, Rig, program, wait_until};

use crate::report;

const PAIRS: usize = 15;
const PARALLEL: usize = 200;
/// Lines that one container writes as fast as it can.
const LINES: usize = 400_000;

/// A daemon to measure: by whose client, at which socket.
struct Peer {
    name: &'static str,
    client: Vec<String>,
}

impl Peer {
    fn run(&self, args: &[&str]) -> Duration {
        let start = Instant::now();
        let output = self.command(args).output().expect("the client runs");
        let took = start.elapsed();
        assert!(output.status.success(), "{} {args:?}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        took
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.client[0]);
        command.args(&self.client[1..]).args(args).env("DOCKER_BUILDKIT", "0").stdin(Stdio::null());
        command
    }
}

pub(crate) fn engine() {
    let rig = Rig::new(2);
    let host = rig.host(1);
    host.start_daemon();
    let docker = start_dockerd(rig.host(2));
    let docker_at = |socket: String| vec!["docker".to_owned(), "-H".to_owned(), socket];
    let skep = vec![program().display().to_string(), "-H".to_owned(), host.socket()];
    let ours = Peer { name: "skep, docker client", client: docker_at(host.socket()) };
    let own_client = Peer { name: "skep, own client", client: skep };
    let theirs = docker.map(|socket| Peer { name: "dockerd 20.10", client: docker_at(socket) });
    if theirs.is_none() {
        println!("dockerd is not installed (package docker.io): figures without a peer");
    }
    let daemons: Vec<&Peer> = [Some(&ours), theirs.as_ref()].into_iter().flatten().collect();
    let all: Vec<&Peer> = [Some(&ours), Some(&own_client), theirs.as_ref()].into_iter().flatten().collect();
    for peer in &daemons {
        import_busybox(peer, host.dir());
    }
    pairs("run --rm --network none busybox true", &all, |peer| {
        peer.run(&["run", "--rm", "--network", "none", "busybox", "true"])
    });
    pairs("run --rm busybox true, on the bridge", &all, |peer| peer.run(&["run", "--rm", "busybox", "true"]));
    for peer in &daemons {
        peer.run(&["run", "-d", "--name", "box", "busybox", "sleep", "100000"]);
    }
    pairs("exec box true", &all, |peer| peer.run(&["exec", "box", "true"]));
    build(&daemons, host.dir());
    for peer in &daemons {
        parallel(peer);
        log_throughput(peer);
        peer.run(&["rm", "-f", "box"]);
    }
    stop_dockerd(rig.host(2));
}

/// Each peer in turn, again and again: what disturbs one disturbs the other.
fn pairs(what: &str, peers: &[&Peer], work: impl Fn(&Peer) -> Duration) {
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
fn build(peers: &[&Peer], dir: &Path) {
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
fn parallel(peer: &Peer) {
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
fn log_throughput(peer: &Peer) {
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

fn import_busybox(peer: &Peer, dir: &Path) {
    let root = dir.join("busybox-root");
    let script = format!(
        "set -e; mkdir -p {0}/bin {0}/tmp; cp $(which busybox) {0}/bin/busybox; \
         for a in sh true sleep echo yes head cat; do ln -sf busybox {0}/bin/$a; done; tar -C {0} -cf {0}.tar .",
        root.display()
    );
    let made = Command::new("sh").args(["-c", &script]).status().expect("a shell runs");
    assert!(made.success(), "the image's files cannot be made: is busybox-static installed?");
    peer.run(&["import", &format!("{}.tar", root.display()), "busybox"]);
}

/// Debian's dockerd in a host of its own; `None` if it is not installed.
fn start_dockerd(host: &Host) -> Option<String> {
    let dir = host.dir().join("docker");
    std::fs::create_dir_all(&dir).ok()?;
    let at = |name: &str| dir.join(name).display().to_string();
    let socket = format!("unix://{}", at("sock"));
    Command::new("dockerd").arg("--version").output().ok()?;
    host.spawn(
        "dockerd",
        &[
            "--data-root",
            &at("data"),
            "--exec-root",
            &at("exec"),
            "-p",
            &at("pid"),
            "-H",
            &socket,
            "--cgroup-parent",
            "/skep-bench-docker",
        ],
    );
    wait_until("dockerd answers", LIMIT, || {
        let answers = Command::new("docker").args(["-H", &socket, "info"]).output().is_ok_and(|o| o.status.success());
        (answers, String::new())
    });
    Some(socket)
}

/// It takes its own containerd with it.
fn stop_dockerd(host: &Host) {
    let pattern = format!("dockerd.*{}", host.dir().display());
    // Absent if it is not installed.
    let _ = Command::new("pkill").args(["-TERM", "-f", &pattern]).status();
    wait_until("dockerd has ended", LIMIT, || {
        let left = Command::new("pgrep").args(["-f", &pattern]).output().is_ok_and(|found| found.status.success());
        (!left, String::new())
    });
}
