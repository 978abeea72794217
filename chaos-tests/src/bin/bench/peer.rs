//! Daemons to measure, each on a host: ours, and Debian's dockerd beside it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use skep_chaos_tests::{Api, Host, LIMIT, program, wait_for, wait_until};

/// Where the rig has its registry.
pub(crate) const REGISTRY: &str = "10.77.0.1:5000";
/// dockerd without a leader needs longer than anything of ours.
const PATIENCE: Duration = Duration::from_secs(240);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Maker {
    Skep,
    /// dockerd 20.10 of Debian, with its own containerd.
    Docker,
}

impl Maker {
    /// Those that are installed.
    pub(crate) fn all() -> Vec<Self> {
        let has_docker = Command::new("dockerd").arg("--version").output().is_ok();
        if !has_docker {
            println!("dockerd is not installed (package docker.io): figures without a peer");
        }
        if has_docker { vec![Self::Skep, Self::Docker] } else { vec![Self::Skep] }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Skep => "skep",
            Self::Docker => "dockerd 20.10",
        }
    }
}

/// A daemon on a host, and the client to ask it with.
pub(crate) struct Peer<'a> {
    pub(crate) host: &'a Host,
    pub(crate) maker: Maker,
    pub(crate) name: &'static str,
    client: Vec<String>,
}

impl<'a> Peer<'a> {
    /// A daemon, asked by its maker's own client.
    pub(crate) fn of(host: &'a Host, maker: Maker) -> Self {
        let mut peer = Self { host, maker, name: maker.name(), client: Vec::new() };
        let client = match maker {
            Maker::Skep => program().display().to_string(),
            Maker::Docker => "docker".to_owned(),
        };
        peer.client = vec![client, "-H".to_owned(), format!("unix://{}", peer.socket().display())];
        peer
    }

    /// Our daemon, asked by the `docker` client.
    pub(crate) fn by_docker_client(host: &'a Host) -> Self {
        let mut peer = Self::of(host, Maker::Skep);
        "docker".clone_into(&mut peer.client[0]);
        peer.name = "skep, docker client";
        peer
    }

    pub(crate) fn run(&self, args: &[&str]) -> Duration {
        let start = Instant::now();
        let output = self.command(args).output().expect("the client runs");
        let took = start.elapsed();
        assert!(output.status.success(), "{} {args:?}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        took
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.client[0]);
        command.args(&self.client[1..]).args(args).env("DOCKER_BUILDKIT", "0").stdin(Stdio::null());
        command
    }

    pub(crate) fn api(&self) -> Api {
        Api::connect(&self.socket()).expect("the daemon runs")
    }

    /// What the daemon says to a GET; `None` while it says nothing good.
    pub(crate) fn ask(&self, path: &str) -> Option<Value> {
        let answer = Api::connect(&self.socket()).ok()?.get(path).ok()?;
        (answer.status == 200).then_some(answer.body)
    }

    pub(crate) fn await_replicas(&self, service: &str, count: u64) {
        let path = format!("/v1.41/services?status=true&filters=%7B%22name%22%3A%5B%22{service}%22%5D%7D");
        wait_until(&format!("{} runs {count} of {service}", self.name), PATIENCE, || {
            let services = self.ask(&path).unwrap_or_default();
            let all = services.as_array().map_or(&[][..], Vec::as_slice);
            let found = all.iter().find(|found| found["Spec"]["Name"] == service);
            let running = found.and_then(|found| found["ServiceStatus"]["RunningTasks"].as_u64());
            (running == Some(count), format!("{running:?}"))
        });
    }

    /// How many containers run here.
    pub(crate) fn running(&self) -> usize {
        self.ask("/v1.41/containers/json").and_then(|list| Some(list.as_array()?.len())).unwrap_or_default()
    }

    /// An image of busybox, the same for every maker.
    pub(crate) fn import_busybox(&self) {
        let root = self.host.dir().join("busybox-root");
        let script = format!(
            "set -e; mkdir -p {0}/bin {0}/tmp; cp $(which busybox) {0}/bin/busybox; \
             for a in sh true sleep echo yes head cat; do ln -sf busybox {0}/bin/$a; done; tar -C {0} -cf {0}.tar .",
            root.display()
        );
        let made = Command::new("sh").args(["-c", &script]).status().expect("a shell runs");
        assert!(made.success(), "the image's files cannot be made: is busybox-static installed?");
        self.run(&["import", &format!("{}.tar", root.display()), "busybox"]);
    }

    pub(crate) fn start(&self) {
        match self.maker {
            Maker::Skep => self.host.start_daemon(),
            Maker::Docker => self.start_dockerd(),
        }
    }

    /// `kill -9` of the daemon.
    pub(crate) fn kill(&self) {
        match self.maker {
            Maker::Skep => self.host.kill_daemon(),
            Maker::Docker => self.end_dockerd("-KILL"),
        }
    }

    /// The processes that a user calls the daemon.
    pub(crate) fn daemon_pids(&self) -> Vec<String> {
        match self.maker {
            Maker::Skep => self.pids("/[^ ]* daemon"),
            Maker::Docker => self.pids("(dockerd|containerd) "),
        }
    }

    /// What watches containers, one of them each.
    pub(crate) fn shim_pids(&self) -> Vec<String> {
        match self.maker {
            Maker::Skep => self.pids("shim-watch"),
            Maker::Docker => self.pids("containerd-shim"),
        }
    }

    fn pids(&self, word: &str) -> Vec<String> {
        let pattern = format!("{word}.*{}", self.host.dir().display());
        let found = Command::new("pgrep").args(["-f", &pattern]).output().expect("pgrep runs (package procps)");
        String::from_utf8_lossy(&found.stdout).lines().map(str::to_owned).collect()
    }

    fn docker_dir(&self) -> PathBuf {
        self.host.dir().join("docker")
    }

    fn socket(&self) -> PathBuf {
        match self.maker {
            Maker::Skep => Path::new(self.host.socket().trim_start_matches("unix://")).to_owned(),
            Maker::Docker => self.docker_dir().join("sock"),
        }
    }

    fn start_dockerd(&self) {
        let dir = self.docker_dir();
        std::fs::create_dir_all(&dir).expect("a directory can be made");
        let at = |name: &str| dir.join(name).display().to_string();
        // One that was killed is our child still, and dockerd would take it for alive.
        let _ = std::fs::remove_file(dir.join("pid"));
        let socket = format!("unix://{}", at("sock"));
        let dirs = ["--data-root", &at("data"), "--exec-root", &at("exec"), "-p", &at("pid"), "-H", &socket];
        self.host.spawn(
            "dockerd",
            &[&dirs[..], &["--cgroup-parent", "/skep-bench-docker", "--insecure-registry", REGISTRY]].concat(),
        );
        wait_until("dockerd answers", LIMIT, || (self.ask("/_ping").is_some(), String::new()));
    }

    fn end_dockerd(&self, signal: &str) {
        let pattern = format!("dockerd.*{}", self.docker_dir().display());
        // Absent if it has ended already.
        let _ = Command::new("pkill").args([signal, "-f", &pattern]).status();
        wait_until("dockerd has ended", LIMIT, || {
            let left = Command::new("pgrep").args(["-f", &pattern]).output().is_ok_and(|found| found.status.success());
            (!left, String::new())
        });
    }
}

impl Drop for Peer<'_> {
    /// dockerd takes its own containerd with it; ours is ended with the rig.
    fn drop(&mut self) {
        if self.maker == Maker::Docker {
            self.end_dockerd("-TERM");
        }
    }
}

/// One swarm of all these daemons, which run: the first so many are its managers.
pub(crate) fn form_swarm(peers: &[Peer<'_>], managers: usize) {
    let first = &peers[0];
    first.run(&["swarm", "init", "--advertise-addr", first.host.addr()]);
    let token = |role: &str| {
        let output = first.command(&["swarm", "join-token", "-q", role]).output().expect("the client runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let (manager, worker) = (token("manager"), token("worker"));
    let target = format!("{}:2377", first.host.addr());
    for (index, peer) in peers.iter().enumerate().skip(1) {
        let token = if index < managers { &manager } else { &worker };
        peer.run(&["swarm", "join", "--token", token, "--advertise-addr", peer.host.addr(), &target]);
    }
    await_nodes(first, peers.len());
}

/// Waits until so many nodes are ready, and no manager is unreachable.
pub(crate) fn await_nodes(asked: &Peer<'_>, count: usize) {
    wait_until("every node is ready", PATIENCE, || {
        let nodes = asked.ask("/v1.41/nodes").unwrap_or_default();
        let all = nodes.as_array().map_or(&[][..], Vec::as_slice);
        let ready = all.iter().filter(|node| {
            let reachability = &node["ManagerStatus"]["Reachability"];
            node["Status"]["State"] == "ready" && (reachability.is_null() || reachability == "reachable")
        });
        (ready.count() == count, nodes.to_string())
    });
}

/// Which of the daemons leads.
pub(crate) fn leader(peers: &[Peer<'_>]) -> usize {
    wait_for("a leader", PATIENCE, || {
        let nodes = peers.iter().find_map(|peer| peer.ask("/v1.41/nodes")).unwrap_or_default();
        let all = nodes.as_array().map_or(&[][..], Vec::as_slice);
        let leader = all.iter().find(|node| node["ManagerStatus"]["Leader"] == true);
        let name = leader.and_then(|node| node["Description"]["Hostname"].as_str());
        peers.iter().position(|peer| Some(peer.host.name()) == name).ok_or_else(|| nodes.to_string())
    })
}
