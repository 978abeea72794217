//! A set of hosts on one bridge.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{Host, Placing};
use crate::processes::{self, has_docker};

/// Hosts, joined by a bridge in a namespace of its own.
pub struct Rig {
    hosts: Vec<Host>,
    switch: Child,
    dir: tempfile::TempDir,
    cgroup: String,
}

impl std::fmt::Debug for Rig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rig").field("hosts", &self.hosts.len()).finish_non_exhaustive()
    }
}

/// Whether namespaces can be made at all.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The `skep` binary under test: `SKEP_BIN`, or the one cargo built beside the caller.
#[must_use]
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("SKEP_BIN") {
        return path.into();
    }
    let own = std::env::current_exe().expect("a process knows its program");
    let mut dir = own.parent().expect("a program lies in a directory");
    if dir.ends_with("deps") {
        dir = dir.parent().expect("deps lies in a directory");
    }
    dir.join("skep")
}

static RIGS: AtomicU32 = AtomicU32::new(0);

impl Rig {
    /// Makes `count` hosts, named `n1` and so on, at 10.77.0.1 and so on; no daemon runs yet.
    #[must_use]
    pub fn new(count: u8) -> Self {
        let program = program();
        assert!(program.exists(), "{} is not built: run 'cargo build' first, or set SKEP_BIN", program.display());
        let number = RIGS.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("/skep-test-{}-{number}", std::process::id());
        let dir = tempfile::Builder::new().prefix("skep-rig-").tempdir().expect("a temporary directory");
        // As the directories that it stands for: containers' users pass.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).expect("it is ours");
        let switch = hold(&["--net"]);
        let switch_pid = switch.id();
        enter(switch_pid, &["ip", "link", "add", "br0", "type", "bridge"]);
        enter(switch_pid, &["ip", "link", "set", "br0", "up"]);
        let mut rig = Self { hosts: Vec::new(), switch, dir, cgroup };
        for number in 1..=count {
            rig.add_host(number, &program);
        }
        rig
    }

    fn add_host(&mut self, number: u8, program: &std::path::Path) {
        let holder = hold(&["--net", "--mount", "--uts", "--propagation", "slave"]);
        let (pid, switch) = (holder.id(), self.switch.id());
        let port = format!("port{number}");
        let pid_text = pid.to_string();
        enter(switch, &["ip", "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &pid_text]);
        enter(switch, &["ip", "link", "set", &port, "master", "br0", "up"]);
        let name = format!("n{number}");
        enter(pid, &["hostname", &name]);
        enter(pid, &["ip", "link", "set", "lo", "up"]);
        enter(pid, &["ip", "addr", "add", &format!("10.77.0.{number}/24"), "dev", "eth0"]);
        enter(pid, &["ip", "link", "set", "eth0", "up"]);
        let placing = Placing {
            name,
            addr: format!("10.77.0.{number}"),
            port,
            switch,
            dir: self.dir.path().join(format!("n{number}")),
            cgroup: format!("{}/n{number}", self.cgroup),
            program: program.to_owned(),
        };
        self.hosts.push(Host::new(placing, holder));
    }

    /// One host with its daemon and busybox; none, aloud, where there is no docker client to ask it.
    #[must_use]
    pub fn with_docker_and_busybox() -> Option<Self> {
        let rig = has_docker().then(|| Self::new(1))?;
        rig.host(1).start_daemon();
        rig.host(1).import_busybox();
        Some(rig)
    }

    /// Sets the largest packet of all links between the hosts.
    pub fn set_mtu(&self, bytes: u32) {
        let bytes = bytes.to_string();
        for (number, host) in (1..).zip(&self.hosts) {
            enter(self.switch.id(), &["ip", "link", "set", &format!("port{number}"), "mtu", &bytes]);
            enter(host.holder_pid(), &["ip", "link", "set", "eth0", "mtu", &bytes]);
        }
        enter(self.switch.id(), &["ip", "link", "set", "br0", "mtu", &bytes]);
    }

    /// Hosts by number, from 1.
    #[must_use]
    pub fn host(&self, number: usize) -> &Host {
        &self.hosts[number - 1]
    }

    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.iter()
    }

    /// A swarm on all hosts, the first `managers` of them managers; returns once every node is ready.
    #[must_use]
    pub fn swarm(count: u8, managers: usize) -> Self {
        let rig = Self::new(count);
        rig.hosts().for_each(Host::start_daemon);
        rig.form_swarm(managers);
        rig
    }

    /// Makes one swarm of all hosts whose daemons run.
    pub fn form_swarm(&self, managers: usize) {
        let first = self.host(1);
        first.ok(&["swarm", "init", "--advertise-addr", first.addr()]);
        let token = |role: &str| first.ok(&["swarm", "join-token", "-q", role]).trim().to_owned();
        let (manager, worker) = (token("manager"), token("worker"));
        let target = format!("{}:2377", first.addr());
        for (index, host) in self.hosts.iter().enumerate().skip(1) {
            let token = if index < managers { &manager } else { &worker };
            host.ok(&["swarm", "join", "--token", token, "--advertise-addr", host.addr(), &target]);
        }
        crate::wait_until("every node is ready", std::time::Duration::from_secs(20), || {
            let list = first.ok(&["node", "ls", "--format", "{{.Status}}"]);
            (list.lines().filter(|line| *line == "Ready").count() == self.hosts.len(), list)
        });
    }

    /// The names and pids of all containers that run, by what the hosts themselves say.
    #[must_use]
    pub fn running(&self) -> Vec<(String, i64)> {
        let mut all: Vec<_> = self.hosts().flat_map(Host::running).collect();
        all.sort();
        all
    }

    /// How many tasks run in each slot.
    #[must_use]
    pub fn per_slot(&self) -> BTreeMap<String, usize> {
        let mut slots = BTreeMap::new();
        for (name, _) in self.running() {
            let slot = name.rsplit_once('.').map_or_else(|| name.clone(), |(slot, _)| slot.to_owned());
            *slots.entry(slot).or_default() += 1;
        }
        slots
    }

    /// Waits until no host has any container.
    pub fn await_no_container(&self) {
        crate::wait_until("no container is left", crate::LIMIT, || {
            let left: Vec<String> = self.hosts().map(|host| host.ok(&["ps", "-a", "-q"])).collect();
            (left.iter().all(String::is_empty), left.concat())
        });
    }

    /// The manager that leads, as `asked` sees it.
    #[must_use]
    pub fn leader(&self, asked: usize) -> usize {
        let look = || {
            let list = self.host(asked).run(&["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"]);
            let leader =
                list.stdout.lines().find_map(|line| line.strip_suffix(" Leader")?.strip_prefix('n')?.parse().ok());
            leader.ok_or_else(|| format!("{list:?}"))
        };
        crate::wait_for("a leader", std::time::Duration::from_secs(20), look)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.hosts().for_each(Host::tell_log);
        }
        for pid in processes::naming(self.dir.path()) {
            // Gone already is just as well.
            let _ = kill(pid, Signal::SIGKILL);
        }
        processes::clear_cgroups(&self.cgroup);
        self.hosts.iter_mut().for_each(Host::release);
        let _ = self.switch.kill();
        let _ = self.switch.wait();
    }
}

/// A process that keeps namespaces alive.
fn hold(namespaces: &[&str]) -> Child {
    let mut child = Command::new("unshare")
        .args(namespaces)
        .args(["sh", "-c", "echo ready; exec sleep 86400"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare runs (package util-linux)");
    let mut ready = [0; 6];
    let mut stdout = child.stdout.take().expect("it is piped");
    std::io::Read::read_exact(&mut stdout, &mut ready).expect("namespaces can be made: this needs root");
    child
}

/// Runs a command inside the namespaces of `pid`.
pub(crate) fn enter(pid: u32, command: &[&str]) {
    let output = Command::new("nsenter")
        .args(["-t", &pid.to_string(), "-n", "-m", "-u"])
        .args(command)
        .output()
        .expect("nsenter runs (package util-linux)");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// For what may find its target gone.
pub(crate) fn signal_all(pids: &[Pid], signal: Signal) {
    for &pid in pids {
        let _ = kill(pid, signal);
    }
}
